#include "api/candidate_select.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "host/checks.h"
#include "host/memory.h"
#include "host/parallel.h"
#include "simd/candidate_select.h"

namespace simctg {
namespace {

using namespace candidates;

thread_local Scratch row_scratch;

constexpr int64_t kCut = 128;              // positions to a task
constexpr int64_t kSmallWork = 1 << 16;    // floats of history below which waking a thread costs more than it saves
constexpr int64_t kFewest = 3;             // positions with a mean that says anything

// prepare(b, rows) makes what scan(b, begin, end, rows, best, position) holds against the positions begin..end-1 of
// sequence b, so many floats.
template <class Prepare, class Scan>
void scan_in_cuts(const CandidateScan& call, int64_t floats, int num_threads, const Prepare& prepare, const Scan& scan) {
    const int64_t cuts = std::max<int64_t>(1, (call.length + kCut - 1) / kCut);
    if (call.batch * call.length * call.dim < kSmallWork) num_threads = 1;
    float* rows = row_scratch.get(call.batch * floats);
    for (int64_t b = 0; b < call.batch; ++b) prepare(b, rows + b * floats);
    std::vector<float> best(static_cast<size_t>(call.batch * cuts * call.candidates));
    std::vector<int64_t> position(best.size());
    parallel_for(call.batch * cuts, num_threads, [&](int64_t task) {
        const int64_t b = task / cuts, begin = task % cuts * kCut;
        const int64_t end = std::min(call.lengths ? call.lengths[b] : call.length, begin + kCut);
        scan(b, begin, std::max(begin, end), rows + b * floats, best.data() + task * call.candidates,
             position.data() + task * call.candidates);
    });
    for (int64_t b = 0; b < call.batch; ++b) {
        for (int64_t c = 0; c < call.candidates; ++c) {
            float value = -std::numeric_limits<float>::infinity();
            int64_t where = 0;
            for (int64_t cut = 0; cut < cuts; ++cut) {
                const size_t i = static_cast<size_t>((b * cuts + cut) * call.candidates + c);
                if (!replaces(best[i], value)) continue;
                value = best[i];
                where = position[i];
            }
            call.penalty[b * call.candidates + c] = value;
            call.position[b * call.candidates + c] = where;
        }
    }
}

void check_sizes(const CandidateScan& call, int num_threads) {
    for (const auto& [name, value] : {std::pair<const char*, int64_t>{"batch", call.batch},
                                      {"candidates", call.candidates},
                                      {"dim", call.dim},
                                      {"length", call.length},
                                      {"num_threads", num_threads - 1}}) {
        if (value < 0) throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + ", too small");
    }
    for (int64_t b = 0; b < call.batch; ++b) length_of(call.lengths, b, call.length);
}

int64_t real_positions(const CandidateScan& call, int64_t b) {
    const int64_t end = call.lengths ? call.lengths[b] : call.length;
    if (!call.mask) return end;
    const uint8_t* mask = call.mask + b * call.mask_batch;
    return end - std::count(mask, mask + end, uint8_t{0});
}

}  // namespace

void candidate_scan(const CandidateScan& call, int num_threads) {
    check_sizes(call, num_threads);
    if (call.batch == 0 || call.candidates == 0) return;
    const Kernels& k = kernels<Kernels>();
    scan_in_cuts(
        call, call.candidates * call.dim, num_threads,
        [&](int64_t b, float* unit) { k.normalize(call, b, unit); },
        [&](int64_t b, int64_t begin, int64_t end, const float* unit, float* best, int64_t* position) {
            k.scan(call, b, begin, end, unit, best, position);
        });
}

void centered_scan(const CenteredScan& call, int num_threads) {
    check_sizes(call, num_threads);
    if (call.batch == 0 || call.candidates == 0) return;
    const Kernels& k = kernels<Kernels>();
    scan_in_cuts(
        call, (call.candidates + 1) * (call.dim + 2), num_threads,
        [&](int64_t b, float* rows) { k.center(call, b, real_positions(call, b), rows); },
        [&](int64_t b, int64_t begin, int64_t end, const float* rows, float* best, int64_t* position) {
            k.scan_centered(call, b, begin, end, rows, best, position);
        });
    for (int64_t b = 0; b < call.batch; ++b) {
        const int64_t seen = real_positions(call, b);
        if (seen >= kFewest) continue;
        for (int64_t i = b * call.candidates; i < (b + 1) * call.candidates; ++i) {
            call.penalty[i] = seen == 0 ? 0.0f : call.penalty[i] - call.penalty[i];  // NaN stays
            call.position[i] = 0;
        }
    }
}

}  // namespace simctg
