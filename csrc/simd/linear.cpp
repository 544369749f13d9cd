// y = x · W + b for few rows of x.
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
#include "simd/linear.h"

#include "simd/simd.h"

namespace simctg::linear_layer {
namespace {

using namespace simd;

constexpr int64_t kLineFloats = 16;
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
constexpr int64_t kDotBlock = 1024;  // k's in a pass where row tiles share a weight tile: it stays in the first cache
constexpr int64_t kDotTiles = 64 / kDotRows;  // row tiles in a pass: kDotSums holds the partial sums of all

struct DotStep {
    const Linear* call;
    int64_t row, column;  // the tile of y
    int64_t k, count;     // the block of k's
    const float* ahead;   // weight rows to fetch meanwhile, weight_stride apart
    Vec* sums;            // [Rows, Columns], carried from one block of k's to the next
};

template <int Rows, int Columns>
SIMCTG_INLINE void dot_multiply(const float* x, int64_t x_stride, const float* w, int64_t w_stride, Mask mask,
                                bool whole, Vec* acc) {
    Vec a[Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) a[r] = whole ? load(x + r * x_stride) : load(x + r * x_stride, mask);
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c) {
        const Vec b = in_register(whole ? load(w + c * w_stride) : load(w + c * w_stride, mask));
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) acc[r * Columns + c] = multiply_add(a[r], b, acc[r * Columns + c]);
    }
}

template <int Rows, int Columns, int Ahead>
void dot_step(const DotStep& step) {
    const Linear& call = *step.call;
    const int64_t x_stride = call.x_stride, w_stride = call.weight_stride;
    const float* x = call.x + step.row * x_stride + step.k;
    const float* w = call.weight + step.column * w_stride + step.k;
    const float* ahead = step.ahead;
    Vec acc[Rows * Columns];
#pragma GCC unroll 32
    for (int i = 0; i < Rows * Columns; ++i) acc[i] = step.k > 0 ? step.sums[i] : zeros();
    const int64_t count = step.count;
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) {
#pragma GCC unroll 8
        for (int c = 0; c < Ahead; ++c) prefetch_l2(ahead + c * w_stride + k);
        dot_multiply<Rows, Columns>(x + k, x_stride, w + k, w_stride, Mask(), true, acc);
    }
    if (k < count) dot_multiply<Rows, Columns>(x + k, x_stride, w + k, w_stride, first_lanes(count - k), false, acc);
    if (step.k + count < call.in_features) {
#pragma GCC unroll 32
        for (int i = 0; i < Rows * Columns; ++i) step.sums[i] = acc[i];
        return;
    }
    float sums[Rows * Columns];
    sum_all<Rows * Columns>(acc, sums);
    float* y = call.y + step.row * call.y_stride + step.column;
    for (int c = 0; c < Columns; ++c) {
        const float bias = call.bias ? call.bias[step.column + c] : 0.0f;
        for (int r = 0; r < Rows; ++r) y[r * call.y_stride + c] = sums[r * Columns + c] + bias;
    }
}

template <int Columns, int Ahead>
SIMCTG_INLINE void dot_step(int rows, const DotStep& step) {
    switch (rows) {
        case 1: return dot_step<1, Columns, Ahead>(step);
        case 2: return dot_step<2, Columns, Ahead>(step);
        case 3: if constexpr (kDotRows >= 3) return dot_step<3, Columns, Ahead>(step); break;
        case 4: if constexpr (kDotRows >= 4) return dot_step<4, Columns, Ahead>(step); break;
    }
}

// A pass: the row tiles first..last-1 of `tiles`.
struct DotPass {
    int64_t tiles, first, last;
    int64_t count() const { return last - first; }
};

// The block k..k+count-1 of Columns columns for all rows of a pass; meanwhile the weight rows from `ahead` on, if there
// are any, are fetched.
template <int Columns>
void dot_columns(const Linear& call, const DotPass& pass, int64_t column, int64_t k, int64_t count, const float* ahead,
                 Vec* sums) {
    constexpr int third = (Columns + 2) / 3, half = (Columns + 1) / 2;
    const int64_t tiles = pass.count();
    const int64_t share = tiles == 1 ? Columns : tiles == 2 ? half : tiles < 6 ? third : 1;
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const RowTile rows(call.rows, pass.tiles, pass.first + tile);
        DotStep step{&call, rows.begin, column, k, count, nullptr, sums + tile * kDotRows * Columns};
        const int64_t fetched = tile * share;  // weight rows that earlier tiles have asked for
        if (ahead == nullptr || fetched + share > Columns) {
            dot_step<Columns, 0>(rows.count, step);
            continue;
        }
        step.ahead = ahead + fetched * call.weight_stride;
        if (tiles == 1) dot_step<Columns, Columns>(rows.count, step);
        else if (tiles == 2) dot_step<Columns, half>(rows.count, step);
        else if (tiles < 6) dot_step<Columns, third>(rows.count, step);
        else dot_step<Columns, 1>(rows.count, step);
    }
}

// Where a weight row is longer than a block, the sums of many columns are carried from block to block, so that a block of
// x is read for all of them while it is in the cache.
template <int Columns>
void dot_pass(const Linear& call, const DotPass& pass, int64_t begin, int64_t end, Vec* sums) {
    const float* w = call.weight;
    const int64_t stride = call.weight_stride, in_features = call.in_features;
    const int64_t block = pass.tiles > 1 ? smaller(kDotBlock, in_features) : in_features;
    const int64_t tile_sums = pass.count() * kDotRows * Columns;
    const int64_t wide = block < in_features ? kDotSums / kLanes / tile_sums * Columns : Columns;
    const int64_t whole = end - (end - begin) % Columns;
    for (int64_t first = begin; first < whole; first += wide) {
        const int64_t last = smaller(first + wide, whole);
        for (int64_t k = 0; k < in_features; k += block) {
            const int64_t count = smaller(block, in_features - k);
            for (int64_t n = first; n < last; n += Columns) {
                const float* ahead = w + (n + Columns) * stride + k;
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
            dot_columns<1>(call, pass, n, k, smaller(block, in_features - k), nullptr, sums);
        }
    }
}

void rows_are_outputs(const Linear& call, int64_t begin, int64_t end, float* sums) {
    Vec* partial = reinterpret_cast<Vec*>(sums);
    if (call.rows < kDotRows) return dot_pass<kDotColumnsFew>(call, {1, 0, 1}, begin, end, partial);
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

constexpr int64_t kAxpyHeight = 32;    // k's in a piece of the weight, at most
constexpr int64_t kPageFloats = 1024;  // rows so far apart, or a multiple of it, meet in a few lines of the first cache

struct AxpyStep {
    const float* x;
    int64_t x_stride;
    const float* w;
    int64_t w_stride;
    int64_t count;         // k's
    const float* ahead;    // weight to fetch meanwhile
    int64_t ahead_stride;  // from one request to the next
    float* sums;         // carried from one step of a chunk to the next
    int64_t sums_stride;
    bool first;          // the chunk begins here
    float* y;            // null until the chunk ends here and is to be added to y
    int64_t y_stride;
    bool add;            // y holds earlier chunks
    const float* bias;   // to be added with the last chunk
};

// Asks for `Lines` lines of what is ahead every `Every` k's.
template <int Rows, int Vectors, int Lines, bool Masked, int Every>
void axpy_step(const AxpyStep& step, Mask mask) {
    const auto get = [&](const float* p) { return Masked ? load(p, mask) : load(p); };
    const auto put = [&](float* p, Vec v) { Masked ? store(p, v, mask) : store(p, v); };
    const int64_t x_stride = step.x_stride, count = step.count;
    // Of a panel, the stride is known when this is compiled.
    const int64_t w_stride = Every > 1 ? Vectors * kLanes : step.w_stride;
    const float *x = step.x, *w = step.w, *ahead = step.ahead;
    Vec acc[Rows][Vectors];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) {
            acc[r][v] = step.first ? zeros() : get(step.sums + r * step.sums_stride + v * kLanes);
        }
    }
    const auto multiply = [&](int64_t k) __attribute__((always_inline)) {
        Vec b[Vectors];
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) b[v] = in_register(get(w + k * w_stride + v * kLanes));
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
            const Vec a = broadcast(x[r * x_stride + k]);
#pragma GCC unroll 8
            for (int v = 0; v < Vectors; ++v) acc[r][v] = multiply_add(a, b[v], acc[r][v]);
        }
    };
    int64_t k = 0;
    for (; k + Every <= count; k += Every, ahead += step.ahead_stride) {
#pragma GCC unroll 8
        for (int line = 0; line < Lines; ++line) prefetch_l2(ahead + line * kLineFloats);
#pragma GCC unroll 8
        for (int64_t i = 0; i < Every; ++i) multiply(k + i);
    }
    for (; Every > 1 && k < count; ++k) multiply(k);
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

template <int Vectors, int Lines, bool Masked, int Every = 1>
SIMCTG_INLINE void axpy_step(int rows, const AxpyStep& step, Mask mask) {
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

// A piece of the weight, Vectors · kLanes wide and `step.count` rows high, against all rows of x. `step` describes the
// whole height of x. `fetch`: step.ahead is to be fetched. Where its rows would push each other out of the cache between
// two row tiles, the piece is copied first.
template <int Vectors, bool Masked>
SIMCTG_INLINE void axpy_piece(AxpyStep step, int64_t rows, bool fetch, Mask mask) {
    constexpr int lines = static_cast<int>(Vectors * kLanes / kLineFloats);
    const int64_t tiles = (rows + tile_rows(Vectors) - 1) / tile_rows(Vectors);
    constexpr bool copies = kRegisters == 16 && !Masked;
    float copy[copies ? kAxpyHeight * Vectors * kLanes : 1];
    if constexpr (copies) {
        if (tiles > 2 && step.w_stride % kPageFloats == 0) {
            constexpr int64_t width = Vectors * kLanes;
            for (int64_t k = 0; k < step.count; ++k) {
#pragma GCC unroll 8
                for (int v = 0; v < Vectors; ++v) {
                    store(copy + k * width + v * kLanes, load(step.w + k * step.w_stride + v * kLanes));
                }
            }
            step.w = copy;
            step.w_stride = width;
        }
    }
    for (int64_t index = 0; index < tiles; ++index) {
        const RowTile tile(rows, tiles, index);
        AxpyStep part = step;
        part.x += tile.begin * step.x_stride;
        part.sums += tile.begin * step.sums_stride;
        if (part.y) part.y += tile.begin * step.y_stride;
        if (Masked || lines == 0 || !fetch) {
            axpy_step<Vectors, 0, Masked>(tile.count, part, mask);
        } else if (tiles < lines) {  // the first tile asks for everything
            if (index == 0) axpy_step<Vectors, lines, Masked>(tile.count, part, mask);
            else axpy_step<Vectors, 0, Masked>(tile.count, part, mask);
        } else if (index < lines) {
            part.ahead += index * kLineFloats;
            axpy_step<Vectors, (lines > 0), Masked>(tile.count, part, mask);
        } else {
            axpy_step<Vectors, 0, Masked>(tile.count, part, mask);
        }
    }
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
template <int Vectors, int64_t Height>
void axpy_chunks(const Linear& call, int64_t begin, int64_t end, int64_t first_chunk, int64_t last_chunk, float* sums,
                 int64_t sums_stride, bool finish, bool follows) {
    static_assert(kChunk % Height == 0 && Height <= kAxpyHeight, "a chunk is a whole number of steps");
    const int64_t stride = call.weight_stride, k_end = smaller(last_chunk * kChunk, call.in_features);
    for (int64_t k = first_chunk * kChunk; k < k_end; k += Height) {
        const int64_t chunk = k / kChunk, count = smaller(Height, k_end - k);
        const bool chunk_ends = (k + count) % kChunk == 0 || k + count == call.in_features;
        const bool to_y = finish && chunk_ends, last = k + count == call.in_features;
        float* chunk_sums = finish ? sums : sums + (chunk - first_chunk) * call.rows * sums_stride;
        const auto at = [&](int64_t n) {
            AxpyStep step;
            step.x = call.x + k;
            step.x_stride = call.x_stride;
            step.w = call.weight + k * stride + n;
            step.w_stride = stride;
            step.count = count;
            step.ahead = step.w + count * stride;
            step.ahead_stride = stride;
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

using AxpyChunks = void (*)(const Linear&, int64_t, int64_t, int64_t, int64_t, float*, int64_t, bool, bool);

SIMCTG_INLINE AxpyChunks axpy_for(int64_t rows) {
    constexpr int many = kRegisters == 32 ? 4 : 2;  // vectors in a tile for many rows
    if (rows <= tile_rows(4)) return axpy_chunks<4, 8>;
    if (rows <= 16) return axpy_chunks<2, 16>;
    if (rows <= 24) return axpy_chunks<2, 32>;
    return axpy_chunks<many, 32>;
}

void rows_are_inputs(const Linear& call, int64_t begin, int64_t end, int64_t first_chunk, int64_t last_chunk,
                     float* sums, int64_t sums_stride, bool finish) {
    axpy_for(call.rows)(call, begin, end, first_chunk, last_chunk, sums, sums_stride, finish, false);
}

void add_chunks(const Linear& call, int64_t begin, int64_t end, int64_t chunks, const float* sums,
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

// A panel against all rows of x, where registers are few: a block of it stays in the first cache while the row tiles pass
// by, and they share the asking for the next one.
constexpr int64_t kPanelBlock = 128;  // k's: 8 kB of a panel 16 wide, and 3 kB of x for a row tile
constexpr int64_t kPanelRows = 64;    // of x, for which all panels pass before the next: the second cache holds them
constexpr int kPanelEvery = 8;        // k's between two requests
static_assert(kChunk % kPanelBlock == 0, "a chunk is a whole number of blocks");

template <int Lines>
void panel_tiles(AxpyStep step, int64_t rows, int64_t tiles, bool fetch) {
    constexpr int vectors = static_cast<int>(kPanelWidth / kLanes);
    const AxpyStep whole = step;
    const int64_t lines = step.count * kPanelWidth / kLineFloats, share = step.count / kPanelEvery * Lines;
    step.ahead_stride = Lines * kLineFloats;
    for (int64_t index = 0; index < tiles; ++index) {
        const RowTile tile(rows, tiles, index);
        step.x = whole.x + tile.begin * whole.x_stride;
        step.sums = whole.sums + tile.begin * whole.sums_stride;
        if (whole.y) step.y = whole.y + tile.begin * whole.y_stride;
        step.ahead = whole.ahead + index * share * kLineFloats;
        if (fetch && index * share < lines) axpy_step<vectors, Lines, false, kPanelEvery>(tile.count, step, Mask());
        else axpy_step<vectors, 0, false, kPanelEvery>(tile.count, step, Mask());
    }
}

void panel_blocks(const Linear& call, int64_t begin, int64_t end, float* sums) {
    const int64_t most = tile_rows(static_cast<int>(kPanelWidth / kLanes)), tiles = (call.rows + most - 1) / most;
    for (int64_t n = begin; n < end; n += kPanelWidth) {
        for (int64_t k = 0; k < call.in_features; k += kPanelBlock) {
            const int64_t count = smaller(kPanelBlock, call.in_features - k);
            const bool last = k + count == call.in_features, chunk_ends = last || (k + count) % kChunk == 0;
            AxpyStep step{};
            step.x = call.x + k;
            step.x_stride = call.x_stride;
            step.w = call.weight + n * call.in_features + k * kPanelWidth;
            step.w_stride = kPanelWidth;
            step.count = count;
            step.ahead = step.w + count * kPanelWidth;  // panels follow one another
            step.sums = sums;
            step.sums_stride = kPanelWidth;
            step.first = k % kChunk == 0;
            step.y = chunk_ends ? call.y + n : nullptr;
            step.y_stride = call.y_stride;
            step.add = k >= kChunk;
            step.bias = last && call.bias ? call.bias + n : nullptr;
            const bool fetch = !last || n + kPanelWidth < end;
            if (n + kPanelWidth > end) {
                for (int64_t lane = 0; n + lane < end; lane += kLanes) {
                    AxpyStep part = step;
                    part.w += lane;
                    part.sums += lane;
                    if (part.y) part.y += lane;
                    if (part.bias) part.bias += lane;
                    axpy_piece<1, true>(part, call.rows, false, first_lanes(smaller<int64_t>(kLanes, end - n - lane)));
                }
            } else if (tiles == 1) {
                panel_tiles<8>(step, call.rows, tiles, fetch);
            } else if (tiles == 2) {
                panel_tiles<4>(step, call.rows, tiles, fetch);
            } else if (tiles == 3) {
                panel_tiles<3>(step, call.rows, tiles, fetch);
            } else if (tiles < 8) {
                panel_tiles<2>(step, call.rows, tiles, fetch);
            } else {
                panel_tiles<1>(step, call.rows, tiles, fetch);
            }
        }
    }
}

void panels(const Linear& call, int64_t begin, int64_t end, float* sums) {
    if constexpr (kRegisters < 32) {
        const int64_t parts = (call.rows + kPanelRows - 1) / kPanelRows;
        for (int64_t i = 0; i < parts; ++i) {
            const RowTile tile(call.rows, parts, i);
            Linear part = call;
            part.x += tile.begin * call.x_stride;
            part.y += tile.begin * call.y_stride;
            part.rows = tile.count;
            panel_blocks(part, begin, end, sums);
        }
        return;
    }
    const AxpyChunks run = axpy_for(call.rows);
    const int64_t chunks = (call.in_features + kChunk - 1) / kChunk;
    for (int64_t n = begin; n < end; n += kPanelWidth) {
        Linear panel = call;
        panel.weight = call.weight + n * call.in_features;
        panel.weight_stride = kPanelWidth;
        panel.bias = call.bias ? call.bias + n : nullptr;
        panel.y = call.y + n;
        run(panel, 0, smaller(kPanelWidth, end - n), 0, chunks, sums, kPanelWidth, true, n + 2 * kPanelWidth <= end);
    }
}

#if defined(__AVX2__) && !defined(__AVX512F__)

// Eight rows of the source become eight columns of the target.
SIMCTG_INLINE void transpose8(const float* source, int64_t stride, float* target) {
    const float* lower = source + 4 * stride;
    const auto rows = [&](int r, int k) __attribute__((always_inline)) {  // four of row r, four of row r + 4
        return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(source + r * stride + k)),
                                    _mm_loadu_ps(lower + r * stride + k), 1);
    };
#pragma GCC unroll 2
    for (int k = 0; k < 8; k += 4) {
        const Vec a = rows(0, k), b = rows(1, k), c = rows(2, k), d = rows(3, k);
        const Vec ab = _mm256_unpacklo_ps(a, b), cd = _mm256_unpacklo_ps(c, d);
        const Vec ab_high = _mm256_unpackhi_ps(a, b), cd_high = _mm256_unpackhi_ps(c, d);
        store(target + (k + 0) * kPanelWidth, _mm256_shuffle_ps(ab, cd, 0x44));
        store(target + (k + 1) * kPanelWidth, _mm256_shuffle_ps(ab, cd, 0xEE));
        store(target + (k + 2) * kPanelWidth, _mm256_shuffle_ps(ab_high, cd_high, 0x44));
        store(target + (k + 3) * kPanelWidth, _mm256_shuffle_ps(ab_high, cd_high, 0xEE));
    }
}

void pack_rows(const float* weight, int64_t stride, int64_t in_features, float* panel) {
    int64_t k = 0;
    for (; k + 8 <= in_features; k += 8) {
#pragma GCC unroll 2
        for (int64_t n = 0; n < kPanelWidth; n += 8) {
            transpose8(weight + n * stride + k, stride, panel + k * kPanelWidth + n);
        }
    }
    for (; k < in_features; ++k) {
        for (int64_t n = 0; n < kPanelWidth; ++n) panel[k * kPanelWidth + n] = weight[n * stride + k];
    }
}

// For each mask of eight lanes, the numbers of those that are set, a byte each, the lowest first.
struct SetLanes {
    uint64_t lanes[256];
    constexpr SetLanes() : lanes() {
        for (int mask = 0; mask < 256; ++mask) {
            int count = 0;
            for (uint64_t lane = 0; lane < 8; ++lane) {
                if (mask >> lane & 1) lanes[mask] |= lane << 8 * count++;
            }
        }
    }
};
constexpr SetLanes kSetLanes;

int64_t find_entries(const float* x, int64_t count, uint8_t* entries) {
    int64_t found = 0;
    for (int64_t k = 0; k < count; k += kLanes) {
        const Vec v = k + kLanes <= count ? load(x + k) : load(x + k, first_lanes(count - k));
        const int mask = _mm256_movemask_ps(_mm256_cmp_ps(v, zeros(), _CMP_NLE_UQ));
        const uint64_t lanes = kSetLanes.lanes[mask] + 0x0101010101010101u * static_cast<uint64_t>(k);
        __builtin_memcpy(entries + found, &lanes, sizeof lanes);
        found += __builtin_popcount(static_cast<unsigned>(mask));
    }
    return found;
}

// `sums` += the entries' rows of Panels panels, panel_floats apart.
template <int Panels>
SIMCTG_INLINE void sparse_step(const float* x, const uint8_t* entries, int64_t count, const float* panels,
                               int64_t panel_floats, bool first, float* sums) {
    Vec acc[2 * Panels];
#pragma GCC unroll 8
    for (int v = 0; v < 2 * Panels; ++v) acc[v] = first ? zeros() : load(sums + v * kLanes);
    for (int64_t i = 0; i < count; ++i) {
        const int64_t k = entries[i];
        const Vec a = broadcast(x[k]);
        const float* w = panels + k * kPanelWidth;
#pragma GCC unroll 8
        for (int v = 0; v < 2 * Panels; ++v) {
            acc[v] = multiply_add(a, load(w + v / 2 * panel_floats + v % 2 * kLanes), acc[v]);
        }
    }
#pragma GCC unroll 8
    for (int v = 0; v < 2 * Panels; ++v) store(sums + v * kLanes, acc[v]);
}

template <int Panels>
void sparse_group(const Linear& call, const SparseRows& x, int64_t begin, int64_t end, float* sums) {
    const int64_t panel_floats = call.in_features * kPanelWidth, width = Panels * kPanelWidth;
    const float* panels = call.weight + begin * call.in_features;
    for (int64_t block = 0; block < x.blocks; ++block) {
        const int64_t k = block * kSparseBlock, k_end = smaller(k + kSparseBlock, call.in_features);
        const bool last = k_end == call.in_features, chunk_ends = last || k_end % kChunk == 0;
        // The next block's lines, shared among the rows.
        const float* ahead = panels + k_end * kPanelWidth;
        const int64_t lines = last ? 0 : smaller(kSparseBlock, call.in_features - k_end);
        const int64_t share = (Panels * lines + call.rows - 1) / call.rows;
        int64_t asked = 0;
        for (int64_t m = 0; m < call.rows; ++m) {
            for (int64_t i = 0; i < share && asked < Panels * lines; ++i, ++asked) {
                prefetch_l2(ahead + asked / lines * panel_floats + asked % lines * kLineFloats);
            }
            const int64_t entry = m * x.blocks + block;
            float* row_sums = sums + m * width;
            sparse_step<Panels>(call.x + m * call.x_stride + k, x.entries + entry * kSparseRoom, x.counts[entry],
                                panels + k * kPanelWidth, panel_floats, k % kChunk == 0, row_sums);
            if (!chunk_ends) continue;
            float* y = call.y + m * call.y_stride + begin;
            for (int64_t n = 0; n < end - begin; n += kLanes) {
                const int64_t columns = end - begin - n;
                const Mask mask = first_lanes(smaller<int64_t>(kLanes, columns));
                Vec total = load(row_sums + n);
                if (k >= kChunk) total = add(load(y + n, mask), total);
                if (last && call.bias) total = add(total, load(call.bias + begin + n, mask));
                store_first(y + n, total, columns);
            }
        }
    }
}

void sparse_panels(const Linear& call, const SparseRows& rows, int64_t begin, int64_t end, float* sums) {
    constexpr int64_t width = kSparsePanels * kPanelWidth;
    int64_t n = begin;
    for (; n + width <= end; n += width) sparse_group<kSparsePanels>(call, rows, n, n + width, sums);
    for (; n < end; n += kPanelWidth) sparse_group<1>(call, rows, n, smaller(n + kPanelWidth, end), sums);
}

#else
constexpr int64_t (*find_entries)(const float*, int64_t, uint8_t*) = nullptr;
constexpr void (*sparse_panels)(const Linear&, const SparseRows&, int64_t, int64_t, float*) = nullptr;
constexpr void (*pack_rows)(const float*, int64_t, int64_t, float*) = nullptr;
#endif

}  // namespace
}  // namespace simctg::linear_layer

SIMCTG_TABLE(linear_layer, Kernels, kPanelWidth, rows_are_outputs, rows_are_inputs, add_chunks, panels, find_entries,
             sparse_panels, pack_rows)
