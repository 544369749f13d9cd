#include "simd/decode_attention_kernels.h"

namespace simctg {

const AttentionKernels& attention_kernels_generic() { return kAttentionKernels; }

}  // namespace simctg
