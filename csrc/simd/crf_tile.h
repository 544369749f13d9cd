// What the kernels of crf.h share: scores of a step between two positions, tile by tile.
//
// A tile is kRows sources × a few vectors of targets; its accumulators take the products of the two tables' rows in order
// of the rank, then the sources' own scores, and are consumed in registers. Layout: sources row by row, [padded][rank],
// padded = beam rounded up to kRows; targets in panels of kPanel columns, [rank][kPanel] each, so that a panel is read
// from the first-level cache once for every tile.
//
// Sums over sources run in slot order in every lane: results do not depend on how many targets there are.
#pragma once

#include <math.h>

#include "simd/crf.h"
#include "simd/simd.h"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace simctg::crf {
namespace {

using namespace simd;

constexpr int kRows = 4;
constexpr int kVecs = kLanes == 16 ? 4 : 2;
constexpr int64_t kPanel = kVecs * kLanes;
constexpr int64_t kChunk = 32;  // sources whose scores wait together: for their common maximum, for the gradient
constexpr float kLowest = -1e30f;
constexpr float kInfinity = __builtin_inff();

SIMCTG_INLINE int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Results below the smallest normal number become 0 here: they would count for nothing and cost a hundred times more.
struct FlushToZero {
#if defined(__SSE2__)
    unsigned saved;
    FlushToZero() : saved(_mm_getcsr()) { _mm_setcsr(saved | 0x8040u); }
    ~FlushToZero() { _mm_setcsr(saved); }
#else
    FlushToZero() {}
#endif
};

// Hands out pieces of the scratch memory, each on a cache line of its own.
struct Arena {
    float* next;
    SIMCTG_INLINE float* take(int64_t count) {
        float* piece = next;
        next += round_up(count, 16);
        return piece;
    }
};

// e^x for x <= 88, relative error 1.8e-7 and -2e-8 on average (a bias would add up over the positions); 0 below -87 and
// for -inf.
SIMCTG_INLINE Vec exponential(Vec x) {
    x = max(broadcast(-138.0f), x);  // NaN stays NaN
    // log2(e) in two parts: with one, the error would grow with |x|.
    const Vec high = broadcast(1.44269502162933349609375f), low = broadcast(1.925963033500011079e-8f);
    const Vec whole = round_even(mul(x, high));
    const Vec f = multiply_add(x, low, multiply_add(x, high, sub(zeros(), whole)));
    Vec p = broadcast(0.0013264726091425831f);
    p = multiply_add(p, f, broadcast(0.009671512780652156f));
    p = multiply_add(p, f, broadcast(0.05550733747505163f));
    p = multiply_add(p, f, broadcast(0.24022242082683262f));
    p = multiply_add(p, f, broadcast(0.6931469775959435f));
    p = multiply_add(p, f, broadcast(1.0f));
    return scale_by_power(p, whole);
}

// 1 where a <= b, else 0; 1 for NaN.
SIMCTG_INLINE Vec not_above(Vec a, Vec b) { return where_less(b, a, zeros(), broadcast(1.0f)); }


// Rows of `table` for the slots of one position, [round_up(beam, kRows)][rank], zeros behind.
SIMCTG_INLINE void gather_rows(const Item& item, int64_t t, const float* table, float* out) {
    const int64_t* tokens = item.tokens + t * item.beam;
    const int64_t rank = item.rank, padded = round_up(item.beam, kRows);
    for (int64_t k = 0; k < item.beam; ++k) {
        if (k + 8 < item.beam) {
            const float* ahead = table + tokens[k + 8] * rank;
            for (int64_t d = 0; d < rank; d += 16) __builtin_prefetch(ahead + d);
        }
        const float* row = table + tokens[k] * rank;
        int64_t d = 0;
        for (; d + kLanes <= rank; d += kLanes) store(out + k * rank + d, load(row + d));
        for (; d < rank; ++d) out[k * rank + d] = row[d];
    }
    for (int64_t i = item.beam * rank; i < padded * rank; ++i) out[i] = 0.0f;
}

// `rows` [beam][rank] as panels of columns, times `scale`, zeros behind.
SIMCTG_INLINE void pack_panels(const float* rows, int64_t beam, int64_t rank, float scale, float* panels) {
    for (int64_t begin = 0; begin < beam; begin += kPanel) {
        float* panel = panels + begin * rank;
        const int64_t count = smaller(kPanel, beam - begin);
        const float* from = rows + begin * rank;
        for (int64_t d = 0; d < rank; ++d) {
            float* line = panel + d * kPanel;
            for (int64_t j = 0; j < count; ++j) line[j] = from[j * rank + d] * scale;
            for (int64_t j = count; j < kPanel; ++j) line[j] = 0.0f;
        }
    }
}

SIMCTG_INLINE int vectors_of(int64_t columns) {
    return static_cast<int>(smaller<int64_t>(kVecs, (columns + kLanes - 1) / kLanes));
}

template <int C>
SIMCTG_INLINE void score_tile(const float* rows, int64_t rank, const float* panel, const float* start, Vec* acc) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows * C; ++i) acc[i] = zeros();
    for (int64_t d = 0; d < rank; ++d) {
        Vec column[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) column[c] = load(panel + d * kPanel + c * kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
            const Vec value = broadcast(rows[r * rank + d]);
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) acc[r * C + c] = multiply_add(value, column[c], acc[r * C + c]);
        }
    }
    // Last, since scores may be large beside the products, which would round with them.
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) acc[r * C + c] = add(acc[r * C + c], broadcast(start[r]));
    }
}

// Scores of all sources against the columns of one panel, [padded][C · kLanes].
template <int C>
void all_scores(const float* rows, int64_t rank, int64_t padded, const float* panel, const float* start, float* out) {
    for (int64_t k = 0; k < padded; k += kRows) {
        Vec acc[kRows * C];
        score_tile<C>(rows + k * rank, rank, panel, start + k, acc);
#pragma GCC unroll 16
        for (int i = 0; i < kRows * C; ++i) store(out + (k * C + i) * kLanes, acc[i]);
    }
}

#define SIMCTG_BY_VECTORS(count, call)  \
    switch (count) {                    \
        case 1: call(1); break;         \
        case 2: call(2); break;         \
        case 3: call((kVecs < 3 ? kVecs : 3)); break; \
        default: call(kVecs); break;    \
    }

// values[k] -= their largest, which is returned; -inf behind the beam up to a multiple of kRows.
SIMCTG_INLINE float take_off_largest(float* values, int64_t beam) {
    float top = -kInfinity;
    for (int64_t k = 0; k < beam; ++k) top = values[k] > top ? values[k] : top;
    for (int64_t k = 0; k < beam; ++k) values[k] -= top;
    for (int64_t k = beam; k < round_up(beam, kRows); ++k) values[k] = -kInfinity;
    return top;
}

// Where the products of one step are packed.
struct Step {
    float* rows;     // sources, from `left`
    float* targets;  // targets, from `right`, row by row
    float* panels;   // the same, as panels
    int64_t padded;

    Step(const Item& item, Arena& arena)
        : rows(arena.take(round_up(item.beam, kRows) * item.rank)),
          targets(arena.take(round_up(item.beam, kRows) * item.rank)),
          panels(arena.take(round_up(item.beam, kPanel) * item.rank)),
          padded(round_up(item.beam, kRows)) {}

    SIMCTG_INLINE void load_step(const Item& item, int64_t t) {  // from t to t + 1
        gather_rows(item, t, item.left, rows);
        gather_rows(item, t + 1, item.right, targets);
        pack_panels(targets, item.beam, item.rank, item.scale, panels);
    }
};

constexpr int64_t kSlack = 32 * 16;  // floats: what `take` rounds up, for up to 32 pieces
SIMCTG_INLINE int64_t step_floats(int64_t beam, int64_t rank) {
    return 2 * round_up(beam, kRows) * rank + round_up(beam, kPanel) * rank;
}

[[maybe_unused]] float largest(const float* values, int64_t count) {
    Vec top[4] = {broadcast(-kInfinity), broadcast(-kInfinity), broadcast(-kInfinity), broadcast(-kInfinity)};
    int64_t i = 0;
    for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) top[c] = max(load(values + i + c * kLanes), top[c]);
    }
    for (; i + kLanes <= count; i += kLanes) top[0] = max(load(values + i), top[0]);
    float result = highest(max(max(top[0], top[1]), max(top[2], top[3])));
    for (; i < count; ++i) result = values[i] > result ? values[i] : result;
    return result;
}

SIMCTG_INLINE int64_t first_largest(const float* values, int64_t count) {
    int64_t best = 0;
    for (int64_t k = 1; k < count; ++k) best = values[k] > values[best] ? k : best;
    return best;
}

}  // namespace
}  // namespace simctg::crf
