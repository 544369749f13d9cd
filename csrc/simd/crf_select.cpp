// Beam selection: which elements of a row of emissions can be among its largest.
//
// Floor: 4 V bytes of emissions a position, read once from memory; the second reading, for what reaches the threshold,
// finds the row in the cache while the next one is fetched. Layout: a row as it is; lane l of `group` vectors is a group,
// whose largest values, [groups], are all that is kept.
#include "simd/crf_tile.h"

namespace simctg::crf {
namespace {

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
    const Vec limit = broadcast(threshold);
    for (; i + kLanes <= count; i += kLanes) {
        if (kLanes != 8 || i % 16 == 0) __builtin_prefetch(next + i, 0, 2);
        uint32_t mask = at_least_bits(load(row + i), limit);
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

}  // namespace
}  // namespace simctg::crf

SIMCTG_TABLE(crf, Select, group_maxima, threshold, collect, kLanes)
