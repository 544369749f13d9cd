#include "simd/contrastive_loss_kernels.h"

namespace simctg {

#if defined(SIMCTG_FAST_X86_64)
const LossKernels& loss_kernels_avx512() { return kLossKernels; }
#endif
}  // namespace simctg
