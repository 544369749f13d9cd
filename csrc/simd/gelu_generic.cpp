#include "api/gelu.h"
#include "simd/gelu_kernels.h"

namespace simctg {

void gelu_tanh_generic(const float* x, float* y, int64_t count) { gelu_tanh_all(x, y, count); }

}  // namespace simctg
