#include "simd/crf_kernels.h"

namespace simctg {

const CrfKernels& crf_kernels_generic() { return kKernels; }

}  // namespace simctg
