// Single results of a linear layer, for who knows which of them matter.
#pragma once

#include <cstdint>

#include "api/linear.h"

namespace simctg {

struct Element {
    int64_t row;
    int32_t column;
};

// y[row, column] = what linear() with WeightLayout::rows_are_outputs computes there, in float32 and not yet rounded, with the
// same bits; y has rows of y_stride.
void linear_elements(const Linear& call, const Element* elements, int64_t count, float* y, int64_t y_stride, int num_threads);

// Rounds y to the call's type, into the call's y.
void narrow_rows(const Linear& call, const float* y, int64_t y_stride, int num_threads);

}  // namespace simctg
