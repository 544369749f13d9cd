// y = x · W + b for few rows of x: bound by reading W, which is read once, in place, whatever the number of rows.
#pragma once

#include <cstdint>

#include "api/element_type.h"

namespace simctg {

// Strides in elements. Row m of x begins at x + m · x_stride, row m of y at y + m · y_stride. `type` is of x, bias and y;
// `weight_type` is the same, or 16 bits wide where `type` is float32. Sums are taken in float32 and rounded once.
struct Linear {
    const void* x;
    int64_t x_stride;
    const void* weight;
    int64_t weight_stride;
    const void* bias;  // [out_features] or null
    void* y;
    int64_t y_stride;
    int64_t rows, in_features, out_features;
    ElementType type = ElementType::float32, weight_type = ElementType::float32;
};

// How the weight lies in memory.
enum class WeightLayout {
    rows_are_outputs,  // [out_features, in_features], torch.nn.Linear: row n begins at n · weight_stride
    rows_are_inputs,   // [in_features, out_features], GPT-2's Conv1D: row k begins at k · weight_stride
    panels,            // the copy that pack_linear makes, float32; weight_stride is not read
    int8,              // the copy that quantize_linear makes (linear_int8.h); likewise, nor is weight_type
};

// The result of a row depends on that row alone: neither on the other rows, nor on how many there are, nor on the number
// of threads. It does depend on the layout, which decides the order of the sums (panels sum as rows_are_inputs does), and
// on the instruction set. Throws std::invalid_argument on negative sizes and on a weight_stride or y_stride shorter than a
// row.
void linear(const Linear& call, WeightLayout layout, int num_threads);

// y = max(x, 0) · W + b, all float32, with the bits of linear() on max(x, 0) if W is finite: what is zero is not multiplied
// where most is. `x` may be overwritten.
void relu_linear(const Linear& call, WeightLayout layout, int num_threads);

// Floats in the packed copy of a weight.
int64_t packed_linear_size(int64_t in_features, int64_t out_features);

// Copies a weight that lies as `from` says into `packed`, best aligned to 64 bytes. Every float of it is written.
void pack_linear(const float* weight, int64_t weight_stride, WeightLayout from, int64_t in_features,
                 int64_t out_features, float* packed, int num_threads);

}  // namespace simctg
