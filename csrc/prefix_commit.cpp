#include "prefix_commit.h"

#include <cstring>

namespace simctg {

void prefix_commit(const CommitItem* items, int64_t count, const int64_t* winners, const int64_t* positions,
                   int64_t batch) {
    for (int64_t i = 0; i < count; ++i) {
        const CommitItem& item = items[i];
        for (int64_t b = 0; b < batch; ++b) {
            char* to = item.buffer + b * item.buffer_batch + (positions ? positions[b] * item.buffer_position : 0);
            const char* from = item.rows + winners[b] * item.rows_row;
            for (int64_t h = 0; h < item.heads; ++h) {
                std::memcpy(to + h * item.buffer_head, from + h * item.rows_head, item.head_bytes);
            }
        }
    }
}

}  // namespace simctg
