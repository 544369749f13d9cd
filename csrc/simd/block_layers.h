// What one instruction set offers to block_layers.cpp: what is done element by element, in float32, and rounded once. The
// arrays are of one type; `begin` counts elements, or rows.
#pragma once

#include <cstdint>

#include "api/element_type.h"
#include "simd/table.h"

namespace simctg::block {

struct Kernels {
    void (*silu)(ElementType type, void* y, int64_t begin, int64_t count);  // y / (1 + exp(−y))
    void (*relu)(ElementType type, void* y, int64_t begin, int64_t count);
    void (*multiply)(ElementType type, void* y, const void* x, int64_t begin, int64_t count);
    void (*add)(ElementType type, void* y, const void* x, int64_t begin, int64_t count);

    // Of rows y [heads, width], each head's halves (a, b) become (a · cos − b · sin, b · cos + a · sin). cos and sin are
    // [width], `stride` apart from row to row.
    void (*rotate)(ElementType type, void* y, const void* cos, const void* sin, int64_t stride, int64_t begin, int64_t rows,
                   int64_t heads, int64_t width);
};

}  // namespace simctg::block

SIMCTG_TABLES(block::Kernels)
