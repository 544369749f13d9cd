#include "simd/top_k_kernels.h"

namespace simctg {

void top_k_row_avx2(const float* logits, int64_t count, int64_t k, float* groups, float* probs, int64_t* tokens) {
    top_k_row(logits, count, k, groups, probs, tokens);
}

}  // namespace simctg
