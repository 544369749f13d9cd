// What one instruction set offers to decode_attention.cpp.
//
// The prefix is cut at multiples of kSplit positions whatever the sizes, so that the cuts never change a result. A cut
// leaves for each query row its unnormalised output, largest score and sum of exponentials: a partial. Rows of a partial
// are numbered c · groups + r.
#pragma once

#include "api/decode_attention.h"
#include "simd/table.h"

namespace simctg::attention {

constexpr int64_t kSplit = 512;

// Floats to a row of a partial: the output, padded to whole vectors, then largest score and sum.
static inline int64_t partial_stride(int64_t value_dim) { return (value_dim + 15) / 16 * 16 + 16; }

// Floats of scratch for `rows` query rows: the rows themselves, their scores, what the mask closes, and a widened bias.
static inline int64_t attention_scratch(int64_t rows, int64_t dim) {
    return rows * ((dim + 15) / 16 * 16) + rows * kSplit + 2 * kSplit;
}

// For one type of element.
struct Typed {
    // The positions begin..end-1, kSplit at most, for the query rows of sequence b and key/value head g. `next`: keys
    // that are read after them, to be fetched meanwhile, or null.
    void (*attend)(const DecodeAttention& call, int64_t b, int64_t g, int64_t begin, int64_t end, const void* next,
                   float* scratch, float* partial);
    // Adds up partials [cuts, candidates · groups, stride] (a sequence of fewer candidates has the first rows of each),
    // the new key and the sink, and writes `out`. Changes them.
    void (*finish)(const DecodeAttention& call, int64_t b, int64_t g, int64_t cuts, float* partials);
};

struct Kernels {
    Typed of_type[3];  // ElementType
};

}  // namespace simctg::attention

SIMCTG_EXTENDED_TABLES(attention::Kernels, Isa::avx512_bf16)
