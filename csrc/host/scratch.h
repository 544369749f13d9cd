// Working memory of the kernels.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace simctg {

// Aligned memory that a thread keeps between calls.
class Scratch {
  public:
    float* get(int64_t floats) {
        if (floats > capacity_) {
            data_.reset();
            capacity_ = 0;
            const size_t bytes = static_cast<size_t>((floats + 1023) / 1024 * 1024) * sizeof(float);
            data_.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
            if (!data_) throw std::bad_alloc();
            capacity_ = static_cast<int64_t>(bytes / sizeof(float));
        }
        return data_.get();
    }

  private:
    struct Free {
        void operator()(float* p) const { std::free(p); }
    };
    std::unique_ptr<float, Free> data_;
    int64_t capacity_ = 0;
};

}  // namespace simctg
