// Attention of a few queries over one prefix.
//
// Floor: keys and values, 2 or 4 T (dim + value_dim) bytes a key/value head, are read once for all its query rows; each row
// takes T multiply-adds by dim and by value_dim, and T exponentials. Layout: queries are copied together, [rows][dim in
// whole lines]; scores [rows][kSplit]; a partial row is its output, largest score and sum. Keys and values of 16 bits are
// widened in registers, once for the rows of a tile; pairs of bfloat16 are multiplied as they are where the processor can.
//
// A cut of the prefix is taken in three sweeps: all scores (keys pass once, kBlock at a time, through every query row
// that shares them), their softmax, all outputs (values pass once). While one sweep ends, the next one's memory is
// asked for.
#include "simd/decode_attention.h"

#include "simd/dot_block.h"
#include "simd/element.h"
#include "simd/simd_math.h"

namespace simctg::attention {
namespace {

using namespace simd;
using namespace dots;
using math::exponential;
using math::hyperbolic_tangent;

constexpr int64_t kBlock = 64;
constexpr int64_t kLine = 64;  // bytes
constexpr float kMinusInfinity = -__builtin_inff();
// Vectors of the output in a register tile.
constexpr int value_vectors(int rows) { return kRegisters == 32 || rows <= 3 ? 4 : 2; }

static_assert(kSplit % kBlock == 0 && kBlock % kLanes == 0, "blocks are whole vectors, cuts whole blocks");

template <class E>
SIMCTG_INLINE const E* elements(const void* array, int64_t first) { return static_cast<const E*>(array) + first; }

// What the queries are copied to: floats, or as they are where the processor multiplies pairs of bfloat16.
template <class E>
struct QueryOf {
    using Type = float;
};
template <class E>
SIMCTG_INLINE void copy_query(const E* query, int64_t dim, float* to) { widen_array(query, dim, to); }
#if defined(__AVX512BF16__)
template <>
struct QueryOf<BFloat16> {
    using Type = BFloat16;
};
SIMCTG_INLINE void copy_query(const BFloat16* query, int64_t dim, BFloat16* to) {
    int64_t d = 0;  // whole vectors, as they are read: a load waits where it spans two stores
    for (; d + 32 <= dim; d += 32) _mm512_storeu_si512(to + d, _mm512_loadu_si512(query + d));
    for (; d < dim; ++d) to[d] = query[d];
}
#endif

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

// Products with the keys become exp(score − largest). Room for whole vectors behind `scores` and `closed`.
SIMCTG_INLINE void softmax_row(const DecodeAttention& call, float* scores, int64_t count, const float* bias,
                               const float* closed, PartialRow row, const char* ahead) {
    Vec best = broadcast(kMinusInfinity);
    for (int64_t j = 0; j < count; j += kLanes) {
        const Mask mask = first_lanes(smaller<int64_t>(kLanes, count - j));
        Vec score = final_score(call, load(scores + j, mask));
        if (bias) score = add(score, load(bias + j, mask));
        if (closed) score = where_less(load(closed + j, mask), zeros(), broadcast(kMinusInfinity), score);
        store(scores + j, score);
        if (j + kLanes <= count) best = max(best, score);
    }
    const int64_t whole = count / kLanes * kLanes, padded = (count + kLanes - 1) / kLanes * kLanes;
    for (int64_t j = count; j < padded; ++j) scores[j] = kMinusInfinity;
    if (whole < count) best = max(best, load(scores + whole));
    const float largest = highest(best);
    const Vec reference = broadcast(reference_score(largest));
    Vec total = zeros();
    for (int64_t j = 0; j < padded; j += kLanes) {
        if (ahead) {
            prefetch_l2(ahead);
            prefetch_l2(ahead + kLine);
            ahead += 2 * kLine;
        }
        const Vec p = exponential(sub(load(scores + j), reference));
        store(scores + j, p);
        total = add(total, p);
    }
    *row.largest = largest;
    *row.sum = sum(total);
}

// output += Σ_j weights[j] · values[j], for Vectors vectors of it.
template <int Rows, int Vectors, bool Masked, class E>
SIMCTG_INLINE void add_values(const float* weights, const E* values, int64_t stride, int64_t count, Mask mask,
                              float* output, int64_t output_stride, Ahead<E> ahead) {
    Vec acc[Rows][Vectors];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) acc[r][v] = load(output + r * output_stride + v * kLanes);
    }
    for (int64_t j = 0; j < count; ++j) {
        if (ahead.rows) {
#pragma GCC unroll 4
            for (int64_t d = 0; d < Vectors * kLanes; d += kLineElements<E>) {
                prefetch_l2(ahead.rows + j * ahead.stride + d);
            }
        }
        Vec b[Vectors];
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) {
            const E* p = values + j * stride + v * kLanes;
            b[v] = Masked ? load(p, mask) : load(p);
        }
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
            const Vec a = broadcast(weights[r * kSplit + j]);
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

template <int Rows, class E>
void add_values(const float* weights, const E* values, int64_t stride, int64_t count, int64_t value_dim, float* output,
                int64_t output_stride, Ahead<E> ahead) {
    constexpr int vectors = value_vectors(Rows);
    const auto ahead_at = [=](int64_t d) SIMCTG_INLINE_LAMBDA {  // once for each line
        return Ahead<E>{ahead.rows && d % kLineElements<E> == 0 ? ahead.rows + d : nullptr, ahead.stride};
    };
    int64_t d = 0;
    for (; d + vectors * kLanes <= value_dim; d += vectors * kLanes) {
        add_values<Rows, vectors, false>(weights, values + d, stride, count, Mask(), output + d, output_stride,
                                         ahead_at(d));
    }
    for (; d < value_dim; d += kLanes) {
        const Mask mask = first_lanes(smaller<int64_t>(kLanes, value_dim - d));
        add_values<Rows, 1, true>(weights, values + d, stride, count, mask, output + d, output_stride, ahead_at(d));
    }
}

template <class E>
SIMCTG_INLINE void add_values(int rows, const float* weights, const E* values, int64_t stride, int64_t count,
                              int64_t value_dim, float* output, int64_t output_stride, Ahead<E> ahead) {
    switch (rows) {
        case 1: return add_values<1>(weights, values, stride, count, value_dim, output, output_stride, ahead);
        case 2: return add_values<2>(weights, values, stride, count, value_dim, output, output_stride, ahead);
        case 3: return add_values<3>(weights, values, stride, count, value_dim, output, output_stride, ahead);
        default: return add_values<4>(weights, values, stride, count, value_dim, output, output_stride, ahead);
    }
}

// A row of the bias as floats, in `room` where it is of 16 bits.
template <class E>
SIMCTG_INLINE const float* bias_row(const DecodeAttention& call, int64_t first, int64_t count, float* room) {
    if (call.bias_type == ElementType::float32) return elements<float>(call.bias, first);
    widen_array(elements<E>(call.bias, first), count, room);
    return room;
}

template <class E>
void attend(const DecodeAttention& call, int64_t b, int64_t g, int64_t begin, int64_t end, const void* next,
            float* scratch, float* partial) {
    const int64_t rows = call.candidates_of(b) * call.groups, value_dim = call.value_dim, count = end - begin;
    using Query = typename QueryOf<E>::Type;
    constexpr int64_t line = kLineElements<Query>;
    const int64_t query_stride = (call.dim + line - 1) / line * line, output_stride = partial_stride(value_dim);
    Query* queries = reinterpret_cast<Query*>(scratch);
    float *scores = reinterpret_cast<float*>(queries + rows * query_stride), *closed = scores + rows * kSplit;
    float* bias_room = closed + kSplit;
    const E* keys =
        elements<E>(call.key, b * call.key_batch + g * call.key_head + begin * call.key_position);
    const E* values =
        elements<E>(call.value, b * call.value_batch + g * call.value_head + begin * call.value_position);

    const bool one_mask = call.mask && call.mask_candidate == 0 && (call.mask_head == 0 || call.groups == 1);
    bool skip[kSplit / kBlock] = {};  // blocks that nobody may see (padding) are not even read
    for (int64_t j = 0; one_mask && j < count; j += kBlock) {
        const uint8_t* mask = call.mask + b * call.mask_batch + g * call.groups * call.mask_head + begin + j;
        skip[j / kBlock] = !read_mask(mask, smaller(kBlock, count - j), closed + j);
    }
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = call.first_row(b) + i / call.groups, head = g * call.groups + i % call.groups;
        const E* query = elements<E>(call.query, row * call.query_row + head * call.query_head);
        copy_query(query, call.dim, queries + i * query_stride);
        for (int64_t d = 0; d < output_stride; ++d) partial[i * output_stride + d] = 0.0f;
    }

    for (int64_t j = 0; j < count; j += kBlock) {
        const int64_t width = smaller(kBlock, count - j);
        for (int64_t first = 0; first < rows; first += kDotTileRows) {
            float* tile = scores + first * kSplit + j;
            const int height = static_cast<int>(smaller<int64_t>(kDotTileRows, rows - first));
            if (skip[j / kBlock]) {
                for (int64_t i = 0; i < height * width; ++i) tile[i / width * kSplit + i % width] = 0.0f;
                continue;
            }
            Ahead<E> ahead{};
            if (first == 0) {
                const bool more = j + 2 * kBlock <= count;
                ahead = more ? Ahead<E>{keys + (j + kBlock) * call.key_position, call.key_position}
                             : Ahead<E>{values, call.value_position};
            }
            dot_block(height, queries + first * query_stride, query_stride, keys + j * call.key_position,
                      call.key_position, width, call.dim, tile, kSplit, ahead);
        }
    }

    for (int64_t i = 0; i < rows; ++i) {
        const int64_t c = i / call.groups, head = g * call.groups + i % call.groups;
        if (call.mask && !one_mask) {
            read_mask(call.mask + b * call.mask_batch + c * call.mask_candidate + head * call.mask_head + begin, count,
                      closed);
        }
        const int64_t first = b * call.bias_batch + c * call.bias_candidate + head * call.bias_head + begin;
        const float* bias = call.bias ? bias_row<E>(call, first, count, bias_room) : nullptr;
        // The first block of the values is on its way; each vector of scores asks for two lines more.
        const int64_t asked = kBlock * value_dim + i * ((count + kLanes - 1) / kLanes) * 2 * kLineElements<E>;
        const bool fetch = call.value_position == value_dim && asked < count * value_dim;
        softmax_row(call, scores + i * kSplit, count, bias, call.mask ? closed : nullptr,
                    PartialRow(partial, i, value_dim), fetch ? reinterpret_cast<const char*>(values + asked) : nullptr);
    }

    for (int64_t j = 0; j < count; j += kBlock) {
        if (skip[j / kBlock]) continue;
        for (int64_t first = 0; first < rows; first += kDotTileRows) {
            Ahead<E> ahead{};
            if (first == 0 && j + 2 * kBlock <= count) {
                ahead = {values + (j + kBlock) * call.value_position, call.value_position};
            } else if (first == 0 && j + kBlock >= count) {
                ahead = {static_cast<const E*>(next), call.key_position};
            }
            add_values(static_cast<int>(smaller<int64_t>(kDotTileRows, rows - first)), scores + first * kSplit + j,
                       values + j * call.value_position, call.value_position, smaller(kBlock, count - j), value_dim,
                       partial + first * output_stride, output_stride, ahead);
        }
    }
}

// The score of the candidate's own key, −inf if the mask closes it.
template <class E>
SIMCTG_INLINE float new_score(const DecodeAttention& call, int64_t b, int64_t c, int64_t g, int64_t head) {
    if (call.mask &&
        !call.mask[b * call.mask_batch + c * call.mask_candidate + head * call.mask_head + call.length]) {
        return kMinusInfinity;
    }
    const int64_t row = call.first_row(b) + c;
    const E* query = elements<E>(call.query, row * call.query_row + head * call.query_head);
    const E* key = elements<E>(call.new_key, row * call.new_key_row + g * call.new_key_head);
    float score;
    dot_tile<1, 1>(query, 0, key, 0, call.dim, &score, 0);
    float lanes[kLanes];
    store(lanes, final_score(call, broadcast(score)));
    if (!call.bias) return lanes[0];
    float room;
    const int64_t own = b * call.bias_batch + c * call.bias_candidate + head * call.bias_head + call.length;
    return lanes[0] + *bias_row<E>(call, own, 1, &room);
}

template <class E>
void finish(const DecodeAttention& call, int64_t b, int64_t g, int64_t cuts, float* partials) {
    const int64_t rows = call.candidates_of(b) * call.groups, value_dim = call.value_dim;
    const int64_t cut_floats = call.candidates * call.groups * partial_stride(value_dim);
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t c = i / call.groups, head = g * call.groups + i % call.groups, row = call.first_row(b) + c;
        const float own = call.new_key ? new_score<E>(call, b, c, g, head) : kMinusInfinity;
        const float sink = call.sinks ? call.sinks[head] : kMinusInfinity;
        float largest = larger(own, sink);
        for (int64_t cut = 0; cut < cuts; ++cut) {
            largest = larger(largest, *PartialRow(partials + cut * cut_floats, i, value_dim).largest);
        }
        const float reference = reference_score(largest);
        const float own_weight = own == kMinusInfinity ? 0.0f : exponential_of(own - reference);
        float total = (sink == kMinusInfinity ? 0.0f : exponential_of(sink - reference)) + own_weight;
        for (int64_t cut = 0; cut < cuts; ++cut) {
            const PartialRow part(partials + cut * cut_floats, i, value_dim);
            // From here on, the weight of the part.
            *part.largest = *part.largest == reference ? 1.0f : exponential_of(*part.largest - reference);
            total += *part.sum * *part.largest;
        }
        E* out = static_cast<E*>(call.out) + (row * call.kv_heads * call.groups + head) * value_dim;
        const E* value =
            call.new_key ? elements<E>(call.new_value, row * call.new_value_row + g * call.new_value_head) : out;
        for (int64_t d = 0; d < value_dim; d += kLanes) {
            Vec sum = call.new_key ? mul(load_first(value + d, value_dim - d), broadcast(own_weight)) : zeros();
            for (int64_t cut = 0; cut < cuts; ++cut) {
                const PartialRow part(partials + cut * cut_floats, i, value_dim);
                sum = multiply_add(load(part.output + d), broadcast(*part.largest), sum);
            }
            store_first(out + d, div(sum, broadcast(total)), value_dim - d);
        }
    }
}

template <class E>
constexpr Typed typed() { return {attend<E>, finish<E>}; }

}  // namespace
}  // namespace simctg::attention

SIMCTG_TABLE(attention, Kernels, {typed<float>(), typed<BFloat16>(), typed<Float16>()})
