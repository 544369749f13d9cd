#include "simd/crf_kernels.h"

namespace simctg {

const CrfKernels& crf_kernels_avx512() { return kKernels; }

}  // namespace simctg
