// Linear layers whose weights are rounded to 8 bits, and their output layer, whose largest results are exact all the same.
//
// Output n has the weights q[n, k] · scales[n], q in −127 … 127; 64 elements of a row of x are rounded together likewise, by
// the largest of them. Sums are exact integers within these, and of float32 beyond.
#pragma once

#include "api/linear.h"

namespace simctg {

// Bytes of such a copy.
int64_t int8_linear_size(int64_t in_features, int64_t out_features);

// Makes the copy from a weight of any type that lies as `from` says, panels excepted. `copy`, int8_linear_size bytes, has to be
// aligned to 64. False: the weight is not finite, and the copy of no use. Throws std::invalid_argument on sizes out of range.
bool quantize_linear(const void* weight, ElementType type, int64_t weight_stride, WeightLayout from, int64_t in_features,
                     int64_t out_features, void* copy, int num_threads);

// linear() with WeightLayout::int8, where `call.weight` is the copy. A row that is not finite gives NaN.
void int8_linear(const Linear& call, int num_threads);

// linear() with WeightLayout::rows_are_outputs, of which every result that may be among the `top` largest of its row is
// what that computes, bit by bit, and the others are those of `copy`, and smaller than all these: bounds of what rounding
// can do choose whom to compute. Results are therefore in their order as far as the `top`-th, up to equal ones.
void certified_linear(const Linear& call, const void* copy, int64_t top, int num_threads);

}  // namespace simctg
