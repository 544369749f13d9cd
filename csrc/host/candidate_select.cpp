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

thread_local Scratch unit_scratch;

constexpr int64_t kCut = 128;              // positions to a task
constexpr int64_t kSmallWork = 1 << 16;    // floats of history below which waking a thread costs more than it saves

}  // namespace

void candidate_scan(const CandidateScan& call, int num_threads) {
    for (const auto& [name, value] : {std::pair<const char*, int64_t>{"batch", call.batch},
                                      {"candidates", call.candidates},
                                      {"dim", call.dim},
                                      {"length", call.length},
                                      {"num_threads", num_threads - 1}}) {
        if (value < 0) throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + ", too small");
    }
    for (int64_t b = 0; b < call.batch; ++b) length_of(call.lengths, b, call.length);
    if (call.batch == 0 || call.candidates == 0) return;
    const Kernels& k = kernels<Kernels>();
    if (call.batch * call.length * call.dim < kSmallWork) num_threads = 1;
    const int64_t cuts = std::max<int64_t>(1, (call.length + kCut - 1) / kCut);
    const int64_t floats = call.candidates * call.dim;
    float* unit = unit_scratch.get(call.batch * floats);
    for (int64_t b = 0; b < call.batch; ++b) k.normalize(call, b, unit + b * floats);
    std::vector<float> best(static_cast<size_t>(call.batch * cuts * call.candidates));
    std::vector<int64_t> position(best.size());
    parallel_for(call.batch * cuts, num_threads, [&](int64_t task) {
        const int64_t b = task / cuts, begin = task % cuts * kCut;
        const int64_t end = std::min(call.lengths ? call.lengths[b] : call.length, begin + kCut);
        k.scan(call, b, begin, std::max(begin, end), unit + b * floats,
               best.data() + task * call.candidates, position.data() + task * call.candidates);
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

}  // namespace simctg
