// Attention of one-token queries, several to a sequence, over the sequence's one copy of keys and values.
#pragma once

#include <cstdint>

#include "api/element_type.h"

namespace simctg {

// Arrays of `type`, the bias of `type` or float32; strides in elements; the last dimension of every array is contiguous.
// Scores, softmax and sums are float32, and the output is rounded once. Query row first_row(b) + c is candidate c of
// sequence b; heads h = g · groups + r share the key/value head g.
struct DecodeAttention {
    int64_t batch, candidates, kv_heads, groups, dim, value_dim;  // `candidates`: of each sequence, or the most
    const int64_t* offsets;  // [batch + 1], of the sequences' first rows, and all rows; null: `candidates` each
    ElementType type;

    int64_t first_row(int64_t b) const { return offsets ? offsets[b] : b * candidates; }
    int64_t candidates_of(int64_t b) const { return first_row(b + 1) - first_row(b); }
    int64_t rows() const { return first_row(batch); }

    const void* query;  // [rows, kv_heads · groups, dim]
    int64_t query_row, query_head;

    const void* key;  // [batch, kv_heads, length, dim]
    int64_t key_batch, key_head, key_position;
    const void* value;  // [batch, kv_heads, length, value_dim]
    int64_t value_batch, value_head, value_position;
    int64_t length;          // positions in use, at most
    const int64_t* lengths;  // [batch], each in 0..length, or null: all `length`
    const int64_t* starts;   // [batch], positions before which nothing is read, or null
    int64_t start;           // the same for all sequences

    const void* new_key;  // [rows, kv_heads, dim]: one more key for each query row, or null
    int64_t new_key_row, new_key_head;
    const void* new_value;
    int64_t new_value_row, new_value_head;

    float scaling;
    float softcap;  // softcap · tanh(score / softcap) unless 0

    // Entry `length` belongs to the new key. `*_batch` and `*_candidate` are the strides of b and c.
    const uint8_t* mask;  // 0: may not be seen; null: everything may
    int64_t mask_batch, mask_candidate, mask_head;
    const void* bias;  // added to the scaled, capped score, or null
    ElementType bias_type;
    int64_t bias_batch, bias_candidate, bias_head;

    const float* sinks;  // [kv_heads · groups]: a logit that takes part in the softmax and carries no value, or null

    void* out;  // [rows, kv_heads · groups, value_dim], contiguous
};

// Keys and values are read once. The result of a row depends neither on the other sequences nor on the number of
// threads. A row that may see nothing, and has no sink, is NaN, as softmax makes it.
// Throws std::invalid_argument on negative sizes, on lengths outside 0..length, on offsets that leave a sequence fewer
// than 0 or more than `candidates` rows, and on a bias of a third type.
void decode_attention(const DecodeAttention& call, int num_threads);

}  // namespace simctg
