// The stretches of a transformer block between its attentions, for a few rows: norm and projections (and rotation of
// queries and keys), projection and residual, feed-forward network. Their arithmetic is that of rms_norm, layer_norm, linear
// and gelu_tanh, one after the other.
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

enum class NormKind { root_mean_square, layer };

struct Norm {
    NormKind kind;
    const void* weight;
    const void* bias;  // or null; of a layer norm alone
    float epsilon;
};

// Rotary positions: of each head of `width` elements the halves (a, b) become (a · cos − b · sin, b · cos + a · sin).
struct Rotation {
    const void *cos, *sin;  // [rows, width], rows `stride` elements apart
    int64_t stride, width;
    int64_t results;  // how many of them, from the first on
};

enum class Activation { relu, gelu_tanh, silu };

// All arrays are contiguous, x and the results have `rows` rows, and all but weights are of the layers' one `type`: what a
// norm, a layer, an activation, a gate and a residual make is computed in float32 and rounded to it once.

// y[i] = norm(x) · layers[i], rotated if `rotation` is not null.
void norm_linears(const void* x, int64_t rows, const Norm& norm, const std::vector<const LinearLayer*>& layers,
                  const Rotation* rotation, const std::vector<void*>& y, int num_threads);

// y = x · layer + residual
void linear_residual(const void* x, int64_t rows, const LinearLayer& layer, const void* residual, void* y,
                     int num_threads);

// y = (act(norm(z) · inner) [* (norm(z) · gate)]) · outer + z, for z = x · layer + residual; `gate` may be null.
void linear_feed_forward(const void* x, int64_t rows, const LinearLayer& layer, const void* residual, const Norm& norm,
                         const LinearLayer& inner, const LinearLayer* gate, Activation act, const LinearLayer& outer,
                         void* y, int num_threads);

}  // namespace simctg
