// Root mean square normalisation in one pass; as separate tensor operations it costs as much as a small matrix product.
#pragma once

#include <cstdint>

namespace simctg {

// y[r, i] = weight[i] · x[r, i] / sqrt(mean(x[r]²) + epsilon), x and y contiguous [rows, width]; y may be x.
void rms_norm(const float* x, const float* weight, float epsilon, int64_t rows, int64_t width, float* y,
              int num_threads);

}  // namespace simctg
