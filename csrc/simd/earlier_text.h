// What one instruction set offers to earlier_text.cpp.
#pragma once

#include <cstdint>

#include "simd/table.h"

namespace simctg::earlier_text {

struct Kernels {
    // a · b, of `dim` values.
    float (*dot)(const float* a, const float* b, int64_t dim);
};

}  // namespace simctg::earlier_text

SIMCTG_TABLES(earlier_text::Kernels)
