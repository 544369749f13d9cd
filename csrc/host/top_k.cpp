#include "api/top_k.h"

#include "host/memory.h"
#include "host/parallel.h"
#include "simd/top_k.h"

namespace simctg {
namespace {

thread_local Scratch scratch;

constexpr int64_t kSmallWork = 1 << 15;  // logits below which waking a thread costs more than it saves

}  // namespace

void top_k_probs(const float* logits, int64_t rows, int64_t count, int64_t k, float* probs, int64_t* tokens,
                 int num_threads) {
    const auto run = kernels<top_k::Kernels>().row;
    if (rows * count < kSmallWork) num_threads = 1;
    parallel_for(rows, num_threads, [&](int64_t row) {
        float* groups = scratch.get((count + top_k::kGroup - 1) / top_k::kGroup);
        run(logits + row * count, count, k, groups, probs + row * k, tokens + row * k);
    });
}

}  // namespace simctg
