// What one instruction set offers to api/layer_norm.h.
#pragma once

#include <cstdint>

#include "api/element_type.h"
#include "simd/table.h"

namespace simctg::layer_normalisation {

struct Kernels {
    // Of the rows from `begin` on.
    void (*run)(ElementType type, const void* x, const void* weight, const void* bias, float epsilon, int64_t begin,
                int64_t rows, int64_t width, void* y);
};

}  // namespace simctg::layer_normalisation

SIMCTG_TABLES(layer_normalisation::Kernels)
