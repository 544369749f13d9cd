// The stretches of a transformer block between its attentions, for a few rows: norm and projections (and rotation of
// queries and keys), projection and residual, feed-forward network; and whole blocks, one after the other. Their arithmetic
// is that of rms_norm, layer_norm, linear, gelu_tanh and decode_attention in turn.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "api/decode_attention.h"
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

// A block of a decoder: z = x + attention(norm(x)) · output, y as `linear_feed_forward` makes it of z.
struct DecoderBlock {
    Norm attention_norm;
    std::vector<LinearLayer> projections;  // to queries, keys and values, or one to all three, side by side
    float scaling;                         // of its attention
    LinearLayer output;
    Norm norm;
    LinearLayer inner;
    std::optional<LinearLayer> gate;
    Activation act;
    LinearLayer outer;
};

// What one of them reads and writes besides x. `query`, `new_key` and `new_value` are where the projections go; of one
// projection, parts of what it makes.
struct BlockArrays {
    void *query, *new_key, *new_value;
    const void *key, *value;  // that are there already
    void* y;
};

// Runs blocks in turn, the first on x and each on what the one before has made. `attention` says how they attend, all alike
// but for their arrays and the scaling, and may leave those out.
void decoder_blocks(const void* x, int64_t rows, const std::vector<const DecoderBlock*>& blocks,
                    const std::vector<BlockArrays>& arrays, DecodeAttention attention, const Rotation* rotation,
                    int num_threads);

}  // namespace simctg
