#include "api/gelu.h"

#include "host/parallel.h"
#include "simd/gelu.h"

namespace simctg {
namespace {

constexpr int64_t kTask = 1 << 14;  // elements: some microseconds, so that waking a thread pays

}  // namespace

void gelu_tanh(const void* x, void* y, int64_t count, int num_threads, ElementType type) {
    const auto run = kernels<gelu::Kernels>().run;
    parallel_ranges(count, kTask, num_threads, [&](int64_t begin, int64_t size) { run(type, x, y, begin, size); });
}

}  // namespace simctg
