#include "simd/decode_attention_kernels.h"

namespace simctg {

const AttentionKernels& attention_kernels_avx512() { return kAttentionKernels; }

}  // namespace simctg
