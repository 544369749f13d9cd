// What one instruction set offers to linear.cpp. The kernels know nothing of threads: they fill a range of columns.
#pragma once

#include "api/linear.h"
#include "simd/table.h"

namespace simctg::linear_layer {

constexpr int64_t kChunk = 384;      // k's that are summed before they join the total of a rows_are_inputs product
constexpr int64_t kDotSums = 1 << 15;  // floats of scratch for rows_are_outputs: a fraction of the second cache

constexpr int64_t kSparsePanels = 4;  // panels that are worked on together
constexpr int64_t kSparseBlock = 64;  // k's whose entries stand together; a chunk is a whole number of blocks
constexpr int64_t kSparseRoom = kSparseBlock + 8;  // bytes kept for a block's entries: eight are written at a time
static_assert(kChunk % kSparseBlock == 0 && kSparseBlock <= 256, "a chunk is whole blocks, an entry fits a byte");

// What a kernel is asked for: `Linear` in the types that it computes with.
template <class X, class Weight>
struct Product {
    const X* x;
    int64_t x_stride;
    const Weight* weight;
    int64_t weight_stride;
    const float* bias;
    float* y;
    int64_t y_stride;
    int64_t rows, in_features, out_features;
};

// The layouts in place.
template <class X, class Weight>
struct InPlace {
    using Call = Product<X, Weight>;

    // `sums` [kDotSums], aligned to a vector, is scratch.
    void (*rows_are_outputs)(const Call& call, int64_t begin, int64_t end, float* sums);

    // The chunks first_chunk..last_chunk-1. With `finish` (all chunks, then) they are added up in y, and `sums`
    // [rows, sums_stride] is scratch; without, the sums of each chunk are left in sums[chunk, rows, sums_stride].
    // Column n is at n - begin in `sums`.
    void (*rows_are_inputs)(const Call& call, int64_t begin, int64_t end, int64_t first_chunk, int64_t last_chunk,
                            float* sums, int64_t sums_stride, bool finish);

    // y = sums[0] + sums[1] + … + bias: what `finish` leaves, from sums[chunks, rows, sums_stride].
    void (*add_chunks)(const Call& call, int64_t begin, int64_t end, int64_t chunks, const float* sums,
                       int64_t sums_stride);
};

// Where x is above 0, or NaN: of row m and block b, the k's within the block, from (m · blocks + b) · kSparseRoom on.
struct SparseRows {
    uint8_t* entries;
    int32_t* counts;  // [rows, blocks]
    int64_t blocks;
};

struct Kernels {
    int64_t panel_width;  // columns in a panel of the packed layout: [panels][in_features][panel_width]

    InPlace<float, float> in_place;

    // begin is a multiple of panel_width, end as well unless the row ends there; `sums` [rows, panel_width] is scratch.
    void (*panels)(const Product<float, float>& call, int64_t begin, int64_t end, float* sums);

    // The entries of `count` elements of x, kSparseBlock at most; how many. Null, as the next: there is no such kernel.
    int64_t (*find_entries)(const float* x, int64_t count, uint8_t* entries);

    // As `panels`, of max(x, 0). `sums` [rows, kSparsePanels · panel_width] is scratch.
    void (*sparse_panels)(const Product<float, float>& call, const SparseRows& rows, int64_t begin, int64_t end, float* sums);

    // panel[k, n] = weight[n, k] for a whole panel. Null: nothing faster than plain loops.
    void (*pack_rows)(const float* weight, int64_t stride, int64_t in_features, float* panel);
};

// Weights of 16 bits.
struct NarrowKernels {
    InPlace<float, BFloat16> bfloat16;
    InPlace<float, Float16> float16;
    InPlace<BFloat16, BFloat16> pairs;  // both factors are taken as they are, or null
    void (*widen)(ElementType type, const void* from, int64_t count, float* to);
    void (*narrow)(ElementType type, const float* from, int64_t count, void* to);
};

}  // namespace simctg::linear_layer

SIMCTG_TABLES(linear_layer::Kernels)
SIMCTG_EXTENDED_TABLES(linear_layer::NarrowKernels, Isa::avx512_bf16)
