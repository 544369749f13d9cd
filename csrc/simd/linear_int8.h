// What one instruction set offers to linear_int8.cpp.
#pragma once

#include "api/element_type.h"
#include "simd/table.h"

namespace simctg::int8 {

constexpr int64_t kPanel = 16;    // outputs that stand together
constexpr int64_t kQuad = 4;      // inputs that are multiplied in one go
constexpr int64_t kGroup = 64;    // inputs of a row of x with a factor of their own
constexpr int64_t kColumns = 64;  // outputs in a unit of work: whole panels

// Panels are [in_features / kQuad, kPanel, kQuad], 128 + q; the rest has an element an output.
struct Weight {
    uint8_t* panels;
    float* scales;
    float* errors;  // |h · w − what is computed in two digits| ≤ errors · ‖h‖
};

// x in integers. A row is [digits, quads · kQuad] of them, and [groups] of the rest. (What weights have too much is 128 times
// the sum of a group: processors multiply integers without a sign with those that have one.)
struct Rows {
    void* x;
    float* scales;      // NaN in a row that is not finite
    int32_t* excesses;  // [digits, groups], −128 · the sum
    float* norms;       // an element a row: at least its length. Or null
    int64_t count, quads, groups;
    int digits;
};

struct Call {
    Rows x;
    Weight weight;
    const void* bias;
    void* y;
    int64_t y_stride;
    ElementType bias_type, type;  // the latter of y
};

struct Kernels {
    int64_t element_bytes;  // of an integer of x

    // Rounds a row of `count` elements to 8 bits; or, where there are two digits, to 16 as 256 · the first + the second.
    void (*round)(ElementType type, const void* x, int64_t count, const Rows& rows, int64_t row);

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
