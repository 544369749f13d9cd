// Dot products of a few rows with many: the scores of attention, the cosines of candidate selection.
#pragma once

#include "simd/element.h"

namespace simctg::dots {
namespace {

using namespace simd;

constexpr int kDotTileRows = 4;

// Columns that are worked on together with so many rows.
constexpr int dot_tile_columns(int rows) {
    if (kRegisters == 32) return 16 / (rows == 3 ? 4 : rows);
    return rows == 1 ? 8 : 12 / rows;  // twelve sums, and what they are made of
}

template <class E>
constexpr int64_t kLineElements = 64 / sizeof(E);  // of a cache line

// Rows to be fetched while others are worked on, the j-th beside the j-th. Null: none.
template <class E>
struct Ahead {
    const E* rows;
    int64_t stride;

    // Short rows are asked for one after the other: in that order the hardware's own prefetching joins in.
    SIMCTG_INLINE void fetch(int64_t count, int64_t length) const {
        for (int64_t j = 0; j < count; ++j) {
            for (int64_t d = 0; d < length; d += kLineElements<E>) prefetch_l2(rows + j * stride + d);
        }
    }
};

constexpr int64_t kShortRow = 1024;  // bytes; longer rows are asked for a line each at a time, while the products are taken

// Elements of 16 bits are widened as they are loaded (simd::Along), those of b once for all rows of a.
template <int Rows, int Columns, class A, class B>
SIMCTG_INLINE void dot_tile(const A* a, int64_t a_stride, const B* b, int64_t b_stride, int64_t dim, float* out,
                            int64_t out_stride, Ahead<B> ahead = {}) {
    Vec acc[Rows * Columns];
#pragma GCC unroll 16
    for (int i = 0; i < Rows * Columns; ++i) acc[i] = zeros();
    using Dot = Along<A>;
    constexpr int64_t wide = Dot::kStep;
    const auto step = [&](int64_t d, auto... rest) SIMCTG_INLINE_LAMBDA {
        decltype(Dot::get(a)) x[Rows];
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) x[r] = Dot::get(a + r * a_stride + d, rest...);
#pragma GCC unroll 16
        for (int c = 0; c < Columns; ++c) {
            const auto y = in_register(Dot::get(b + c * b_stride + d, rest...));
#pragma GCC unroll 4
            for (int r = 0; r < Rows; ++r) acc[r * Columns + c] = Dot::multiply_add(x[r], y, acc[r * Columns + c]);
        }
    };
    int64_t d = 0;
    if (ahead.rows) {
        constexpr int64_t asked = kLanes * static_cast<int64_t>(sizeof(float) / sizeof(B));  // elements to a request
        for (; d + asked <= dim; d += asked) {
#pragma GCC unroll 16
            for (int c = 0; c < Columns; ++c) prefetch_l2(ahead.rows + c * ahead.stride + d);
#pragma GCC unroll 2
            for (int64_t i = 0; i < asked; i += wide) step(d + i);
        }
    }
    for (; d + wide <= dim; d += wide) step(d);
    if (d < dim) step(d, Dot::rest(dim - d));
    float sums[Rows * Columns];
    sum_all<Rows * Columns>(acc, sums);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) __builtin_memcpy(out + r * out_stride, sums + r * Columns, Columns * sizeof(float));
}

// out[r, j] = a_r · b_j for `count` rows b_j. Each value is summed in one order, whatever tile it falls in.
template <int Rows, class A, class B>
void dot_block(const A* a, int64_t a_stride, const B* b, int64_t b_stride, int64_t count, int64_t dim, float* out,
               int64_t out_stride, Ahead<B> ahead) {
    constexpr int columns = dot_tile_columns(Rows);
    int64_t j = 0;
    for (; j + columns <= count; j += columns) {
        const bool short_rows = dim * static_cast<int64_t>(sizeof(B)) <= kShortRow;
        if (ahead.rows && short_rows) ahead.fetch(columns, dim);
        dot_tile<Rows, columns>(a, a_stride, b + j * b_stride, b_stride, dim, out + j, out_stride,
                                short_rows ? Ahead<B>{} : ahead);
        if (ahead.rows) ahead.rows += columns * ahead.stride;
    }
    for (; j < count; ++j) dot_tile<Rows, 1>(a, a_stride, b + j * b_stride, b_stride, dim, out + j, out_stride);
}

template <class A, class B>
SIMCTG_INLINE void dot_block(int rows, const A* a, int64_t a_stride, const B* b, int64_t b_stride, int64_t count,
                             int64_t dim, float* out, int64_t out_stride, Ahead<B> ahead) {
    switch (rows) {
        case 1: return dot_block<1>(a, a_stride, b, b_stride, count, dim, out, out_stride, ahead);
        case 2: return dot_block<2>(a, a_stride, b, b_stride, count, dim, out, out_stride, ahead);
        case 3: return dot_block<3>(a, a_stride, b, b_stride, count, dim, out, out_stride, ahead);
        default: return dot_block<4>(a, a_stride, b, b_stride, count, dim, out, out_stride, ahead);
    }
}

}  // namespace
}  // namespace simctg::dots
