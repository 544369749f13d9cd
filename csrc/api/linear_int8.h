// Linear layers whose weights are rounded to 8 bits, and their output layer, whose largest results are exact all the same.
//
// Output n has the weights q[n, k] · scales[n], q in −127 … 127; a row of x is rounded likewise, by its largest element. Sums
// are exact integers.
#pragma once

#include "api/linear.h"

namespace simctg {

// Bytes of such a copy, and the inputs up to which its sums fit in 32 bits.
int64_t int8_linear_size(int64_t in_features, int64_t out_features);
constexpr int64_t kMostInt8Inputs = 65536;

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
