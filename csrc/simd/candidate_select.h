// What one instruction set offers to candidate_select.cpp.
#pragma once

#include "api/candidate_select.h"
#include "simd/table.h"

namespace simctg::candidates {

struct Kernels {
    // The candidates of sequence b scaled to length 1, contiguous.
    void (*normalize)(const CandidateScan& call, int64_t b, float* unit);
    // The largest cosine, and where it is, over the positions begin..end-1.
    void (*scan)(const CandidateScan& call, int64_t b, int64_t begin, int64_t end, const float* unit, float* best,
                 int64_t* position);
    // m and the candidates' g of sequence b, which has so many real positions: [candidates + 1, dim]; then the products of
    // each with m; then 1 / the length of each less m, but for m's own.
    void (*center)(const CenteredScan& call, int64_t b, int64_t seen, float* rows);
    // `scan` of these.
    void (*scan_centered)(const CenteredScan& call, int64_t b, int64_t begin, int64_t end, const float* rows, float* best,
                          int64_t* position);
};

// Whether `value` replaces `best`: larger, or the first NaN.
static inline bool replaces(float value, float best) { return !(value <= best) && best == best; }

}  // namespace simctg::candidates

SIMCTG_TABLES(candidates::Kernels)
