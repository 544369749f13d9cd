// Working memory of the kernels: floats at the start of a cache line, as a vector that crosses two costs twice.
#pragma once

#include <cstdint>
#include <memory>

namespace simctg {

class Floats {  // not initialised
  public:
    Floats() = default;
    explicit Floats(int64_t count) : memory_(new char[static_cast<size_t>(count) * sizeof(float) + 64]) {
        const auto address = reinterpret_cast<std::uintptr_t>(memory_.get());
        data_ = reinterpret_cast<float*>((address + 63) / 64 * 64);
    }
    float* data() const { return data_; }
    explicit operator bool() const { return memory_ != nullptr; }

  private:
    std::unique_ptr<char[]> memory_;
    float* data_ = nullptr;
};

// Memory that a thread keeps between calls.
class Scratch {
  public:
    float* get(int64_t count) {
        if (count > capacity_) {
            capacity_ = 0;
            data_ = Floats();  // given back first
            const int64_t floats = (count + 1023) / 1024 * 1024;
            data_ = Floats(floats);
            capacity_ = floats;
        }
        return data_.data();
    }

  private:
    Floats data_;
    int64_t capacity_ = 0;
};

}  // namespace simctg
