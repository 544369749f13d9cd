// GELU, tanh form.
//
// Floor: two elements' bytes an element, read and written once; some 25 operations an element, a division and an exponential among
// them, are what it takes where the array is in a cache. Layout: one contiguous array.
#include "simd/gelu.h"

#include <type_traits>

#include "simd/element.h"
#include "simd/simd_math.h"

namespace simctg::gelu {
namespace {

using namespace simd;
using math::hyperbolic_tangent;

SIMCTG_INLINE Vec gelu_tanh(Vec x) {
    const Vec cube = mul(mul(x, x), x);
    const Vec inner = mul(broadcast(0.7978845608f), multiply_add(broadcast(0.044715f), cube, x));
    return mul(mul(broadcast(0.5f), x), add(broadcast(1.0f), hyperbolic_tangent(inner)));
}

template <class E>
SIMCTG_INLINE void all(const E* x, E* y, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(y + i, gelu_tanh(load(x + i)));
    if (i < count) {
        const Mask rest = first_lanes(count - i);
        store(y + i, gelu_tanh(load(x + i, rest)), rest);
    }
}

void run(ElementType type, const void* x, void* y, int64_t begin, int64_t count) {
    with_type(type, y, [=](auto* out) SIMCTG_INLINE_LAMBDA {
        all(static_cast<const std::remove_pointer_t<decltype(out)>*>(x) + begin, out + begin, count);
    });
}

}  // namespace
}  // namespace simctg::gelu

SIMCTG_TABLE(gelu, Kernels, run)
