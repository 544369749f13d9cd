#include "simd/candidate_select_kernels.h"

namespace simctg {

const CandidateKernels& candidate_kernels_avx512() { return kCandidateKernels; }

}  // namespace simctg
