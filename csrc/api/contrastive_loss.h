// The contrastive loss of SimCTG without the matrix of similarities, in two phases.
//
// Phase 1 multiplies the tiles of S = U U^T on and above the diagonal (U: unit vectors), sums max(0, s - threshold) over
// the pairs i != j and keeps one bit a pair and one flag a tile. Phase 2 multiplies the 0/1 matrix of the bits by U:
// nothing for an empty tile, one sum of vectors for a full one, and a table of the 16 sums of four vectors ("four
// Russians") for a mixed one.
//
// Formats: `bits` [batch][padded][padded / 32], bit j % 32 of word j / 32 in row i; `flags` [batch][padded / 128]
// [padded / 128]: 0 no pair of the tile is active, 1 every one is, 2 mixed, and only then do its bits mean anything.
// Pairs with padding or a zero vector are free to count as either.
//
// No float is added to by two threads: results do not depend on their number.
#pragma once

#include <cstdint>
#include <optional>

#include "api/element_type.h"

namespace simctg {

struct States {
    const void* data;
    ElementType type;
    int64_t batch, length, width;
    int64_t batch_stride, row_stride;  // in elements; the last dimension is contiguous
};

struct HingeSums {
    States states;
    const uint8_t* real;  // [batch][length], 0 at padding, or null
    float threshold;      // >= 0
    float* hinge;         // [batch][length]; NaN at row 0 of a sequence with a vector that is not finite
    float* inverse;       // [batch][length]: 1 / norm; 0 at padding and zero vectors, NaN where not finite
    float* radial;        // [batch][length]: sum of s over the active pairs; written if bits is not null
    uint32_t* bits;       // or null
    uint8_t* flags;       // or null
};

enum class Reduction { pairs, paper, dense };

// From the sums of the hinges to the loss, and its derivative with respect to each sequence's sum.
struct HingeReduction {
    const float* hinge;    // [batch][length]
    const float* inverse;  // [batch][length]
    const uint8_t* real;   // [batch][length] or null
    int64_t batch, length;
    double margin;
    Reduction reduction;
    std::optional<double> normalizer;  // else what the reduction counts
    float* loss;
    float* weights;  // [batch]
};

struct HingeGradient {
    States states;
    const float* scale;  // [batch]
    const float* inverse;
    const float* radial;
    const uint32_t* bits;
    const uint8_t* flags;
    void* gradient;  // [batch][length][width], contiguous, the states' type
};

// Throw std::invalid_argument on negative sizes.
void contrastive_hinge(const HingeSums& call, int num_threads);
void contrastive_reduce(const HingeReduction& call);
void contrastive_gradient(const HingeGradient& call, int num_threads);

}  // namespace simctg
