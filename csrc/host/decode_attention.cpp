#include "api/decode_attention.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <stdexcept>
#include <utility>

#include "host/checks.h"
#include "host/memory.h"
#include "host/parallel.h"
#include "simd/decode_attention.h"

namespace simctg {
namespace {

using namespace attention;

thread_local Scratch work_scratch, partial_scratch;

constexpr int64_t kTasksPerThread = 8;   // enough to even out rows of different length
constexpr int64_t kSmallWork = 1 << 16;  // elements of keys and values below which waking a thread costs more than it saves

// The positions a sequence reads, and how many cuts of kSplit they touch.
struct Range {
    int64_t begin, end, first_cut, cuts;
    Range(const DecodeAttention& call, int64_t b) {
        begin = std::max<int64_t>(0, std::max(call.start, call.starts ? call.starts[b] : 0));
        end = call.lengths ? call.lengths[b] : call.length;
        begin = std::min(begin, end);
        first_cut = begin / kSplit;
        cuts = begin == end ? 0 : (end - 1) / kSplit + 1 - first_cut;
    }
};

}  // namespace

void decode_attention(const DecodeAttention& call, int num_threads) {
    for (const auto& [name, value] : {std::pair<const char*, int64_t>{"batch", call.batch},
                                      {"candidates", call.candidates},
                                      {"kv_heads", call.kv_heads},
                                      {"groups", call.groups},
                                      {"dim", call.dim},
                                      {"value_dim", call.value_dim},
                                      {"length", call.length}}) {
        check(value >= 0, name, value, ">= 0");
    }
    check(num_threads >= 1, "num_threads", num_threads, ">= 1");
    if (call.bias && call.bias_type != call.type && call.bias_type != ElementType::float32) {
        throw std::invalid_argument("bias_type must be type or float32");
    }
    for (int64_t b = 0; b < call.batch; ++b) length_of(call.lengths, b, call.length);
    if (call.offsets) {
        check(call.offsets[0] == 0, "offsets[0]", call.offsets[0], "0");
        for (int64_t b = 0; b < call.batch; ++b) {
            const int64_t count = call.candidates_of(b);
            check(count >= 0 && count <= call.candidates, "candidates of a sequence", count, "0..candidates");
        }
    }
    const Typed& k = kernels<Kernels>().of_type[static_cast<int>(call.type)];
    const int64_t rows = call.candidates * call.groups, heads = call.batch * call.kv_heads;
    const int64_t cut_floats = rows * partial_stride(call.value_dim);
    if (heads == 0 || rows == 0) return;
    if (heads * call.length * (call.dim + call.value_dim) < kSmallWork) num_threads = 1;

    const auto run_cut = [&](int64_t b, int64_t g, const Range& range, int64_t cut, const void* next, float* partial) {
        const int64_t begin = std::max(range.begin, (range.first_cut + cut) * kSplit);
        const int64_t end = std::min(range.end, (range.first_cut + cut + 1) * kSplit);
        k.attend(call, b, g, begin, end, next, work_scratch.get(attention_scratch(rows, call.dim)), partial);
    };
    const auto keys_at = [&](int64_t b, int64_t g, int64_t position) -> const void* {
        return static_cast<const char*>(call.key) +
               size_of(call.type) * (b * call.key_batch + g * call.key_head + position * call.key_position);
    };
    const int64_t most_cuts = (call.length + kSplit - 1) / kSplit;
    if (most_cuts <= 1 || heads >= 4 * int64_t{num_threads} || num_threads == 1) {
        // Heads that follow one another: each cut has the keys that are read after it fetched.
        const int64_t tasks = std::min(heads, kTasksPerThread * num_threads);
        parallel_for(tasks, num_threads, [&](int64_t task) {
            const int64_t last = heads * (task + 1) / tasks;
            for (int64_t head = heads * task / tasks; head < last; ++head) {
                const int64_t b = head / call.kv_heads, g = head % call.kv_heads;
                const Range range(call, b);
                const void* next = nullptr;
                if (head + 1 < last) {
                    const int64_t next_b = (head + 1) / call.kv_heads, next_g = (head + 1) % call.kv_heads;
                    next = keys_at(next_b, next_g, Range(call, next_b).begin);
                }
                float* partials = partial_scratch.get(std::max<int64_t>(1, range.cuts) * cut_floats);
                for (int64_t cut = 0; cut < range.cuts; ++cut) {
                    const bool ends = cut + 1 == range.cuts;
                    run_cut(b, g, range, cut, ends ? next : keys_at(b, g, (range.first_cut + cut + 1) * kSplit),
                            partials + cut * cut_floats);
                }
                k.finish(call, b, g, range.cuts, partials);
            }
        });
        return;
    }
    // Few heads, long sequences: each cut is a task, and whoever ends a head's last one adds them up.
    float* all = partial_scratch.get(heads * most_cuts * cut_floats);
    const auto missing = std::make_unique<std::atomic<int64_t>[]>(static_cast<size_t>(heads));
    for (int64_t head = 0; head < heads; ++head) {
        missing[head].store(most_cuts, std::memory_order_relaxed);
    }
    parallel_for(heads * most_cuts, num_threads, [&](int64_t task) {
        const int64_t head = task / most_cuts, cut = task % most_cuts;
        const int64_t b = head / call.kv_heads, g = head % call.kv_heads;
        const Range range(call, b);
        float* partials = all + head * most_cuts * cut_floats;
        if (cut < range.cuts) run_cut(b, g, range, cut, nullptr, partials + cut * cut_floats);
        if (missing[head].fetch_sub(1, std::memory_order_acq_rel) == 1) k.finish(call, b, g, range.cuts, partials);
    });
}

}  // namespace simctg
