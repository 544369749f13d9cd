// What the hosts of crf.h share: the kernels of this machine, working memory, checks of lengths.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

#include "api/cpu_features.h"
#include "simd/crf_dispatch.h"

namespace simctg {

inline const CrfKernels& crf_kernels() {
#if defined(SIMCTG_FAST_X86_64)
    if (active_isa() == Isa::avx512) return crf_kernels_avx512();
    if (active_isa() == Isa::avx2) return crf_kernels_avx2();
#endif
    return crf_kernels_generic();
}

// Uninitialised floats on a cache line.
class Floats {
public:
    explicit Floats(int64_t count) : memory_(new char[static_cast<size_t>(count) * sizeof(float) + 64]) {
        const auto address = reinterpret_cast<std::uintptr_t>(memory_.get());
        data_ = reinterpret_cast<float*>((address + 63) / 64 * 64);
    }
    float* data() { return data_; }
    const float* data() const { return data_; }

private:
    std::unique_ptr<char[]> memory_;
    float* data_;
};

[[noreturn]] inline void fail(const std::string& what, int64_t value, int64_t limit) {
    throw std::invalid_argument(what + " is " + std::to_string(value) + ", must be in 0.." + std::to_string(limit));
}

inline int64_t length_of(const int64_t* lengths, int64_t b, int64_t limit) {
    if (lengths == nullptr) return limit;
    if (lengths[b] < 0 || lengths[b] > limit) fail("lengths[" + std::to_string(b) + "]", lengths[b], limit);
    return lengths[b];
}

}  // namespace simctg
