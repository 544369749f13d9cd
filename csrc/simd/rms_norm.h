// What one instruction set offers to api/rms_norm.h.
#pragma once

#include <cstdint>

#include "simd/table.h"

namespace simctg::rms {

struct Kernels {
    void (*run)(const float* x, const float* weight, float epsilon, int64_t rows, int64_t width, float* y);
};

}  // namespace simctg::rms

SIMCTG_TABLES(rms::Kernels)
