// The stretches of a transformer block between its attentions, for a few rows: norm and projections, projection and
// residual, feed-forward network. Their arithmetic is that of rms_norm, linear and gelu_tanh, one after the other.
#pragma once

#include <cstdint>
#include <vector>

#include "api/linear.h"

namespace simctg {

struct LinearLayer {
    WeightLayout layout;
    const void* weight;
    const void* bias;  // or null
    int64_t in_features, out_features;
    ElementType type = ElementType::float32, weight_type = ElementType::float32;  // as `Linear`'s
};

struct RmsNorm {
    const float* weight;
    float epsilon;
};

enum class Activation { relu, gelu_tanh };

// All arrays float32 and contiguous; x and the results have `rows` rows.

// y[i] = norm(x) · layers[i]
void norm_linears(const float* x, int64_t rows, const RmsNorm& norm, const std::vector<const LinearLayer*>& layers,
                  const std::vector<float*>& y, int num_threads);

// y = x · layer + residual
void linear_residual(const float* x, int64_t rows, const LinearLayer& layer, const float* residual, float* y,
                     int num_threads);

// y = (act(norm(x) · inner) [* (norm(x) · gate)]) · outer + x; `gate` may be null.
void feed_forward(const float* x, int64_t rows, const RmsNorm& norm, const LinearLayer& inner, const LinearLayer* gate,
                  Activation act, const LinearLayer& outer, float* y, int num_threads);

}  // namespace simctg
