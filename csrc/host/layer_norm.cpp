#include "api/layer_norm.h"

#include <algorithm>

#include "host/parallel.h"
#include "simd/layer_norm.h"

namespace simctg {
namespace {

constexpr int64_t kTask = 1 << 15;  // elements: some microseconds, so that waking a thread pays

}  // namespace

void layer_norm(const void* x, const void* weight, const void* bias, float epsilon, int64_t rows, int64_t width, void* y,
                int num_threads, ElementType type) {
    if (width == 0) return;
    const auto run = kernels<layer_normalisation::Kernels>().run;
    const int64_t height = std::max<int64_t>(1, kTask / width);
    parallel_ranges(rows, height, num_threads, [&](int64_t begin, int64_t count) {
        run(type, x, weight, bias, epsilon, begin, count, width, y);
    });
}

}  // namespace simctg
