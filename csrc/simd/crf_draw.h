// What the samplers of the low-rank CRF share: random numbers, and slots drawn from columns of scores.
#pragma once

#include "simd/crf_tile.h"

namespace simctg::crf {
namespace {

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

}  // namespace
}  // namespace simctg::crf
