// Working memory of the kernels: floats at the start of a cache line, as a vector that crosses two costs twice.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace simctg {

class Floats {  // not initialised
  public:
    Floats() = default;
    explicit Floats(int64_t count) {
        const size_t bytes = (static_cast<size_t>(count) * sizeof(float) / 64 + 1) * 64;
        data_.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
        if (!data_) throw std::bad_alloc();
    }
    float* data() const { return data_.get(); }
    explicit operator bool() const { return data_ != nullptr; }

  private:
    struct Free {
        void operator()(float* p) const { std::free(p); }
    };
    std::unique_ptr<float, Free> data_;
};

// Memory that a thread keeps between calls.
class Scratch {
  public:
    float* get(int64_t count) {
        if (count > capacity_) {
            capacity_ = 0;
            data_ = Floats();
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
