#include "api/gelu.h"

#include <algorithm>

#include "api/cpu_features.h"
#include "host/parallel.h"

namespace simctg {
namespace {

GeluKernel kernel() {
#if defined(SIMCTG_FAST_X86_64)
    if (active_isa() == Isa::avx512) return gelu_tanh_avx512;
    if (active_isa() == Isa::avx2) return gelu_tanh_avx2;
#endif
    return gelu_tanh_generic;
}

constexpr int64_t kTask = 1 << 14;  // elements: some microseconds, so that waking a thread pays

}  // namespace

void gelu_tanh(const float* x, float* y, int64_t count, int num_threads) {
    const GeluKernel run = kernel();
    parallel_for((count + kTask - 1) / kTask, num_threads, [&](int64_t task) {
        const int64_t begin = task * kTask;
        run(x + begin, y + begin, std::min(kTask, count - begin));
    });
}

}  // namespace simctg
