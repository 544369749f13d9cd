// What one instruction set offers to api/rms_norm.h.
#pragma once

#include <cstdint>

#include "api/element_type.h"
#include "simd/table.h"

namespace simctg::rms {

struct Kernels {
    // Rows from `begin` on.
    void (*run)(ElementType type, const void* x, const void* weight, float epsilon, int64_t begin, int64_t rows,
                int64_t width, void* y);
};

}  // namespace simctg::rms

SIMCTG_TABLES(rms::Kernels)
