#include "simd/candidate_select_kernels.h"

namespace simctg {

const CandidateKernels& candidate_kernels_generic() { return kCandidateKernels; }

}  // namespace simctg
