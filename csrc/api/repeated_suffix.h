// How much of the end of a text has stood before each of its tokens: how long a repetition it would go on with.
#pragma once

#include <cstdint>

namespace simctg {

// Row b's text is tokens[b, starts[b] .. lengths[b]-1]. For each of its positions j, repeats[b, j] becomes the length of
// the longest end of the whole text that the part before j, tokens[b, starts[b] .. j-1], ends in as well, but
// limits[b] and `longest` at most; 0 for the other positions.
struct RepeatedSuffix {
    const int64_t* tokens;  // [batch, length]
    int64_t batch, length, stride;
    const int64_t* starts;   // [batch]; null: 0
    const int64_t* lengths;  // [batch]; null: length
    const int64_t* limits;   // [batch]; null: no limit
    int64_t longest;
    int64_t* repeats;  // [batch, length], contiguous, every element is written
};

// Linear in the length. Returns how often two tokens were compared: less than twice for each token. Throws
// std::invalid_argument on a start or length outside 0..length, and on a negative limit.
int64_t repeated_suffix(const RepeatedSuffix& call, int num_threads);

}  // namespace simctg
