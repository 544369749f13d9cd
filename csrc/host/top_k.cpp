#include "api/top_k.h"

#include "api/cpu_features.h"
#include "host/parallel.h"
#include "host/scratch.h"

namespace simctg {
namespace {

TopKRow kernel() {
#if defined(SIMCTG_FAST_X86_64)
    if (active_isa() == Isa::avx512) return top_k_row_avx512;
    if (active_isa() == Isa::avx2) return top_k_row_avx2;
#endif
    return top_k_row_generic;
}

thread_local Scratch scratch;

constexpr int64_t kSmallWork = 1 << 15;  // logits below which waking a thread costs more than it saves

}  // namespace

void top_k_probs(const float* logits, int64_t rows, int64_t count, int64_t k, float* probs, int64_t* tokens,
                 int num_threads) {
    const TopKRow run = kernel();
    if (rows * count < kSmallWork) num_threads = 1;
    parallel_for(rows, num_threads, [&](int64_t row) {
        float* groups = scratch.get((count + kTopKGroup - 1) / kTopKGroup);
        run(logits + row * count, count, k, groups, probs + row * k, tokens + row * k);
    });
}

}  // namespace simctg
