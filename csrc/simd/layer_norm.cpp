// Normalisation of rows to mean 0 and variance 1.
//
// Floor: an element is read and written once from memory; later readings of a row find it in the cache.
// Layout: rows follow one another; four vectors of a sum stand side by side, then are added up. Squares are those of the
// distances from the mean: the mean of squares less the square of the mean would cancel.
#include "simd/layer_norm.h"

#include <type_traits>

#include "simd/element.h"

namespace simctg::layer_normalisation {
namespace {

using namespace simd;

// The sum of x − shift, or of its squares.
template <bool squares, class E>
SIMCTG_INLINE float sum_of(const E* x, int64_t width, float shift) {
    const Vec center = broadcast(shift);
    const auto joined = [&](Vec total, Vec value) SIMCTG_INLINE_LAMBDA {
        return squares ? multiply_add(value, value, total) : add(value, total);
    };
    Vec sums[4] = {zeros(), zeros(), zeros(), zeros()};
    int64_t i = 0;
    for (; i + 4 * kLanes <= width; i += 4 * kLanes) {
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) sums[v] = joined(sums[v], sub(load(x + i + v * kLanes), center));
    }
    for (; i + kLanes <= width; i += kLanes) sums[0] = joined(sums[0], sub(load(x + i), center));
    if (i < width) {
        const Mask rest = first_lanes(width - i);
        float distances[kLanes] = {};
        store(distances, sub(load(x + i, rest), center), rest);
        sums[1] = joined(sums[1], load(distances));
    }
    return sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

template <class E>
SIMCTG_INLINE void all(const E* x, const E* weight, const E* bias, float epsilon, int64_t rows, int64_t width, E* y) {
    const float count = static_cast<float>(width);
    for (int64_t r = 0; r < rows; ++r, x += width, y += width) {
        // What rounding leaves of the mean is that of the distances from it.
        const float mean = sum_of<false>(x, width, 0.0f) / count, rest_of_mean = sum_of<false>(x, width, mean) / count;
        const float variance = larger(sum_of<true>(x, width, mean) / count - rest_of_mean * rest_of_mean, 0.0f);
        const Vec center = broadcast(mean), rest_of_center = broadcast(rest_of_mean);
        const Vec scale = broadcast(1.0f / __builtin_sqrtf(variance + epsilon));
        const auto scaled = [&](Vec value, Vec factor, Vec shift) SIMCTG_INLINE_LAMBDA {
            return multiply_add(mul(sub(sub(value, center), rest_of_center), scale), factor, shift);
        };
        int64_t i = 0;
        for (; i + kLanes <= width; i += kLanes) {
            store(y + i, scaled(load(x + i), load(weight + i), bias ? load(bias + i) : zeros()));
        }
        if (i < width) {
            const Mask rest = first_lanes(width - i);
            store(y + i, scaled(load(x + i, rest), load(weight + i, rest), bias ? load(bias + i, rest) : zeros()), rest);
        }
    }
}

void run(ElementType type, const void* x, const void* weight, const void* bias, float epsilon, int64_t begin, int64_t rows,
         int64_t width, void* y) {
    with_type(type, y, [=](auto* out) SIMCTG_INLINE_LAMBDA {
        using E = std::remove_pointer_t<decltype(out)>;
        const int64_t offset = begin * width;
        all(static_cast<const E*>(x) + offset, static_cast<const E*>(weight), static_cast<const E*>(bias), epsilon, rows,
            width, out + offset);
    });
}

}  // namespace
}  // namespace simctg::layer_normalisation

SIMCTG_TABLE(layer_normalisation, Kernels, run)
