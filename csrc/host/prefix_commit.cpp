#include "api/prefix_commit.h"

#include <cstring>

#include "host/parallel.h"

namespace simctg {

void prefix_commit(const CommitItem* items, int64_t count, const int64_t* winners, const int64_t* positions,
                   int64_t batch, int num_threads) {
    constexpr int64_t small_work = 256;  // rows of a head: each is a miss or two; waking a thread costs some hundred
    int64_t heads = 0;
    for (int64_t i = 0; i < count; ++i) heads += items[i].heads;
    parallel_for(count, heads * batch < small_work ? 1 : num_threads, [&](int64_t i) {
        const CommitItem& item = items[i];
        for (int64_t b = 0; b < batch; ++b) {
            char* to = item.buffer + b * item.buffer_batch + (positions ? positions[b] * item.buffer_position : 0);
            const char* from = item.rows + winners[b] * item.rows_row;
            for (int64_t h = 0; h < item.heads; ++h) {
                std::memcpy(to + h * item.buffer_head, from + h * item.rows_head, item.head_bytes);
            }
        }
    });
}

}  // namespace simctg
