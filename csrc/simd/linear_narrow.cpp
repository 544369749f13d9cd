// Products with weights of 16 bits, read in place.
//
// Floor: 2 bytes a weight; layouts: linear_tiles.h. Weights are widened in registers, once for all rows of x, and x is
// float; where the processor multiplies pairs of bfloat16, both are taken as they are.
#include "simd/linear_tiles.h"

namespace simctg::linear_layer {
namespace {

void widen(ElementType type, const void* from, int64_t count, float* to) {
    with_type(type, from, [=](const auto* in) SIMCTG_INLINE_LAMBDA { widen_array(in, count, to); });
}
void narrow(ElementType type, const float* from, int64_t count, void* to) {
    with_type(type, to, [=](auto* out) SIMCTG_INLINE_LAMBDA { narrow_array(from, count, out); });
}

#if defined(__AVX512BF16__)
constexpr InPlace<BFloat16, BFloat16> pairs = in_place<BFloat16, BFloat16>();
#else
constexpr InPlace<BFloat16, BFloat16> pairs{};
#endif

}  // namespace
}  // namespace simctg::linear_layer

SIMCTG_TABLE(linear_layer, NarrowKernels, (in_place<float, BFloat16>()), (in_place<float, Float16>()), pairs, widen, narrow)
