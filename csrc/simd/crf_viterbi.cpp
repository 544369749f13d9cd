// The best path of the low-rank CRF, and single columns of scores for the n best.
//
// Floor: K² (R multiply-adds and a maximum) a step, K · R more to find the source of the path's slot again: no
// back-pointers are kept. Layout: crf_tile.h; `best` [length][beam] is all that the way back reads.
#include "simd/crf_tile.h"

namespace simctg::crf {
namespace {

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

// Scores of all sources at t, from `start`, into one slot at t + 1: the same operations in the same order as in a panel,
// so the result is bit for bit what the filter saw. `out` has room for padded · kLanes floats and holds [padded].
SIMCTG_INLINE void column_scores(const Item& item, int64_t t, int64_t slot, const float* start, float* rows,
                                 float* panel, float* out) {
    const int64_t rank = item.rank, padded = round_up(item.beam, kRows);
    gather_rows(item, t, item.left, rows);
    const float* target = item.right + item.tokens[(t + 1) * item.beam + slot] * rank;
    for (int64_t d = 0; d < rank; ++d) store(panel + d * kPanel, broadcast(target[d] * item.scale));
    all_scores<1>(rows, rank, padded, panel, start, out);
    for (int64_t k = 0; k < padded; ++k) out[k] = out[k * kLanes];
}

void into_slot(const Item& item, int64_t t, int64_t slot, const float* start, float* out, float* scratch) {
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

void max_filter(const Item& item, float* best, float* offsets, int64_t* slots, float* scratch) {
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
#define CALL(C) max_panel<C>(step.rows, item.rank, step.padded, step.panels + j * item.rank, state, out + j)
                SIMCTG_BY_VECTORS(vectors_of(beam - j), CALL)
#undef CALL
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

int64_t scratch(int64_t beam, int64_t rank) {
    const int64_t padded = round_up(beam, kRows);
    return step_floats(beam, rank) + padded + round_up(beam, kPanel) + kPanel * rank + padded * kLanes + kSlack;
}

}  // namespace
}  // namespace simctg::crf

SIMCTG_TABLE(crf, Viterbi, scratch, max_filter, into_slot)
