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

constexpr int64_t kLineBytes = kPanel * kQuad;

// How a line is multiplied with four elements of x. X: what x is rounded to, plus kOffset; kVectors: registers a line takes.
#if defined(__AVX512VNNI__)
struct Dot {
    using X = uint8_t;
    using Sums = __m512i;
    static constexpr int kOffset = 128, kVectors = 1, kRows = 6, kPanels = 4;
    static SIMCTG_INLINE Sums none() { return _mm512_setzero_si512(); }
    static SIMCTG_INLINE __m512i all(const X* x) {
        int quad;
        __builtin_memcpy(&quad, x, sizeof quad);
        return _mm512_set1_epi32(quad);
    }
    static SIMCTG_INLINE __m512i line(const int8_t* w, int) { return _mm512_loadu_si512(w); }
    static SIMCTG_INLINE Sums add(Sums sums, __m512i x, __m512i w) { return _mm512_dpbusd_epi32(sums, x, w); }
    static SIMCTG_INLINE void put(const Sums* sums, int32_t* out) { _mm512_storeu_si512(out, sums[0]); }
};
#elif defined(__AVX512F__)
struct Dot {
    using X = int16_t;
    using Sums = __m512i;  // two for each of eight outputs
    static constexpr int kOffset = 0, kVectors = 2, kRows = 6, kPanels = 2;
    static SIMCTG_INLINE Sums none() { return _mm512_setzero_si512(); }
    static SIMCTG_INLINE __m512i all(const X* x) {
        long long quad;
        __builtin_memcpy(&quad, x, sizeof quad);
        return _mm512_set1_epi64(quad);
    }
    static SIMCTG_INLINE __m512i line(const int8_t* w, int vector) {
        return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w) + vector));
    }
    static SIMCTG_INLINE Sums add(Sums sums, __m512i x, __m512i w) { return _mm512_add_epi32(sums, _mm512_madd_epi16(x, w)); }
    static SIMCTG_INLINE void put(const Sums* sums, int32_t* out) {
        int32_t halves[2 * kPanel];
        for (int v = 0; v < kVectors; ++v) _mm512_storeu_si512(halves + v * 16, sums[v]);
        for (int n = 0; n < kPanel; ++n) out[n] = halves[2 * n] + halves[2 * n + 1];
    }
};
#elif defined(__AVXVNNI__)
struct Dot {
    using X = uint8_t;
    using Sums = __m256i;
    static constexpr int kOffset = 128, kVectors = 2, kRows = 6, kPanels = 1;
    static SIMCTG_INLINE Sums none() { return _mm256_setzero_si256(); }
    static SIMCTG_INLINE __m256i all(const X* x) {
        int quad;
        __builtin_memcpy(&quad, x, sizeof quad);
        return _mm256_set1_epi32(quad);
    }
    static SIMCTG_INLINE __m256i line(const int8_t* w, int vector) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w) + vector);
    }
    static SIMCTG_INLINE Sums add(Sums sums, __m256i x, __m256i w) { return _mm256_dpbusd_avx_epi32(sums, x, w); }
    static SIMCTG_INLINE void put(const Sums* sums, int32_t* out) {
        for (int v = 0; v < kVectors; ++v) _mm256_storeu_si256(reinterpret_cast<__m256i*>(out) + v, sums[v]);
    }
};
#elif defined(__AVX2__)
struct Dot {
    using X = int16_t;
    using Sums = __m256i;  // two for each of four outputs
    static constexpr int kOffset = 0, kVectors = 4, kRows = 2, kPanels = 1;
    static SIMCTG_INLINE Sums none() { return _mm256_setzero_si256(); }
    static SIMCTG_INLINE __m256i all(const X* x) {
        long long quad;
        __builtin_memcpy(&quad, x, sizeof quad);
        return _mm256_set1_epi64x(quad);
    }
    static SIMCTG_INLINE __m256i line(const int8_t* w, int vector) {
        return in_register(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w) + vector)));
    }
    static SIMCTG_INLINE Sums add(Sums sums, __m256i x, __m256i w) { return _mm256_add_epi32(sums, _mm256_madd_epi16(x, w)); }
    static SIMCTG_INLINE void put(const Sums* sums, int32_t* out) {
        int32_t halves[2 * kPanel];
        for (int v = 0; v < kVectors; ++v) _mm256_storeu_si256(reinterpret_cast<__m256i*>(halves) + v, sums[v]);
        for (int n = 0; n < kPanel; ++n) out[n] = halves[2 * n] + halves[2 * n + 1];
    }
};
#else
typedef int16_t Shorts __attribute__((vector_size(16)));
typedef int32_t Words __attribute__((vector_size(16)));
struct Dot {
    using X = int16_t;
    using Sums = Words;  // of four outputs
    static constexpr int kOffset = 0, kVectors = 4, kRows = 2, kPanels = 1;
    static SIMCTG_INLINE Sums none() { return Words{}; }
    static SIMCTG_INLINE const X* all(const X* x) { return x; }
    static SIMCTG_INLINE const int8_t* line(const int8_t* w, int vector) { return w + 4 * kQuad * vector; }
    static SIMCTG_INLINE Sums add(Sums sums, const X* x, const int8_t* w) {
        for (int n = 0; n < 4; ++n) {
            for (int k = 0; k < kQuad; ++k) sums[n] += x[k] * w[n * kQuad + k];
        }
        return sums;
    }
    static SIMCTG_INLINE void put(const Sums* sums, int32_t* out) { __builtin_memcpy(out, sums, kVectors * sizeof *sums); }
};
#endif

using X = Dot::X;

// ---- x --------------------------------------------------------------------------------------------------------------

constexpr float kLeast = 1e-30f;  // a row below it is zero: its factor would not be finite

template <class E>
SIMCTG_INLINE RoundedRow round_row(const E* x, int64_t count, int digits, int64_t stride, X* q) {
    Vec most = zeros(), squares = zeros(), finite = zeros();
    for (int64_t k = 0; k < count; k += kLanes) {
        const Vec v = load_first(x + k, count - k);
        most = max(absolute(v), most);
        squares = multiply_add(v, v, squares);
        finite = multiply_add(v, zeros(), finite);  // NaN from here on where an element is not
    }
    const float largest = highest(most), unit = digits == 2 ? 32512.0f : 127.0f;
    if (sum(finite) != 0.0f) return {__builtin_nanf(""), __builtin_nanf("")};
    const bool is_zero = largest < kLeast;
    const Vec factor = broadcast(is_zero ? 0.0f : unit / largest);
    for (int64_t k = 0; k < count; k += kLanes) {
        float lanes[kLanes];
        store(lanes, round_even(mul(load_first(x + k, count - k), factor)));
        const int lanes_left = static_cast<int>(smaller<int64_t>(kLanes, count - k));
        const auto put = [&](int lane) SIMCTG_INLINE_LAMBDA {
            const int value = static_cast<int>(lanes[lane]);
            if (digits == 1) {
                q[k + lane] = static_cast<X>(value + Dot::kOffset);
                return;
            }
            const int high = (value + 128) >> 8;
            q[k + lane] = static_cast<X>(high + Dot::kOffset);
            q[stride + k + lane] = static_cast<X>(value - 256 * high + Dot::kOffset);
        };
        if (lanes_left == kLanes) {
            for (int lane = 0; lane < kLanes; ++lane) put(lane);
        } else {
            for (int lane = 0; lane < lanes_left; ++lane) put(lane);
        }
    }
    if (is_zero) return {0.0f, largest > 0.0f ? 1e30f : 0.0f};  // of what was taken for zero nothing is known
    const float terms = static_cast<float>(count), most_norm = largest * __builtin_sqrtf(terms) * 1.001f;
    const float norm = __builtin_sqrtf(sum(squares)) * (1.0f + 1e-7f * terms);
    return {largest / unit, largest > 1e-15f && largest < 1e15f ? norm : smaller(most_norm, 3e38f)};
}

RoundedRow round(ElementType type, const void* x, int64_t count, int digits, int64_t stride, void* q) {
    return with_type(type, x, [=](const auto* in) SIMCTG_INLINE_LAMBDA {
        return round_row(in, count, digits, stride, static_cast<X*>(q));
    });
}

// ---- sums -----------------------------------------------------------------------------------------------------------

// out[r, panel · kPanel + n] = Σ x[r] · panel's q[n], for Rows rows and Panels panels; asks for what lies `ahead` bytes on.
template <int Rows, int Panels>
void tile(const X* x, int64_t x_stride, const int8_t* w, int64_t panel_bytes, int64_t quads, int64_t ahead, int32_t* out) {
    typename Dot::Sums sums[Rows][Panels * Dot::kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < Panels * Dot::kVectors; ++v) sums[r][v] = Dot::none();
    }
    for (int64_t i = 0; i < quads; ++i) {
        const int8_t* lines = w + i * kLineBytes;
        const X* quad = x + i * kQuad;
        if (ahead) {
#pragma GCC unroll 8
            for (int p = 0; p < Panels; ++p) __builtin_prefetch(lines + p * panel_bytes + ahead, 0, 3);
        }
        decltype(Dot::all(x)) a[Rows];
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) a[r] = Dot::all(quad + r * x_stride);
#pragma GCC unroll 8
        for (int p = 0; p < Panels; ++p) {
#pragma GCC unroll 8
            for (int v = 0; v < Dot::kVectors; ++v) {
                const auto b = Dot::line(lines + p * panel_bytes, v);
#pragma GCC unroll 8
                for (int r = 0; r < Rows; ++r) {
                    auto& sum = sums[r][p * Dot::kVectors + v];
                    sum = Dot::add(sum, a[r], b);
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
        for (int p = 0; p < Panels; ++p) Dot::put(&sums[r][p * Dot::kVectors], out + (r * Panels + p) * kPanel);
    }
}

template <int Panels, int Rows = Dot::kRows>
SIMCTG_INLINE void tile_of(int rows, const X* x, int64_t x_stride, const int8_t* w, int64_t panel_bytes, int64_t quads,
                           int64_t ahead, int32_t* out) {
    if constexpr (Rows > 1) {
        if (rows < Rows) return tile_of<Panels, Rows - 1>(rows, x, x_stride, w, panel_bytes, quads, ahead, out);
    }
    tile<Rows, Panels>(x, x_stride, w, panel_bytes, quads, ahead, out);
}

// What the integers mean.
template <int Width>
void put_row(const Call& call, int64_t row, int64_t begin, int64_t count, const int32_t* high, const int32_t* low) {
    float y[Width];
    const float* scales = call.weight.scales + begin;
    const int32_t* sums = call.weight.sums + begin;
    const float x_scale = call.x_scales[row];
    for (int n = 0; n < Width; ++n) {
        if (low) {
            const double both = 256.0 * (high[n] - Dot::kOffset * sums[n]) + (low[n] - Dot::kOffset * sums[n]);
            y[n] = static_cast<float>(both) * (x_scale * scales[n]);
        } else {
            y[n] = static_cast<float>(high[n] - Dot::kOffset * sums[n]) * (x_scale * scales[n]);
        }
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

constexpr int64_t kAhead = 16 * kLineBytes;  // far enough for memory, in a page as a rule

template <int Panels>
void panels_of(const Call& call, int64_t begin, int64_t end) {
    constexpr int width = static_cast<int>(Panels * kPanel);
    const int64_t x_stride = call.quads * kQuad, panel_bytes = call.quads * kLineBytes;
    const int64_t most = Dot::kRows / call.digits, tiles = (call.rows + most - 1) / most;
    const int8_t* w = call.weight.panels + begin * x_stride;
    const X* x = static_cast<const X*>(call.x);
    for (int64_t t = 0; t < tiles; ++t) {
        const int64_t first = call.rows * t / tiles, last = call.rows * (t + 1) / tiles;
        int32_t sums[Dot::kRows * width];
        tile_of<Panels>(static_cast<int>((last - first) * call.digits), x + first * call.digits * x_stride, x_stride, w,
                        panel_bytes, call.quads, t == 0 ? kAhead : 0, sums);
        for (int64_t row = first; row < last; ++row) {
            const int32_t* of_row = sums + (row - first) * call.digits * width;
            put_row<width>(call, row, begin, end - begin, of_row, call.digits == 2 ? of_row + width : nullptr);
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
    int32_t sums[kPanel] = {};
    float factors[kPanel];
    for (int64_t n = 0; n < kPanel; ++n) {
        const bool is_zero = most[n] < kLeast;
        panel.scales[n] = is_zero ? 0.0f : most[n] / 127.0f;
        factors[n] = is_zero ? 0.0f : 127.0f / most[n];
    }
    for (int64_t quad = 0; quad < quads; ++quad) {
        int8_t* line = panel.panels + quad * kLineBytes;
        for (int64_t i = 0; i < kLineBytes; ++i) {
            const int64_t n = i / kQuad, k = quad * kQuad + i % kQuad;
            if (n >= count || k >= in_features) {
                line[i] = 0;
                continue;
            }
            const float value = widen(w[n * n_stride + k * k_stride]);
            const int rounded = static_cast<int>(__builtin_rintf(value * factors[n]));
            line[i] = static_cast<int8_t>(rounded);
            sums[n] += rounded;
            const double difference = static_cast<double>(value) - static_cast<double>(panel.scales[n]) * rounded;
            squares[n] += static_cast<double>(value) * value;
            lost[n] += difference * difference;
        }
    }
    // x in two digits is off by half a unit in 32512 of its largest element in each of them, and products and sums of
    // floats, in the other layout as here, by less than 2^-23 a term.
    const double terms = static_cast<double>(in_features);
    const double relative = 0.52 * __builtin_sqrt(terms) / 32512.0 + (terms + 16.0) * 0x1p-23;
    for (int64_t n = 0; n < kPanel; ++n) {
        panel.sums[n] = sums[n];
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
