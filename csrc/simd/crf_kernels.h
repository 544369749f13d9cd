// The kernels behind crf.h, compiled once for each instruction set (crf_generic.cpp, crf_avx2.cpp, crf_avx512.cpp).
//
// A tile is kRows sources × a few vectors of targets; its accumulators take the products of the two tables' rows in order
// of the rank, then the sources' own scores, and are consumed in registers. Targets are packed in panels of
// kPanel columns ([rank][kPanel]), so a panel is read from the first-level cache once for every tile.
//
// Sums over sources run in slot order in every lane: results do not depend on how many targets there are.
#pragma once

#include <math.h>

#include "simd/crf_dispatch.h"
#include "simd/simd.h"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace simctg {
namespace {

constexpr int kRows = 4;
constexpr int kVecs = kLanes == 16 ? 4 : 2;
constexpr int64_t kPanel = kVecs * kLanes;
constexpr int64_t kChunk = 32;  // sources whose scores wait in the stash for their common maximum
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

// ---- packing --------------------------------------------------------------------------------------------------------

// Rows of `table` for the slots of one position, [round_up(beam, kRows)][rank], zeros behind.
SIMCTG_INLINE void gather_rows(const CrfItem& item, int64_t t, const float* table, float* out) {
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

// ---- the tile -------------------------------------------------------------------------------------------------------

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

// out[j] = log sum_k exp(start[k] + transition), for the columns of a panel.
template <int C>
void lse_panel(const float* rows, int64_t rank, int64_t padded, const float* panel, const float* start, float* out) {
    Vec top[C], total[C];
    for (int c = 0; c < C; ++c) top[c] = broadcast(kLowest), total[c] = zeros();
    alignas(64) float stash[kChunk * C * kLanes];
    for (int64_t begin = 0; begin < padded; begin += kChunk) {
        const int64_t end = smaller(padded, begin + kChunk);
        Vec higher[C];
        for (int c = 0; c < C; ++c) higher[c] = top[c];
        float* line = stash;
        for (int64_t k = begin; k < end; k += kRows, line += kRows * C * kLanes) {
            Vec acc[kRows * C];
            score_tile<C>(rows + k * rank, rank, panel, start + k, acc);
#pragma GCC unroll 16
            for (int i = 0; i < kRows * C; ++i) {
                store(line + i * kLanes, acc[i]);
                higher[i % C] = max(acc[i], higher[i % C]);
            }
        }
        Vec part[C];  // summed on its own: long running sums round more
        for (int c = 0; c < C; ++c) part[c] = zeros();
        for (const float* p = stash; p < line; p += C * kLanes) {
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) part[c] = add(part[c], exponential(sub(load(p + c * kLanes), higher[c])));
        }
        for (int c = 0; c < C; ++c) {
            total[c] = multiply_add(total[c], exponential(sub(top[c], higher[c])), part[c]);
            top[c] = higher[c];
        }
    }
    for (int c = 0; c < C; ++c) {
        alignas(64) float sums[kLanes], tops[kLanes];
        store(sums, total[c]);
        store(tops, top[c]);
        for (int l = 0; l < kLanes; ++l) out[c * kLanes + l] = tops[l] + logf(sums[l]);
    }
}

template <int C>
void max_panel(const float* rows, int64_t rank, int64_t padded, const float* panel, const float* start, float* out) {
    Vec top[C];
    for (int c = 0; c < C; ++c) top[c] = broadcast(-kInfinity);
    for (int64_t k = 0; k < padded; k += kRows) {
        Vec acc[kRows * C];
        score_tile<C>(rows + k * rank, rank, panel, start + k, acc);
#pragma GCC unroll 16
        for (int i = 0; i < kRows * C; ++i) top[i % C] = max(acc[i], top[i % C]);
    }
    for (int c = 0; c < C; ++c) store(out + c * kLanes, top[c]);
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

SIMCTG_INLINE void lse_columns(int vecs, const float* rows, int64_t rank, int64_t padded, const float* panel,
                               const float* start, float* out) {
#define CALL(C) lse_panel<C>(rows, rank, padded, panel, start, out)
    SIMCTG_BY_VECTORS(vecs, CALL)
#undef CALL
}
SIMCTG_INLINE void max_columns(int vecs, const float* rows, int64_t rank, int64_t padded, const float* panel,
                               const float* start, float* out) {
#define CALL(C) max_panel<C>(rows, rank, padded, panel, start, out)
    SIMCTG_BY_VECTORS(vecs, CALL)
#undef CALL
}
SIMCTG_INLINE void score_columns(int vecs, const float* rows, int64_t rank, int64_t padded, const float* panel,
                                 const float* start, float* out) {
#define CALL(C) all_scores<C>(rows, rank, padded, panel, start, out)
    SIMCTG_BY_VECTORS(vecs, CALL)
#undef CALL
}

// ---- filters --------------------------------------------------------------------------------------------------------

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

    Step(const CrfItem& item, Arena& arena)
        : rows(arena.take(round_up(item.beam, kRows) * item.rank)),
          targets(arena.take(round_up(item.beam, kRows) * item.rank)),
          panels(arena.take(round_up(item.beam, kPanel) * item.rank)),
          padded(round_up(item.beam, kRows)) {}

    SIMCTG_INLINE void load_step(const CrfItem& item, int64_t t) {  // from t to t + 1
        gather_rows(item, t, item.left, rows);
        gather_rows(item, t + 1, item.right, targets);
        pack_panels(targets, item.beam, item.rank, item.scale, panels);
    }
};

void filter(const CrfItem& item, float* messages, float* norms, float* scratch) {
    const FlushToZero flush;
    Arena arena{scratch};
    Step step(item, arena);
    const int64_t beam = item.beam;
    float* alpha = arena.take(step.padded);
    float* out = arena.take(round_up(beam, kPanel));
    for (int64_t t = 0; t < item.length; ++t) {
        float* message = messages + t * beam;
        if (t == 0) {
            for (int64_t k = 0; k < beam; ++k) message[k] = 0.0f;
        } else {
            step.load_step(item, t - 1);
            for (int64_t j = 0; j < beam; j += kPanel) {
                lse_columns(vectors_of(beam - j), step.rows, item.rank, step.padded, step.panels + j * item.rank, alpha,
                            out + j);
            }
            for (int64_t k = 0; k < beam; ++k) message[k] = out[k];
        }
        const float* score = item.scores + t * beam;
        for (int64_t k = 0; k < beam; ++k) alpha[k] = message[k] + score[k];
        norms[t] = take_off_largest(alpha, beam);
    }
}

// Scores of all sources at t, from `start`, into one slot at t + 1: the same operations in the same order as in a panel,
// so the result is bit for bit what the filter saw. `out` has room for padded · kLanes floats and holds [padded].
SIMCTG_INLINE void column_scores(const CrfItem& item, int64_t t, int64_t slot, const float* start, float* rows,
                                 float* panel, float* out) {
    const int64_t rank = item.rank, padded = round_up(item.beam, kRows);
    gather_rows(item, t, item.left, rows);
    const float* target = item.right + item.tokens[(t + 1) * item.beam + slot] * rank;
    for (int64_t d = 0; d < rank; ++d) store(panel + d * kPanel, broadcast(target[d] * item.scale));
    all_scores<1>(rows, rank, padded, panel, start, out);
    for (int64_t k = 0; k < padded; ++k) out[k] = out[k * kLanes];
}

void into_slot(const CrfItem& item, int64_t t, int64_t slot, const float* start, float* out, float* scratch) {
    Arena arena{scratch};
    const int64_t padded = round_up(item.beam, kRows);
    float* rows = arena.take(padded * item.rank);
    float* panel = arena.take(kPanel * item.rank);
    float* wide = arena.take(padded * kLanes);
    float* from = arena.take(padded);
    for (int64_t k = 0; k < padded; ++k) from[k] = k < item.beam ? start[k] : -kInfinity;
    column_scores(item, t, slot, from, rows, panel, wide);
    for (int64_t k = 0; k < item.beam; ++k) out[k] = wide[k];
}

SIMCTG_INLINE int64_t first_largest(const float* values, int64_t count) {
    int64_t best = 0;
    for (int64_t k = 1; k < count; ++k) best = values[k] > values[best] ? k : best;
    return best;
}

void max_filter(const CrfItem& item, float* best, float* offsets, int64_t* slots, float* scratch) {
    const FlushToZero flush;
    Arena arena{scratch};
    Step step(item, arena);
    const int64_t beam = item.beam;
    float* state = arena.take(step.padded);
    float* out = arena.take(round_up(beam, kPanel));
    float* panel = arena.take(kPanel * item.rank);
    float* wide = arena.take(step.padded * kLanes);
    for (int64_t t = 0; t < item.length; ++t) {
        const float* score = item.scores + t * beam;
        if (t == 0) {
            for (int64_t k = 0; k < beam; ++k) state[k] = score[k];
        } else {
            step.load_step(item, t - 1);
            for (int64_t j = 0; j < beam; j += kPanel) {
                max_columns(vectors_of(beam - j), step.rows, item.rank, step.padded, step.panels + j * item.rank, state,
                            out + j);
            }
            for (int64_t k = 0; k < beam; ++k) state[k] = out[k] + score[k];
        }
        offsets[t] = take_off_largest(state, beam);
        for (int64_t k = 0; k < beam; ++k) best[t * beam + k] = state[k];
    }
    if (slots == nullptr || item.length == 0) return;
    // No back-pointers: the best source of each slot on the path is found again, which costs one column a step.
    int64_t slot = first_largest(best + (item.length - 1) * beam, beam);
    slots[item.length - 1] = slot;
    for (int64_t t = item.length - 2; t >= 0; --t) {
        for (int64_t k = 0; k < beam; ++k) state[k] = best[t * beam + k];
        column_scores(item, t, slot, state, step.rows, panel, wide);
        slots[t] = slot = first_largest(wide, beam);
    }
}

// ---- the reverse sweep ----------------------------------------------------------------------------------------------

// share[k][j] = exp(min(score - message[j], 0)) · flow[j]; sums over j are added to `sums` [padded][kLanes].
template <int C>
SIMCTG_INLINE void share_chunk(const float* rows, int64_t rank, int64_t begin, int64_t end, const float* panel,
                               const float* alpha, const float* message, const float* flow, float* share, float* sums) {
    Vec shift[C], weight[C];
    for (int c = 0; c < C; ++c) shift[c] = load(message + c * kLanes), weight[c] = load(flow + c * kLanes);
    float* line = share;
    for (int64_t k = begin; k < end; k += kRows, line += kRows * kPanel) {
        Vec acc[kRows * C];
        score_tile<C>(rows + k * rank, rank, panel, alpha + k, acc);
#pragma GCC unroll 16
        for (int i = 0; i < kRows * C; ++i) store(line + i / C * kPanel + i % C * kLanes, acc[i]);
    }
    line = share;
    for (int64_t k = begin; k < end; ++k, line += kPanel) {
        Vec row = load(sums + k * kLanes);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            const Vec x = min(zeros(), sub(load(line + c * kLanes), shift[c]));
            const Vec value = mul(exponential(x), weight[c]);
            store(line + c * kLanes, value);
            row = add(row, value);
        }
        store(sums + k * kLanes, row);
    }
}

// out[d][j] += sum_k rows[k][d] · share[k][j]: the gradient of a panel of targets.
template <int C>
SIMCTG_INLINE void target_gradient(const float* rows, int64_t rank, int64_t begin, int64_t end, const float* share,
                                   float* out) {
    int64_t d = 0;
    for (; d + 4 <= rank; d += 4) {
        Vec acc[4 * C];
#pragma GCC unroll 16
        for (int i = 0; i < 4 * C; ++i) acc[i] = load(out + (d + i / C) * kPanel + i % C * kLanes);
        const float* line = share;
        for (int64_t k = begin; k < end; ++k, line += kPanel) {
            Vec s[C];
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) s[c] = load(line + c * kLanes);
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) {
                const Vec value = broadcast(rows[k * rank + d + r]);
#pragma GCC unroll 4
                for (int c = 0; c < C; ++c) acc[r * C + c] = multiply_add(value, s[c], acc[r * C + c]);
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < 4 * C; ++i) store(out + (d + i / C) * kPanel + i % C * kLanes, acc[i]);
    }
    for (; d < rank; ++d) {
        for (int c = 0; c < C; ++c) {
            Vec acc = load(out + d * kPanel + c * kLanes);
            const float* line = share + c * kLanes;
            for (int64_t k = begin; k < end; ++k, line += kPanel) {
                acc = multiply_add(broadcast(rows[k * rank + d]), load(line), acc);
            }
            store(out + d * kPanel + c * kLanes, acc);
        }
    }
}

// out[k][d] += sum_j share[k][j] · targets[j][d], rows of `wide` floats (a multiple of kLanes).
SIMCTG_INLINE void source_gradient(const float* targets, int64_t wide, int64_t columns, int64_t begin, int64_t end,
                                   const float* share, float* out) {
    constexpr int kTall = kRegisters == 32 ? 8 : 4;
    int64_t d = 0;
    for (; d + 2 * kLanes <= wide; d += 2 * kLanes) {
        int64_t k = begin;
        for (; k + kTall <= end; k += kTall) {
            Vec acc[kTall * 2];
#pragma GCC unroll 16
            for (int i = 0; i < kTall * 2; ++i) acc[i] = load(out + (k + i / 2) * wide + d + i % 2 * kLanes);
            const float* line = share + (k - begin) * kPanel;
            for (int64_t j = 0; j < columns; ++j) {
                const Vec a = load(targets + j * wide + d), b = load(targets + j * wide + d + kLanes);
#pragma GCC unroll 8
                for (int r = 0; r < kTall; ++r) {
                    const Vec value = broadcast(line[r * kPanel + j]);
                    acc[2 * r] = multiply_add(value, a, acc[2 * r]);
                    acc[2 * r + 1] = multiply_add(value, b, acc[2 * r + 1]);
                }
            }
#pragma GCC unroll 16
            for (int i = 0; i < kTall * 2; ++i) store(out + (k + i / 2) * wide + d + i % 2 * kLanes, acc[i]);
        }
        for (; k < end; ++k) {
            Vec a = load(out + k * wide + d), b = load(out + k * wide + d + kLanes);
            const float* line = share + (k - begin) * kPanel;
            for (int64_t j = 0; j < columns; ++j) {
                const Vec value = broadcast(line[j]);
                a = multiply_add(value, load(targets + j * wide + d), a);
                b = multiply_add(value, load(targets + j * wide + d + kLanes), b);
            }
            store(out + k * wide + d, a);
            store(out + k * wide + d + kLanes, b);
        }
    }
    for (; d < wide; d += kLanes) {
        for (int64_t k = begin; k < end; ++k) {
            Vec a = load(out + k * wide + d);
            const float* line = share + (k - begin) * kPanel;
            for (int64_t j = 0; j < columns; ++j) {
                a = multiply_add(broadcast(line[j]), load(targets + j * wide + d), a);
            }
            store(out + k * wide + d, a);
        }
    }
}

void reverse(const CrfItem& item, const float* grad, const float* messages, const float* norms, float* into,
             float* grad_left, float* grad_right, float* scratch) {
    const FlushToZero flush;
    if (item.length == 0) return;
    Arena arena{scratch};
    Step step(item, arena);
    const int64_t beam = item.beam, rank = item.rank, padded = step.padded;
    const int64_t wide = round_up(rank, kLanes), columns_all = round_up(beam, kPanel);
    float* alpha = arena.take(padded);
    float* message = arena.take(columns_all);
    float* flow = arena.take(columns_all);
    float* sums = arena.take(padded * kLanes);
    float* share = arena.take(kChunk * kPanel);
    float* target_rows = arena.take(columns_all * wide);
    float* source_sum = arena.take(padded * wide);
    float* target_sum = arena.take(columns_all * rank);
    const int64_t last = item.length - 1;
    for (int64_t j = 0; j < columns_all; ++j) flow[j] = j < beam ? grad[last * beam + j] : 0.0f;
    for (int64_t k = 0; k < beam; ++k) into[last * beam + k] = 0.0f;
    for (int64_t t = last - 1; t >= 0; --t) {
        step.load_step(item, t);
        for (int64_t k = 0; k < beam; ++k) alpha[k] = messages[t * beam + k] + item.scores[t * beam + k] - norms[t];
        for (int64_t k = beam; k < padded; ++k) alpha[k] = -kInfinity;
        for (int64_t j = 0; j < columns_all; ++j) message[j] = j < beam ? messages[(t + 1) * beam + j] : 0.0f;
        for (int64_t i = 0; i < padded * kLanes; ++i) sums[i] = 0.0f;
        if (grad_left != nullptr) {
            for (int64_t j = 0; j < columns_all; ++j) {
                for (int64_t d = 0; d < wide; ++d) {
                    target_rows[j * wide + d] = j < beam && d < rank ? step.targets[j * rank + d] : 0.0f;
                }
            }
            for (int64_t i = 0; i < padded * wide; ++i) source_sum[i] = 0.0f;
            for (int64_t i = 0; i < columns_all * rank; ++i) target_sum[i] = 0.0f;
        }
        for (int64_t j = 0; j < beam; j += kPanel) {
            const int vecs = vectors_of(beam - j);
            const float* panel = step.panels + j * rank;
            for (int64_t begin = 0; begin < padded; begin += kChunk) {
                const int64_t end = smaller(padded, begin + kChunk);
#define CALL(C) share_chunk<C>(step.rows, rank, begin, end, panel, alpha, message + j, flow + j, share, sums)
                SIMCTG_BY_VECTORS(vecs, CALL)
#undef CALL
                if (grad_left == nullptr) continue;
#define CALL(C) target_gradient<C>(step.rows, rank, begin, end, share, target_sum + j * rank)
                SIMCTG_BY_VECTORS(vecs, CALL)
#undef CALL
                source_gradient(target_rows + j * wide, wide, smaller(kPanel, beam - j), begin, end, share, source_sum);
            }
        }
        for (int64_t k = 0; k < beam; ++k) {
            const float total = sum(load(sums + k * kLanes));
            into[t * beam + k] = total;
            flow[k] = grad[t * beam + k] + total;
        }
        if (grad_left == nullptr) continue;
        const int64_t* tokens = item.tokens + t * beam;
        for (int64_t k = 0; k < beam; ++k) {
            float* row = grad_left + tokens[k] * rank;
            for (int64_t d = 0; d < rank; ++d) row[d] += item.scale * source_sum[k * wide + d];
        }
        for (int64_t k = 0; k < beam; ++k) {
            float* row = grad_right + tokens[beam + k] * rank;
            const float* column = target_sum + k / kPanel * kPanel * rank + k % kPanel;
            for (int64_t d = 0; d < rank; ++d) row[d] += item.scale * column[d * kPanel];
        }
    }
}

// ---- randomness -----------------------------------------------------------------------------------------------------

// Philox4x32-10 (Salmon et al. 2011), the same counters as in simctg_fast/ops/crf_common.py.
SIMCTG_INLINE void philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t* out) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
        c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
        c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
        c1 = static_cast<uint32_t>(p1);
        c3 = static_cast<uint32_t>(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

SIMCTG_INLINE float to_uniform(uint32_t word) { return static_cast<float>(word >> 8) * (1.0f / 16777216.0f); }

// ---- exact samples --------------------------------------------------------------------------------------------------

// For every lane: the first k whose running sum of exp(scores[k]) exceeds uniform · total. `scores` [padded][C · kLanes]
// is overwritten.
template <int C>
void choose(float* scores, int64_t padded, const float* uniform, float* chosen) {
    Vec top[C], total[C], run[C], index[C], last[C];
    for (int c = 0; c < C; ++c) top[c] = broadcast(kLowest), total[c] = run[c] = index[c] = last[c] = zeros();
    for (int64_t k = 0; k < padded; ++k) {
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) top[c] = max(load(scores + (k * C + c) * kLanes), top[c]);
    }
    for (int64_t k = 0; k < padded; ++k) {
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            float* at = scores + (k * C + c) * kLanes;
            const Vec weight = exponential(sub(load(at), top[c]));
            store(at, weight);
            total[c] = add(total[c], weight);
        }
    }
    for (int c = 0; c < C; ++c) total[c] = mul(total[c], load(uniform + c * kLanes));
    for (int64_t k = 0; k < padded; ++k) {
        const Vec here = broadcast(static_cast<float>(k));
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            const Vec weight = load(scores + (k * C + c) * kLanes);
            run[c] = add(run[c], weight);
            index[c] = add(index[c], not_above(run[c], total[c]));
            last[c] = where_less(zeros(), weight, here, last[c]);
        }
    }
    // Rounding may carry uniform · total up to the total: the last slot that has any weight, then.
    for (int c = 0; c < C; ++c) store(chosen + c * kLanes, min(index[c], last[c]));
}

void ffbs(const CrfItem& item, const float* messages, const float* norms, int64_t samples, uint64_t seed,
          const float* uniforms, int64_t first, int64_t count, int64_t* slots, float* scratch) {
    const FlushToZero flush;
    Arena arena{scratch};
    const int64_t beam = item.beam, rank = item.rank, padded = round_up(beam, kRows);
    float* rows = arena.take(padded * rank);
    float* panel = arena.take(kPanel * rank);
    float* alpha = arena.take(padded);
    float* scores = arena.take(padded * kPanel);
    alignas(64) float uniform[kPanel], chosen[kPanel];
    for (int64_t t = item.length - 1; t >= 0; --t) {
        gather_rows(item, t, item.left, rows);
        for (int64_t k = 0; k < beam; ++k) alpha[k] = messages[t * beam + k] + item.scores[t * beam + k] - norms[t];
        for (int64_t k = beam; k < padded; ++k) alpha[k] = -kInfinity;
        for (int64_t begin = first; begin < first + count; begin += kPanel) {
            const int64_t here = smaller(kPanel, first + count - begin);
            for (int64_t i = 0; i < kPanel; ++i) {
                const float* target = nullptr;
                if (i < here && t + 1 < item.length) {
                    const int64_t slot = slots[(t + 1) * samples + begin + i];
                    target = item.right + item.tokens[(t + 1) * beam + slot] * rank;
                }
                for (int64_t d = 0; d < rank; ++d) panel[d * kPanel + i] = target ? target[d] * item.scale : 0.0f;
                if (i >= here) {
                    uniform[i] = 0.0f;
                } else if (uniforms) {
                    uniform[i] = uniforms[t * samples + begin + i];
                } else {
                    uint32_t words[4];
                    philox(seed, 0, static_cast<uint32_t>(t), static_cast<uint32_t>(begin + i),
                           static_cast<uint32_t>(item.index), words);
                    uniform[i] = to_uniform(words[0]);
                }
            }
            const int vecs = vectors_of(here);
            score_columns(vecs, rows, rank, padded, panel, alpha, scores);
#define CALL(C) choose<C>(scores, padded, uniform, chosen)
            SIMCTG_BY_VECTORS(vecs, CALL)
#undef CALL
            for (int64_t i = 0; i < here; ++i) {
                slots[t * samples + begin + i] = smaller<int64_t>(beam - 1, static_cast<int64_t>(chosen[i]));
            }
        }
    }
}

// ---- the published sampler ------------------------------------------------------------------------------------------

constexpr int kTables = kRegisters == 32 ? 8 : 2;  // samples whose tables are drawn together
constexpr float kTiny = 1e-25f;                    // a smaller total has lost terms to underflow

// One vector of targets, kTables samples: sources drawn from factors[k][n] · terms[k], in slot order.
SIMCTG_INLINE void draw_tables(const float* factors, int64_t stride, const float* terms, int64_t padded,
                               const float* uniform, float* chosen, float* totals) {
    Vec total[kTables], run[kTables], index[kTables];
#pragma GCC unroll 8
    for (int n = 0; n < kTables; ++n) total[n] = run[n] = index[n] = zeros();
    for (int64_t k = 0; k < padded; ++k) {
        const Vec term = load(terms + k * kPanel);
#pragma GCC unroll 8
        for (int n = 0; n < kTables; ++n) {
            total[n] = multiply_add(broadcast(factors[k * stride + n]), term, total[n]);
        }
    }
#pragma GCC unroll 8
    for (int n = 0; n < kTables; ++n) {
        store(totals + n * kLanes, total[n]);
        total[n] = mul(total[n], load(uniform + n * kPanel));
    }
    for (int64_t k = 0; k < padded; ++k) {
        const Vec term = load(terms + k * kPanel);
#pragma GCC unroll 8
        for (int n = 0; n < kTables; ++n) {
            run[n] = multiply_add(broadcast(factors[k * stride + n]), term, run[n]);
            index[n] = add(index[n], not_above(run[n], total[n]));
        }
    }
#pragma GCC unroll 8
    for (int n = 0; n < kTables; ++n) store(chosen + n * kLanes, index[n]);
}

// The same for one sample, with every exponential taken of its own sum: right whatever the spread of the scores.
void draw_directly(const float* state, const float* steps, int64_t padded, float inverse, const float* uniform,
                   float* weights, float* chosen) {
    for (int64_t k = 0; k < padded; ++k) {
        const Vec total = add(broadcast(state[k]), load(steps + k * kPanel));
        store(weights + k * kLanes, mul(total, broadcast(inverse)));
    }
    choose<1>(weights, padded, uniform, chosen);
}

template <class Pointer>
void stochastic_item(const CrfItem& item, float temperature, int64_t all, uint64_t seed, const float* uniforms,
                     int64_t first, int64_t samples, int64_t* slots, float* prefixes, Pointer* backpointers,
                     float* scratch) {
    // From here on n counts from `first`; what is read and written holds `all` samples side by side.
    if (uniforms) uniforms += first;
    slots += first, prefixes += first, backpointers += first;
    if (item.length == 0) return;
    const FlushToZero flush;
    Arena arena{scratch};
    Step step(item, arena);
    const int64_t beam = item.beam, rank = item.rank, padded = step.padded;
    const int64_t tables = round_up(samples, kTables), columns = round_up(beam, kPanel);
    float* state = arena.take(padded * tables);      // [n][padded], each sample's largest score taken off
    float* following = arena.take(padded * tables);  // the next one
    float* factors = arena.take(padded * tables);    // exp(state / temperature), [padded][tables]
    float* steps = arena.take(padded * kPanel);      // transitions into a panel
    float* terms = arena.take(padded * kPanel);      // their exponentials
    float* weights = arena.take(padded * kLanes);
    float* zero = arena.take(padded);
    float* uniform = arena.take(tables * columns);  // [n][columns]
    alignas(64) float chosen[kTables * kLanes], totals[kTables * kLanes], direct[kLanes];
    const float inverse = 1.0f / temperature;
    for (int64_t k = 0; k < padded; ++k) zero[k] = k < beam ? 0.0f : -kInfinity;
    for (int64_t n = 0; n < samples; ++n) {
        float* own = state + n * padded;
        for (int64_t k = 0; k < beam; ++k) own[k] = item.scores[k];
        take_off_largest(own, beam);
        for (int64_t k = 0; k < beam; ++k) {
            prefixes[k * all + n] = own[k];
            backpointers[k * all + n] = 0;
        }
    }
    for (int64_t t = 1; t < item.length; ++t) {
        step.load_step(item, t - 1);
        for (int64_t n = 0; n < tables; ++n) {
            for (int64_t k = 0; k < padded; ++k) {
                factors[k * tables + n] = n < samples && k < beam ? state[n * padded + k] * inverse : -kInfinity;
            }
            if (n >= samples) continue;
            float* own = uniform + n * columns;
            if (uniforms) {
                for (int64_t j = 0; j < columns; ++j) {
                    own[j] = j < beam ? uniforms[((t - 1) * beam + j) * all + n] : 0.0f;
                }
            } else {
                for (int64_t j = 0; j < columns; j += 4) {
                    uint32_t words[4];
                    philox(seed, static_cast<uint32_t>(1 + j / 4), static_cast<uint32_t>(t - 1),
                           static_cast<uint32_t>(first + n), static_cast<uint32_t>(item.index), words);
                    for (int i = 0; i < 4; ++i) own[j + i] = to_uniform(words[i]);
                }
            }
        }
        static_assert(kRows * kTables % kLanes == 0, "padded * tables must be whole vectors");
        for (int64_t i = 0; i < padded * tables; i += kLanes) store(factors + i, exponential(load(factors + i)));
        const float* score = item.scores + t * beam;
        for (int64_t begin = 0; begin < beam; begin += kPanel) {
            const int vecs = vectors_of(beam - begin);
            for (int64_t k = 0; k < padded; k += kRows) {
                Vec acc[kRows * kVecs];
                score_tile<kVecs>(step.rows + k * rank, rank, step.panels + begin * rank, zero + k, acc);
                for (int i = 0; i < kRows * kVecs; ++i) store(steps + k * kPanel + i * kLanes, acc[i]);
            }
            for (int c = 0; c < vecs; ++c) {
                Vec top = broadcast(kLowest);
                for (int64_t k = 0; k < padded; ++k) top = max(load(steps + k * kPanel + c * kLanes), top);
                for (int64_t k = 0; k < padded; ++k) {
                    const Vec x = mul(sub(load(steps + k * kPanel + c * kLanes), top), broadcast(inverse));
                    store(terms + k * kPanel + c * kLanes, exponential(x));
                }
                for (int64_t n = 0; n < samples; n += kTables) {
                    // Tables behind `samples` draw too, with some other table's uniforms; nobody reads them.
                    alignas(64) float own[kTables * kPanel];
                    for (int i = 0; i < kTables; ++i) {
                        const int64_t from = smaller(n + i, samples - 1);
                        store(own + i * kPanel, load(uniform + from * columns + begin + c * kLanes));
                    }
                    draw_tables(factors + n, tables, terms + c * kLanes, padded, own, chosen, totals);
                    for (int i = 0; i < kTables && n + i < samples; ++i) {
                        const float* source = state + (n + i) * padded;
                        bool again = false;
                        for (int l = 0; l < kLanes; ++l) again |= !(totals[i * kLanes + l] >= kTiny);
                        if (again) {
                            draw_directly(source, steps + c * kLanes, padded, inverse, own + i * kPanel, weights, direct);
                        }
                        for (int l = 0; l < kLanes; ++l) {
                            const int64_t j = begin + c * kLanes + l;
                            if (j >= beam) break;
                            int64_t k;
                            if (again && !(totals[i * kLanes + l] >= kTiny)) {
                                k = static_cast<int64_t>(direct[l]);
                            } else {
                                k = smaller<int64_t>(static_cast<int64_t>(chosen[i * kLanes + l]), beam - 1);
                                // Rounding: the last slot that has any weight.
                                while (k > 0 && !(factors[k * tables + n + i] * terms[k * kPanel + c * kLanes + l] > 0)) --k;
                            }
                            k = smaller<int64_t>(k, beam - 1);
                            backpointers[(t * beam + j) * all + n + i] = static_cast<Pointer>(k);
                            following[(n + i) * padded + j] = source[k] + steps[k * kPanel + c * kLanes + l] + score[j];
                        }
                    }
                }
            }
        }
        for (int64_t n = 0; n < samples; ++n) {
            float* own = following + n * padded;
            take_off_largest(own, beam);
            for (int64_t j = 0; j < beam; ++j) prefixes[(t * beam + j) * all + n] = own[j];
        }
        float* swap = state;
        state = following;
        following = swap;
    }
    for (int64_t n = 0; n < samples; ++n) {
        int64_t slot = first_largest(state + n * padded, beam);
        for (int64_t t = item.length - 1; t >= 0; --t) {
            slots[t * all + n] = slot;
            slot = backpointers[(t * beam + slot) * all + n];
        }
    }
}

void stochastic(const CrfItem& item, float temperature, int64_t samples, uint64_t seed, const float* uniforms,
                int64_t first, int64_t count, int64_t* slots, float* prefixes, void* backpointers, float* scratch) {
    if (item.beam <= 256) {
        stochastic_item(item, temperature, samples, seed, uniforms, first, count, slots, prefixes,
                        static_cast<uint8_t*>(backpointers), scratch);
    } else {
        stochastic_item(item, temperature, samples, seed, uniforms, first, count, slots, prefixes,
                        static_cast<uint16_t*>(backpointers), scratch);
    }
}

int64_t scratch_size(int64_t beam, int64_t rank, int64_t samples) {
    const int64_t padded = round_up(beam, kRows), columns = round_up(beam, kPanel), wide = round_up(rank, kLanes);
    const int64_t tables = round_up(samples, kTables);
    int64_t size = 2 * padded * rank + columns * rank;                               // a Step
    size += 4 * columns + padded * kLanes + kPanel * rank + padded * kPanel;         // filters, columns, samples
    size += kChunk * kPanel + columns * wide + padded * wide + columns * rank;       // the reverse sweep
    size += 3 * padded * tables + 2 * padded * kPanel + padded * kLanes + padded + tables * columns;  // published law
    return size + 32 * 16;  // rounding of up to 32 pieces
}

// ---- beam selection -------------------------------------------------------------------------------------------------

int64_t group_maxima(const float* row, int64_t count, int64_t group, float* maxima, bool* nan) {
    // Lane l of a block of `group` vectors is one group: no maxima across lanes.
    Vec odd = zeros();
    int64_t groups = 0;
    const int64_t block = group * kLanes;
    constexpr int64_t kAhead = 1024;  // the processor's own reading ahead stops at every page
    for (int64_t begin = 0; begin < count; begin += block, groups += kLanes) {
        Vec top = broadcast(-kInfinity);
        const int64_t end = smaller(count, begin + block);
        int64_t i = begin;
        for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
            for (int64_t line = 0; line < 4 * kLanes; line += 16) __builtin_prefetch(row + i + kAhead + line, 0, 3);
            const Vec a = load(row + i), b = load(row + i + kLanes);
            const Vec c = load(row + i + 2 * kLanes), d = load(row + i + 3 * kLanes);
            top = max(max(max(a, b), max(c, d)), top);
            // A NaN anywhere makes the sum NaN; so do +inf and -inf together, which the caller sorts out.
            odd = add(odd, add(add(a, b), add(c, d)));
        }
        for (; i < end; i += kLanes) {
            Vec a = load(row + i, first_lanes(smaller<int64_t>(kLanes, end - i)));
            odd = add(odd, a);
            if (end - i < kLanes) {  // lanes behind the end were read as 0
                alignas(64) float lanes[kLanes];
                store(lanes, a);
                for (int64_t l = end - i; l < kLanes; ++l) lanes[l] = -kInfinity;
                a = load(lanes);
            }
            top = max(a, top);
        }
        store(maxima + groups, top);
    }
    alignas(64) float lanes[kLanes];
    store(lanes, odd);
    *nan = false;
    for (int l = 0; l < kLanes; ++l) *nan |= lanes[l] != lanes[l];
    return groups;
}

SIMCTG_INLINE int64_t count_reaching(const float* values, int64_t count, float limit) {
    Vec below[2] = {zeros(), zeros()};
    int64_t i = 0;
    for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
        below[0] = add(below[0], not_above(broadcast(limit), load(values + i)));
        below[1] = add(below[1], not_above(broadcast(limit), load(values + i + kLanes)));
    }
    for (; i < count; i += kLanes) below[0] = add(below[0], not_above(broadcast(limit), load(values + i)));
    return static_cast<int64_t>(sum(add(below[0], below[1])));
}

float largest(const float* values, int64_t count) {
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

// By bisection between the smallest and the largest: a selection in full would branch on every value.
float threshold(const float* values, int64_t count, int64_t wanted) {
    Vec least = broadcast(kInfinity);
    for (int64_t i = 0; i < count; i += kLanes) least = min(load(values + i), least);
    alignas(64) float lanes[kLanes];
    store(lanes, least);
    float low = lanes[0], high = largest(values, count);
    for (int l = 1; l < kLanes; ++l) low = smaller(low, lanes[l]);
    int64_t reaching = count;
    for (int step = 0; step < 20 && reaching > wanted + wanted / 16; ++step) {
        const float middle = low + (high - low) * 0.5f;
        if (!(middle > low && middle < high)) break;  // no room, or infinite
        const int64_t found = count_reaching(values, count, middle);
        if (found >= wanted) {
            low = middle, reaching = found;
        } else {
            high = middle;
        }
    }
    return reaching <= wanted + wanted / 4 ? low : __builtin_nanf("");
}

int64_t collect(const float* row, int64_t count, float threshold, const float* next, Candidate* out) {
    int64_t found = 0, i = 0;
#if defined(__AVX512F__)
    const Vec limit = broadcast(threshold);
    for (; i + kLanes <= count; i += kLanes) {
        __builtin_prefetch(next + i, 0, 2);
        uint32_t mask = _mm512_cmp_ps_mask(load(row + i), limit, _CMP_GE_OQ);
#elif defined(__AVX2__)
    const Vec limit = broadcast(threshold);
    for (; i + kLanes <= count; i += kLanes) {
        if (i % 16 == 0) __builtin_prefetch(next + i, 0, 2);
        uint32_t mask = static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(load(row + i), limit, _CMP_GE_OQ)));
#else
    for (; i + kLanes <= count; i += kLanes) {
        __builtin_prefetch(next + i, 0, 2);
        uint32_t mask = 0;
        for (int l = 0; l < kLanes; ++l) mask |= static_cast<uint32_t>(row[i + l] >= threshold) << l;
#endif
        for (; mask; mask &= mask - 1) {
            const int64_t at = i + __builtin_ctz(mask);
            out[found++] = {row[at], static_cast<uint32_t>(at)};
        }
    }
    for (; i < count; ++i) {
        if (row[i] >= threshold) out[found++] = {row[i], static_cast<uint32_t>(i)};
    }
    return found;
}

// ---- dense transitions ----------------------------------------------------------------------------------------------

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

const CrfKernels kKernels = {
    scratch_size, group_maxima, threshold, collect,          filter,          reverse,   max_filter, into_slot,    ffbs,
    stochastic,   kTables,      dense_any<false>, dense_any<true>, dense_lse, largest,    exponentials, kLanes, kDenseRows,
};

}  // namespace
}  // namespace simctg
