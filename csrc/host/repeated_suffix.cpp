#include "api/repeated_suffix.h"

#include <algorithm>
#include <atomic>
#include <string>

#include "host/checks.h"
#include "host/parallel.h"

namespace simctg {
namespace {

constexpr int64_t kSmallWork = 1 << 14;  // tokens below which waking a thread costs more than it saves

// The Z function of the text read from its end (Gusfield 1997, section 1.4): there the end of the whole text is a
// prefix, and the part before j begins at place count - (j - start). `begin` is the text's first token; repeats[i] are
// of its i-th one. Returns the comparisons made.
int64_t row(const int64_t* begin, int64_t count, int64_t most, int64_t* repeats) {
    const int64_t* last = begin + count - 1;
    int64_t left = 0, right = 0, compared = 0;  // the stretch [left, right) equals the beginning, right the farthest
    if (count > 0) repeats[0] = 0;
    for (int64_t place = 1; place < count; ++place) {
        int64_t same = place < right ? std::min(right - place, repeats[count - (place - left)]) : 0;
        if (place + same >= right) {
            while (place + same < count && (++compared, last[-same] == last[-(place + same)])) ++same;
            left = place, right = place + same;
        }
        repeats[count - place] = same;
    }
    for (int64_t i = 0; i < count; ++i) repeats[i] = std::min(repeats[i], most);
    return compared;
}

}  // namespace

int64_t repeated_suffix(const RepeatedSuffix& call, int num_threads) {
    check(call.batch >= 0, "batch", call.batch, "0 or more");
    check(call.length >= 0, "length", call.length, "0 or more");
    check(call.longest >= 0, "longest", call.longest, "0 or more");
    for (int64_t b = 0; b < call.batch; ++b) {  // before any thread begins: the first wrong one is named
        const std::string item = "[" + std::to_string(b) + "]";
        length_of(call.lengths, b, call.length);
        if (call.starts && (call.starts[b] < 0 || call.starts[b] > call.length)) {
            fail("starts" + item, call.starts[b], call.length);
        }
        if (call.limits) check(call.limits[b] >= 0, ("limits" + item).c_str(), call.limits[b], "0 or more");
    }
    std::atomic<int64_t> compared{0};
    parallel_for(call.batch, call.batch * call.length < kSmallWork ? 1 : num_threads, [&](int64_t b) {
        const int64_t end = length_of(call.lengths, b, call.length);
        const int64_t start = std::min(call.starts ? call.starts[b] : 0, end);
        const int64_t most = call.limits ? std::min(call.limits[b], call.longest) : call.longest;
        int64_t* repeats = call.repeats + b * call.length;
        std::fill(repeats, repeats + start, int64_t{0});
        std::fill(repeats + end, repeats + call.length, int64_t{0});
        compared += row(call.tokens + b * call.stride + start, end - start, most, repeats + start);
    });
    return compared.load();
}

}  // namespace simctg
