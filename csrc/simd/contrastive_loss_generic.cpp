#include "simd/contrastive_loss_kernels.h"

namespace simctg {


const LossKernels& loss_kernels_generic() { return kLossKernels; }

}  // namespace simctg
