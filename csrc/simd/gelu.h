// What one instruction set offers to api/gelu.h.
#pragma once

#include <cstdint>

#include "api/element_type.h"
#include "simd/table.h"

namespace simctg::gelu {

struct Kernels {
    void (*run)(ElementType type, const void* x, void* y, int64_t begin, int64_t count);  // from `begin` on; y may be x
};

}  // namespace simctg::gelu

SIMCTG_TABLES(gelu::Kernels)
