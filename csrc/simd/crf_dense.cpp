// Steps of a CRF with one dense matrix of transitions, for several items at once.
//
// Floor: N² multiply-adds an item and step (sums and maxima), N² exponentials in logarithms; the matrix, 4 N² bytes, is
// read from the cache once for kDenseRows items. Layout: rows of `stride` floats, whole pairs of vectors, in states and
// matrix alike; two vectors of targets for all items of a tile are summed in registers, sources in order.
#include "simd/crf_tile.h"

namespace simctg::crf {
namespace {

constexpr int kDenseRows = kRegisters == 32 ? 8 : 4;

template <int Rows, bool Max>
SIMCTG_INLINE void dense_rows(const float* state, const float* matrix, int64_t tags, int64_t stride, float* next) {
    int64_t j = 0;
    for (; j + 2 * kLanes <= stride; j += 2 * kLanes) {
        Vec acc[Rows * 2];
#pragma GCC unroll 16
        for (int i = 0; i < Rows * 2; ++i) acc[i] = Max ? broadcast(-kInfinity) : zeros();
        for (int64_t k = 0; k < tags; ++k) {
            const Vec a = load(matrix + k * stride + j), b = load(matrix + k * stride + j + kLanes);
#pragma GCC unroll 8
            for (int r = 0; r < Rows; ++r) {
                const Vec value = broadcast(state[r * stride + k]);
                if constexpr (Max) {
                    acc[2 * r] = max(add(value, a), acc[2 * r]);
                    acc[2 * r + 1] = max(add(value, b), acc[2 * r + 1]);
                } else {
                    acc[2 * r] = multiply_add(value, a, acc[2 * r]);
                    acc[2 * r + 1] = multiply_add(value, b, acc[2 * r + 1]);
                }
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < Rows * 2; ++i) store(next + i / 2 * stride + j + i % 2 * kLanes, acc[i]);
    }
    for (; j < stride; j += kLanes) {
        for (int r = 0; r < Rows; ++r) {
            Vec acc = Max ? broadcast(-kInfinity) : zeros();
            for (int64_t k = 0; k < tags; ++k) {
                const Vec value = broadcast(state[r * stride + k]), a = load(matrix + k * stride + j);
                acc = Max ? max(add(value, a), acc) : multiply_add(value, a, acc);
            }
            store(next + r * stride + j, acc);
        }
    }
}

template <bool Max>
void dense_any(const float* state, const float* matrix, int64_t tags, int64_t stride, int64_t rows, float* next) {
    int64_t r = 0;
    for (; r + kDenseRows <= rows; r += kDenseRows) {
        dense_rows<kDenseRows, Max>(state + r * stride, matrix, tags, stride, next + r * stride);
    }
    for (; r + 4 <= rows; r += 4) dense_rows<4, Max>(state + r * stride, matrix, tags, stride, next + r * stride);
    for (; r + 2 <= rows; r += 2) dense_rows<2, Max>(state + r * stride, matrix, tags, stride, next + r * stride);
    for (; r < rows; ++r) dense_rows<1, Max>(state + r * stride, matrix, tags, stride, next + r * stride);
}

void dense_lse(const float* state, const float* matrix, int64_t tags, int64_t stride, int64_t rows, float* next) {
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t j = 0; j < stride; j += kLanes) {
            Vec top = broadcast(kLowest), total = zeros();
            for (int64_t k = 0; k < tags; ++k) {
                top = max(add(broadcast(state[r * stride + k]), load(matrix + k * stride + j)), top);
            }
            for (int64_t k = 0; k < tags; ++k) {
                const Vec score = add(broadcast(state[r * stride + k]), load(matrix + k * stride + j));
                total = add(total, exponential(sub(score, top)));
            }
            alignas(64) float tops[kLanes], sums[kLanes];
            store(tops, top);
            store(sums, total);
            for (int l = 0; l < kLanes; ++l) next[r * stride + j + l] = tops[l] + logf(sums[l]);
        }
    }
}

void exponentials(const float* in, float shift, int64_t count, float* out) {
    const FlushToZero flush;
    for (int64_t i = 0; i < count; i += kLanes) store(out + i, exponential(add(load(in + i), broadcast(shift))));
}

}  // namespace
}  // namespace simctg::crf

SIMCTG_TABLE(crf, Dense, dense_any<false>, dense_any<true>, dense_lse, largest, exponentials, kLanes, kDenseRows)
