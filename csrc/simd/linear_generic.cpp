#include "simd/linear_kernels.h"

namespace simctg {

const LinearKernels& linear_kernels_generic() { return kLinearKernels; }

}  // namespace simctg
