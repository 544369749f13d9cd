// Root mean square normalisation of rows.
//
// Floor: two elements' bytes an element, read and written once from memory; the second reading of a row finds it in the cache.
// Layout: rows follow one another; four vectors of squares are summed side by side, then added up.
#include "simd/rms_norm.h"

#include <type_traits>

#include "simd/element.h"

namespace simctg::rms {
namespace {

using namespace simd;

template <class E>
SIMCTG_INLINE float sum_of_squares(const E* x, int64_t width) {
    Vec sums[4] = {zeros(), zeros(), zeros(), zeros()};
    int64_t i = 0;
    for (; i + 4 * kLanes <= width; i += 4 * kLanes) {
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            const Vec value = load(x + i + v * kLanes);
            sums[v] = multiply_add(value, value, sums[v]);
        }
    }
    for (; i < width; i += kLanes) {
        const int64_t rest = width - i;
        const Vec value = rest >= kLanes ? load(x + i) : load(x + i, first_lanes(rest));
        sums[0] = multiply_add(value, value, sums[0]);
    }
    return sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

template <class E>
SIMCTG_INLINE void all(const E* x, const E* weight, float epsilon, int64_t rows, int64_t width, E* y) {
    for (int64_t r = 0; r < rows; ++r, x += width, y += width) {
        const float mean = sum_of_squares(x, width) / static_cast<float>(width);
        const Vec scale = broadcast(1.0f / __builtin_sqrtf(mean + epsilon));
        int64_t i = 0;
        for (; i + kLanes <= width; i += kLanes) store(y + i, mul(load(weight + i), mul(load(x + i), scale)));
        if (i < width) {
            const Mask rest = first_lanes(width - i);
            store(y + i, mul(load(weight + i, rest), mul(load(x + i, rest), scale)), rest);
        }
    }
}

void run(ElementType type, const void* x, const void* weight, float epsilon, int64_t begin, int64_t rows, int64_t width,
         void* y) {
    with_type(type, y, [=](auto* out) SIMCTG_INLINE_LAMBDA {
        using E = std::remove_pointer_t<decltype(out)>;
        const int64_t offset = begin * width;
        all(static_cast<const E*>(x) + offset, static_cast<const E*>(weight), epsilon, rows, width, out + offset);
    });
}

}  // namespace
}  // namespace simctg::rms

SIMCTG_TABLE(rms, Kernels, run)
