// Exact samples of the low-rank CRF: the filter's messages, then slots drawn from the last position to the first.
//
// Floor: K (R multiply-adds and an exponential) a sample and step. Layout: the targets of kPanel samples are one panel,
// [rank][kPanel], against all sources, row by row; their scores, [padded][kPanel], are drawn from lane by lane.
#include "simd/crf_draw.h"

namespace simctg::crf {
namespace {

void ffbs(const Item& item, const float* messages, const float* norms, int64_t samples, uint64_t seed,
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
#define CALL(C) all_scores<C>(rows, rank, padded, panel, alpha, scores)
            SIMCTG_BY_VECTORS(vecs, CALL)
#undef CALL
#define CALL(C) choose<C>(scores, padded, uniform, chosen)
            SIMCTG_BY_VECTORS(vecs, CALL)
#undef CALL
            for (int64_t i = 0; i < here; ++i) {
                slots[t * samples + begin + i] = smaller<int64_t>(beam - 1, static_cast<int64_t>(chosen[i]));
            }
        }
    }
}

int64_t scratch(int64_t beam, int64_t rank) {
    const int64_t padded = round_up(beam, kRows);
    return padded * rank + kPanel * rank + padded + padded * kPanel + kSlack;
}

}  // namespace
}  // namespace simctg::crf

SIMCTG_TABLE(crf, Ffbs, scratch, ffbs)
