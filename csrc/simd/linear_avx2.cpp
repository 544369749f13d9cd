#include "simd/linear_kernels.h"

namespace simctg {

const LinearKernels& linear_kernels_avx2() { return kLinearKernels; }

}  // namespace simctg
