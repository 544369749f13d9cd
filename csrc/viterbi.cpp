#include "viterbi.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#include "parallel.h"

namespace simctg {
namespace {

[[noreturn]] void fail(const std::string& what, int64_t value, int64_t limit) {
    throw std::invalid_argument(what + " is " + std::to_string(value) + ", must be in 0.." + std::to_string(limit));
}

// Traces one item; false as soon as something is out of range.
template <class Slot>
bool trace(const BackpointerView& view, int64_t b, int64_t last, int64_t length, int64_t* path) {
    if (length < 0 || length > view.length) return false;
    std::fill(path + length, path + view.length, int64_t{-1});
    const Slot* item = static_cast<const Slot*>(view.data) + b * view.stride_batch;
    int64_t slot = last;
    for (int64_t t = length - 1; t >= 0; --t) {
        if (slot < 0 || slot >= view.slots) return false;
        path[t] = slot;
        if (t > 0) slot = static_cast<int64_t>(item[t * view.stride_length + slot * view.stride_slot]);
    }
    return true;
}

// Says what `trace` stumbled over; the way there is walked once more because errors are rare and the loop is hot.
template <class Slot>
[[noreturn]] void explain(const BackpointerView& view, int64_t b, int64_t last, int64_t length) {
    const std::string item = std::to_string(b);
    if (length < 0 || length > view.length) fail("lengths[" + item + "]", length, view.length);
    if (last < 0 || last >= view.slots) fail("last[" + item + "]", last, view.slots - 1);
    const Slot* data = static_cast<const Slot*>(view.data) + b * view.stride_batch;
    int64_t slot = last;
    for (int64_t t = length - 1; t > 0; --t) {
        const int64_t next = static_cast<int64_t>(data[t * view.stride_length + slot * view.stride_slot]);
        if (next < 0 || next >= view.slots) {
            fail("backpointers[" + item + ", " + std::to_string(t) + ", " + std::to_string(slot) + "]", next,
                 view.slots - 1);
        }
        slot = next;
    }
    throw std::logic_error("viterbi_backtrace: item " + item + " failed once and passed the second time");
}

}  // namespace

template <class Slot>
void viterbi_backtrace(const BackpointerView& view, const int64_t* last, const int64_t* lengths, int64_t* path,
                       int num_threads) {
    const auto length_of = [&](int64_t b) { return lengths ? lengths[b] : view.length; };
    // A step is one read that waits for the one before; a task is enough of them to be worth waking a thread.
    const int64_t items = std::max<int64_t>(1, 4096 / std::max<int64_t>(1, view.length));
    std::atomic<int64_t> wrong{view.batch};  // the first item that failed: the same one for any number of threads
    parallel_for((view.batch + items - 1) / items, num_threads, [&](int64_t task) {
        for (int64_t b = task * items; b < std::min(view.batch, (task + 1) * items); ++b) {
            if (trace<Slot>(view, b, last[b], length_of(b), path + b * view.length)) continue;
            int64_t seen = wrong.load();
            while (b < seen && !wrong.compare_exchange_weak(seen, b)) {}
        }
    });
    const int64_t b = wrong.load();
    if (b < view.batch) explain<Slot>(view, b, last[b], length_of(b));
}

template void viterbi_backtrace<uint8_t>(const BackpointerView&, const int64_t*, const int64_t*, int64_t*, int);
template void viterbi_backtrace<uint16_t>(const BackpointerView&, const int64_t*, const int64_t*, int64_t*, int);
template void viterbi_backtrace<int32_t>(const BackpointerView&, const int64_t*, const int64_t*, int64_t*, int);
template void viterbi_backtrace<int64_t>(const BackpointerView&, const int64_t*, const int64_t*, int64_t*, int);

}  // namespace simctg
