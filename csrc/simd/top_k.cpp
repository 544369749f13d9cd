// The k most probable tokens of a row of logits.
//
// Floor: 4 bytes a logit, read once from memory (a row is in the second cache when it is read again), and an exponential
// a logit. Layout: a row in groups of kGroup, whose largest values, [groups], say which groups are looked into.
#include "simd/top_k.h"

#include "simd/simd_math.h"

namespace simctg::top_k {
namespace {

using namespace simd;
using math::exponential;

constexpr float kLowest = -__builtin_inff();

// The largest of them; NaN does not count.
SIMCTG_INLINE float largest(const float* x, int64_t count) {
    Vec best = broadcast(kLowest);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) best = max(load(x + i), best);  // best where either is NaN
    float found = highest(best);
    for (; i < count; ++i) found = x[i] > found ? x[i] : found;
    return found;
}

// Sum of exp(x - shift).
SIMCTG_INLINE float sum_of_exponentials(const float* x, int64_t count, float shift) {
    const Vec by = broadcast(shift);
    Vec sums[4] = {zeros(), zeros(), zeros(), zeros()};
    int64_t i = 0;
    for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) sums[v] = add(sums[v], exponential(sub(load(x + i + v * kLanes), by)));
    }
    Vec total = add(add(sums[0], sums[1]), add(sums[2], sums[3]));
    for (; i < count; i += kLanes) {
        const int64_t rest = smaller<int64_t>(kLanes, count - i);
        float values[kLanes];
        for (int64_t lane = 0; lane < kLanes; ++lane) values[lane] = lane < rest ? x[i + lane] - shift : -104.0f;
        total = add(total, exponential(load(values)));
    }
    return sum(total);
}

// Of two candidates for the list the larger comes first, and of equals the one that was there. NaN is none.
SIMCTG_INLINE int64_t insert(float value, int64_t index, int64_t held, int64_t k, float* values, int64_t* indices) {
    if (!(held < k ? value == value : value > values[k - 1])) return held;
    int64_t place = held < k ? held : k - 1;
    for (; place > 0 && value > values[place - 1]; --place) {
        values[place] = values[place - 1];
        indices[place] = indices[place - 1];
    }
    values[place] = value;
    indices[place] = index;
    return held < k ? held + 1 : k;
}

// The k-th largest of the groups' maxima is a bound that k elements reach: only groups that reach it are looked into.
void row(const float* logits, int64_t count, int64_t k, float* groups, float* probs, int64_t* tokens) {
    const int64_t number = (count + kGroup - 1) / kGroup;
    int64_t held = 0;
    for (int64_t g = 0; g < number; ++g) {
        groups[g] = largest(logits + g * kGroup, smaller(kGroup, count - g * kGroup));
        held = insert(groups[g], g, held, k, probs, tokens);
    }
    const float top = probs[0], bound = held == k ? probs[k - 1] : kLowest;
    held = 0;
    for (int64_t g = 0; g < number; ++g) {
        if (groups[g] < bound) continue;
        const int64_t end = smaller((g + 1) * kGroup, count);
        for (int64_t i = g * kGroup; i < end; ++i) {
            if (logits[i] >= bound) held = insert(logits[i], i, held, k, probs, tokens);
        }
    }
    for (; held < k; ++held) probs[held] = kLowest, tokens[held] = 0;  // fewer numbers than k, the rest NaN
    double total = 0.0;  // NaN where a logit is, and where top is infinite
    for (int64_t g = 0; g < number; ++g) {
        const int64_t begin = g * kGroup;
        total += static_cast<double>(sum_of_exponentials(logits + begin, smaller(kGroup, count - begin), top));
    }
    for (int64_t i = 0; i < k; ++i) {
        float lanes[kLanes];
        store(lanes, exponential(broadcast(probs[i] - top)));
        probs[i] = lanes[0] / static_cast<float>(total);
    }
}

}  // namespace
}  // namespace simctg::top_k

SIMCTG_TABLE(top_k, Kernels, row)
