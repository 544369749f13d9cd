// The kernels behind decode_attention.h, compiled once for each instruction set.
//
// Blocks of kBlock positions pass through the caches once; all query rows that share the key/value head, in tiles of
// kDotTileRows, take their scores, their softmax (online: largest score and sum so far) and their share of the values.
#pragma once

#include "decode_attention_dispatch.h"
#include "dot_block.h"
#include "simd_math.h"

namespace simctg {
namespace {

constexpr int64_t kBlock = 64;
constexpr float kMinusInfinity = -__builtin_inff();
constexpr int kValueVectors = kLanes == 16 ? 4 : 2;  // vectors of the output in a register tile

static_assert(kSplit % kBlock == 0 && kBlock % kLanes == 0, "blocks are whole vectors, cuts whole blocks");

// A row of a partial.
struct PartialRow {
    float* output;
    float* largest;
    float* sum;
    PartialRow(float* partial, int64_t row, int64_t value_dim)
        : output(partial + row * partial_stride(value_dim)),
          largest(output + partial_stride(value_dim) - 16),
          sum(largest + 1) {}
};

SIMCTG_INLINE float exponential_of(float x) {
    float lanes[kLanes];
    store(lanes, exponential(broadcast(x)));
    return lanes[0];
}

// What to subtract from scores whose largest is `largest`: exp(−inf − 0) is 0 where exp(−inf − −inf) would be NaN.
SIMCTG_INLINE float reference_score(float largest) { return largest == kMinusInfinity ? 0.0f : largest; }

// 0 where a position may be seen, −1 where not; whether any may.
SIMCTG_INLINE bool read_mask(const uint8_t* mask, int64_t count, float* closed) {
    uint8_t any = 0;
    for (int64_t j = 0; j < count; ++j) {
        closed[j] = mask[j] ? 0.0f : -1.0f;
        any |= mask[j];
    }
    for (int64_t j = count; j < kBlock; ++j) closed[j] = 0.0f;
    return any != 0;
}

SIMCTG_INLINE Vec final_score(const DecodeAttention& call, Vec score) {
    score = mul(score, broadcast(call.scaling));
    if (call.softcap != 0.0f) {
        const Vec cap = broadcast(call.softcap);
        score = mul(cap, hyperbolic_tangent(div(score, cap)));
    }
    return score;
}

// Products with the keys become exp(score − largest so far); returns what the row's earlier output is to be scaled by.
SIMCTG_INLINE float softmax_row(const DecodeAttention& call, float* scores, int64_t count, const float* bias,
                                const float* closed, PartialRow row) {
    const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
    for (int64_t j = count; j < padded; ++j) scores[j] = 0.0f;
    for (int64_t j = 0; j < count; j += kLanes) {
        Vec score = final_score(call, load(scores + j));
        if (bias) score = add(score, load(bias + j, first_lanes(smaller<int64_t>(kLanes, count - j))));
        if (closed) score = where_less(load(closed + j), zeros(), broadcast(kMinusInfinity), score);
        store(scores + j, score);
    }
    for (int64_t j = count; j < padded; ++j) scores[j] = kMinusInfinity;
    Vec best = broadcast(*row.largest);
    for (int64_t j = 0; j < padded; j += kLanes) best = max(best, load(scores + j));
    const float largest = highest(best), reference = reference_score(largest);
    const float scale = exponential_of(*row.largest - reference);
    Vec total = zeros();
    for (int64_t j = 0; j < padded; j += kLanes) {
        const Vec p = exponential(sub(load(scores + j), broadcast(reference)));
        store(scores + j, p);
        total = add(total, p);
    }
    *row.largest = largest;
    *row.sum = *row.sum * scale + sum(total);
    return scale;
}

// output = output · scale + Σ_j weights[j] · values[j], for Vectors vectors of it.
template <int Rows, int Vectors, bool Masked>
SIMCTG_INLINE void add_values(const float* weights, const float* values, int64_t stride, int64_t count, Mask mask,
                              const float* scale, float* output, int64_t output_stride) {
    Vec acc[Rows][Vectors];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) {
            acc[r][v] = mul(load(output + r * output_stride + v * kLanes), broadcast(scale[r]));
        }
    }
    for (int64_t j = 0; j < count; ++j) {
        Vec b[Vectors];
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) {
            const float* p = values + j * stride + v * kLanes;
            b[v] = Masked ? load(p, mask) : load(p);
        }
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
            const Vec a = broadcast(weights[r * kBlock + j]);
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) acc[r][v] = multiply_add(a, b[v], acc[r][v]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) store(output + r * output_stride + v * kLanes, acc[r][v]);
    }
}

template <int Rows>
void add_values(const float* weights, const float* values, int64_t stride, int64_t count, int64_t value_dim,
                const float* scale, float* output, int64_t output_stride) {
    int64_t d = 0;
    for (; d + kValueVectors * kLanes <= value_dim; d += kValueVectors * kLanes) {
        add_values<Rows, kValueVectors, false>(weights, values + d, stride, count, Mask(), scale, output + d,
                                               output_stride);
    }
    for (; d < value_dim; d += kLanes) {
        const Mask mask = first_lanes(smaller<int64_t>(kLanes, value_dim - d));
        add_values<Rows, 1, true>(weights, values + d, stride, count, mask, scale, output + d, output_stride);
    }
}

SIMCTG_INLINE void add_values(int rows, const float* weights, const float* values, int64_t stride, int64_t count,
                              int64_t value_dim, const float* scale, float* output, int64_t output_stride) {
    switch (rows) {
        case 1: return add_values<1>(weights, values, stride, count, value_dim, scale, output, output_stride);
        case 2: return add_values<2>(weights, values, stride, count, value_dim, scale, output, output_stride);
        case 3: return add_values<3>(weights, values, stride, count, value_dim, scale, output, output_stride);
        default: return add_values<4>(weights, values, stride, count, value_dim, scale, output, output_stride);
    }
}

void attend(const DecodeAttention& call, int64_t b, int64_t g, int64_t begin, int64_t end, float* queries,
            float* partial) {
    const int64_t rows = call.candidates * call.groups, dim = call.dim, value_dim = call.value_dim;
    const int64_t output_stride = partial_stride(value_dim);
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = b * call.candidates + i / call.groups, head = g * call.groups + i % call.groups;
        const float* query = call.query + row * call.query_row + head * call.query_head;
        for (int64_t d = 0; d < dim; ++d) queries[i * dim + d] = query[d];
        for (int64_t d = 0; d < output_stride; ++d) partial[i * output_stride + d] = 0.0f;
        *PartialRow(partial, i, value_dim).largest = kMinusInfinity;
    }
    const float* keys = call.key + b * call.key_batch + g * call.key_head;
    const float* values = call.value + b * call.value_batch + g * call.value_head;
    const bool one_mask = call.mask && call.mask_candidate == 0 && (call.mask_head == 0 || call.groups == 1);
    alignas(64) float scores[kDotTileRows * kBlock];
    alignas(64) float closed[kBlock];
    for (int64_t position = begin; position < end; position += kBlock) {
        const int64_t count = smaller(kBlock, end - position);
        if (one_mask) {
            const uint8_t* mask = call.mask + b * call.mask_batch + g * call.groups * call.mask_head + position;
            if (!read_mask(mask, count, closed)) continue;  // padding: not even read
        }
        const float* block_keys = keys + position * call.key_position;
        const float* block_values = values + position * call.value_position;
        for (int64_t first = 0; first < rows; first += kDotTileRows) {
            const int tile = static_cast<int>(smaller<int64_t>(kDotTileRows, rows - first));
            float scale[kDotTileRows];
            dot_block(tile, queries + first * dim, dim, block_keys, call.key_position, count, dim, scores, kBlock);
            for (int r = 0; r < tile; ++r) {
                const int64_t i = first + r, c = i / call.groups, head = g * call.groups + i % call.groups;
                if (call.mask && !one_mask) {
                    read_mask(call.mask + b * call.mask_batch + c * call.mask_candidate + head * call.mask_head +
                                  position,
                              count, closed);
                }
                const float* bias = call.bias ? call.bias + b * call.bias_batch + c * call.bias_candidate +
                                                    head * call.bias_head + position
                                              : nullptr;
                scale[r] = softmax_row(call, scores + r * kBlock, count, bias, call.mask ? closed : nullptr,
                                       PartialRow(partial, i, value_dim));
            }
            add_values(tile, scores, block_values, call.value_position, count, value_dim, scale,
                       partial + first * output_stride, output_stride);
        }
    }
}

// The score of the candidate's own key, −inf if the mask closes it.
SIMCTG_INLINE float new_score(const DecodeAttention& call, int64_t b, int64_t c, int64_t g, int64_t head) {
    if (call.mask &&
        !call.mask[b * call.mask_batch + c * call.mask_candidate + head * call.mask_head + call.length]) {
        return kMinusInfinity;
    }
    const int64_t row = b * call.candidates + c;
    const float* query = call.query + row * call.query_row + head * call.query_head;
    const float* key = call.new_key + row * call.new_key_row + g * call.new_key_head;
    float score;
    dot_tile<1, 1>(query, 0, key, 0, call.dim, &score, 0);
    float lanes[kLanes];
    store(lanes, final_score(call, broadcast(score)));
    if (!call.bias) return lanes[0];
    return lanes[0] +
           call.bias[b * call.bias_batch + c * call.bias_candidate + head * call.bias_head + call.length];
}

void finish(const DecodeAttention& call, int64_t b, int64_t g, int64_t cuts, float* partials) {
    const int64_t rows = call.candidates * call.groups, value_dim = call.value_dim;
    const int64_t cut_floats = rows * partial_stride(value_dim);
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t c = i / call.groups, head = g * call.groups + i % call.groups, row = b * call.candidates + c;
        const float own = call.new_key ? new_score(call, b, c, g, head) : kMinusInfinity;
        const float sink = call.sinks ? call.sinks[head] : kMinusInfinity;
        float largest = larger(own, sink);
        for (int64_t cut = 0; cut < cuts; ++cut) {
            largest = larger(largest, *PartialRow(partials + cut * cut_floats, i, value_dim).largest);
        }
        const float reference = reference_score(largest);
        const float own_weight = exponential_of(own - reference);
        float total = exponential_of(sink - reference) + own_weight;
        for (int64_t cut = 0; cut < cuts; ++cut) {
            const PartialRow part(partials + cut * cut_floats, i, value_dim);
            *part.largest = exponential_of(*part.largest - reference);  // from here on, the weight of the part
            total += *part.sum * *part.largest;
        }
        float* out = call.out + (row * call.kv_heads * call.groups + head) * value_dim;
        const float* value = call.new_key ? call.new_value + row * call.new_value_row + g * call.new_value_head : out;
        for (int64_t d = 0; d < value_dim; d += kLanes) {
            const Mask mask = first_lanes(smaller<int64_t>(kLanes, value_dim - d));
            Vec sum = call.new_key ? mul(load(value + d, mask), broadcast(own_weight)) : zeros();
            for (int64_t cut = 0; cut < cuts; ++cut) {
                const PartialRow part(partials + cut * cut_floats, i, value_dim);
                sum = multiply_add(load(part.output + d), broadcast(*part.largest), sum);
            }
            store(out + d, div(sum, broadcast(total)), mask);
        }
    }
}

constexpr AttentionKernels kAttentionKernels{attend, finish};

}  // namespace
}  // namespace simctg
