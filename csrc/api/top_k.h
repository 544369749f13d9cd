// The k most probable tokens of a row of logits, without the softmax over the vocabulary.
#pragma once

#include <cstdint>

namespace simctg {

// All contiguous: logits [rows, count], probs and tokens [rows, k], 1 <= k <= count. Probabilities fall; of equal logits
// the earlier token comes first. A row without probabilities (NaN, +inf, or nothing but -inf) has NaN for each.
void top_k_probs(const float* logits, int64_t rows, int64_t count, int64_t k, float* probs, int64_t* tokens,
                 int num_threads);

// One row; `groups` [ceil(count / kTopKGroup)] is scratch.
constexpr int64_t kTopKGroup = 256;
using TopKRow = void (*)(const float* logits, int64_t count, int64_t k, float* groups, float* probs, int64_t* tokens);

void top_k_row_generic(const float* logits, int64_t count, int64_t k, float* groups, float* probs, int64_t* tokens);
#if defined(SIMCTG_FAST_X86_64)
void top_k_row_avx2(const float* logits, int64_t count, int64_t k, float* groups, float* probs, int64_t* tokens);
void top_k_row_avx512(const float* logits, int64_t count, int64_t k, float* groups, float* probs, int64_t* tokens);
#endif

}  // namespace simctg
