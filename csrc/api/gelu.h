// The tanh form of GELU in one pass; as separate tensor operations it costs as much as a small matrix product.
#pragma once

#include <cstdint>

#include "api/element_type.h"

namespace simctg {

// y[i] = x[i] / 2 · (1 + tanh(sqrt(2 / pi) · (x[i] + 0.044715 · x[i]^3))); y may be x. Both are of
// one type; it is computed in float32 and rounded once.
void gelu_tanh(const void* x, void* y, int64_t count, int num_threads, ElementType type = ElementType::float32);

}  // namespace simctg
