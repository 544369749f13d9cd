// What one instruction set offers to api/gelu.h.
#pragma once

#include <cstdint>

#include "simd/table.h"

namespace simctg::gelu {

struct Kernels {
    void (*run)(const float* x, float* y, int64_t count);  // y may be x
};

}  // namespace simctg::gelu

SIMCTG_TABLES(gelu::Kernels)
