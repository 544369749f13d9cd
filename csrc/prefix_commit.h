// Writing the winners' keys and values into the prefix cache.
#pragma once

#include <cstdint>

namespace simctg {

// One tensor to commit, in bytes: `head_bytes` contiguous bytes of every head go from the candidate rows to the buffer.
struct CommitItem {
    char* buffer;                          // [batch, heads, …] at the position to write
    int64_t buffer_batch, buffer_head;     // strides
    const char* rows;                      // [candidate rows, heads, …]
    int64_t rows_row, rows_head;           // strides
    int64_t heads, head_bytes;
};

// buffer[b, h] = rows[winners[b], h] for every item, every b < batch and every head.
void prefix_commit(const CommitItem* items, int64_t count, const int64_t* winners, int64_t batch);

}  // namespace simctg
