#include "api/viterbi.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#include "host/checks.h"
#include "host/parallel.h"

namespace simctg {
namespace {

// A step is one read that has to wait for the one before it; several items in turn keep that many reads in flight.
constexpr int64_t kItems = 8;

// Traces items first..first + count - 1 (count <= kItems); the first of them that is out of range anywhere, or -1.
template <class Slot>
int64_t trace(const BackpointerView& view, int64_t first, int64_t count, const int64_t* last, const int64_t* lengths,
              int64_t* path) {
    struct Item {
        const Slot* data;
        int64_t* path;
        int64_t slot, length;
    } items[kItems];
    int64_t longest = 0, wrong = -1;
    for (int64_t i = count - 1; i >= 0; --i) {
        const int64_t b = first + i;
        int64_t length = lengths ? lengths[b] : view.length;
        if (length < 0 || length > view.length) {
            wrong = b;
            length = 0;
        }
        items[i] = {static_cast<const Slot*>(view.data) + b * view.stride_batch, path + b * view.length, last[b], length};
        std::fill(items[i].path + length, items[i].path + view.length, int64_t{-1});
        longest = std::max(longest, length);
    }
    for (int64_t t = longest - 1; t >= 0; --t) {
        for (int64_t i = 0; i < count; ++i) {
            Item& item = items[i];
            if (t >= item.length) continue;
            if (static_cast<uint64_t>(item.slot) >= static_cast<uint64_t>(view.slots)) {  // negative ones too
                if (wrong < 0 || first + i < wrong) wrong = first + i;
                item.length = 0;
                continue;
            }
            item.path[t] = item.slot;
            if (t > 0) {
                item.slot = static_cast<int64_t>(item.data[t * view.stride_length + item.slot * view.stride_slot]);
            }
        }
    }
    return wrong;
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
    // A task is kItems at a time, as often as makes it worth waking a thread for.
    const int64_t items = kItems * std::max<int64_t>(1, 2048 / std::max<int64_t>(1, view.length));
    std::atomic<int64_t> wrong{view.batch};  // the first item that failed: the same one for any number of threads
    parallel_for((view.batch + items - 1) / items, num_threads, [&](int64_t task) {
        const int64_t end = std::min(view.batch, (task + 1) * items);
        for (int64_t b = task * items; b < end; b += kItems) {
            const int64_t failed = trace<Slot>(view, b, std::min(kItems, end - b), last, lengths, path);
            if (failed < 0) continue;
            int64_t seen = wrong.load();
            while (failed < seen && !wrong.compare_exchange_weak(seen, failed)) {}
        }
    });
    const int64_t b = wrong.load();
    if (b < view.batch) explain<Slot>(view, b, last[b], lengths ? lengths[b] : view.length);
}

template void viterbi_backtrace<uint8_t>(const BackpointerView&, const int64_t*, const int64_t*, int64_t*, int);
template void viterbi_backtrace<uint16_t>(const BackpointerView&, const int64_t*, const int64_t*, int64_t*, int);
template void viterbi_backtrace<int32_t>(const BackpointerView&, const int64_t*, const int64_t*, int64_t*, int);
template void viterbi_backtrace<int64_t>(const BackpointerView&, const int64_t*, const int64_t*, int64_t*, int);

}  // namespace simctg
