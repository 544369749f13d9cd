// What one instruction set offers to api/top_k.h.
#pragma once

#include <cstdint>

#include "simd/table.h"

namespace simctg::top_k {

constexpr int64_t kGroup = 256;

struct Kernels {
    // One row; `groups` [ceil(count / kGroup)] is scratch.
    void (*row)(const float* logits, int64_t count, int64_t k, float* groups, float* probs, int64_t* tokens);
};

}  // namespace simctg::top_k

SIMCTG_TABLES(top_k::Kernels)
