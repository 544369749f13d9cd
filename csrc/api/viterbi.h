// Following back-pointers from the last slot of a sequence to its first.
#pragma once

#include <cstdint>

namespace simctg {

// A [batch, length, slots] view in elements; nothing has to be contiguous.
struct BackpointerView {
    const void* data;
    int64_t batch, length, slots;
    int64_t stride_batch, stride_length, stride_slot;
};

// path[b, t] for t < lengths[b] is the slot at t of the path that ends in last[b]; -1 from lengths[b] on.
//   backpointers[b, t, j]  the slot at t - 1 that leads to j at t; row 0 is not read
//   last, lengths [batch]  contiguous; lengths may be null (all sequences are `length` long)
//   path [batch, length]   contiguous, every element is written
// Slot is uint8_t, uint16_t, int32_t or int64_t. Throws std::invalid_argument on a length outside 0..length and on a
// slot outside 0..slots-1 that the path runs into, naming the item, the step and the value.
template <class Slot>
void viterbi_backtrace(const BackpointerView& backpointers, const int64_t* last, const int64_t* lengths,
                       int64_t* path, int num_threads);

}  // namespace simctg
