// Loads and stores of 16-bit floats as vectors of floats: widening is exact, narrowing rounds to nearest, ties to even.
#pragma once

#include "api/element_type.h"
#include "simd/simd.h"

namespace simctg::simd {
namespace {

SIMCTG_INLINE float from_bits(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}
SIMCTG_INLINE uint32_t to_bits(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}

SIMCTG_INLINE float widen(float value) { return value; }
SIMCTG_INLINE float widen(BFloat16 value) { return from_bits(static_cast<uint32_t>(value.bits) << 16); }
SIMCTG_INLINE float widen(Float16 value) {
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16, magnitude = value.bits & 0x7FFFu;
    // Shifted into place the exponent is 112 too small; the multiplication adds that, subnormals included.
    const float scaled = from_bits(magnitude << 13) * from_bits((127u + 112u) << 23);
    const uint32_t special = magnitude >= 0x7C00u ? 0x7F800000u : 0u;
    return from_bits(to_bits(scaled) | special | sign);
}

SIMCTG_INLINE void narrow(float value, float* out) { *out = value; }
SIMCTG_INLINE void narrow(float value, BFloat16* out) {
    const uint32_t bits = to_bits(value);
    const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    out->bits = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}
SIMCTG_INLINE void narrow(float value, Float16* out) {
    const uint32_t bits = to_bits(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    const uint32_t odd = (magnitude >> 13) & 1u;
    uint32_t half = (magnitude - 0x38000000u + 0xFFFu + odd) >> 13;
    if (magnitude > 0x7F800000u) half = 0x7E00u;
    else if (magnitude >= 0x477FF000u) half = 0x7C00u;
    else if (magnitude < 0x38800000u) half = to_bits(from_bits(magnitude) + 0.5f) - 0x3F000000u;  // rounds at 2^-24
    out->bits = static_cast<uint16_t>(sign | half);
}

// ---- vectors --------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)

SIMCTG_INLINE Vec widen_bfloat(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
SIMCTG_INLINE __m256i narrow_bfloat(Vec v) {
    const __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16));
}
SIMCTG_INLINE Vec load(const BFloat16* p) { return widen_bfloat(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
SIMCTG_INLINE Vec load(const BFloat16* p, Mask mask) { return widen_bfloat(_mm256_maskz_loadu_epi16(mask, p)); }
SIMCTG_INLINE void store(BFloat16* p, Vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bfloat(v)); }
SIMCTG_INLINE void store(BFloat16* p, Vec v, Mask mask) { _mm256_mask_storeu_epi16(p, mask, narrow_bfloat(v)); }
SIMCTG_INLINE Vec load(const Float16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
SIMCTG_INLINE Vec load(const Float16* p, Mask mask) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p)); }
SIMCTG_INLINE void store(Float16* p, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
SIMCTG_INLINE void store(Float16* p, Vec v, Mask mask) {
    _mm256_mask_storeu_epi16(p, mask, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

#else

// The lanes that a mask leaves.
SIMCTG_INLINE int64_t lanes_of(Mask mask) {
#if defined(__AVX2__)
    return __builtin_popcount(static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(mask))));
#else
    return mask.count;
#endif
}
template <class E>
SIMCTG_INLINE Vec load_lanes(const E* p, int64_t count) {
    float lanes[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = widen(p[i]);
    return load(lanes);
}
template <class E>
SIMCTG_INLINE void store_lanes(E* p, Vec v, int64_t count) {
    float lanes[kLanes];
    store(lanes, v);
    for (int64_t i = 0; i < count; ++i) narrow(lanes[i], p + i);
}

#if defined(__AVX2__)

SIMCTG_INLINE Vec load(const BFloat16* p) {
    const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i places = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,  //
                                            -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(twice, places));
}
SIMCTG_INLINE void store(BFloat16* p, Vec v) {
    const __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const Vec chosen = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(chosen), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
SIMCTG_INLINE Vec load(const Float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
SIMCTG_INLINE void store(Float16* p, Vec v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

#else

typedef uint16_t HalfWords __attribute__((vector_size(2 * kLanes)));
typedef int32_t Words __attribute__((vector_size(4 * kLanes)));

SIMCTG_INLINE Words load_bits(const void* p) {
    HalfWords bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    return __builtin_convertvector(bits, Words);
}
SIMCTG_INLINE Vec load(const BFloat16* p) { return reinterpret_cast<Vec>(load_bits(p) << 16); }
SIMCTG_INLINE Vec load(const Float16* p) {  // as `widen`
    const Words bits = load_bits(p), magnitude = bits & 0x7FFF;
    const Vec scaled = mul(reinterpret_cast<Vec>(magnitude << 13), broadcast(from_bits((127u + 112u) << 23)));
    const Words special = (magnitude >= 0x7C00) & 0x7F800000;
    return reinterpret_cast<Vec>(reinterpret_cast<Words>(scaled) | special | (bits & 0x8000) << 16);
}
// A compiler makes vectors of these loops.
SIMCTG_INLINE void store(BFloat16* p, Vec v) { store_lanes(p, v, kLanes); }
SIMCTG_INLINE void store(Float16* p, Vec v) { store_lanes(p, v, kLanes); }

#endif

// Masks are for the ends of rows, and functions of their own keep the kernels short.
#define SIMCTG_CALLED inline __attribute__((noinline))
SIMCTG_CALLED Vec load(const BFloat16* p, Mask mask) { return load_lanes(p, lanes_of(mask)); }
SIMCTG_CALLED Vec load(const Float16* p, Mask mask) { return load_lanes(p, lanes_of(mask)); }
SIMCTG_CALLED void store(BFloat16* p, Vec v, Mask mask) { store_lanes(p, v, lanes_of(mask)); }
SIMCTG_CALLED void store(Float16* p, Vec v, Mask mask) { store_lanes(p, v, lanes_of(mask)); }
#undef SIMCTG_CALLED

#endif

// The first `count` lanes, all of them where it is no less; the others 0.
template <class E>
SIMCTG_INLINE Vec load_first(const E* p, int64_t count) {
    return count >= kLanes ? load(p) : load(p, first_lanes(count));
}
template <class E>
SIMCTG_INLINE void store_first(E* p, Vec v, int64_t count) {
    if (count >= kLanes) store(p, v);
    else store(p, v, first_lanes(count));
}

// ---- arrays ---------------------------------------------------------------------------------------------------------

template <class E>
SIMCTG_INLINE void widen_array(const E* in, int64_t count, float* out) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(out + i, load(in + i));
    for (; i < count; ++i) out[i] = widen(in[i]);
}
template <class E>
SIMCTG_INLINE void narrow_array(const float* in, int64_t count, E* out) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(out + i, load(in + i));
    for (; i < count; ++i) narrow(in[i], out + i);
}

// Calls f with `data` as a pointer to elements of its type.
template <class F>
SIMCTG_INLINE auto with_type(ElementType type, const void* data, const F& f) {
    if (type == ElementType::bfloat16) return f(static_cast<const BFloat16*>(data));
    if (type == ElementType::float16) return f(static_cast<const Float16*>(data));
    return f(static_cast<const float*>(data));
}
template <class F>
SIMCTG_INLINE auto with_type(ElementType type, void* data, const F& f) {
    if (type == ElementType::bfloat16) return f(static_cast<BFloat16*>(data));
    if (type == ElementType::float16) return f(static_cast<Float16*>(data));
    return f(static_cast<float*>(data));
}

// ---- products -------------------------------------------------------------------------------------------------------

// How vectors of two rows are multiplied along them, the first one's elements being X. Whatever the other's type, an X of
// float takes it widened.
template <class X>
struct Along {
    static constexpr int kStep = kLanes;
    using Rest = Mask;
    static SIMCTG_INLINE Rest rest(int64_t count) { return first_lanes(count); }
    template <class T>
    static SIMCTG_INLINE Vec get(const T* p) { return load(p); }
    template <class T>
    static SIMCTG_INLINE Vec get(const T* p, Rest rest) { return load(p, rest); }
    static SIMCTG_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return simd::multiply_add(a, b, c); }
};

#if defined(__AVX512BF16__)
template <>
struct Along<BFloat16> {
    static constexpr int kStep = 2 * kLanes;
    using Rest = __mmask32;
    static SIMCTG_INLINE Rest rest(int64_t count) { return static_cast<Rest>((uint64_t{1} << count) - 1); }
    static SIMCTG_INLINE __m512bh get(const BFloat16* p) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p)); }
    static SIMCTG_INLINE __m512bh get(const BFloat16* p, Rest rest) {
        return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(rest, p));
    }
    static SIMCTG_INLINE Vec multiply_add(__m512bh a, __m512bh b, Vec c) { return _mm512_dpbf16_ps(c, a, b); }
};
#endif

}  // namespace
}  // namespace simctg::simd
