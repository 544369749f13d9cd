#include "simd/linear_kernels.h"

namespace simctg {

const LinearKernels& linear_kernels_avx512() { return kLinearKernels; }

}  // namespace simctg
