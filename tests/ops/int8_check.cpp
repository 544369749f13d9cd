// csrc/simd/linear_int8.cpp by itself, for a processor that lacks AVX-VNNI: what that multiplies is multiplied one by one.
// `tests/ops/test_linear_int8.py` builds it and holds it against PyTorch.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

static __m256i multiplied_one_by_one(__m256i sums, __m256i unsigned_bytes, __m256i signed_bytes) {
    int32_t total[8];
    uint8_t u[32];
    int8_t s[32];
    std::memcpy(total, &sums, sizeof sums), std::memcpy(u, &unsigned_bytes, sizeof u), std::memcpy(s, &signed_bytes, sizeof s);
    for (int i = 0; i < 32; ++i) total[i / 4] += u[i] * s[i];
    std::memcpy(&sums, total, sizeof sums);
    return sums;
}

#define __AVXVNNI__ 1
#define _mm256_dpbusd_avx_epi32 multiplied_one_by_one
#include "simd/linear_int8.cpp"

using namespace simctg;

// y [rows, out_features] = x [rows, in_features] · weight [out_features, in_features], rounded; `memory` is scratch.
extern "C" void product(const float* x, const float* weight, int64_t rows, int64_t in_features, int64_t out_features,
                        int digits, char* memory, float* y) {
    const int8::Kernels& k = table<int8::Kernels, Isa::avx2_vnni>();
    const int64_t outputs = (out_features + 15) / 16 * 16, quads = (in_features + 3) / 4, groups = (in_features + 63) / 64;
    int8::Weight w{reinterpret_cast<uint8_t*>(memory), reinterpret_cast<float*>(memory + outputs * quads * 4), nullptr};
    w.errors = w.scales + outputs;
    for (int64_t n = 0; n < out_features; n += 16) {
        const int8::Weight panel{w.panels + n * quads * 4, w.scales + n, w.errors + n};
        k.quantize(ElementType::float32, weight + n * in_features, in_features, 1, in_features,
                   out_features - n < 16 ? out_features - n : 16, panel);
    }
    int8::Rows r{nullptr, w.errors + outputs, nullptr, nullptr, rows, quads, groups, digits};
    r.excesses = reinterpret_cast<int32_t*>(r.scales + rows * groups);
    r.x = r.excesses + digits * rows * groups;
    for (int64_t m = 0; m < rows; ++m) k.round(ElementType::float32, x + m * in_features, in_features, r, m);
    k.columns({r, w, nullptr, y, out_features, ElementType::float32, ElementType::float32}, 0, out_features);
}
