// The tanh form of GELU in one pass; as separate tensor operations it costs as much as a small matrix product.
#pragma once

#include <cstdint>

namespace simctg {

// y[i] = x[i] / 2 · (1 + tanh(sqrt(2 / pi) · (x[i] + 0.044715 · x[i]^3))); y may be x.
void gelu_tanh(const float* x, float* y, int64_t count, int num_threads);

}  // namespace simctg
