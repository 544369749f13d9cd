// The tiles of y = x · W + b, for any types of x and W; linear.cpp and linear_narrow.cpp instantiate them.
//
// Floor: W is read once, 4 bytes a weight, for up to a dozen rows of x; beyond that rows · in · out multiply-adds. Layout of
// W: three, see api/linear.h; a panel is [in_features][kPanelWidth].
//
// The layout alone fixes the order in which an element of y is summed, so tiles can be chosen for speed:
//   rows_are_outputs         lane l of one vector takes k = l, l + kLanes, …; the lanes are added up at the end
//   rows_are_inputs, panels  k in order within chunks of kChunk, the chunks added up in order
//
// What limits speed is reading the weight. A core has a dozen line fills under way at most, so every line is asked for
// one tile ahead, and where several row tiles read one weight tile they share the asking. Rows of the weight are walked
// over their full length where the layout allows, because the hardware's own prefetching runs on past the end of a piece.
#pragma once

#include "simd/element.h"
#include "simd/linear.h"

namespace simctg::linear_layer {
namespace {

using namespace simd;

constexpr int64_t kLineBytes = 64, kLineFloats = 16;
constexpr int64_t kPanelWidth = (kRegisters == 32 ? 4 : 2) * kLanes;  // a register tile

// Tile `index` when `rows` are cut into `tiles` of nearly equal height.
struct RowTile {
    int64_t begin;
    int count;
    RowTile(int64_t rows, int64_t tiles, int64_t index)
        : begin(rows * index / tiles), count(static_cast<int>(rows * (index + 1) / tiles - begin)) {}
};

// ---- rows_are_outputs: y[m, n] is the dot product of two contiguous rows --------------------------------------------

constexpr int kDotRows = kRegisters == 32 ? 4 : 2;  // rows of x in a register tile, at most
constexpr int kDotColumns = 6;                      // rows of the weight in a register tile
constexpr int kDotColumnsFew = 8;                   // the same for calls of less than kDotRows rows
constexpr int kDotColumnsWide = 3;                  // the same where up to twice as many rows share what is widened
constexpr bool dot_fits(int rows, int columns) { return rows <= kDotRows || rows * columns <= kDotRows * kDotColumns; }
// k's in a pass where row tiles share a weight tile: it stays in the first cache, widened or as it is.
template <class X, class Weight>
constexpr int64_t kDotBlock = sizeof(Weight) < sizeof(X) ? 512 : 1024;
constexpr int64_t kDotTiles = 64 / kDotRows;  // row tiles in a pass: kDotSums holds the partial sums of all

// Whether several row tiles share a copy of a weight tile that has been widened once.
template <class X, class Weight>
constexpr bool kWidens = sizeof(Weight) < sizeof(X);

template <class X, class Weight>
struct DotStep {
    const X* x;
    int64_t x_stride;
    const Weight* w;
    int64_t w_stride;
    int64_t count;        // k's
    const Weight* ahead;  // weight rows to fetch meanwhile, w_stride apart
    Vec* sums;            // [Rows, Columns], carried from one block of k's to the next
    bool first, last;     // blocks
    float* y;
    int64_t y_stride;
    const float* bias;
};

template <int Rows, int Columns, class X, class Weight, class... Rest>
SIMCTG_INLINE void dot_multiply(const X* x, int64_t x_stride, const Weight* w, int64_t w_stride, Vec* acc, Rest... rest) {
    using Dot = Along<X>;
    decltype(Dot::get(x)) a[Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) a[r] = Dot::get(x + r * x_stride, rest...);
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c) {
        const auto b = in_register(Dot::get(w + c * w_stride, rest...));
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) acc[r * Columns + c] = Dot::multiply_add(a[r], b, acc[r * Columns + c]);
    }
}

template <int Rows, int Columns, int Ahead, class X, class Weight>
void dot_step(const DotStep<X, Weight>& step) {
    constexpr int64_t wide = Along<X>::kStep;
    const int64_t x_stride = step.x_stride, w_stride = step.w_stride, count = step.count;
    const X* x = step.x;
    const Weight *w = step.w, *ahead = step.ahead;
    Vec acc[Rows * Columns];
#pragma GCC unroll 32
    for (int i = 0; i < Rows * Columns; ++i) acc[i] = step.first ? zeros() : step.sums[i];
    int64_t k = 0;
    for (; k + wide <= count; k += wide) {
#pragma GCC unroll 8
        for (int c = 0; c < Ahead; ++c) prefetch_l2(ahead + c * w_stride + k);
        dot_multiply<Rows, Columns>(x + k, x_stride, w + k, w_stride, acc);
    }
    if (k < count) dot_multiply<Rows, Columns>(x + k, x_stride, w + k, w_stride, acc, Along<X>::rest(count - k));
    if (!step.last) {
#pragma GCC unroll 32
        for (int i = 0; i < Rows * Columns; ++i) step.sums[i] = acc[i];
        return;
    }
    float sums[Rows * Columns];
    sum_all<Rows * Columns>(acc, sums);
    for (int c = 0; c < Columns; ++c) {
        const float bias = step.bias ? step.bias[c] : 0.0f;
        for (int r = 0; r < Rows; ++r) step.y[r * step.y_stride + c] = sums[r * Columns + c] + bias;
    }
}

template <int Columns, int Ahead, class X, class Weight>
SIMCTG_INLINE void dot_step(int rows, const DotStep<X, Weight>& step) {
    switch (rows) {
        case 1: return dot_step<1, Columns, Ahead>(step);
        case 2: return dot_step<2, Columns, Ahead>(step);
        case 3: if constexpr (dot_fits(3, Columns)) return dot_step<3, Columns, Ahead>(step); break;
        case 4: if constexpr (dot_fits(4, Columns)) return dot_step<4, Columns, Ahead>(step); break;
    }
}

// A pass: the row tiles first..last-1 of `tiles`.
struct DotPass {
    int64_t tiles, first, last;
    int64_t count() const { return last - first; }
};

// The block k..k+count-1 of Columns columns for all rows of a pass; meanwhile the weight rows from `ahead` on, if there
// are any, are fetched.
template <int Columns, class X, class Weight>
void dot_columns(const Product<X, Weight>& call, const DotPass& pass, int64_t column, int64_t k, int64_t count,
                 const Weight* ahead, Vec* sums) {
    constexpr int third = (Columns + 2) / 3, half = (Columns + 1) / 2;
    const int64_t tiles = pass.count(), stride = call.weight_stride;
    const Weight* w = call.weight + column * stride + k;
    const auto step_of = [&](auto* step, int64_t tile) SIMCTG_INLINE_LAMBDA {
        const RowTile rows(call.rows, pass.tiles, pass.first + tile);
        step->x = call.x + rows.begin * call.x_stride + k;
        step->x_stride = call.x_stride;
        step->count = count;
        step->ahead = nullptr;
        step->sums = sums + tile * kDotRows * Columns;
        step->first = k == 0;
        step->last = k + count == call.in_features;
        step->y = call.y + rows.begin * call.y_stride + column;
        step->y_stride = call.y_stride;
        step->bias = call.bias ? call.bias + column : nullptr;
        return rows.count;
    };
    if constexpr (kWidens<X, Weight> && Columns > 1) {
        if (tiles > 1) {
            constexpr int64_t width = kDotBlock<X, Weight>;
            float wide[Columns * width];
            for (int c = 0; c < Columns; ++c) {
                for (int64_t i = 0; ahead && i < count; i += kLineBytes / int64_t{sizeof(Weight)}) {
                    prefetch_l2(ahead + c * stride + i);
                }
                widen_array(w + c * stride, count, wide + c * width);
            }
            for (int64_t tile = 0; tile < tiles; ++tile) {
                DotStep<float, float> step;
                const int rows = step_of(&step, tile);
                step.w = wide;
                step.w_stride = width;
                dot_step<Columns, 0>(rows, step);
            }
            return;
        }
    }
    const int64_t share = tiles == 1 ? Columns : tiles == 2 ? half : tiles < 6 ? third : 1;
    for (int64_t tile = 0; tile < tiles; ++tile) {
        DotStep<X, Weight> step;
        const int rows = step_of(&step, tile);
        step.w = w;
        step.w_stride = stride;
        const int64_t fetched = tile * share;  // weight rows that earlier tiles have asked for
        if (ahead == nullptr || fetched + share > Columns) {
            dot_step<Columns, 0>(rows, step);
            continue;
        }
        step.ahead = ahead + fetched * stride;
        if (tiles == 1) dot_step<Columns, Columns>(rows, step);
        else if (tiles == 2) dot_step<Columns, half>(rows, step);
        else if (tiles < 6) dot_step<Columns, third>(rows, step);
        else dot_step<Columns, 1>(rows, step);
    }
}

// Where a weight row is longer than a block, the sums of many columns are carried from block to block, so that a block of
// x is read for all of them while it is in the cache.
template <int Columns, class X, class Weight>
void dot_pass(const Product<X, Weight>& call, const DotPass& pass, int64_t begin, int64_t end, Vec* sums) {
    const Weight* w = call.weight;
    const int64_t stride = call.weight_stride, in_features = call.in_features;
    const int64_t block = pass.tiles > 1 ? smaller(kDotBlock<X, Weight>, in_features) : in_features;
    const int64_t tile_sums = pass.count() * kDotRows * Columns;
    const int64_t wide = block < in_features ? kDotSums / kLanes / tile_sums * Columns : Columns;
    const int64_t whole = end - (end - begin) % Columns;
    for (int64_t first = begin; first < whole; first += wide) {
        const int64_t last = smaller(first + wide, whole);
        for (int64_t k = 0; k < in_features; k += block) {
            const int64_t count = smaller(block, in_features - k);
            for (int64_t n = first; n < last; n += Columns) {
                const Weight* ahead = w + (n + Columns) * stride + k;
                if (n + Columns == last) {
                    if (k + count < in_features) ahead = w + first * stride + k + count;
                    else ahead = last < whole ? w + last * stride : nullptr;
                }
                dot_columns<Columns>(call, pass, n, k, count, ahead, sums + (n - first) / Columns * tile_sums);
            }
        }
    }
    for (int64_t n = whole; n < end; ++n) {
        for (int64_t k = 0; k < in_features; k += block) {
            dot_columns<1>(call, pass, n, k, smaller(block, in_features - k), static_cast<const Weight*>(nullptr), sums);
        }
    }
}

template <class X, class Weight>
void rows_are_outputs(const Product<X, Weight>& call, int64_t begin, int64_t end, float* sums) {
    Vec* partial = reinterpret_cast<Vec*>(sums);
    if (call.rows < kDotRows) return dot_pass<kDotColumnsFew>(call, {1, 0, 1}, begin, end, partial);
    if constexpr (kWidens<X, Weight> && kRegisters == 16) {
        const bool one_tile = call.rows > kDotRows && call.rows <= 2 * kDotRows;
        if (one_tile) return dot_pass<kDotColumnsWide>(call, {1, 0, 1}, begin, end, partial);
    }
    const int64_t tiles = (call.rows + kDotRows - 1) / kDotRows, passes = (tiles + kDotTiles - 1) / kDotTiles;
    for (int64_t i = 0; i < passes; ++i) {
        dot_pass<kDotColumns>(call, {tiles, tiles * i / passes, tiles * (i + 1) / passes}, begin, end, partial);
    }
}

// ---- rows_are_inputs and panels: y[m, :] is a sum of weight rows, scaled by x[m, k] ---------------------------------

// Rows of x in a register tile, at most, where it is `vectors` wide.
constexpr int tile_rows(int vectors) {
    if (kRegisters == 32) return vectors == 4 ? 6 : 8;
    return vectors == 4 ? 2 : vectors == 2 ? 6 : 8;
}

constexpr int64_t kAxpyHeight = 32;    // k's, or pairs of them, in a piece of the weight, at most
constexpr int64_t kPageFloats = 1024;  // rows so far apart, or a multiple of it, meet in a few lines of the first cache

template <class X, class Weight>
struct AxpyStep {
    const X* x;
    int64_t x_stride;
    const Weight* w;
    int64_t w_stride;
    int64_t count;         // k's
    const char* ahead;     // weight to fetch meanwhile
    int64_t ahead_stride;  // bytes from one request to the next
    float* sums;         // carried from one step of a chunk to the next
    int64_t sums_stride;
    bool first;          // the chunk begins here
    float* y;            // null until the chunk ends here and is to be added to y
    int64_t y_stride;
    bool add;            // y holds earlier chunks
    const float* bias;   // to be added with the last chunk
};

struct LastOne {};  // of an odd number of k's

// How one or two k's are multiplied across the columns.
template <class X>
struct Across {
    using Copied = float;  // a weight in the copy of a piece that several row tiles read
    static constexpr int kDepth = 1;
    template <class Weight>
    static SIMCTG_INLINE Vec get(const Weight* p, int64_t, Mask mask, bool masked) { return masked ? load(p, mask) : load(p); }
    static SIMCTG_INLINE void put(float* p, Vec weights) { store(p, weights); }
    static SIMCTG_INLINE Vec all(const float* p) { return broadcast(*p); }
    static SIMCTG_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return simd::multiply_add(a, b, c); }
};

#if defined(__AVX512BF16__)
struct Pair {  // the weights of two rows, beside each other
    BFloat16 first, second;
};
template <>
struct Across<BFloat16> {
    using Copied = Pair;
    static constexpr int kDepth = 2;
    static SIMCTG_INLINE __m512i one(const BFloat16* p, Mask mask, bool masked) {
        return _mm512_cvtepu16_epi32(masked ? _mm256_maskz_loadu_epi16(mask, p) : _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static SIMCTG_INLINE __m512bh get(const BFloat16* p, int64_t stride, Mask mask, bool masked) {
        const __m512i second = _mm512_slli_epi32(one(p + stride, mask, masked), 16);
        return reinterpret_cast<__m512bh>(_mm512_or_si512(one(p, mask, masked), second));
    }
    static SIMCTG_INLINE __m512bh get(const BFloat16* p, int64_t, Mask mask, bool masked, LastOne) {
        return reinterpret_cast<__m512bh>(one(p, mask, masked));
    }
    template <class... Last>
    static SIMCTG_INLINE __m512bh get(const Pair* p, int64_t, Mask, bool, Last...) {
        return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p));
    }
    static SIMCTG_INLINE void put(Pair* p, __m512bh weights) { _mm512_storeu_si512(p, reinterpret_cast<__m512i>(weights)); }
    static SIMCTG_INLINE __m512bh all(const BFloat16* p) {
        int pair;
        __builtin_memcpy(&pair, p, sizeof pair);
        return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
    }
    static SIMCTG_INLINE __m512bh all(const BFloat16* p, LastOne) { return reinterpret_cast<__m512bh>(_mm512_set1_epi32(p->bits)); }
    static SIMCTG_INLINE Vec multiply_add(__m512bh a, __m512bh b, Vec c) { return _mm512_dpbf16_ps(c, a, b); }
};
#endif

// Asks for `Lines` lines of what is ahead every `Every` k's.
template <int Rows, int Vectors, int Lines, bool Masked, int Every, class X, class Weight>
void axpy_step(const AxpyStep<X, Weight>& step, Mask mask) {
    const auto get = [&](const float* p) { return Masked ? load(p, mask) : load(p); };
    const auto put = [&](float* p, Vec v) { Masked ? store(p, v, mask) : store(p, v); };
    const int64_t x_stride = step.x_stride, count = step.count;
    // Of a panel, the stride is known when this is compiled.
    const int64_t w_stride = Every > 1 ? Vectors * kLanes : step.w_stride;
    const X* x = step.x;
    const Weight* w = step.w;
    const char* ahead = step.ahead;
    Vec acc[Rows][Vectors];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) {
            acc[r][v] = step.first ? zeros() : get(step.sums + r * step.sums_stride + v * kLanes);
        }
    }
    using Axpy = Across<X>;
    constexpr int64_t depth = Axpy::kDepth;
    const auto multiply = [&](int64_t k, auto... rest) SIMCTG_INLINE_LAMBDA {
        decltype(Axpy::get(w, w_stride, Mask(), false)) b[Vectors];
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) {
            b[v] = in_register(Axpy::get(w + k * w_stride + v * kLanes, w_stride, mask, Masked, rest...));
        }
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
            const auto a = Axpy::all(x + r * x_stride + k, rest...);
#pragma GCC unroll 8
            for (int v = 0; v < Vectors; ++v) acc[r][v] = Axpy::multiply_add(a, b[v], acc[r][v]);
        }
    };
    int64_t k = 0;
    for (; k + Every * depth <= count; k += Every * depth, ahead += depth * step.ahead_stride) {
#pragma GCC unroll 8
        for (int64_t i = 0; i < depth; ++i) {
#pragma GCC unroll 8
            for (int line = 0; line < Lines; ++line) prefetch_l2(ahead + i * step.ahead_stride + line * kLineBytes);
        }
#pragma GCC unroll 8
        for (int64_t i = 0; i < Every; ++i) multiply(k + i * depth);
    }
    for (; Every > 1 && k < count; ++k) multiply(k);
    if constexpr (depth > 1) {
        if (k < count) multiply(k, LastOne());
    }
    if (step.y == nullptr) {
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
            for (int v = 0; v < Vectors; ++v) put(step.sums + r * step.sums_stride + v * kLanes, acc[r][v]);
        }
        return;
    }
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
        const Vec bias = step.bias ? get(step.bias + v * kLanes) : zeros();
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
            float* y = step.y + r * step.y_stride + v * kLanes;
            Vec total = step.add ? add(get(y), acc[r][v]) : acc[r][v];
            if (step.bias) total = add(total, bias);
            put(y, total);
        }
    }
}

template <int Vectors, int Lines, bool Masked, int Every = 1, class X, class Weight>
SIMCTG_INLINE void axpy_step(int rows, const AxpyStep<X, Weight>& step, Mask mask) {
    constexpr int most = tile_rows(Vectors);
    switch (rows) {
        case 1: return axpy_step<1, Vectors, Lines, Masked, Every>(step, mask);
        case 2: return axpy_step<2, Vectors, Lines, Masked, Every>(step, mask);
        case 3: if constexpr (most >= 3) return axpy_step<3, Vectors, Lines, Masked, Every>(step, mask); break;
        case 4: if constexpr (most >= 4) return axpy_step<4, Vectors, Lines, Masked, Every>(step, mask); break;
        case 5: if constexpr (most >= 5) return axpy_step<5, Vectors, Lines, Masked, Every>(step, mask); break;
        case 6: if constexpr (most >= 6) return axpy_step<6, Vectors, Lines, Masked, Every>(step, mask); break;
        case 7: if constexpr (most >= 7) return axpy_step<7, Vectors, Lines, Masked, Every>(step, mask); break;
        case 8: if constexpr (most >= 8) return axpy_step<8, Vectors, Lines, Masked, Every>(step, mask); break;
    }
}

// A piece of the weight against all rows of x, cut into tiles.
template <int Vectors, int Lines, bool Masked, class X, class Weight>
SIMCTG_INLINE void axpy_tiles(const AxpyStep<X, Weight>& step, int64_t rows, int64_t tiles, bool fetch, Mask mask) {
    for (int64_t index = 0; index < tiles; ++index) {
        const RowTile tile(rows, tiles, index);
        AxpyStep<X, Weight> part = step;
        part.x += tile.begin * step.x_stride;
        part.sums += tile.begin * step.sums_stride;
        if (part.y) part.y += tile.begin * step.y_stride;
        if (Masked || Lines == 0 || !fetch) {
            axpy_step<Vectors, 0, Masked>(tile.count, part, mask);
        } else if (tiles < Lines) {  // the first tile asks for everything
            if (index == 0) axpy_step<Vectors, Lines, Masked>(tile.count, part, mask);
            else axpy_step<Vectors, 0, Masked>(tile.count, part, mask);
        } else if (index < Lines) {
            part.ahead += index * kLineBytes;
            axpy_step<Vectors, (Lines > 0), Masked>(tile.count, part, mask);
        } else {
            axpy_step<Vectors, 0, Masked>(tile.count, part, mask);
        }
    }
}

// A piece of the weight, Vectors · kLanes wide and `step.count` rows high, against all rows of x. `step` describes the
// whole height of x. `fetch`: step.ahead is to be fetched. What several row tiles would widen or pair anew, or what would
// push each other out of the cache between two of them, is copied first.
template <int Vectors, bool Masked, class X, class Weight>
SIMCTG_INLINE void axpy_piece(const AxpyStep<X, Weight>& step, int64_t rows, bool fetch, Mask mask) {
    constexpr int64_t width = Vectors * kLanes;
    // A piece of half a line asks for it twice, which costs less than waiting for it.
    constexpr int64_t bytes = width * int64_t{sizeof(Weight)};
    constexpr int lines = static_cast<int>(bytes == kLineBytes / 2 ? 1 : bytes / kLineBytes);
    const int64_t tiles = (rows + tile_rows(Vectors) - 1) / tile_rows(Vectors);
    using Axpy = Across<X>;
    constexpr int64_t depth = Axpy::kDepth;
    constexpr bool prepares = kWidens<X, Weight> || depth > 1;
    if constexpr (!Masked && (prepares || kRegisters == 16)) {
        if (prepares ? tiles > 1 : tiles > 2 && step.w_stride % kPageFloats == 0) {
            typename Axpy::Copied copy[kAxpyHeight * width];
            const auto fill = [&](int64_t k, auto... last) SIMCTG_INLINE_LAMBDA {
#pragma GCC unroll 8
                for (int v = 0; v < Vectors; ++v) {
                    const Weight* w = step.w + k * step.w_stride + v * kLanes;
                    Axpy::put(copy + k / depth * width + v * kLanes, Axpy::get(w, step.w_stride, mask, false, last...));
                }
            };
            int64_t k = 0;
            for (; k + depth <= step.count; k += depth) fill(k);
            if constexpr (depth > 1) {
                if (k < step.count) fill(k, LastOne());
            }
            const AxpyStep<X, typename Axpy::Copied> copied{
                step.x,            step.x_stride, copy,             width / depth, step.count, step.ahead,
                step.ahead_stride, step.sums,     step.sums_stride, step.first,    step.y,     step.y_stride,
                step.add,          step.bias};
            return axpy_tiles<Vectors, lines, Masked>(copied, rows, tiles, fetch, mask);
        }
    }
    axpy_tiles<Vectors, lines, Masked>(step, rows, tiles, fetch, mask);
}

// Pieces from column `n` on, as wide as Vectors allows and then one vector at a time, up to column `end`.
// `at(n)` gives the step for a piece that begins at column n.
template <int Vectors, class At>
SIMCTG_INLINE void axpy_sweep(int64_t n, int64_t end, int64_t rows, bool fetch, const At& at) {
    for (; n + Vectors * kLanes <= end; n += Vectors * kLanes) {
        axpy_piece<Vectors, false>(at(n), rows, fetch, Mask());
    }
    for (; n < end; n += kLanes) {
        axpy_piece<1, true>(at(n), rows, false, first_lanes(smaller<int64_t>(kLanes, end - n)));
    }
}

// `Height` rows of the weight at a time, over their full length: few enough that they are still in the cache for the
// next row tile, enough that carrying `sums` does not count. `follows`: the weight goes on in memory after its last row.
template <int Vectors, int64_t Height, class X, class Weight>
void axpy_chunks(const Product<X, Weight>& call, int64_t begin, int64_t end, int64_t first_chunk, int64_t last_chunk, float* sums,
                 int64_t sums_stride, bool finish, bool follows) {
    static_assert(kChunk % Height == 0 && Height <= kAxpyHeight * Across<X>::kDepth, "a chunk is a whole number of steps");
    const int64_t stride = call.weight_stride, k_end = smaller(last_chunk * kChunk, call.in_features);
    for (int64_t k = first_chunk * kChunk; k < k_end; k += Height) {
        const int64_t chunk = k / kChunk, count = smaller(Height, k_end - k);
        const bool chunk_ends = (k + count) % kChunk == 0 || k + count == call.in_features;
        const bool to_y = finish && chunk_ends, last = k + count == call.in_features;
        float* chunk_sums = finish ? sums : sums + (chunk - first_chunk) * call.rows * sums_stride;
        const auto at = [&](int64_t n) {
            AxpyStep<X, Weight> step;
            step.x = call.x + k;
            step.x_stride = call.x_stride;
            step.w = call.weight + k * stride + n;
            step.w_stride = stride;
            step.count = count;
            step.ahead = reinterpret_cast<const char*>(step.w + count * stride);
            step.ahead_stride = stride * int64_t{sizeof(Weight)};
            step.sums = chunk_sums + (n - begin);
            step.sums_stride = sums_stride;
            step.first = k % kChunk == 0;
            step.y = to_y ? call.y + n : nullptr;
            step.y_stride = call.y_stride;
            step.add = chunk > 0;
            step.bias = to_y && last && call.bias ? call.bias + n : nullptr;
            return step;
        };
        axpy_sweep<Vectors>(begin, end, call.rows, follows || k + 2 * count <= k_end, at);
    }
}

template <class X, class Weight>
using AxpyChunks = void (*)(const Product<X, Weight>&, int64_t, int64_t, int64_t, int64_t, float*, int64_t, bool, bool);

template <class X, class Weight>
SIMCTG_INLINE AxpyChunks<X, Weight> axpy_for(int64_t rows) {
    constexpr int many = kRegisters == 32 ? 4 : 2;  // vectors in a tile for many rows
    constexpr int64_t depth = Across<X>::kDepth;
    if (rows <= tile_rows(4)) return axpy_chunks<4, 8, X, Weight>;
    if (rows <= 16) return axpy_chunks<2, 16 * depth, X, Weight>;
    if (rows <= 24) return axpy_chunks<2, 32, X, Weight>;
    return axpy_chunks<many, 32 * depth, X, Weight>;
}

template <class X, class Weight>
void rows_are_inputs(const Product<X, Weight>& call, int64_t begin, int64_t end, int64_t first_chunk, int64_t last_chunk,
                     float* sums, int64_t sums_stride, bool finish) {
    axpy_for<X, Weight>(call.rows)(call, begin, end, first_chunk, last_chunk, sums, sums_stride, finish, false);
}

template <class X, class Weight>
void add_chunks(const Product<X, Weight>& call, int64_t begin, int64_t end, int64_t chunks, const float* sums,
                int64_t sums_stride) {
    for (int64_t row = 0; row < call.rows; ++row) {
        for (int64_t n = begin; n < end; n += kLanes) {
            const Mask mask = first_lanes(smaller<int64_t>(kLanes, end - n));
            const float* part = sums + row * sums_stride + (n - begin);
            Vec total = load(part, mask);
            for (int64_t chunk = 1; chunk < chunks; ++chunk) {
                total = add(total, load(part + chunk * call.rows * sums_stride, mask));
            }
            if (call.bias) total = add(total, load(call.bias + n, mask));
            store_first(call.y + row * call.y_stride + n, total, end - n);
        }
    }
}

template <class X, class Weight>
constexpr InPlace<X, Weight> in_place() {
    return {rows_are_outputs<X, Weight>, rows_are_inputs<X, Weight>, add_chunks<X, Weight>};
}

}  // namespace
}  // namespace simctg::linear_layer
