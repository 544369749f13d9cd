// What one instruction set offers to linear.cpp. The kernels know nothing of threads: they fill a range of columns.
#pragma once

#include "linear.h"

namespace simctg {

constexpr int64_t kChunk = 384;      // k's that are summed before they join the total of a rows_are_inputs product
constexpr int64_t kDotSums = 1 << 15;  // floats of scratch for rows_are_outputs: a fraction of the second cache

struct LinearKernels {
    int64_t panel_width;  // columns in a panel of the packed layout: [panels][in_features][panel_width]

    // `sums` [kDotSums], aligned to a vector, is scratch.
    void (*rows_are_outputs)(const Linear& call, int64_t begin, int64_t end, float* sums);

    // The chunks first_chunk..last_chunk-1. With `finish` (all chunks, then) they are added up in y, and `sums`
    // [rows, sums_stride] is scratch; without, the sums of each chunk are left in sums[chunk, rows, sums_stride].
    // Column n is at n - begin in `sums`.
    void (*rows_are_inputs)(const Linear& call, int64_t begin, int64_t end, int64_t first_chunk, int64_t last_chunk,
                            float* sums, int64_t sums_stride, bool finish);

    // y = sums[0] + sums[1] + … + bias: what `finish` leaves, from sums[chunks, rows, sums_stride].
    void (*add_chunks)(const Linear& call, int64_t begin, int64_t end, int64_t chunks, const float* sums,
                       int64_t sums_stride);

    // begin is a multiple of panel_width, end as well unless the row ends there; `sums` [rows, panel_width] is scratch.
    void (*panels)(const Linear& call, int64_t begin, int64_t end, float* sums);

    // panel[k, n] = weight[n, k] for a whole panel. Null: nothing faster than plain loops.
    void (*pack_rows)(const float* weight, int64_t stride, int64_t in_features, float* panel);
};

const LinearKernels& linear_kernels_generic();
#if defined(SIMCTG_FAST_X86_64)
const LinearKernels& linear_kernels_avx2();
const LinearKernels& linear_kernels_avx512();
#endif

}  // namespace simctg
