// The kernels of contrastive_loss.h that one instruction set offers. None of them starts threads or allocates.
#pragma once

#include "api/contrastive_loss.h"
#include "simd/table.h"

namespace simctg::hinge {

constexpr int64_t kTile = 128;  // side of a tile that has one flag
constexpr int64_t kTileWords = kTile / 32;
constexpr int64_t kSlice = 128;  // k's in a pass of a product: two panels of that depth fit the first-level cache
constexpr uint8_t kProvenFull = 3;  // beside the flags 0, 1, 2: full, and not summed

// Static: each instruction set keeps a copy of its own.
static inline int64_t slices_of(int64_t width) { return (width + kSlice - 1) / kSlice; }

// A direction that the vectors of a sequence have in common; any direction is right, a good one proves more tiles.
struct Direction {
    float* vector;        // [width]
    float* inverse_tail;  // [slices]: 1 / norm of its components from that slice on, or 0
};

// Of every row and slice, what the components from that slice on can still add to a cosine: with the part `along` the
// direction's tail and the norm `across` of the rest, at most across_i across_j more or less than along_i along_j.
struct Bounds {
    float* along;  // [slices][stride]
    float* across;
    int64_t stride;
};

// Unit vectors lie in panels of `panel_width` rows, [width][panel_width] each: one layout for both sides of a product.
struct HingeTile {
    const float* left;   // panels of the tile's rows
    const float* right;  // panels of the tile's columns; the same as `left` on the diagonal
    int64_t width;
    int64_t rows, columns;  // real extent, at most kTile
    bool diagonal;
    float threshold;
    Bounds row_bounds, column_bounds;  // at the tile's first row and column
    const uint32_t* free_rows;     // [kTileWords] bits of rows that are padding or zero, those beyond the extent included
    const uint32_t* free_columns;  // likewise
    float* scratch;                // [kTile][kTile]
    float* row_sums;               // [kTile], and, off the diagonal, the mirrored tile's:
    float* column_sums;            // [kTile]
    bool keep;                     // whether the rest is written
    float* row_counts;             // [kTile] active pairs
    float* column_counts;
    uint32_t* bits;         // first word of row 0
    uint32_t* mirror_bits;  // first word of the mirrored tile; not read on the diagonal
    int64_t bits_stride;    // words in a row
};

struct GradientTask {
    const HingeGradient* call;
    int64_t b, first_column;     // `gradient_columns` columns from here, or what is left
    int64_t first_row, end_row;  // first_row is a multiple of kTile
    float* sums;                 // [rows rounded up to kTile][gradient_columns]
    float* full;                 // [tiles of rows][gradient_columns]
    float* table;                // [kGroups][16][gradient_columns]
    float* vectors;              // [32][gradient_columns]
};

struct Kernels {
    int64_t panel_width;       // divides kTile
    int64_t gradient_columns;  // width of a gradient task
    // The mean of some of the unit vectors of sequence b. `row` holds [width] floats.
    void (*direction)(const States& states, const uint8_t* real, int64_t b, float* row, const Direction& direction);
    // Packs rows first_row.. of sequence b into one panel, writes 1 / norm to `inverse`, zeros beyond `count` rows, and
    // the bounds of the panel's rows. `rows` holds [panel_width][width] floats.
    void (*pack)(const States& states, const uint8_t* real, int64_t b, int64_t first_row, int64_t count, float* rows,
                 float* inverse, float* panel, const Direction& direction, const Bounds& bounds);
    uint8_t (*hinge_tile)(const HingeTile& tile);  // returns the flag, or kProvenFull and leaves the sums alone
    // Of a tile with `rows` rows: the sum of its unit vectors, [width], and their products with one, [kTile].
    void (*tile_sum)(const float* panels, int64_t rows, int64_t width, float* sum);
    void (*tile_dots)(const float* panels, int64_t rows, int64_t width, const float* vector, float* dots);
    void (*gradient)(const GradientTask& task);
};

}  // namespace simctg::hinge

SIMCTG_TABLES(hinge::Kernels)
