// Dot products of a few rows with many: the scores of attention, the cosines of candidate selection.
#pragma once

#include "simd.h"

namespace simctg {
namespace {

constexpr int kDotTileRows = 4;

// Columns that are worked on together with so many rows.
constexpr int dot_tile_columns(int rows) { return (kLanes == 16 ? 16 : 8) / (rows == 3 ? 4 : rows); }

template <int Rows, int Columns>
SIMCTG_INLINE void dot_tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t dim, float* out,
                            int64_t out_stride) {
    Vec acc[Rows * Columns];
#pragma GCC unroll 16
    for (int i = 0; i < Rows * Columns; ++i) acc[i] = zeros();
    const auto step = [&](int64_t d, const auto& get) {
        Vec x[Rows];
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) x[r] = get(a + r * a_stride + d);
#pragma GCC unroll 16
        for (int c = 0; c < Columns; ++c) {
            const Vec y = get(b + c * b_stride + d);
#pragma GCC unroll 4
            for (int r = 0; r < Rows; ++r) acc[r * Columns + c] = multiply_add(x[r], y, acc[r * Columns + c]);
        }
    };
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) step(d, [](const float* p) SIMCTG_INLINE_LAMBDA { return load(p); });
    if (d < dim) {
        const Mask mask = first_lanes(dim - d);
        step(d, [mask](const float* p) SIMCTG_INLINE_LAMBDA { return load(p, mask); });
    }
    float sums[Rows * Columns];
    sum_all<Rows * Columns>(acc, sums);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) __builtin_memcpy(out + r * out_stride, sums + r * Columns, Columns * sizeof(float));
}

// out[r, j] = a_r · b_j for `count` rows b_j. Each value is summed in one order, whatever tile it falls in.
template <int Rows>
void dot_block(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t count, int64_t dim,
               float* out, int64_t out_stride) {
    constexpr int columns = dot_tile_columns(Rows);
    int64_t j = 0;
    for (; j + columns <= count; j += columns) {
        dot_tile<Rows, columns>(a, a_stride, b + j * b_stride, b_stride, dim, out + j, out_stride);
    }
    for (; j < count; ++j) dot_tile<Rows, 1>(a, a_stride, b + j * b_stride, b_stride, dim, out + j, out_stride);
}

SIMCTG_INLINE void dot_block(int rows, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                             int64_t count, int64_t dim, float* out, int64_t out_stride) {
    switch (rows) {
        case 1: return dot_block<1>(a, a_stride, b, b_stride, count, dim, out, out_stride);
        case 2: return dot_block<2>(a, a_stride, b, b_stride, count, dim, out, out_stride);
        case 3: return dot_block<3>(a, a_stride, b, b_stride, count, dim, out, out_stride);
        default: return dot_block<4>(a, a_stride, b, b_stride, count, dim, out, out_stride);
    }
}

}  // namespace
}  // namespace simctg
