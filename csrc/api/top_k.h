// The k most probable tokens of a row of logits, without the softmax over the vocabulary.
#pragma once

#include <cstdint>

namespace simctg {

// All contiguous: logits [rows, count], probs and tokens [rows, k], 1 <= k <= count. Probabilities fall; of equal logits
// the earlier token comes first. A row without probabilities (NaN, +inf, or nothing but -inf) has NaN for each.
void top_k_probs(const float* logits, int64_t rows, int64_t count, int64_t k, float* probs, int64_t* tokens,
                 int num_threads);

}  // namespace simctg
