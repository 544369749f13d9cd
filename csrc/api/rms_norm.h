// Root mean square normalisation in one pass; as separate tensor operations it costs as much as a small matrix product.
#pragma once

#include <cstdint>

#include "api/element_type.h"

namespace simctg {

// y[r, i] = weight[i] · x[r, i] / sqrt(mean(x[r]²) + epsilon), x and y contiguous [rows, width]; y may be x. All three
// are of one type; it is computed in float32 and rounded once.
void rms_norm(const void* x, const void* weight, float epsilon, int64_t rows, int64_t width, void* y, int num_threads,
              ElementType type = ElementType::float32);

}  // namespace simctg
