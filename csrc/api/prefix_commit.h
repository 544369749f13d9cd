// Writing the winners' keys and values into the prefix cache.
#pragma once

#include <cstdint>

namespace simctg {

// One tensor to commit, in bytes: `head_bytes` contiguous bytes of every head go from the candidate rows to the buffer.
struct CommitItem {
    char* buffer;                          // [batch, heads, positions, …], at the position to write or at the first
    int64_t buffer_batch, buffer_head, buffer_position;  // strides
    const char* rows;                      // [candidate rows, heads, …]
    int64_t rows_row, rows_head;           // strides
    int64_t heads, head_bytes;
};

// buffer[b, h, positions[b]] = rows[winners[b], h] for every item, every b < batch and every head. Without positions
// (null), `buffer` is at the position to write.
void prefix_commit(const CommitItem* items, int64_t count, const int64_t* winners, const int64_t* positions,
                   int64_t batch, int num_threads);

}  // namespace simctg
