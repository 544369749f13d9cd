#include "api/rms_norm.h"

#include <algorithm>

#include "host/parallel.h"
#include "simd/rms_norm.h"

namespace simctg {
namespace {

constexpr int64_t kTask = 1 << 15;  // elements: some microseconds, so that waking a thread pays

}  // namespace

void rms_norm(const void* x, const void* weight, float epsilon, int64_t rows, int64_t width, void* y, int num_threads,
              ElementType type) {
    if (width == 0) return;
    const auto run = kernels<rms::Kernels>().run;
    const int64_t height = std::max<int64_t>(1, kTask / width);
    parallel_ranges(rows, height, num_threads, [&](int64_t begin, int64_t count) {
        run(type, x, weight, epsilon, begin, count, width, y);
    });
}

}  // namespace simctg
