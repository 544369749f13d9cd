// GELU, tanh form.
//
// Floor: 8 bytes an element, read and written once; some 25 operations an element, a division and an exponential among
// them, are what it takes where the array is in a cache. Layout: one contiguous array.
#include "simd/gelu.h"

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

void all(const float* x, float* y, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(y + i, gelu_tanh(load(x + i)));
    if (i < count) {
        const Mask rest = first_lanes(count - i);
        store(y + i, gelu_tanh(load(x + i, rest)), rest);
    }
}

}  // namespace
}  // namespace simctg::gelu

SIMCTG_TABLE(gelu, Kernels, all)
