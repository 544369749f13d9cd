// The two phases of the contrastive loss.
//
// Floor: phase 1 T² D / 2 multiply-adds a sequence, less the slices that bounds make needless; the vectors are read and
// packed once. Phase 2 T² D / 4 additions for mixed tiles, T D / 128 for full ones, none for empty ones. Layout: unit
// vectors in panels of kPanel rows, [width][kPanel], on both sides of a product; tiles of kTile × kTile scores; tables
// of the 16 sums of four vectors, [kGroups][16][kColumns].
#include "simd/contrastive_loss.h"

#include "simd/element.h"

namespace simctg::hinge {
namespace {

using namespace simd;

constexpr int kPanel = 2 * kLanes;
constexpr int kColumnVectors = 4;
constexpr int64_t kColumns = kColumnVectors * kLanes;  // columns in a gradient task
constexpr int kGroups = 8;                             // of four vectors: one word of the bits

// ---- element types --------------------------------------------------------------------------------------------------

void load_floats(const States& states, int64_t offset, int64_t count, float* out) {
    with_type(states.type, states.data, [=](const auto* in) SIMCTG_INLINE_LAMBDA { widen_array(in + offset, count, out); });
}

void store_floats(void* data, ElementType type, int64_t offset, const float* in, int64_t count) {
    with_type(type, data, [=](auto* out) SIMCTG_INLINE_LAMBDA { narrow_array(in, count, out + offset); });
}

// ---- norms and panels -----------------------------------------------------------------------------------------------

SIMCTG_INLINE float sum_of_squares(const float* row, int64_t width, float factor) {
    const Vec f = broadcast(factor);
    Vec acc[4] = {zeros(), zeros(), zeros(), zeros()};
    int64_t k = 0;
    for (; k + 4 * kLanes <= width; k += 4 * kLanes) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const Vec v = mul(load(row + k + i * kLanes), f);
            acc[i] = multiply_add(v, v, acc[i]);
        }
    }
    for (; k < width; k += kLanes) {
        const int64_t left = width - k;
        const Vec v = mul(left >= kLanes ? load(row + k) : load(row + k, first_lanes(left)), f);
        acc[0] = multiply_add(v, v, acc[0]);
    }
    return sum(add(add(acc[0], acc[1]), add(acc[2], acc[3])));
}

// 1 / norm; 0 for a zero vector (or one below 2^-120, whose reciprocal would not fit), NaN for one that is not finite.
float inverse_norm(const float* row, int64_t width) {
    const float squares = sum_of_squares(row, width, 1.0f);
    if (squares > 1e-30f && squares < 1e30f) return 1.0f / __builtin_sqrtf(squares);
    uint32_t largest = 0;  // magnitudes of floats are ordered as their bits are
    for (int64_t k = 0; k < width; ++k) {
        const uint32_t magnitude = to_bits(row[k]) & 0x7FFFFFFFu;
        largest = magnitude > largest ? magnitude : largest;
    }
    if (largest >= 0x7F800000u) return from_bits(0x7FC00000u);
    if (from_bits(largest) <= 0x1p-120f) return 0.0f;
    const float factor = 1.0f / from_bits(largest);
    return factor / __builtin_sqrtf(sum_of_squares(row, width, factor));
}

// kLanes vectors as a square matrix, transposed in place: pairs, fours, and so on of lanes change places.
SIMCTG_INLINE void transpose(Vec* v) {
    Vec t[kLanes];
#if defined(__AVX512F__)
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        const __m512d a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 1]);
        const __m512d c = _mm512_castps_pd(t[i + 2]), d = _mm512_castps_pd(t[i + 3]);
        v[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
        v[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
        v[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
        v[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 16; i += 8) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            t[i + j] = _mm512_shuffle_f32x4(v[i + j], v[i + 4 + j], 0x88);
            t[i + 4 + j] = _mm512_shuffle_f32x4(v[i + j], v[i + 4 + j], 0xDD);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        v[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
        v[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xDD);
    }
#else
    float in[kLanes][kLanes], out[kLanes][kLanes];
    for (int i = 0; i < kLanes; ++i) store(in[i], v[i]);
    for (int i = 0; i < kLanes; ++i) {
        for (int j = 0; j < kLanes; ++j) out[j][i] = in[i][j];
    }
    for (int i = 0; i < kLanes; ++i) t[i] = load(out[i]);
    for (int i = 0; i < kLanes; ++i) v[i] = t[i];
#endif
}

void direction(const States& states, const uint8_t* real, int64_t b, float* row, const Direction& out) {
    constexpr int64_t kSamples = 32;
    const int64_t width = states.width, samples = smaller(kSamples, states.length);
    for (int64_t k = 0; k < width; ++k) out.vector[k] = 0.0f;
    for (int64_t n = 0; n < samples; ++n) {
        const int64_t t = n * states.length / samples;
        if (real != nullptr && !real[b * states.length + t]) continue;
        load_floats(states, b * states.batch_stride + t * states.row_stride, width, row);
        const float scale = inverse_norm(row, width);
        if (!(scale > 0.0f)) continue;
        for (int64_t k = 0; k < width; ++k) out.vector[k] += row[k] * scale;
    }
    float squares = 0.0f;
    for (int64_t slice = slices_of(width) - 1; slice >= 0; --slice) {
        const int64_t begin = slice * kSlice;
        squares += sum_of_squares(out.vector + begin, smaller(kSlice, width - begin), 1.0f);
        out.inverse_tail[slice] = squares > 1e-12f ? 1.0f / __builtin_sqrtf(squares) : 0.0f;
    }
}

void measure(const float* row, float scale, int64_t width, const Direction& direction, float* along, float* across,
             int64_t stride) {
    const Vec f = broadcast(scale);
    float squares = 0.0f, product = 0.0f;
    for (int64_t slice = slices_of(width) - 1; slice >= 0; --slice) {
        const int64_t end = smaller(width, (slice + 1) * kSlice);
        Vec square_sums = zeros(), product_sums = zeros();
        for (int64_t k = slice * kSlice; k < end; k += kLanes) {
            const bool whole = end - k >= kLanes;
            const Vec v = mul(whole ? load(row + k) : load(row + k, first_lanes(end - k)), f);
            const Vec d = whole ? load(direction.vector + k) : load(direction.vector + k, first_lanes(end - k));
            square_sums = multiply_add(v, v, square_sums);
            product_sums = multiply_add(v, d, product_sums);
        }
        squares += sum(square_sums);
        product += sum(product_sums);
        const float part = product * direction.inverse_tail[slice];
        const float rest = squares - part * part;
        along[slice * stride] = part;
        across[slice * stride] = __builtin_sqrtf((rest > 0.0f ? rest : 0.0f) + 1e-6f);  // more than rounding took away
    }
}

void pack(const States& states, const uint8_t* real, int64_t b, int64_t first_row, int64_t count, float* rows,
          float* inverse, float* panel, const Direction& direction, const Bounds& bounds) {
    const int64_t width = states.width;
    float scale[kPanel];
    for (int r = 0; r < kPanel; ++r) {
        float* row = rows + r * width;
        scale[r] = 0.0f;
        if (r < count) {
            const int64_t t = first_row + r;
            if (real == nullptr || real[b * states.length + t]) {
                load_floats(states, b * states.batch_stride + t * states.row_stride, width, row);
                scale[r] = inverse_norm(row, width);
            }
            inverse[r] = scale[r];
        }
        if (!(scale[r] > 0.0f)) {
            for (int64_t k = 0; k < width; ++k) row[k] = 0.0f;
            scale[r] = 0.0f;
        }
        measure(row, scale[r], width, direction, bounds.along + r, bounds.across + r, bounds.stride);
    }
    int64_t k = 0;
    for (; k + kLanes <= width; k += kLanes) {
        for (int half = 0; half < kPanel; half += kLanes) {
            Vec v[kLanes];
#pragma GCC unroll 16
            for (int r = 0; r < kLanes; ++r) v[r] = mul(load(rows + (half + r) * width + k), broadcast(scale[half + r]));
            transpose(v);
#pragma GCC unroll 16
            for (int c = 0; c < kLanes; ++c) store(panel + (k + c) * kPanel + half, v[c]);
        }
    }
    for (; k < width; ++k) {
        for (int r = 0; r < kPanel; ++r) panel[k * kPanel + r] = rows[r * width + k] * scale[r];
    }
}

// ---- phase 1 --------------------------------------------------------------------------------------------------------

// c[Rows][kPanel] (+)= a · b over `count` values of k.
template <int Rows>
SIMCTG_INLINE void multiply(const float* a, const float* b, int64_t count, float* c, bool resume) {
    Vec acc[Rows][2];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
        acc[r][0] = resume ? load(c + r * kTile) : zeros();
        acc[r][1] = resume ? load(c + r * kTile + kLanes) : zeros();
    }
    for (int64_t k = 0; k < count; ++k) {
        const Vec b0 = load(b), b1 = load(b + kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) {
            const Vec v = broadcast(a[r]);
            acc[r][0] = multiply_add(v, b0, acc[r][0]);
            acc[r][1] = multiply_add(v, b1, acc[r][1]);
        }
        a += kPanel;
        b += kPanel;
    }
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
        store(c + r * kTile, acc[r][0]);
        store(c + r * kTile + kLanes, acc[r][1]);
    }
}

// One panel of rows by one panel of columns, in slices that fit the registers.
SIMCTG_INLINE void multiply_panels(const float* a, const float* b, int64_t count, float* c, bool resume) {
    if constexpr (kLanes == 16) {
        multiply<12>(a, b, count, c, resume);
        multiply<12>(a + 12, b, count, c + 12 * kTile, resume);
        multiply<8>(a + 24, b, count, c + 24 * kTile, resume);
    } else if constexpr (kLanes == 8) {
        multiply<6>(a, b, count, c, resume);
        multiply<6>(a + 6, b, count, c + 6 * kTile, resume);
        multiply<4>(a + 12, b, count, c + 12 * kTile, resume);
    } else if constexpr (kRegisters == 32) {
        multiply<8>(a, b, count, c, resume);
    } else {
        multiply<4>(a, b, count, c, resume);
        multiply<4>(a + 4, b, count, c + 4 * kTile, resume);
    }
}

// What is known of a tile before its product is complete, from the slices done and the bounds of the rest.
enum class Verdict { open, none, full };

struct Range {
    float low, high;
};

SIMCTG_INLINE bool is_free(const uint32_t* bits, int64_t i) { return bits[i / 32] >> (i % 32) & 1u; }

bool all_free(const uint32_t* bits) {
    uint32_t used = 0;
    for (int w = 0; w < kTileWords; ++w) used |= ~bits[w];
    return used == 0;
}

Range used_range(const float* values, const uint32_t* free) {
    Range range{4.0f, -4.0f};
    for (int64_t i = 0; i < kTile; ++i) {
        if (is_free(free, i)) continue;
        range.low = smaller(range.low, values[i]);
        range.high = larger(range.high, values[i]);
    }
    return range;
}

// Before the first slice: the extremes of along_i along_j, the pairs i = i included.
Range first_range(const HingeTile& tile) {
    const Range a = used_range(tile.row_bounds.along, tile.free_rows);
    const Range b = used_range(tile.column_bounds.along, tile.free_columns);
    const float products[4] = {a.low * b.low, a.low * b.high, a.high * b.low, a.high * b.high};
    Range range{products[0], products[0]};
    for (const float product : products) {
        range.low = smaller(range.low, product);
        range.high = larger(range.high, product);
    }
    return range;
}

// After some slices: the extremes of s_ij so far + along_i along_j over the pairs that count.
Range range_after(const HingeTile& tile, int64_t slice) {
    const int vectors = static_cast<int>((tile.columns + kPanel - 1) / kPanel * kPanel) / kLanes;
    const float* along = tile.row_bounds.along + slice * tile.row_bounds.stride;
    const float* columns = tile.column_bounds.along + slice * tile.column_bounds.stride;
    float aside[kTile];  // takes the columns that do not count out of both extremes
    for (int64_t j = 0; j < kTile; ++j) aside[j] = is_free(tile.free_columns, j) ? 8.0f : 0.0f;
    Vec low = broadcast(4.0f), high = broadcast(-4.0f);
    for (int64_t i = 0; i < tile.rows; ++i) {
        if (is_free(tile.free_rows, i)) continue;
        const Vec own = broadcast(along[i]);
        // On the diagonal the panels to the left are not computed, and the pair i = i does not count.
        for (int v = tile.diagonal ? static_cast<int>(i / kPanel * kPanel) / kLanes : 0; v < vectors; ++v) {
            const Vec estimate = multiply_add(own, load(columns + v * kLanes), load(tile.scratch + i * kTile + v * kLanes));
            const Vec shift = load(aside + v * kLanes);
            Vec below = add(estimate, shift), above = sub(estimate, shift);
            if (tile.diagonal && v == i / kLanes) {
                float lanes[2][kLanes];
                store(lanes[0], below);
                store(lanes[1], above);
                lanes[0][i % kLanes] = 4.0f;
                lanes[1][i % kLanes] = -4.0f;
                below = load(lanes[0]);
                above = load(lanes[1]);
            }
            low = min(below, low);
            high = max(above, high);
        }
    }
    float lows[kLanes], highs[kLanes];
    store(lows, low);
    store(highs, high);
    Range range{lows[0], highs[0]};
    for (int i = 1; i < kLanes; ++i) {
        range.low = smaller(range.low, lows[i]);
        range.high = larger(range.high, highs[i]);
    }
    return range;
}

// The verdict, and the next slice that is worth asking at: where the bounds of the rest have fallen below the distance
// from the threshold. A tile with estimates on both sides is not asked about again.
Verdict judge(const HingeTile& tile, const Range& range, int64_t slice, int64_t* next) {
    constexpr float kRounding = 1e-5f;
    const float full = range.low - tile.threshold, none = tile.threshold - range.high;
    const float distance = larger(full, none) - kRounding;
    const int64_t slices = slices_of(tile.width);
    *next = slices;
    if (!(distance > 0.0f)) return Verdict::open;
    for (int64_t s = slice; s < slices; ++s) {
        const Range rows = used_range(tile.row_bounds.across + s * tile.row_bounds.stride, tile.free_rows);
        const Range columns = used_range(tile.column_bounds.across + s * tile.column_bounds.stride, tile.free_columns);
        if (rows.high * columns.high >= distance) continue;
        if (s == slice) return full > none ? Verdict::full : Verdict::none;
        *next = s;
        break;
    }
    return Verdict::open;
}

Verdict multiply_tile(const HingeTile& tile) {
    if (all_free(tile.free_rows) || all_free(tile.free_columns)) return Verdict::none;
    const int row_panels = static_cast<int>((tile.rows + kPanel - 1) / kPanel);
    const int column_panels = static_cast<int>((tile.columns + kPanel - 1) / kPanel);
    const int64_t slices = slices_of(tile.width);
    int64_t next = 0;
    for (int64_t slice = 0; slice < slices; ++slice) {
        if (slice == next) {
            const Verdict verdict = judge(tile, slice ? range_after(tile, slice) : first_range(tile), slice, &next);
            if (verdict != Verdict::open) return verdict;
        }
        const int64_t k = slice * kSlice, count = smaller(kSlice, tile.width - k);
        for (int j = 0; j < column_panels; ++j) {
            const float* b = tile.right + (j * tile.width + k) * kPanel;
            for (int i = 0; i < (tile.diagonal ? j + 1 : row_panels); ++i) {
                multiply_panels(tile.left + (i * tile.width + k) * kPanel, b, count,
                                tile.scratch + i * kPanel * kTile + j * kPanel, k > 0);
            }
        }
    }
    if (!tile.diagonal) return Verdict::open;
    for (int64_t i = 0; i < tile.rows; ++i) {
        for (int64_t j = 0; j < i / kPanel * kPanel; ++j) tile.scratch[i * kTile + j] = tile.scratch[j * kTile + i];
        tile.scratch[i * kTile + i] = -1.0f;  // below every threshold
    }
    return Verdict::open;
}

void tile_sum(const float* panels, int64_t rows, int64_t width, float* out) {
    for (int64_t k = 0; k < width; ++k) {
        Vec total = zeros();
        for (int64_t p = 0; p * kPanel < rows; ++p) {
            const float* panel = panels + (p * width + k) * kPanel;
            total = add(total, add(load(panel), load(panel + kLanes)));
        }
        out[k] = sum(total);
    }
}

void tile_dots(const float* panels, int64_t rows, int64_t width, const float* vector, float* dots) {
    for (int64_t p = 0; p * kPanel < rows; ++p) {
        Vec acc[2][2] = {{zeros(), zeros()}, {zeros(), zeros()}};
        for (int64_t k = 0; k < width; ++k) {
            const float* panel = panels + (p * width + k) * kPanel;
            const Vec v = broadcast(vector[k]);
            acc[k & 1][0] = multiply_add(v, load(panel), acc[k & 1][0]);
            acc[k & 1][1] = multiply_add(v, load(panel + kLanes), acc[k & 1][1]);
        }
        store(dots + p * kPanel, add(acc[0][0], acc[1][0]));
        store(dots + p * kPanel + kLanes, add(acc[0][1], acc[1][1]));
    }
}

SIMCTG_INLINE int count_bits(const uint32_t* words) {
    int count = 0;
    for (int w = 0; w < kTileWords; ++w) count += __builtin_popcount(words[w]);
    return count;
}

// Bit j of out[i] = bit i of in[j]; Hacker's Delight, section 7-3, turned around for bit 0 being the first column.
void transpose_bits(const uint32_t* in, int64_t in_stride, uint32_t* out, int64_t out_stride) {
    uint32_t a[32];
    for (int i = 0; i < 32; ++i) a[i] = in[i * in_stride];
    uint32_t mask = 0x0000FFFFu;
    for (int step = 16; step; step >>= 1, mask ^= mask << step) {
        for (int i = 0; i < 32; i = (i + step + 1) & ~step) {
            const uint32_t swap = ((a[i] >> step) ^ a[i + step]) & mask;
            a[i + step] ^= swap;
            a[i] ^= swap << step;
        }
    }
    for (int i = 0; i < 32; ++i) out[i * out_stride] = a[i];
}

uint8_t hinge_tile(const HingeTile& tile) {
    switch (multiply_tile(tile)) {
        case Verdict::none: return 0;
        case Verdict::full: return kProvenFull;
        case Verdict::open: break;
    }
    constexpr int kVectors = static_cast<int>(kTile) / kLanes;
    const Vec threshold = broadcast(tile.threshold);
    Vec column_sums[kVectors];
    for (int v = 0; v < kVectors; ++v) column_sums[v] = zeros();
    uint32_t words[kTile][kTileWords] = {};
    // Lanes beyond the columns were never written, rows beyond the rows neither.
    const int vectors = static_cast<int>((tile.columns + kLanes - 1) / kLanes);
    for (int64_t i = 0; i < tile.rows; ++i) {
        Vec row_sum = zeros();
        for (int v = 0; v < vectors; ++v) {
            const int64_t left = tile.columns - v * kLanes;
            Vec excess = sub(load(tile.scratch + i * kTile + v * kLanes), threshold);
            if (left < kLanes) {  // never more than once a row
                store(tile.scratch + i * kTile + v * kLanes, excess);
                excess = load(tile.scratch + i * kTile + v * kLanes, first_lanes(left));
            }
            if (tile.keep) words[i][v * kLanes / 32] |= above_bits(excess, zeros()) << (v * kLanes % 32);
            excess = max(excess, zeros());
            row_sum = add(row_sum, excess);
            column_sums[v] = add(column_sums[v], excess);
        }
        tile.row_sums[i] = sum(row_sum);
    }
    for (int64_t i = tile.rows; i < kTile; ++i) tile.row_sums[i] = 0.0f;
    if (!tile.diagonal) {
        for (int v = 0; v < kVectors; ++v) store(tile.column_sums + v * kLanes, column_sums[v]);
    }
    if (!tile.keep) return 0;

    uint32_t some = 0, missing = 0;
    for (int64_t i = 0; i < kTile; ++i) {
        tile.row_counts[i] = static_cast<float>(count_bits(words[i]));
        if (tile.free_rows[i / 32] >> (i % 32) & 1u) continue;
        for (int w = 0; w < kTileWords; ++w) {
            const uint32_t own = tile.diagonal && w == i / 32 ? 1u << (i % 32) : 0u;
            some |= words[i][w];
            missing |= ~(words[i][w] | tile.free_columns[w] | own);
        }
    }
    uint32_t mirror[kTile][kTileWords];
    if (!tile.diagonal) {
        for (int r = 0; r < kTileWords; ++r) {
            for (int c = 0; c < kTileWords; ++c) transpose_bits(&words[32 * r][c], kTileWords, &mirror[32 * c][r], kTileWords);
        }
        for (int64_t j = 0; j < kTile; ++j) tile.column_counts[j] = static_cast<float>(count_bits(mirror[j]));
    }
    if (!some) return 0;
    if (!missing) return 1;
    for (int64_t i = 0; i < kTile; ++i) {
        for (int w = 0; w < kTileWords; ++w) tile.bits[i * tile.bits_stride + w] = words[i][w];
        if (tile.diagonal) continue;
        for (int w = 0; w < kTileWords; ++w) tile.mirror_bits[i * tile.bits_stride + w] = mirror[i][w];
    }
    return 2;
}

// ---- phase 2 --------------------------------------------------------------------------------------------------------

// Unit vectors j .. j + count - 1 of the task's columns; zeros beyond the sequence and the width, and for padding.
void load_vectors(const GradientTask& task, int64_t j, int64_t count, int64_t columns) {
    const States& states = task.call->states;
    const float* inverse = task.call->inverse + task.b * states.length;
    for (int64_t r = 0; r < count; ++r) {
        float* out = task.vectors + r * kColumns;
        const float scale = j + r < states.length ? inverse[j + r] : 0.0f;
        int64_t filled = 0;
        if (scale > 0.0f) {
            const int64_t at = task.b * states.batch_stride + (j + r) * states.row_stride + task.first_column;
            load_floats(states, at, columns, out);
            for (int64_t k = 0; k < columns; ++k) out[k] *= scale;
            filled = columns;
        }
        for (int64_t k = filled; k < kColumns; ++k) out[k] = 0.0f;
    }
}

// table[g][n] = sum of the vectors 4g + (bits of n). Groups from `groups` on have no vectors, and n = 0 only.
void build_table(const float* vectors, float* table, int groups) {
    for (int g = groups; g < kGroups; ++g) {
        for (int64_t k = 0; k < kColumns; k += kLanes) store(table + 16 * g * kColumns + k, zeros());
    }
    for (int g = 0; g < groups; ++g) {
        const float* in = vectors + 4 * g * kColumns;
        float* out = table + 16 * g * kColumns;
        for (int64_t k = 0; k < kColumns; k += kLanes) {
            Vec sums[16];
            sums[0] = zeros();
#pragma GCC unroll 4
            for (int n = 0; n < 4; ++n) {
                const Vec v = load(in + n * kColumns + k);
#pragma GCC unroll 8
                for (int low = 0; low < 1 << n; ++low) sums[(1 << n) + low] = low ? add(sums[low], v) : v;
            }
#pragma GCC unroll 16
            for (int n = 0; n < 16; ++n) store(out + n * kColumns + k, sums[n]);
        }
    }
}

// Adds to 128 rows what one word of each row's bits selects.
void add_selected(const uint32_t* bits, int64_t bits_stride, const float* table, float* sums, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) {
        const uint32_t word = bits[i * bits_stride];
        float* row = sums + i * kColumns;
        Vec acc[kColumnVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kColumnVectors; ++v) acc[v] = load(row + v * kLanes);
#pragma GCC unroll 8
        for (int g = 0; g < kGroups; ++g) {
            const float* entry = table + (16 * g + ((word >> (4 * g)) & 15u)) * kColumns;
#pragma GCC unroll 4
            for (int v = 0; v < kColumnVectors; ++v) acc[v] = add(acc[v], load(entry + v * kLanes));
        }
#pragma GCC unroll 4
        for (int v = 0; v < kColumnVectors; ++v) store(row + v * kLanes, acc[v]);
    }
}

void gradient(const GradientTask& task) {
    const HingeGradient& call = *task.call;
    const States& states = call.states;
    const int64_t length = states.length, tiles = (length + kTile - 1) / kTile, words = tiles * kTileWords;
    const int64_t columns = smaller<int64_t>(kColumns, states.width - task.first_column);
    const int64_t first = task.first_row / kTile, end = (task.end_row + kTile - 1) / kTile;
    const uint32_t* bits = call.bits + task.b * tiles * kTile * words;
    const uint8_t* flags = call.flags + task.b * tiles * tiles;
    for (int64_t i = 0; i < (task.end_row - task.first_row) * kColumns; ++i) task.sums[i] = 0.0f;
    for (int64_t i = 0; i < (end - first) * kColumns; ++i) task.full[i] = 0.0f;

    for (int64_t j = 0; j < tiles; ++j) {
        bool any_full = false, any_mixed = false;
        for (int64_t i = first; i < end; ++i) {
            any_full |= flags[i * tiles + j] == 1;
            any_mixed |= flags[i * tiles + j] == 2;
        }
        if (!any_full && !any_mixed) continue;
        Vec total[kColumnVectors] = {zeros(), zeros(), zeros(), zeros()};
        for (int64_t w = 0; w < kTileWords && j * kTile + 32 * w < length; ++w) {
            const int groups = static_cast<int>(smaller<int64_t>(kGroups, (length - j * kTile - 32 * w + 3) / 4));
            load_vectors(task, j * kTile + 32 * w, 4 * groups, columns);
            if (any_full) {
                for (int r = 0; r < 4 * groups; ++r) {
                    for (int v = 0; v < kColumnVectors; ++v) {
                        total[v] = add(total[v], load(task.vectors + r * kColumns + v * kLanes));
                    }
                }
            }
            if (!any_mixed) continue;
            build_table(task.vectors, task.table, groups);
            for (int64_t i = first; i < end; ++i) {
                if (flags[i * tiles + j] != 2) continue;
                add_selected(bits + i * kTile * words + j * kTileWords + w, words, task.table,
                             task.sums + (i - first) * kTile * kColumns, smaller(kTile, length - i * kTile));
            }
        }
        for (int64_t i = first; any_full && i < end; ++i) {
            if (flags[i * tiles + j] != 1) continue;
            float* full = task.full + (i - first) * kColumns;
            for (int v = 0; v < kColumnVectors; ++v) store(full + v * kLanes, add(load(full + v * kLanes), total[v]));
        }
    }

    const float scale = call.scale[task.b];
    for (int64_t t = task.first_row; t < task.end_row; ++t) {
        const float inverse = call.inverse[task.b * length + t];
        // The sum of a full tile on the diagonal has the vector itself in it, which is radial too.
        const float own_part = flags[t / kTile * (tiles + 1)] == 1 ? 1.0f : 0.0f;
        const float radial = call.radial[task.b * length + t] + own_part;
        const float* sums = task.sums + (t - task.first_row) * kColumns;
        const float* full = task.full + (t / kTile - first) * kColumns;
        float out[kColumns];
        // The radial part is 0 where no pair is active (and a sum of positive cosines where one is): the vector itself is
        // not read then. NaN goes through.
        if (inverse == 0.0f || radial == 0.0f) {
            for (int64_t k = 0; k < kColumns; ++k) out[k] = 0.0f;
        } else {
            float own[kColumns] = {};
            load_floats(states, task.b * states.batch_stride + t * states.row_stride + task.first_column, columns, own);
            const Vec factor = broadcast(scale * inverse), tangent = broadcast(radial * inverse);
            for (int64_t k = 0; k < kColumns; k += kLanes) {
                const Vec sum = add(load(sums + k), load(full + k));
                store(out + k, mul(sub(sum, mul(tangent, load(own + k))), factor));
            }
        }
        store_floats(call.gradient, states.type, (task.b * length + t) * states.width + task.first_column, out, columns);
    }
}

}  // namespace
}  // namespace simctg::hinge

SIMCTG_TABLE(hinge, Kernels, kPanel, kColumns, direction, pack, hinge_tile, tile_sum, tile_dots, gradient)
