// The cosine of two states. Floor: the earlier one is read, 4 D bytes; the newest stays in the cache.
#include "simd/earlier_text.h"

#include "simd/dot_block.h"

namespace simctg::earlier_text {
namespace {

float dot(const float* a, const float* b, int64_t dim) {
    float product;
    dots::dot_tile<1, 1>(a, 0, b, 0, dim, &product, 0);
    return product;
}

}  // namespace
}  // namespace simctg::earlier_text

SIMCTG_TABLE(earlier_text, Kernels, dot)
