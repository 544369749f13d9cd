// The degeneration penalty of contrastive search: the largest cosine of a candidate with the states before it.
#pragma once

#include <cstdint>

namespace simctg {

// float32, strides in elements; the last dimension is contiguous.
struct CandidateScan {
    int64_t batch, candidates, dim;
    const float* states;  // [batch, candidates, dim], of any length; scaled to length 1 (norms below 1e-12 count as that)
    int64_t state_batch, state_candidate;
    const float* history;  // [batch, length, dim], of length 1
    int64_t history_batch, history_position;
    int64_t length;          // positions in use, at most
    const int64_t* lengths;  // [batch], each in 0..length, or null: all `length`
    const uint8_t* mask;  // [batch, length], 0: not a real position; null: all are real
    int64_t mask_batch;
    float* penalty;     // [batch, candidates], contiguous
    int64_t* position;  // the same shape: where the largest cosine is, the earliest of equals
};

// The history is read once for all candidates. NaN propagates, with the position of the first one; a row without a real
// position gets −inf and position 0. The result depends neither on the number of candidates or sequences nor on the
// number of threads. Throws std::invalid_argument on negative sizes and on
// lengths outside 0..length.
void candidate_scan(const CandidateScan& call, int num_threads);

// The same of cosines of h − μ, μ the mean of the real positions. Given are a shift c near to μ, and in the place of
// unit-length states g_j = h_j − c, their squares |g_j|² and their sum s: with g = h − c and m = s / n a cosine is that of
// g − m and g_j − m.
struct CenteredScan : CandidateScan {  // here the history is of any length
    const float* shift;  // [batch, dim]
    int64_t shift_batch;
    const float* squares;  // [batch, length]
    int64_t squares_batch;
    const float* sums;  // [batch, dim]
    int64_t sums_batch;
};

// As candidate_scan, m being one more row. A length of g − m or g_j − m that is lost in rounding makes a cosine 0; others
// are within −1..1. Of fewer than 3 real positions the penalty is 0, at position 0.
void centered_scan(const CenteredScan& call, int num_threads);

}  // namespace simctg
