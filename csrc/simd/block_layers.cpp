// What a transformer block does element by element between its products.
//
// Floor: an element is read and written once, from a cache as a rule; SiLU's exponential and division are some 20
// operations. Layout: contiguous arrays; heads of a rotated row follow one another.
#include "simd/block_layers.h"

#include <type_traits>

#include "simd/element.h"
#include "simd/simd_math.h"

namespace simctg::block {
namespace {

using namespace simd;

// exp(−x) has no room for x below −88, where the value is x · exp(x).
SIMCTG_INLINE Vec silu_of(Vec x) {
    const Vec least = broadcast(-88.0f);
    const Vec power = math::exponential(where_less(x, least, x, sub(zeros(), x)));
    return where_less(x, least, mul(x, power), div(x, add(broadcast(1.0f), power)));
}

// y[i] = f(y[i], x[i]).
template <class F>
SIMCTG_INLINE void map(ElementType type, void* y, const void* x, int64_t begin, int64_t count, const F& f) {
    with_type(type, y, [=](auto* out) SIMCTG_INLINE_LAMBDA {
        using E = std::remove_pointer_t<decltype(out)>;
        E* p = out + begin;
        const E* other = static_cast<const E*>(x) + begin;
        int64_t i = 0;
        for (; i + kLanes <= count; i += kLanes) store(p + i, f(load(p + i), load(other + i)));
        if (i < count) {
            const Mask rest = first_lanes(count - i);
            store(p + i, f(load(p + i, rest), load(other + i, rest)), rest);
        }
    });
}

void silu(ElementType type, void* y, int64_t begin, int64_t count) {
    map(type, y, y, begin, count, [](Vec value, Vec) SIMCTG_INLINE_LAMBDA { return silu_of(value); });
}
void relu(ElementType type, void* y, int64_t begin, int64_t count) {
    map(type, y, y, begin, count, [](Vec value, Vec) SIMCTG_INLINE_LAMBDA { return max(zeros(), value); });
}
void multiply(ElementType type, void* y, const void* x, int64_t begin, int64_t count) {
    map(type, y, x, begin, count, [](Vec value, Vec other) SIMCTG_INLINE_LAMBDA { return mul(value, other); });
}
void add_to(ElementType type, void* y, const void* x, int64_t begin, int64_t count) {
    map(type, y, x, begin, count, [](Vec value, Vec other) SIMCTG_INLINE_LAMBDA { return add(value, other); });
}

template <class E>
SIMCTG_INLINE void rotate_head(E* y, const E* cos, const E* sin, int64_t half) {
    const auto turn = [=](int64_t i, auto... rest) SIMCTG_INLINE_LAMBDA {
        const Vec a = load(y + i, rest...), b = load(y + half + i, rest...);
        const Vec first = sub(mul(a, load(cos + i, rest...)), mul(b, load(sin + i, rest...)));
        const Vec second = add(mul(b, load(cos + half + i, rest...)), mul(a, load(sin + half + i, rest...)));
        store(y + i, first, rest...);
        store(y + half + i, second, rest...);
    };
    int64_t i = 0;
    for (; i + kLanes <= half; i += kLanes) turn(i);
    if (i < half) turn(i, first_lanes(half - i));
}

void rotate(ElementType type, void* y, const void* cos, const void* sin, int64_t stride, int64_t begin, int64_t rows,
            int64_t heads, int64_t width) {
    with_type(type, y, [=](auto* out) SIMCTG_INLINE_LAMBDA {
        using E = std::remove_pointer_t<decltype(out)>;
        for (int64_t r = begin; r < begin + rows; ++r) {
            const E *c = static_cast<const E*>(cos) + r * stride, *s = static_cast<const E*>(sin) + r * stride;
            for (int64_t h = 0; h < heads; ++h) rotate_head(out + (r * heads + h) * width, c, s, width / 2);
        }
    });
}

}  // namespace
}  // namespace simctg::block

SIMCTG_TABLE(block, Kernels, silu, relu, multiply, add_to, rotate)
