// What a text has to say against a token that would repeat it: the penalties of frustratingly simple decoding (FSD).
#pragma once

#include <cstdint>

namespace simctg {

// Texts and the tokens that are weighed, each [batch, candidates]. Strides in elements. A token below 0 is none: nothing
// matches it, and it is not counted.
struct EarlierText {
    int64_t batch, candidates, length;  // positions in use, at most
    const int64_t* tokens;              // [batch, length]
    int64_t token_batch;
    const int64_t* picks;    // [batch, candidates], contiguous
    const int64_t* lengths;  // [batch], each in 0..length, or null: all `length`
    const int64_t* starts;   // [batch], where the text begins, or null: at 0
    const int64_t* orders;   // [batch], n: the last n − 1 positions are compared; at least 1, or 2 where states are
    float* penalty;          // [batch, candidates], contiguous
    int64_t* position;       // the same shape: the earlier token that says most, −1: none does
};

// Unit-length states of the positions, and the lengths they had.
struct EarlierStates {
    int64_t dim;
    const float* states;  // [batch, length, dim]
    int64_t state_batch, state_position;
    const float* norms;  // [batch, length]; null: no order is above 2
    int64_t norm_batch;
};

// For a candidate v: the largest cosine of the newest n − 1 states, as one vector, with those before an earlier v; at least
// 0, at most 1. 0 where v is not in the text. NaN propagates.
void follower_scan(const EarlierText& text, const EarlierStates& history, int num_threads);

// For a candidate v: how the text's own n-gram model, with weights `betas` [batch] of the longer contexts, predicts it. The
// position is the last one where v followed the longest of the contexts that it followed.
void ngram_penalty(const EarlierText& text, const double* betas, int num_threads);

}  // namespace simctg
