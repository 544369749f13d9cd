// Products with weights of 8 bits.
//
// Floor: 1 byte a weight; beyond some 30 rows of x (VNNI) or 4 (without) rows · in · out multiply-adds, 64 an instruction of
// 512 bits with VNNI, 16 without. Layout: linear_int8.h; a line of memory is four inputs of a panel's sixteen outputs, and a
// panel's lines follow one another.
#include "simd/linear_int8.h"

#include <type_traits>

#include "simd/element.h"

namespace simctg::int8 {
namespace {

using namespace simd;

constexpr int64_t kLineBytes = kPanel * kQuad, kQuads = kGroup / kQuad;

// How a line is multiplied with four elements of x. X: what x is rounded to; kVectors: registers a line takes.
#if defined(__AVX512VNNI__)
struct Dot {
    using X = int8_t;
    using Sums = __m512i;
    static constexpr int kLanes = 16, kVectors = 1, kRows = 4, kPanels = 4;
    static SIMCTG_INLINE Sums begin(int excess) { return _mm512_set1_epi32(excess); }
    static SIMCTG_INLINE __m512i all(const X* x) {
        int quad;
        __builtin_memcpy(&quad, x, sizeof quad);
        return _mm512_set1_epi32(quad);
    }
    static SIMCTG_INLINE __m512i line(const uint8_t* w, int) { return _mm512_loadu_si512(w); }
    static SIMCTG_INLINE Sums add(Sums sums, __m512i x, __m512i w) { return _mm512_dpbusd_epi32(sums, w, x); }
    static SIMCTG_INLINE Vec floats(Sums sums) { return _mm512_cvtepi32_ps(sums); }
};
#elif defined(__AVX512F__)
struct Dot {
    using X = int16_t;
    using Sums = __m512i;  // two for each of eight outputs
    static constexpr int kLanes = 16, kVectors = 2, kRows = 4, kPanels = 2;
    static SIMCTG_INLINE Sums begin(int excess) { return _mm512_set1_epi64(static_cast<uint32_t>(excess)); }
    static SIMCTG_INLINE __m512i all(const X* x) {
        long long quad;
        __builtin_memcpy(&quad, x, sizeof quad);
        return _mm512_set1_epi64(quad);
    }
    static SIMCTG_INLINE __m512i line(const uint8_t* w, int vector) {
        return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w) + vector));
    }
    static SIMCTG_INLINE Sums add(Sums sums, __m512i x, __m512i w) { return _mm512_add_epi32(sums, _mm512_madd_epi16(x, w)); }
    static SIMCTG_INLINE Vec floats(Sums sums) { return _mm512_cvtepi32_ps(sums); }
};
#elif defined(__AVXVNNI__)
struct Dot {
    using X = int8_t;
    using Sums = __m256i;
    static constexpr int kLanes = 8, kVectors = 2, kRows = 4, kPanels = 1;
    static SIMCTG_INLINE Sums begin(int excess) { return _mm256_set1_epi32(excess); }
    static SIMCTG_INLINE __m256i all(const X* x) {
        int quad;
        __builtin_memcpy(&quad, x, sizeof quad);
        return _mm256_set1_epi32(quad);
    }
    static SIMCTG_INLINE __m256i line(const uint8_t* w, int vector) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w) + vector);
    }
    static SIMCTG_INLINE Sums add(Sums sums, __m256i x, __m256i w) { return _mm256_dpbusd_avx_epi32(sums, w, x); }
    static SIMCTG_INLINE Vec floats(Sums sums) { return _mm256_cvtepi32_ps(sums); }
};
#elif defined(__AVX2__)
struct Dot {
    using X = int16_t;
    using Sums = __m256i;  // two for each of four outputs
    static constexpr int kLanes = 8, kVectors = 4, kRows = 2, kPanels = 1;
    static SIMCTG_INLINE Sums begin(int excess) { return _mm256_set1_epi64x(static_cast<uint32_t>(excess)); }
    static SIMCTG_INLINE __m256i all(const X* x) {
        long long quad;
        __builtin_memcpy(&quad, x, sizeof quad);
        return _mm256_set1_epi64x(quad);
    }
    static SIMCTG_INLINE __m256i line(const uint8_t* w, int vector) {
        return in_register(_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w) + vector)));
    }
    static SIMCTG_INLINE Sums add(Sums sums, __m256i x, __m256i w) { return _mm256_add_epi32(sums, _mm256_madd_epi16(x, w)); }
    static SIMCTG_INLINE Vec floats(Sums sums) { return _mm256_cvtepi32_ps(sums); }
};
#else
typedef int32_t Words __attribute__((vector_size(16)));
struct Dot {
    using X = int16_t;
    using Sums = Words;  // of four outputs
    static constexpr int kLanes = 4, kVectors = 4, kRows = 2, kPanels = 1;
    static SIMCTG_INLINE Sums begin(int excess) { return Words{excess, excess, excess, excess}; }
    static SIMCTG_INLINE const X* all(const X* x) { return x; }
    static SIMCTG_INLINE const uint8_t* line(const uint8_t* w, int vector) { return w + 4 * kQuad * vector; }
    static SIMCTG_INLINE Sums add(Sums sums, const X* x, const uint8_t* w) {
        for (int n = 0; n < 4; ++n) {
            for (int k = 0; k < kQuad; ++k) sums[n] += x[k] * w[n * kQuad + k];
        }
        return sums;
    }
    static SIMCTG_INLINE Vec floats(Sums sums) {
        float lanes[4];
        for (int n = 0; n < 4; ++n) lanes[n] = static_cast<float>(sums[n]);
        return load(lanes);
    }
};
#endif

using X = Dot::X;
constexpr int kParts = Dot::kVectors * Dot::kLanes / static_cast<int>(kPanel);  // sums of an output, side by side

// ---- x --------------------------------------------------------------------------------------------------------------

constexpr float kLeast = 1e-30f;  // what is below is zero: its factor would not be finite

template <class E>
SIMCTG_INLINE void round_group(const E* x, int64_t count, float unit, int digits, int64_t stride, X* q, float* scale,
                               int32_t* excesses, int64_t groups) {
    Vec most = zeros();
    for (int64_t k = 0; k < count; k += kLanes) most = max(absolute(load_first(x + k, count - k)), most);
    const float largest = highest(most);
    const bool is_zero = largest < kLeast;
    const Vec factor = broadcast(is_zero ? 0.0f : unit / largest);
    int32_t sums[2] = {0, 0};
    for (int64_t k = 0; k < count; k += kLanes) {
        float lanes[kLanes];
        store(lanes, round_even(mul(load_first(x + k, count - k), factor)));
        const int filled = static_cast<int>(smaller<int64_t>(kLanes, count - k));
        for (int lane = 0; lane < filled; ++lane) {
            const int value = static_cast<int>(lanes[lane]), high = digits == 1 ? value : (value + 128) >> 8;
            q[k + lane] = static_cast<X>(high);
            sums[0] += high;
            if (digits == 1) continue;
            q[stride + k + lane] = static_cast<X>(value - 256 * high);
            sums[1] += value - 256 * high;
        }
    }
    *scale = is_zero ? 0.0f : largest / unit;
    for (int digit = 0; digit < digits; ++digit) excesses[digit * groups] = -128 * sums[digit];
}

template <class E>
SIMCTG_INLINE void round_row(const E* x, int64_t count, const Rows& rows, int64_t row) {
    Vec most = zeros(), squares = zeros(), finite = zeros();
    for (int64_t k = 0; k < count; k += kLanes) {
        const Vec v = load_first(x + k, count - k);
        most = max(absolute(v), most);
        squares = multiply_add(v, v, squares);
        finite = multiply_add(v, zeros(), finite);  // NaN from here on where an element is not
    }
    const bool is_finite = sum(finite) == 0.0f;
    const int64_t stride = rows.quads * kQuad;
    X* q = static_cast<X*>(rows.x) + row * rows.digits * stride;
    float* scales = rows.scales + row * rows.groups;
    int32_t* excesses = rows.excesses + row * rows.digits * rows.groups;
    if (!is_finite) {
        for (int64_t k = 0; k < rows.digits * stride; ++k) q[k] = 0;
        for (int64_t g = 0; g < rows.digits * rows.groups; ++g) excesses[g] = 0;
        for (int64_t g = 0; g < rows.groups; ++g) scales[g] = __builtin_nanf("");
        if (rows.norms) rows.norms[row] = 0.0f;
        return;
    }
    for (int64_t g = 0; g < rows.groups; ++g) {
        const int64_t k = g * kGroup;
        round_group(x + k, smaller(kGroup, count - k), rows.digits == 2 ? 32512.0f : 127.0f, rows.digits, stride, q + k,
                    scales + g, excesses + g, rows.groups);
    }
    for (int digit = 0; digit < rows.digits; ++digit) {
        for (int64_t k = count; k < stride; ++k) q[digit * stride + k] = 0;
    }
    if (!rows.norms) return;
    const float largest = highest(most), terms = static_cast<float>(count);
    const float norm = __builtin_sqrtf(sum(squares)) * (1.0f + 1e-7f * terms), bound = largest * __builtin_sqrtf(terms) * 1.001f;
    // Of what was taken for zero nothing is known; squares may vanish, or not be finite.
    if (largest > 0.0f && largest < 1e3f * kLeast) rows.norms[row] = 1e30f;
    else rows.norms[row] = largest > 1e-15f && largest < 1e15f ? norm : smaller(bound, 3e38f);
}

void round(ElementType type, const void* x, int64_t count, const Rows& rows, int64_t row) {
    with_type(type, x, [&](const auto* in) SIMCTG_INLINE_LAMBDA { round_row(in, count, rows, row); });
}

// ---- sums -----------------------------------------------------------------------------------------------------------

struct Tile {
    const X* x;              // [rows, quads · kQuad]
    const float* scales;     // [rows / digits, groups]
    const int32_t* excesses; // [rows, groups]
    const uint8_t* w;
    int64_t quads, groups;
    int digits;
    float* out;  // [rows, Panels, kVectors, kLanes]
};

constexpr int64_t kAhead = 16 * kLineBytes;  // far enough for memory, in a page as a rule

// Sums of Panels panels and Rows rows: integers within a group, floats beyond. Fetch: asks for what lies ahead. (In a
// function of its own, or GCC keeps sums in memory.)
template <int Rows, int Panels, bool Fetch>
__attribute__((noinline)) void tile(const Tile& t) {
    constexpr int vectors = Panels * Dot::kVectors;
    const int64_t x_stride = t.quads * kQuad, panel_bytes = t.quads * kLineBytes;
    for (int64_t g = 0; g < t.groups; ++g) {
        const int64_t first = g * kQuads, count = smaller(kQuads, t.quads - first);
        const uint8_t* w = t.w + first * kLineBytes;
        const X* x = t.x + first * kQuad;
        typename Dot::Sums sums[Rows][vectors];
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
            const auto excess = Dot::begin(t.excesses[r * t.groups + g]);
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v) sums[r][v] = excess;
        }
        for (int64_t i = 0; i < count; ++i) {
            const uint8_t* lines = w + i * kLineBytes;
            const X* quad = x + i * kQuad;
            decltype(Dot::line(w, 0)) b[vectors];
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v) {
                const uint8_t* of_panel = lines + v / Dot::kVectors * panel_bytes;
                if (Fetch && v % Dot::kVectors == 0) __builtin_prefetch(of_panel + kAhead, 0, 3);
                b[v] = Dot::line(of_panel, v % Dot::kVectors);
            }
#pragma GCC unroll 8
            for (int r = 0; r < Rows; ++r) {
                const auto a = Dot::all(quad + r * x_stride);
#pragma GCC unroll 8
                for (int v = 0; v < vectors; ++v) sums[r][v] = Dot::add(sums[r][v], a, b[v]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
            const Vec scale = broadcast(t.scales[r / t.digits * t.groups + g]);
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v) {
                float* out = t.out + (r * vectors + v) * kLanes;
                const Vec part = Dot::floats(sums[r][v]);
                store(out, g ? multiply_add(part, scale, load(out)) : mul(part, scale));
            }
        }
    }
}

template <int Panels, int Rows = Dot::kRows>
SIMCTG_INLINE void tile_of(int rows, bool fetch, const Tile& t) {
    if constexpr (Rows > 1) {
        if (rows < Rows) return tile_of<Panels, Rows - 1>(rows, fetch, t);
    }
    fetch ? tile<Rows, Panels, true>(t) : tile<Rows, Panels, false>(t);
}

// What the sums of a row mean.
template <int Width>
void put_row(const Call& call, int64_t row, int64_t begin, int64_t count, const float* sums) {
    float y[Width];
    for (int n = 0; n < Width; ++n) {
        float total = 0.0f;
        for (int digit = 0; digit < call.x.digits; ++digit) {
            total *= 256.0f;
            for (int part = 0; part < kParts; ++part) total += sums[(digit * Width + n) * kParts + part];
        }
        y[n] = total * call.weight.scales[begin + n];
    }
    if (call.bias) {
        with_type(call.bias_type, call.bias, [&](const auto* bias) SIMCTG_INLINE_LAMBDA {
            for (int64_t n = 0; n < count; ++n) y[n] += widen(bias[begin + n]);
        });
    }
    with_type(call.type, call.y, [&](auto* out) SIMCTG_INLINE_LAMBDA {
        narrow_array(y, count, out + row * call.y_stride + begin);
    });
}

template <int Panels>
void panels_of(const Call& call, int64_t begin, int64_t end) {
    constexpr int width = static_cast<int>(Panels * kPanel);
    const Rows& x = call.x;
    const int64_t most = Dot::kRows / x.digits, tiles = (x.count + most - 1) / most, x_stride = x.quads * kQuad;
    alignas(64) float sums[Dot::kRows * width * kParts];
    for (int64_t i = 0; i < tiles; ++i) {
        const int64_t first = x.count * i / tiles, last = x.count * (i + 1) / tiles, line = first * x.digits;
        const Tile t{static_cast<const X*>(x.x) + line * x_stride, x.scales + first * x.groups, x.excesses + line * x.groups,
                     call.weight.panels + begin * x_stride, x.quads, x.groups, x.digits, sums};
        tile_of<Panels>(static_cast<int>((last - first) * x.digits), i == 0, t);
        for (int64_t row = first; row < last; ++row) {
            put_row<width>(call, row, begin, end - begin, sums + (row - first) * x.digits * width * kParts);
        }
    }
}

void columns(const Call& call, int64_t begin, int64_t end) {
    constexpr int64_t width = Dot::kPanels * kPanel;
    for (; end - begin > width - kPanel; begin += width) panels_of<Dot::kPanels>(call, begin, smaller(end, begin + width));
    if constexpr (Dot::kPanels > 1) {
        for (; begin < end; begin += kPanel) panels_of<1>(call, begin, smaller(end, begin + kPanel));
    }
}

// ---- weights --------------------------------------------------------------------------------------------------------

template <class E>
SIMCTG_INLINE bool quantize_panel(const E* w, int64_t n_stride, int64_t k_stride, int64_t in_features, int64_t count,
                                  const Weight& panel) {
    const int64_t quads = (in_features + kQuad - 1) / kQuad;
    float most[kPanel] = {};
    bool finite = true;
    for (int64_t k = 0; k < in_features; ++k) {
        for (int64_t n = 0; n < count; ++n) {
            const float size = __builtin_fabsf(widen(w[n * n_stride + k * k_stride]));
            most[n] = size > most[n] ? size : most[n];
            finite = finite && size <= 3.402823466e38f;
        }
    }
    double squares[kPanel] = {}, lost[kPanel] = {};
    float factors[kPanel];
    for (int64_t n = 0; n < kPanel; ++n) {
        const bool is_zero = most[n] < kLeast;
        panel.scales[n] = is_zero ? 0.0f : most[n] / 127.0f;
        factors[n] = is_zero ? 0.0f : 127.0f / most[n];
    }
    for (int64_t quad = 0; quad < quads; ++quad) {
        uint8_t* line = panel.panels + quad * kLineBytes;
        for (int64_t i = 0; i < kLineBytes; ++i) {
            const int64_t n = i / kQuad, k = quad * kQuad + i % kQuad;
            if (n >= count || k >= in_features) {
                line[i] = 128;
                continue;
            }
            const float value = widen(w[n * n_stride + k * k_stride]);
            const int rounded = static_cast<int>(__builtin_rintf(value * factors[n]));
            line[i] = static_cast<uint8_t>(rounded + 128);
            const double difference = static_cast<double>(value) - static_cast<double>(panel.scales[n]) * rounded;
            squares[n] += static_cast<double>(value) * value;
            lost[n] += difference * difference;
        }
    }
    // x in two digits is off by half a unit in 32512 of its largest element in each of them, and products and sums of
    // floats, in the other layout as here, by less than 2^-22 a term.
    const double terms = static_cast<double>(in_features);
    const double relative = 0.52 * __builtin_sqrt(terms) / 32512.0 + (terms + 32.0) * 0x1p-22;
    for (int64_t n = 0; n < kPanel; ++n) {
        const double error = __builtin_sqrt(lost[n]) * (1.0 + relative) + relative * __builtin_sqrt(squares[n]);
        panel.errors[n] = static_cast<float>(error * 1.0001);
    }
    return finite;
}

bool quantize(ElementType type, const void* w, int64_t n_stride, int64_t k_stride, int64_t in_features, int64_t count,
              const Weight& panel) {
    return with_type(type, w, [&](const auto* in) SIMCTG_INLINE_LAMBDA {
        return quantize_panel(in, n_stride, k_stride, in_features, count, panel);
    });
}

// ---- contenders -----------------------------------------------------------------------------------------------------

constexpr float kRounded = 0x1p-21f;  // of a result, for what adding a bias and comparing round

// Upward: +1 adds what rounding may have taken away, −1 takes it away.
template <int Upward>
SIMCTG_INLINE Vec bound(Vec y, Vec error, Vec length) {
    const Vec slack = multiply_add(absolute(y), broadcast(kRounded), mul(error, length));
    return Upward > 0 ? add(y, slack) : sub(y, slack);
}

// The `top`-th largest of the lower bounds is reached by `top` results: who cannot reach it is not among them.
int64_t contenders(const float* y, const float* errors, float length, int64_t count, int64_t top, float* values,
                   int32_t* found) {
    const Vec lengths = broadcast(length);
    const float lowest = -__builtin_inff();
    float least = lowest;
    int64_t held = 0;
    const auto keep = [&](float value) SIMCTG_INLINE_LAMBDA {
        if (!(held < top ? value == value : value > least)) return;
        int64_t place = held < top ? held++ : top - 1;
        for (; place > 0 && value > values[place - 1]; --place) values[place] = values[place - 1];
        values[place] = value;
        if (held == top) least = values[top - 1];
    };
    const auto each = [&](auto upward, const auto& f) SIMCTG_INLINE_LAMBDA {
        for (int64_t n = 0; n < count; n += kLanes) {
            float lanes[kLanes];
            const Vec bounds = bound<decltype(upward)::value>(load_first(y + n, count - n), load_first(errors + n, count - n), lengths);
            const uint32_t valid = count - n >= kLanes ? ~0u : (1u << (count - n)) - 1u;
            uint32_t bits = at_least_bits(bounds, broadcast(least)) & valid;
            if (!bits) continue;
            store(lanes, bounds);
            for (; bits; bits &= bits - 1) f(n, __builtin_ctz(bits), lanes);
        }
    };
    each(std::integral_constant<int, -1>(), [&](int64_t, int lane, const float* lanes) SIMCTG_INLINE_LAMBDA { keep(lanes[lane]); });
    if (held < top) least = lowest;
    int64_t number = 0;
    each(std::integral_constant<int, 1>(), [&](int64_t n, int lane, const float*) SIMCTG_INLINE_LAMBDA {
        found[number++] = static_cast<int32_t>(n + lane);
    });
    return number;
}

}  // namespace
}  // namespace simctg::int8

SIMCTG_TABLE(int8, Kernels, sizeof(int8::X), int8::round, columns, quantize, contenders)
