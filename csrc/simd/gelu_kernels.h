// One instruction set's version of gelu.h. See simd.h.
#pragma once

#include "simd/simd_math.h"

namespace simctg {
namespace {

SIMCTG_INLINE Vec gelu_tanh(Vec x) {
    const Vec cube = mul(mul(x, x), x);
    const Vec inner = mul(broadcast(0.7978845608f), multiply_add(broadcast(0.044715f), cube, x));
    return mul(mul(broadcast(0.5f), x), add(broadcast(1.0f), hyperbolic_tangent(inner)));
}

SIMCTG_INLINE void gelu_tanh_all(const float* x, float* y, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(y + i, gelu_tanh(load(x + i)));
    if (i < count) {
        const Mask rest = first_lanes(count - i);
        store(y + i, gelu_tanh(load(x + i, rest)), rest);
    }
}

}  // namespace
}  // namespace simctg
