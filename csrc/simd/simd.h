// One vector of floats, in the instruction set that the including file is compiled for: AVX-512, AVX2, NEON, or whatever
// the compiler makes of a 16-byte vector. The kernels are written once against these names and compiled once for each set.
//
// Everything sits in an anonymous namespace, and nothing here may call a function template or an inline function of
// the standard library: the linker keeps one copy of those, and it might be the one with the wider instructions.
#pragma once

#include <cstdint>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__)
// GCC's own header initialises the operand that an unmasked intrinsic does not use with itself.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#define SIMCTG_INLINE inline __attribute__((always_inline))
#define SIMCTG_INLINE_LAMBDA __attribute__((always_inline))

namespace simctg::simd {
namespace {

template <class T>
SIMCTG_INLINE T smaller(T a, T b) { return b < a ? b : a; }
template <class T>
SIMCTG_INLINE T larger(T a, T b) { return a < b ? b : a; }

// Into the second-level cache: what is fetched here is read a whole tile later.
SIMCTG_INLINE void prefetch_l2(const void* address) { __builtin_prefetch(address, 0, 2); }

#if defined(__AVX512F__)

constexpr int kLanes = 16;
constexpr int kRegisters = 32;
using Vec = __m512;
using Mask = __mmask16;

SIMCTG_INLINE Mask first_lanes(int64_t count) { return static_cast<Mask>((1u << count) - 1u); }  // 0 <= count <= 16
SIMCTG_INLINE Vec zeros() { return _mm512_setzero_ps(); }
SIMCTG_INLINE Vec broadcast(float value) { return _mm512_set1_ps(value); }
SIMCTG_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
SIMCTG_INLINE Vec load(const float* p, Mask mask) { return _mm512_maskz_loadu_ps(mask, p); }  // 0 where masked off
SIMCTG_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
SIMCTG_INLINE void store(float* p, Vec v, Mask mask) { _mm512_mask_storeu_ps(p, mask, v); }
SIMCTG_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
SIMCTG_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
SIMCTG_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
SIMCTG_INLINE Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
SIMCTG_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
SIMCTG_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }  // b where either is NaN
SIMCTG_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }  // b where either is NaN
SIMCTG_INLINE Vec absolute(Vec a) { return _mm512_abs_ps(a); }
SIMCTG_INLINE Vec copy_sign(Vec magnitude, Vec sign) {
    return _mm512_or_ps(magnitude, _mm512_and_ps(sign, _mm512_set1_ps(-0.0f)));  // magnitude >= 0
}
SIMCTG_INLINE Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
SIMCTG_INLINE Vec where_nan(Vec a, Vec yes, Vec no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), no, yes);
}
SIMCTG_INLINE Vec round_even(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// value · 2^exponent for integral exponents in -252..254 (a float has no room for more).
SIMCTG_INLINE Vec scale_by_power(Vec value, Vec exponent) { return _mm512_scalef_ps(value, exponent); }

// The sum of all lanes. The order of additions is fixed: lanes 8 apart first, then 4, 2, 1; `sum4`, `sum8` and `sum16`
// keep it for every one of their vectors, so a sum has the same bits whichever of them computed it.
SIMCTG_INLINE Vec add_halves(Vec a, Vec b) {  // a's two halves added, then b's
    return add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
}
SIMCTG_INLINE Vec add_quarters(Vec ab, Vec cd) {
    return add(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
}
// [a b c d] of 4 lanes each: sums of 4 lanes that still have to be added up.
SIMCTG_INLINE Vec fold4(Vec a, Vec b, Vec c, Vec d) { return add_quarters(add_halves(a, b), add_halves(c, d)); }

SIMCTG_INLINE float sum(Vec a) {
    const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    const __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    const __m128 p = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(p, _mm_shuffle_ps(p, p, 0x55)));
}
SIMCTG_INLINE void sum4(const Vec* v, float* out) {
    Vec t = fold4(v[0], v[1], v[2], v[3]);
    t = add(t, _mm512_permute_ps(t, 0x4E));
    t = add(t, _mm512_permute_ps(t, 0xB1));
    _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, t)));
}
SIMCTG_INLINE void sum8(const Vec* v, float* out) {
    const Vec t0 = fold4(v[0], v[2], v[4], v[6]), t1 = fold4(v[1], v[3], v[5], v[7]);
    Vec u = add(_mm512_shuffle_ps(t0, t1, 0x44), _mm512_shuffle_ps(t0, t1, 0xEE));
    u = add(u, _mm512_permute_ps(u, 0xB1));
    _mm256_storeu_ps(out, _mm512_castps512_ps256(_mm512_maskz_compress_ps(0x5555, u)));
}
SIMCTG_INLINE void sum16(const Vec* v, float* out) {
    const Vec t0 = fold4(v[0], v[4], v[8], v[12]), t1 = fold4(v[1], v[5], v[9], v[13]);
    const Vec t2 = fold4(v[2], v[6], v[10], v[14]), t3 = fold4(v[3], v[7], v[11], v[15]);
    const Vec u0 = add(_mm512_shuffle_ps(t0, t1, 0x44), _mm512_shuffle_ps(t0, t1, 0xEE));
    const Vec u1 = add(_mm512_shuffle_ps(t2, t3, 0x44), _mm512_shuffle_ps(t2, t3, 0xEE));
    store(out, add(_mm512_shuffle_ps(u0, u1, 0x88), _mm512_shuffle_ps(u0, u1, 0xDD)));
}
SIMCTG_INLINE float highest(Vec a) { return _mm512_reduce_max_ps(a); }

// Bit l: whether lane l of a is above b's, or at least as large; NaN is neither.
SIMCTG_INLINE uint32_t above_bits(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
SIMCTG_INLINE uint32_t at_least_bits(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }

#elif defined(__AVX2__)

constexpr int kLanes = 8;
constexpr int kRegisters = 16;
using Vec = __m256;
using Mask = __m256i;

SIMCTG_INLINE Mask first_lanes(int64_t count) {  // 0 <= count <= 8
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
SIMCTG_INLINE Vec zeros() { return _mm256_setzero_ps(); }
SIMCTG_INLINE Vec broadcast(float value) { return _mm256_set1_ps(value); }
SIMCTG_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
SIMCTG_INLINE Vec load(const float* p, Mask mask) { return _mm256_maskload_ps(p, mask); }
SIMCTG_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
SIMCTG_INLINE void store(float* p, Vec v, Mask mask) { _mm256_maskstore_ps(p, mask, v); }
SIMCTG_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
SIMCTG_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
SIMCTG_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
SIMCTG_INLINE Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
SIMCTG_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
SIMCTG_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
SIMCTG_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
SIMCTG_INLINE Vec absolute(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
SIMCTG_INLINE Vec copy_sign(Vec magnitude, Vec sign) {
    return _mm256_or_ps(magnitude, _mm256_and_ps(sign, _mm256_set1_ps(-0.0f)));
}
SIMCTG_INLINE Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
SIMCTG_INLINE Vec where_nan(Vec a, Vec yes, Vec no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
}
SIMCTG_INLINE Vec round_even(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
SIMCTG_INLINE Vec power_of_two(__m256i exponent) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23));
}
SIMCTG_INLINE Vec scale_by_power(Vec value, Vec exponent) {  // two factors: subnormal results need both
    const __m256i whole = _mm256_cvtps_epi32(exponent), half = _mm256_srai_epi32(whole, 1);
    return mul(mul(value, power_of_two(half)), power_of_two(_mm256_sub_epi32(whole, half)));
}

SIMCTG_INLINE __m128 add_halves(Vec a) { return _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)); }
SIMCTG_INLINE float sum(Vec a) {  // lanes 4 apart, then 2, then 1; the same in sum4, sum8, sum16
    const __m128 q = add_halves(a);
    const __m128 p = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(p, _mm_shuffle_ps(p, p, 0x55)));
}
SIMCTG_INLINE void sum4(const Vec* v, float* out) {
    const __m128 a = add_halves(v[0]), b = add_halves(v[1]), c = add_halves(v[2]), d = add_halves(v[3]);
    const __m128 ab = _mm_add_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a));
    const __m128 cd = _mm_add_ps(_mm_movelh_ps(c, d), _mm_movehl_ps(d, c));
    _mm_storeu_ps(out, _mm_add_ps(_mm_shuffle_ps(ab, cd, 0x88), _mm_shuffle_ps(ab, cd, 0xDD)));
}
SIMCTG_INLINE float highest(Vec a) {
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_shuffle_ps(q, q, 0x55)));
}
SIMCTG_INLINE uint32_t above_bits(Vec a, Vec b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
}
SIMCTG_INLINE uint32_t at_least_bits(Vec a, Vec b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
}

#elif defined(__aarch64__)

constexpr int kLanes = 4;
constexpr int kRegisters = 32;
using Vec = float32x4_t;
struct Mask {
    int64_t count;
};

SIMCTG_INLINE Mask first_lanes(int64_t count) { return Mask{count}; }  // 0 <= count <= 4
SIMCTG_INLINE Vec zeros() { return vdupq_n_f32(0.0f); }
SIMCTG_INLINE Vec broadcast(float value) { return vdupq_n_f32(value); }
SIMCTG_INLINE Vec load(const float* p) { return vld1q_f32(p); }
SIMCTG_INLINE Vec load(const float* p, Mask mask) {
    if (mask.count >= kLanes) return load(p);
    Vec v = zeros();
    if (mask.count > 0) v = vld1q_lane_f32(p, v, 0);
    if (mask.count > 1) v = vld1q_lane_f32(p + 1, v, 1);
    if (mask.count > 2) v = vld1q_lane_f32(p + 2, v, 2);
    return v;
}
SIMCTG_INLINE void store(float* p, Vec v) { vst1q_f32(p, v); }
SIMCTG_INLINE void store(float* p, Vec v, Mask mask) {
    if (mask.count >= kLanes) return store(p, v);
    if (mask.count > 0) vst1q_lane_f32(p, v, 0);
    if (mask.count > 1) vst1q_lane_f32(p + 1, v, 1);
    if (mask.count > 2) vst1q_lane_f32(p + 2, v, 2);
}
SIMCTG_INLINE Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
SIMCTG_INLINE Vec sub(Vec a, Vec b) { return vsubq_f32(a, b); }
SIMCTG_INLINE Vec mul(Vec a, Vec b) { return vmulq_f32(a, b); }
SIMCTG_INLINE Vec div(Vec a, Vec b) { return vdivq_f32(a, b); }
SIMCTG_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
SIMCTG_INLINE Vec max(Vec a, Vec b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }  // vmaxq gives NaN where either is
SIMCTG_INLINE Vec min(Vec a, Vec b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
SIMCTG_INLINE Vec absolute(Vec a) { return vabsq_f32(a); }
SIMCTG_INLINE Vec copy_sign(Vec magnitude, Vec sign) { return vbslq_f32(vdupq_n_u32(0x80000000u), sign, magnitude); }
SIMCTG_INLINE Vec where_less(Vec a, Vec b, Vec yes, Vec no) { return vbslq_f32(vcltq_f32(a, b), yes, no); }
SIMCTG_INLINE Vec where_nan(Vec a, Vec yes, Vec no) { return vbslq_f32(vceqq_f32(a, a), no, yes); }
SIMCTG_INLINE Vec round_even(Vec a) { return vrndnq_f32(a); }
SIMCTG_INLINE Vec power_of_two(int32x4_t exponent) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(exponent, vdupq_n_s32(127)), 23));
}
SIMCTG_INLINE Vec scale_by_power(Vec value, Vec exponent) {  // two factors: subnormal results need both
    const int32x4_t whole = vcvtq_s32_f32(exponent), half = vshrq_n_s32(whole, 1);
    return mul(mul(value, power_of_two(half)), power_of_two(vsubq_s32(whole, half)));
}

SIMCTG_INLINE float32x2_t add_halves(Vec a) { return vadd_f32(vget_low_f32(a), vget_high_f32(a)); }
SIMCTG_INLINE float sum(Vec a) { return vpadds_f32(add_halves(a)); }  // lanes 2 apart, then 1; the same in sum4
SIMCTG_INLINE void sum4(const Vec* v, float* out) {
    const Vec ab = vcombine_f32(add_halves(v[0]), add_halves(v[1]));
    store(out, vpaddq_f32(ab, vcombine_f32(add_halves(v[2]), add_halves(v[3]))));
}
SIMCTG_INLINE float highest(Vec a) { return vmaxvq_f32(a); }
SIMCTG_INLINE uint32_t bits_of(uint32x4_t lanes) {
    constexpr uint32_t bits[] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(lanes, vld1q_u32(bits)));
}
SIMCTG_INLINE uint32_t above_bits(Vec a, Vec b) { return bits_of(vcgtq_f32(a, b)); }
SIMCTG_INLINE uint32_t at_least_bits(Vec a, Vec b) { return bits_of(vcgeq_f32(a, b)); }

#else

constexpr int kLanes = 4;
constexpr int kRegisters = 16;
typedef float Vec __attribute__((vector_size(16)));
typedef int32_t IntVec __attribute__((vector_size(16)));
struct Mask {
    int64_t count;
};

SIMCTG_INLINE Mask first_lanes(int64_t count) { return Mask{count}; }
SIMCTG_INLINE Vec broadcast(float value) { return Vec{value, value, value, value}; }
SIMCTG_INLINE Vec zeros() { return broadcast(0.0f); }
SIMCTG_INLINE Vec load(const float* p) {
    Vec v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
SIMCTG_INLINE Vec load(const float* p, Mask mask) {
    Vec v = zeros();
    for (int64_t i = 0; i < mask.count; ++i) v[i] = p[i];
    return v;
}
SIMCTG_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
SIMCTG_INLINE void store(float* p, Vec v, Mask mask) {
    for (int64_t i = 0; i < mask.count; ++i) p[i] = v[i];
}
SIMCTG_INLINE Vec add(Vec a, Vec b) { return a + b; }
SIMCTG_INLINE Vec sub(Vec a, Vec b) { return a - b; }
SIMCTG_INLINE Vec mul(Vec a, Vec b) { return a * b; }
SIMCTG_INLINE Vec div(Vec a, Vec b) { return a / b; }
SIMCTG_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return a * b + c; }
SIMCTG_INLINE Vec choose(IntVec condition, Vec yes, Vec no) {
    return reinterpret_cast<Vec>((condition & reinterpret_cast<IntVec>(yes)) |
                                 (~condition & reinterpret_cast<IntVec>(no)));
}
SIMCTG_INLINE Vec max(Vec a, Vec b) { return choose(a > b, a, b); }
SIMCTG_INLINE Vec min(Vec a, Vec b) { return choose(a < b, a, b); }
SIMCTG_INLINE Vec absolute(Vec a) {
    return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(a) & IntVec{0x7FFFFFFF, 0x7FFFFFFF, 0x7FFFFFFF, 0x7FFFFFFF});
}
SIMCTG_INLINE Vec copy_sign(Vec magnitude, Vec sign) {
    return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(magnitude) |
                                 (reinterpret_cast<IntVec>(sign) & ~IntVec{0x7FFFFFFF, 0x7FFFFFFF, 0x7FFFFFFF, 0x7FFFFFFF}));
}
SIMCTG_INLINE Vec where_less(Vec a, Vec b, Vec yes, Vec no) { return choose(a < b, yes, no); }
SIMCTG_INLINE Vec where_nan(Vec a, Vec yes, Vec no) { return choose(a != a, yes, no); }
SIMCTG_INLINE Vec round_even(Vec a) {  // |a| < 2^22
    const Vec magic = broadcast(12582912.0f);
    return (a + magic) - magic;
}
SIMCTG_INLINE Vec scale_by_power(Vec value, Vec exponent) {
    const IntVec whole = __builtin_convertvector(exponent, IntVec), half = whole >> 1;
    const Vec first = reinterpret_cast<Vec>((half + 127) << 23);
    const Vec second = reinterpret_cast<Vec>((whole - half + 127) << 23);
    return value * first * second;
}
SIMCTG_INLINE float sum(Vec a) { return (a[0] + a[2]) + (a[1] + a[3]); }
SIMCTG_INLINE void sum4(const Vec* v, float* out) {
    for (int i = 0; i < 4; ++i) out[i] = sum(v[i]);
}
SIMCTG_INLINE float highest(Vec a) {
    const float low = a[0] > a[1] ? a[0] : a[1], high = a[2] > a[3] ? a[2] : a[3];
    return low > high ? low : high;
}
SIMCTG_INLINE uint32_t bits_of(IntVec lanes) {
    lanes &= IntVec{1, 2, 4, 8};
    uint64_t pairs[2];
    __builtin_memcpy(pairs, &lanes, sizeof pairs);
    const uint64_t both = pairs[0] | pairs[1];
    return static_cast<uint32_t>(both | both >> 32);
}
SIMCTG_INLINE uint32_t above_bits(Vec a, Vec b) { return bits_of(a > b); }
SIMCTG_INLINE uint32_t at_least_bits(Vec a, Vec b) { return bits_of(a >= b); }

#endif

#if !defined(__AVX512F__)
SIMCTG_INLINE void sum8(const Vec* v, float* out) {
    sum4(v, out);
    sum4(v + 4, out + 4);
}
SIMCTG_INLINE void sum16(const Vec* v, float* out) {
    sum8(v, out);
    sum8(v + 8, out + 8);
}
#endif

// The first `count` lanes, all of them where it is no less: AMD takes a dozen cycles for a masked store, whatever the mask.
SIMCTG_INLINE void store_first(float* p, Vec v, int64_t count) {
    if (count >= kLanes) store(p, v);
    else store(p, v, first_lanes(count));
}

// Loaded once: GCC would rather read it from memory again in every multiplication, and loads are what a core has least of.
template <class T>
SIMCTG_INLINE T in_register(T v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    asm("" : "+x"(v));
#endif
    return v;
}

// Sums of `Count` vectors.
template <int Count>
SIMCTG_INLINE void sum_all(const Vec* v, float* out) {
    if constexpr (Count >= 16) {
        sum16(v, out);
        sum_all<Count - 16>(v + 16, out + 16);
    } else if constexpr (Count >= 8) {
        sum8(v, out);
        sum_all<Count - 8>(v + 8, out + 8);
    } else if constexpr (Count >= 4) {
        sum4(v, out);
        sum_all<Count - 4>(v + 4, out + 4);
    } else if constexpr (Count >= 1) {
        out[0] = sum(v[0]);
        sum_all<Count - 1>(v + 1, out + 1);
    }
}

}  // namespace
}  // namespace simctg::simd
