// The types that arrays come in.
#pragma once

#include <cstdint>

namespace simctg {

enum class ElementType { float32, bfloat16, float16 };

// Bytes of an element.
constexpr int size_of(ElementType type) { return type == ElementType::float32 ? 4 : 2; }

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

}  // namespace simctg
