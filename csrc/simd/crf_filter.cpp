// The forward filter of the low-rank CRF: messages, each position's largest score taken off.
//
// Floor: K² (R multiply-adds, a maximum and an exponential) a step; memory is the 2 K rows of the tables that a step
// gathers. Layout: crf_tile.h; the scores of kChunk sources wait in a stash on the stack for their common maximum.
#include "simd/crf_tile.h"

namespace simctg::crf {
namespace {

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

void filter(const Item& item, float* messages, float* norms, float* scratch) {
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
#define CALL(C) lse_panel<C>(step.rows, item.rank, step.padded, step.panels + j * item.rank, alpha, out + j)
                SIMCTG_BY_VECTORS(vectors_of(beam - j), CALL)
#undef CALL
            }
            for (int64_t k = 0; k < beam; ++k) message[k] = out[k];
        }
        const float* score = item.scores + t * beam;
        for (int64_t k = 0; k < beam; ++k) alpha[k] = message[k] + score[k];
        norms[t] = take_off_largest(alpha, beam);
    }
}

int64_t scratch(int64_t beam, int64_t rank) {
    return step_floats(beam, rank) + round_up(beam, kRows) + round_up(beam, kPanel) + kSlack;
}

}  // namespace
}  // namespace simctg::crf

SIMCTG_TABLE(crf, Filter, scratch, filter)
