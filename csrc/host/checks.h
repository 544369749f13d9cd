// Errors that name the argument, the value it had and the values it may have.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace simctg {

inline void check(bool valid, const char* name, int64_t value, const char* allowed) {
    if (!valid) throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + ", must be " + allowed);
}

[[noreturn]] inline void fail(const std::string& name, int64_t value, int64_t limit) {
    throw std::invalid_argument(name + " is " + std::to_string(value) + ", must be in 0.." + std::to_string(limit));
}

// Of item b, checked; `lengths` null: all are `limit` long.
inline int64_t length_of(const int64_t* lengths, int64_t b, int64_t limit) {
    if (lengths == nullptr) return limit;
    if (lengths[b] < 0 || lengths[b] > limit) fail("lengths[" + std::to_string(b) + "]", lengths[b], limit);
    return lengths[b];
}

}  // namespace simctg
