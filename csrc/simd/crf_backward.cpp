// The reverse sweep of the low-rank CRF: gradients of the scores and of both tables from one of the messages.
//
// Floor: K² (3 R multiply-adds and an exponential) a step, R for the scores anew and R for each table's gradient; without
// tables R and the exponential. Layout: crf_tile.h; shares of kChunk sources × one panel of targets, [kChunk][kPanel], are
// used for both gradients while they are in the first-level cache. The gradient of the sources is summed row by row,
// that of the targets in panels, and both are added to the tables at the end of a step.
#include "simd/crf_tile.h"

namespace simctg::crf {
namespace {

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

void reverse(const Item& item, const float* grad, const float* messages, const float* norms, float* into,
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

int64_t scratch(int64_t beam, int64_t rank) {
    const int64_t padded = round_up(beam, kRows), columns = round_up(beam, kPanel), wide = round_up(rank, kLanes);
    return step_floats(beam, rank) + padded + 2 * columns + padded * kLanes + kChunk * kPanel + columns * wide +
           padded * wide + columns * rank + kSlack;
}

}  // namespace
}  // namespace simctg::crf

SIMCTG_TABLE(crf, Backward, scratch, reverse)
