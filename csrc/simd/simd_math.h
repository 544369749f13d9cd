// exp and tanh of a vector, to about one unit in the last place. See simd.h.
#pragma once

#include "simd/simd.h"

namespace simctg::math {
namespace {

using namespace simd;

// exp(x) = 2^n · exp(r), n = round(x / ln 2); the polynomial is a minimax fit of (exp(r) − 1 − r) / r² on |r| <= ln 2 / 2.
// 0 from −104 down, NaN stays NaN; meant for x <= 88.
SIMCTG_INLINE Vec exponential(Vec x) {
    x = min(broadcast(88.0f), max(broadcast(-104.0f), x));  // in this order NaN passes
    const Vec n = round_even(mul(x, broadcast(1.44269504f)));
    Vec r = multiply_add(n, broadcast(-0.693359375f), x);  // ln 2 in two parts, the first with few bits
    r = multiply_add(n, broadcast(2.12194440e-4f), r);
    Vec q = broadcast(0.0013814589f);
    q = multiply_add(q, r, broadcast(0.0083687175f));
    q = multiply_add(q, r, broadcast(0.0416683890f));
    q = multiply_add(q, r, broadcast(0.1666652113f));
    q = multiply_add(q, r, broadcast(0.4999999404f));
    const Vec value = add(multiply_add(mul(r, r), q, r), broadcast(1.0f));
    return scale_by_power(value, n);
}

// An odd polynomial (minimax on |x| < 0.625) where 1 − 2 / (exp(2x) + 1) would cancel.
SIMCTG_INLINE Vec hyperbolic_tangent(Vec x) {
    const Vec size = absolute(x), z = mul(x, x), one = broadcast(1.0f);
    Vec q = broadcast(-0.0057025771f);
    q = multiply_add(q, z, broadcast(0.0206370130f));
    q = multiply_add(q, z, broadcast(-0.0537391044f));
    q = multiply_add(q, z, broadcast(0.1333143562f));
    q = multiply_add(q, z, broadcast(-0.3333328068f));
    const Vec near = multiply_add(mul(x, z), q, x);
    const Vec doubled = min(broadcast(40.0f), add(size, size));  // NaN passes
    const Vec far = sub(one, div(broadcast(2.0f), add(exponential(doubled), one)));
    return where_less(size, broadcast(0.625f), near, copy_sign(far, x));
}

}  // namespace
}  // namespace simctg::math
