// Normalisation of rows to mean 0 and variance 1, for a few rows.
#pragma once

#include <cstdint>

#include "api/element_type.h"

namespace simctg {

// y[r, i] = weight[i] · (x[r, i] − mean(x[r])) / sqrt(variance(x[r]) + epsilon) + bias[i], x and y contiguous
// [rows, width]; y may be x, bias null. All are of one type; it is computed in float32 and rounded once.
void layer_norm(const void* x, const void* weight, const void* bias, float epsilon, int64_t rows, int64_t width, void* y,
                int num_threads, ElementType type = ElementType::float32);

}  // namespace simctg
