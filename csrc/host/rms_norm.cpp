#include "api/rms_norm.h"

#include <algorithm>

#include "api/cpu_features.h"
#include "host/parallel.h"

namespace simctg {
namespace {

RmsNormKernel kernel() {
#if defined(SIMCTG_FAST_X86_64)
    if (active_isa() == Isa::avx512) return rms_norm_avx512;
    if (active_isa() == Isa::avx2) return rms_norm_avx2;
#endif
    return rms_norm_generic;
}

constexpr int64_t kTask = 1 << 15;  // elements: some microseconds, so that waking a thread pays

}  // namespace

void rms_norm(const float* x, const float* weight, float epsilon, int64_t rows, int64_t width, float* y,
              int num_threads) {
    if (width == 0) return;
    const RmsNormKernel run = kernel();
    const int64_t height = std::max<int64_t>(1, kTask / width);
    parallel_for((rows + height - 1) / height, num_threads, [&](int64_t task) {
        const int64_t begin = task * height;
        run(x + begin * width, weight, epsilon, std::min(height, rows - begin), width, y + begin * width);
    });
}

}  // namespace simctg
