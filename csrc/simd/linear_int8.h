// What one instruction set offers to linear_int8.cpp.
#pragma once

#include "api/element_type.h"
#include "simd/table.h"

namespace simctg::int8 {

constexpr int64_t kPanel = 16;  // outputs that stand together
constexpr int64_t kQuad = 4;    // inputs that are multiplied in one go
constexpr int64_t kColumns = 64;  // outputs in a unit of work: whole panels

// Panels are [in_features / kQuad, kPanel, kQuad], and filled up with zeros; the rest has an element an output.
struct Weight {
    int8_t* panels;
    float* scales;
    int32_t* sums;   // of q, over the inputs
    float* errors;   // |h · w − what is computed in two digits| ≤ errors · ‖h‖
};

struct RoundedRow {
    float scale;  // NaN: the row is not finite
    float norm;   // at least its length
};

struct Call {
    const void* x;  // [rows · digits, quads · kQuad], rounded
    const float* x_scales;
    Weight weight;
    const void* bias;
    void* y;
    int64_t y_stride;
    int64_t rows, quads, out_features;
    int digits;
    ElementType bias_type, type;  // the latter of y
};

struct Kernels {
    int64_t element_bytes;  // of an element of x, rounded

    // Rounds a row to 8 bits; or, where `digits` is 2, to 16 as 256 · the first row of `q` + the second, `stride` elements
    // behind. Elements from `count` to `stride` are whatever is multiplied by zeros.
    RoundedRow (*round)(ElementType type, const void* x, int64_t count, int digits, int64_t stride, void* q);

    // begin is a multiple of kPanel, end as well unless the row ends there.
    void (*columns)(const Call& call, int64_t begin, int64_t end);

    // The weights of a panel, `count` of its outputs, from element (n, k) at n · n_stride + k · k_stride. False: not finite.
    bool (*quantize)(ElementType type, const void* w, int64_t n_stride, int64_t k_stride, int64_t in_features, int64_t count,
                     const Weight& panel);

    // Of a row of results, the numbers of those that may be among the `top` largest, `length` being that of x's row;
    // `values` [top] is scratch. How many.
    int64_t (*contenders)(const float* y, const float* errors, float length, int64_t count, int64_t top, float* values,
                          int32_t* found);
};

}  // namespace simctg::int8

SIMCTG_EXTENDED_TABLES(int8::Kernels, Isa::avx512_bf16, Isa::avx512_vnni, Isa::avx2_vnni)
