// The largest cosine of a few candidates with a long history.
//
// Floor: the history, 4 T D bytes a sequence, is read once for all candidates; 2 k T D operations. Layout: rows of D floats
// wherever their strides say; a tile of up to four candidates × a few positions is summed in registers (dot_block.h), and
// kPositions of history stay in the first-level cache for further candidates. Of centred states the mean is one more row,
// the first: what a position's products have in common is known before the candidates' are looked at.
#include "simd/candidate_select.h"

#include "simd/dot_block.h"

namespace simctg::candidates {
namespace {

using namespace simd;
using namespace dots;

constexpr int64_t kPositions = 16;  // positions all candidates are held against before the next are read

void normalize(const CandidateScan& call, int64_t b, float* unit) {
    for (int64_t c = 0; c < call.candidates; ++c) {
        const float* state = call.states + b * call.state_batch + c * call.state_candidate;
        float square;
        dot_tile<1, 1>(state, 0, state, 0, call.dim, &square, 0);
        const float norm = __builtin_sqrtf(square);
        const Vec divisor = broadcast(norm < 1e-12f ? 1e-12f : norm);
        for (int64_t d = 0; d < call.dim; d += kLanes) {
            const Mask mask = first_lanes(smaller<int64_t>(kLanes, call.dim - d));
            store_first(unit + c * call.dim + d, div(load(state + d, mask), divisor), call.dim - d);
        }
    }
}

// The largest of each row's values of `count` positions from `first` on, and where it is.
SIMCTG_INLINE void keep_largest(const float* values, const uint8_t* mask, int64_t first, int64_t count, float* best,
                                int64_t* position) {
    for (int64_t j = 0; j < count; ++j) {
        if (mask && !mask[first + j]) continue;
        if (!replaces(values[j], *best)) continue;
        *best = values[j];
        *position = first + j;
    }
}

// take(r, first, count, products) gets the products of every row with every position, `products` of `count` positions
// from `first` on. All rows, the first one first, are held against kPositions before the next are read.
template <class Take>
SIMCTG_INLINE void each_row(const CandidateScan& call, int64_t b, int64_t begin, int64_t end, const float* rows,
                            int64_t row_count, const Take& take) {
    const float* history = call.history + b * call.history_batch;
    const int64_t stride = call.history_position;
    float products[kDotTileRows * kPositions];
    for (int64_t first = begin; first < end; first += kPositions) {
        const int64_t count = smaller(kPositions, end - first);
        for (int64_t c = 0; c < row_count; c += kDotTileRows) {
            const int tile = static_cast<int>(smaller<int64_t>(kDotTileRows, row_count - c));
            const float* block = history + first * stride;
            const bool more = c == 0 && first + 2 * kPositions <= end;
            dot_block(tile, rows + c * call.dim, call.dim, block, stride, count, call.dim, products, kPositions,
                      Ahead<float>{more ? block + kPositions * stride : nullptr, stride});
            for (int r = 0; r < tile; ++r) take(c + r, first, count, products + r * kPositions);
        }
    }
}

void begin_scan(const CandidateScan& call, float* best, int64_t* position) {
    for (int64_t c = 0; c < call.candidates; ++c) {
        best[c] = -__builtin_inff();
        position[c] = 0;
    }
}

const uint8_t* mask_of(const CandidateScan& call, int64_t b) {
    return call.mask ? call.mask + b * call.mask_batch : nullptr;
}

void scan(const CandidateScan& call, int64_t b, int64_t begin, int64_t end, const float* unit, float* best,
          int64_t* position) {
    const uint8_t* mask = mask_of(call, b);
    begin_scan(call, best, position);
    each_row(call, b, begin, end, unit, call.candidates,
             [&](int64_t c, int64_t first, int64_t count, const float* cosines) SIMCTG_INLINE_LAMBDA {
                 keep_largest(cosines, mask, first, count, best + c, position + c);
             });
}

// 1 / √square, where `parts` were added and subtracted to make it; 0 where nothing but their rounding is left of it, NaN
// where it is not finite.
SIMCTG_INLINE float inverse_length(float square, float parts) {
    return square > 0x1p-16f * parts ? 1.0f / __builtin_sqrtf(square) : square - square;
}

void center(const CenteredScan& call, int64_t b, int64_t seen, float* rows) {
    const int64_t dim = call.dim;
    const float* shift = call.shift + b * call.shift_batch;
    const float* sums = call.sums + b * call.sums_batch;
    const Vec count = broadcast(static_cast<float>(larger<int64_t>(1, seen)));
    for (int64_t d = 0; d < dim; d += kLanes) {
        const int64_t left = smaller<int64_t>(kLanes, dim - d);
        const Mask mask = first_lanes(left);
        const Vec common = load(shift + d, mask);
        store_first(rows + d, div(load(sums + d, mask), count), left);
        for (int64_t c = 0; c < call.candidates; ++c) {
            const float* state = call.states + b * call.state_batch + c * call.state_candidate;
            store_first(rows + (c + 1) * dim + d, sub(load(state + d, mask), common), left);
        }
    }
    float* with_mean = rows + (call.candidates + 1) * dim;
    float* inverse = with_mean + call.candidates + 1;
    for (int64_t r = 0; r <= call.candidates; ++r) {
        const float* row = rows + r * dim;
        float square;
        dot_tile<1, 1>(row, 0, rows, 0, dim, with_mean + r, 0);
        dot_tile<1, 1>(row, 0, row, 0, dim, &square, 0);
        inverse[r] = inverse_length(square - 2.0f * with_mean[r] + with_mean[0], square + with_mean[0]);
    }
}

void scan_centered(const CenteredScan& call, int64_t b, int64_t begin, int64_t end, const float* rows, float* best,
                   int64_t* position) {
    const uint8_t* mask = mask_of(call, b);
    const float* squares = call.squares + b * call.squares_batch;
    const float* with_mean = rows + (call.candidates + 1) * call.dim;
    const float* inverse = with_mean + call.candidates + 1;
    const float mean_square = with_mean[0];
    float common[kPositions], inverses[kPositions], cosines[kPositions];
    begin_scan(call, best, position);
    each_row(call, b, begin, end, rows, call.candidates + 1,
             [&](int64_t r, int64_t first, int64_t count, const float* products) SIMCTG_INLINE_LAMBDA {
                 if (r == 0) {
                     for (int64_t j = 0; j < count; ++j) {
                         const float square = squares[first + j];
                         common[j] = mean_square - products[j];
                         inverses[j] = inverse_length(square - 2.0f * products[j] + mean_square, square + mean_square);
                     }
                     return;
                 }
                 for (int64_t j = 0; j < count; ++j) {
                     const float cosine = (products[j] - with_mean[r] + common[j]) * inverse[r] * inverses[j];
                     cosines[j] = cosine > 1.0f ? 1.0f : cosine < -1.0f ? -1.0f : cosine;
                 }
                 keep_largest(cosines, mask, first, count, best + r - 1, position + r - 1);
             });
}

}  // namespace
}  // namespace simctg::candidates

SIMCTG_TABLE(candidates, Kernels, normalize, scan, center, scan_centered)
