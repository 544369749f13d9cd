// The largest cosine of a few candidates with a long history.
//
// Floor: the history, 4 T D bytes a sequence, is read once for all candidates; 2 k T D operations. Layout: rows of D floats
// wherever their strides say; a tile of up to four candidates × a few positions is summed in registers (dot_block.h), and
// kPositions of history stay in the first-level cache for further candidates.
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

void scan(const CandidateScan& call, int64_t b, int64_t begin, int64_t end, const float* unit, float* best,
          int64_t* position) {
    for (int64_t c = 0; c < call.candidates; ++c) {
        best[c] = -__builtin_inff();
        position[c] = 0;
    }
    const float* history = call.history + b * call.history_batch;
    const int64_t stride = call.history_position;
    const uint8_t* mask = call.mask ? call.mask + b * call.mask_batch : nullptr;
    float cosines[kDotTileRows * kPositions];
    for (int64_t first = begin; first < end; first += kPositions) {
        const int64_t count = smaller(kPositions, end - first);
        for (int64_t c = 0; c < call.candidates; c += kDotTileRows) {
            const int rows = static_cast<int>(smaller<int64_t>(kDotTileRows, call.candidates - c));
            const float* block = history + first * stride;
            const bool more = c == 0 && first + 2 * kPositions <= end;
            dot_block(rows, unit + c * call.dim, call.dim, block, stride, count, call.dim, cosines, kPositions,
                      Ahead<float>{more ? block + kPositions * stride : nullptr, stride});
            for (int r = 0; r < rows; ++r) {
                for (int64_t j = 0; j < count; ++j) {
                    if (mask && !mask[first + j]) continue;
                    if (!replaces(cosines[r * kPositions + j], best[c + r])) continue;
                    best[c + r] = cosines[r * kPositions + j];
                    position[c + r] = first + j;
                }
            }
        }
    }
}

}  // namespace
}  // namespace simctg::candidates

SIMCTG_TABLE(candidates, Kernels, normalize, scan)
