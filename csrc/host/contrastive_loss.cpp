#include "api/contrastive_loss.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

#include "host/memory.h"
#include "host/parallel.h"
#include "simd/contrastive_loss.h"

namespace simctg {
namespace {

using namespace hinge;

constexpr int64_t kPackedBytes = 8 << 20;   // of unit vectors on one side of a product
constexpr int64_t kGradientRows = 16 * kTile;  // rows of a gradient task: its sums stay in the second-level cache

void check(const States& states) {
    if (states.batch < 0 || states.length < 0 || states.width < 0) {
        throw std::invalid_argument("batch, length and width must not be negative");
    }
}

int64_t tiles_of(int64_t rows) { return (rows + kTile - 1) / kTile; }

// The rows of some sequences as panels of unit vectors: rows begin .. begin + count of each of `sequences` sequences.
struct Packed {
    int64_t first_sequence, sequences, begin, count;
    Floats panels = {}, bounds = {}, sums = {};  // made for the first rows packed, as no later are more
    int64_t stride = 0;  // floats from one sequence to the next
    bool summed = false;

    int64_t tiles() const { return tiles_of(count); }
    const float* tile(int64_t sequence, int64_t row, int64_t width) const {
        return panels.data() + (sequence - first_sequence) * stride + (row - begin) * width;
    }
    Bounds bounds_at(int64_t sequence, int64_t row, int64_t width) const {
        const int64_t rows = tiles() * kTile, each = slices_of(width) * rows;
        float* along = bounds.data() + (sequence - first_sequence) * 2 * each + (row - begin);
        return {along, along + each, rows};
    }
    float* sum(int64_t sequence, int64_t tile, int64_t width) const {
        return sums.data() + ((sequence - first_sequence) * tiles() + tile) * width;
    }
};

void pack(const HingeSums& call, Packed& packed, int num_threads) {
    const Kernels& k = kernels<Kernels>();
    const int64_t width = call.states.width, slices = slices_of(width);
    const int64_t panels = (packed.count + k.panel_width - 1) / k.panel_width;
    packed.stride = packed.tiles() * kTile * width;
    packed.summed = false;
    if (!packed.panels) {  // memory just freed and asked for again is handed over page by page
        packed.panels = Floats(packed.stride * packed.sequences + 1);
        packed.bounds = Floats(2 * slices * packed.tiles() * kTile * packed.sequences + 1);
    }
    const Floats directions((width + slices) * packed.sequences + 1);
    const auto direction_of = [&](int64_t sequence) {
        float* at = directions.data() + sequence * (width + slices);
        return Direction{at, at + width};
    };
    parallel_for(packed.sequences, num_threads, [&](int64_t sequence) {
        const Floats row(width + 1);
        k.direction(call.states, call.real, packed.first_sequence + sequence, row.data(), direction_of(sequence));
    });
    parallel_for(packed.sequences * panels, num_threads, [&](int64_t task) {
        const int64_t sequence = task / panels, b = packed.first_sequence + sequence;
        const int64_t offset = task % panels * k.panel_width, first = packed.begin + offset;
        const int64_t count = std::min(k.panel_width, packed.count - offset);
        const Floats rows(k.panel_width * width + 1);
        k.pack(call.states, call.real, b, first, count, rows.data(), call.inverse + b * call.states.length + first,
               packed.panels.data() + sequence * packed.stride + offset * width, direction_of(sequence),
               packed.bounds_at(b, first, width));
    });
}

// Sums and counts of a tile's rows, [batch of the group][tile of rows][tile of columns][kTile]; added up in order later.
// The tiles that were proven full are zeros here; all of a row's are in `proven_sums` and `proven_counts` [batch][rows].
struct Partials {
    int64_t tiles;
    std::vector<float> sums, counts, proven_sums, proven_counts;
    std::vector<uint8_t> proven;
    Partials(int64_t sequences, int64_t tiles_, bool keep)
        : tiles(tiles_),
          sums(static_cast<size_t>(sequences * tiles * tiles * kTile)),
          counts(keep ? sums.size() : 0),
          proven_sums(static_cast<size_t>(sequences * tiles * kTile)),
          proven_counts(proven_sums.size()),
          proven(static_cast<size_t>(sequences * tiles * tiles)) {}
    int64_t at(int64_t sequence, int64_t i, int64_t j) const { return ((sequence * tiles + i) * tiles + j) * kTile; }
    uint8_t& is_proven(int64_t sequence, int64_t i, int64_t j) {
        return proven[static_cast<size_t>((sequence * tiles + i) * tiles + j)];
    }
};

void free_bits(const HingeSums& call, int64_t b, int64_t first_row, uint32_t* words) {
    for (int64_t w = 0; w < kTileWords; ++w) {
        words[w] = 0;
        for (int64_t bit = 0; bit < 32; ++bit) {
            const int64_t t = first_row + 32 * w + bit;
            const bool used = t < call.states.length && call.inverse[b * call.states.length + t] > 0.0f;
            words[w] |= static_cast<uint32_t>(!used) << bit;
        }
    }
}

void run_tile(const HingeSums& call, const Packed& left, const Packed& right, Partials& partials, int64_t b, int64_t i,
              int64_t j) {
    const int64_t length = call.states.length, width = call.states.width, sequence = b - left.first_sequence;
    const int64_t words = partials.tiles * kTileWords;
    const Floats scratch(kTile * kTile);
    uint32_t free_rows[kTileWords], free_columns[kTileWords];
    free_bits(call, b, i * kTile, free_rows);
    free_bits(call, b, j * kTile, free_columns);
    HingeTile tile{};
    tile.left = left.tile(b, i * kTile, width);
    tile.right = right.tile(b, j * kTile, width);
    tile.width = width;
    tile.rows = std::min(kTile, length - i * kTile);
    tile.columns = std::min(kTile, length - j * kTile);
    tile.diagonal = i == j;
    tile.threshold = call.threshold;
    tile.row_bounds = left.bounds_at(b, i * kTile, width);
    tile.column_bounds = right.bounds_at(b, j * kTile, width);
    tile.free_rows = free_rows;
    tile.free_columns = free_columns;
    tile.scratch = scratch.data();
    tile.row_sums = partials.sums.data() + partials.at(sequence, i, j);
    tile.column_sums = partials.sums.data() + partials.at(sequence, j, i);
    tile.keep = call.bits != nullptr;
    if (tile.keep) {
        tile.row_counts = partials.counts.data() + partials.at(sequence, i, j);
        tile.column_counts = partials.counts.data() + partials.at(sequence, j, i);
        uint32_t* bits = call.bits + b * partials.tiles * kTile * words;
        tile.bits = bits + i * kTile * words + j * kTileWords;
        tile.mirror_bits = bits + j * kTile * words + i * kTileWords;
        tile.bits_stride = words;
    }
    uint8_t flag = kernels<Kernels>().hinge_tile(tile);
    if (flag == kProvenFull) {
        partials.is_proven(sequence, i, j) = partials.is_proven(sequence, j, i) = 1;
        flag = 1;
    }
    if (tile.keep) {
        uint8_t* flags = call.flags + b * partials.tiles * partials.tiles;
        flags[i * partials.tiles + j] = flags[j * partials.tiles + i] = flag;
    }
}

// All tiles of the two sets of rows; the tiles above the diagonal where they are the same set.
void run_tiles(const HingeSums& call, const Packed& left, const Packed& right, Partials& partials, int num_threads) {
    const int64_t first_i = left.begin / kTile, first_j = right.begin / kTile;
    const int64_t rows = tiles_of(left.count), columns = tiles_of(right.count);
    const bool same = first_i == first_j;
    const int64_t tiles = same ? rows * (rows + 1) / 2 : rows * columns;
    parallel_for(left.sequences * tiles, num_threads, [&](int64_t task) {
        const int64_t b = left.first_sequence + task / tiles;
        int64_t i = 0, j = task % tiles;
        if (same) {
            for (; j >= rows - i; ++i) j -= rows - i;
            j += i;
        } else {
            i = j / columns;
            j %= columns;
        }
        run_tile(call, left, right, partials, b, first_i + i, first_j + j);
    });
}

// What the tiles of `columns` that were proven full add to the rows: one product with the sum of all their vectors.
void add_proven(const HingeSums& call, const Packed& rows, const Packed& columns, Partials& partials, int num_threads) {
    const Kernels& k = kernels<Kernels>();
    const int64_t length = call.states.length, width = call.states.width;
    const int64_t first_i = rows.begin / kTile, first_j = columns.begin / kTile;
    parallel_for(rows.sequences * rows.tiles(), num_threads, [&](int64_t task) {
        const int64_t sequence = task / rows.tiles(), i = first_i + task % rows.tiles();
        const int64_t b = rows.first_sequence + sequence, start = b * length;
        const Floats total(width + 1);
        std::fill_n(total.data(), width, 0.0f);
        float used = 0.0f;
        for (int64_t j = first_j; j < first_j + columns.tiles(); ++j) {
            if (!partials.is_proven(sequence, i, j)) continue;
            const float* sum = columns.sum(b, j - first_j, width);
            for (int64_t w = 0; w < width; ++w) total.data()[w] += sum[w];
            for (int64_t t = j * kTile; t < std::min(length, (j + 1) * kTile); ++t) used += call.inverse[start + t] > 0.0f;
        }
        const float own = first_i == first_j && partials.is_proven(sequence, i, i) ? 1.0f : 0.0f;  // s_ii
        if (used - own <= 0.0f) return;
        float dots[kTile];
        k.tile_dots(rows.tile(b, i * kTile, width), std::min(kTile, length - i * kTile), width, total.data(), dots);
        for (int64_t t = i * kTile; t < std::min(length, (i + 1) * kTile); ++t) {
            if (!(call.inverse[start + t] > 0.0f)) continue;
            const auto at = static_cast<size_t>(sequence * partials.tiles * kTile + t);
            partials.proven_sums[at] += (dots[t - i * kTile] - own) - call.threshold * (used - own);
            partials.proven_counts[at] += used - own;
        }
    });
}

void sum_tiles(const HingeSums& call, Packed& packed, int num_threads) {
    const int64_t width = call.states.width;
    if (packed.summed) return;
    packed.summed = true;
    if (!packed.sums) packed.sums = Floats(packed.sequences * packed.tiles() * width + 1);
    parallel_for(packed.sequences * packed.tiles(), num_threads, [&](int64_t task) {
        const int64_t b = packed.first_sequence + task / packed.tiles(), tile = task % packed.tiles();
        const float* panels = packed.tile(b, packed.begin + tile * kTile, width);
        kernels<Kernels>().tile_sum(panels, std::min(kTile, packed.count - tile * kTile), width, packed.sum(b, tile, width));
    });
}

// Both sets of rows against each other.
void run(const HingeSums& call, Packed& left, Packed& right, Partials& partials, int num_threads) {
    run_tiles(call, left, right, partials, num_threads);
    if (std::find(partials.proven.begin(), partials.proven.end(), 1) == partials.proven.end()) return;
    const bool same = left.begin == right.begin;
    sum_tiles(call, left, num_threads);
    if (!same) sum_tiles(call, right, num_threads);
    add_proven(call, left, same ? left : right, partials, num_threads);
    if (!same) add_proven(call, right, left, partials, num_threads);
}

void add_up(const HingeSums& call, const Partials& partials, int64_t first_sequence, int64_t sequences) {
    const int64_t length = call.states.length;
    for (int64_t s = 0; s < sequences; ++s) {
        const int64_t start = (first_sequence + s) * length;
        bool finite = true;
        for (int64_t t = 0; t < length; ++t) {
            const auto own = static_cast<size_t>(s * partials.tiles * kTile + t);
            float hinge = partials.proven_sums[own], count = partials.proven_counts[own];
            for (int64_t j = 0; j < partials.tiles; ++j) {
                const auto at = static_cast<size_t>(partials.at(s, t / kTile, j) + t % kTile);
                hinge += partials.sums[at];
                if (call.bits) count += partials.counts[at];
            }
            const float inverse = call.inverse[start + t];
            finite = finite && !std::isnan(inverse);
            call.hinge[start + t] = hinge;
            if (call.bits) call.radial[start + t] = hinge + call.threshold * count;
        }
        if (finite) continue;
        call.hinge[start] = std::numeric_limits<float>::quiet_NaN();
        if (call.bits) std::fill_n(call.radial + start, length, std::numeric_limits<float>::quiet_NaN());
    }
}

}  // namespace

void contrastive_hinge(const HingeSums& call, int num_threads) {
    check(call.states);
    const int64_t batch = call.states.batch, length = call.states.length;
    if (batch == 0 || length == 0) return;
    const int64_t row_bytes = std::max<int64_t>(1, call.states.width) * static_cast<int64_t>(sizeof(float));
    const int64_t tiles = tiles_of(length), sequence_bytes = tiles * kTile * row_bytes;
    const bool keep = call.bits != nullptr;
    if (sequence_bytes <= 2 * kPackedBytes) {  // whole sequences, several at a time
        Packed packed{0, std::max<int64_t>(1, std::min(batch, kPackedBytes / sequence_bytes)), 0, length};
        while (packed.first_sequence < batch) {
            packed.sequences = std::min(packed.sequences, batch - packed.first_sequence);
            pack(call, packed, num_threads);
            Partials partials(packed.sequences, tiles, keep);
            run(call, packed, packed, partials, num_threads);
            add_up(call, partials, packed.first_sequence, packed.sequences);
            packed.first_sequence += packed.sequences;
        }
        return;
    }
    const int64_t step = std::max<int64_t>(1, kPackedBytes / (kTile * row_bytes)) * kTile;
    Packed left{0, 1, 0, step}, right{0, 1, 0, step};
    for (int64_t b = 0; b < batch; ++b) {
        Partials partials(1, tiles, keep);
        left.first_sequence = right.first_sequence = b;
        for (int64_t i = 0; i < length; i += step) {
            left.begin = i;
            left.count = std::min(step, length - i);
            pack(call, left, num_threads);
            run(call, left, left, partials, num_threads);
            for (int64_t j = i + step; j < length; j += step) {
                right.begin = j;
                right.count = std::min(step, length - j);
                pack(call, right, num_threads);
                run(call, left, right, partials, num_threads);
            }
        }
        add_up(call, partials, b, 1);
    }
}

void contrastive_reduce(const HingeReduction& call) {
    if (call.batch < 0 || call.length < 0) throw std::invalid_argument("batch and length must not be negative");
    const double own = std::max(0.0, call.margin), length = static_cast<double>(call.length);
    double loss = 0.0, all_pairs = 0.0;
    for (int64_t b = 0; b < call.batch; ++b) {
        double sum = 0.0, tokens = 0.0, zeros = 0.0;
        for (int64_t t = b * call.length; t < (b + 1) * call.length; ++t) {
            if (call.real && !call.real[t]) continue;
            tokens += 1.0;
            zeros += call.inverse[t] == 0.0f;
            sum += call.hinge[t] + 0.0f * call.inverse[t];  // NaN where a real vector is not finite
        }
        // A zero vector has similarity 0 to all others and to itself: its own hinges are max(0, margin).
        sum += (tokens - 1.0) * zeros * own;
        const double pairs = tokens * (tokens - 1.0);
        double weight = 1.0;
        if (call.reduction == Reduction::dense) {
            sum += length * own;
            weight = 1.0 / (length * length);
        } else if (call.reduction == Reduction::paper) {
            weight = pairs > 0.0 ? 1.0 / pairs : 0.0;
        }
        loss += tokens > 0.0 ? sum * weight : 0.0;
        all_pairs += pairs;
        call.weights[b] = static_cast<float>(pairs > 0.0 ? weight : 0.0);  // no pair: not even a rounding error's gradient
    }
    const double counted = call.reduction == Reduction::pairs ? all_pairs : static_cast<double>(call.batch);
    const double items = call.normalizer.value_or(std::max(1.0, counted));
    const bool nothing = loss == 0.0 && items == 0.0;  // 0 / 0: the count of a batch without pairs
    *call.loss = static_cast<float>(nothing ? 0.0 : loss / items);
    for (int64_t b = 0; b < call.batch; ++b) {
        if (call.weights[b] != 0.0f) call.weights[b] = static_cast<float>(call.weights[b] / items);
    }
}

void contrastive_gradient(const HingeGradient& call, int num_threads) {
    check(call.states);
    const int64_t batch = call.states.batch, length = call.states.length, width = call.states.width;
    if (batch == 0 || length == 0 || width == 0) return;
    const Kernels& k = kernels<Kernels>();
    const int64_t columns = k.gradient_columns, slices = (width + columns - 1) / columns;
    const int64_t chunks = (length + kGradientRows - 1) / kGradientRows;
    parallel_for(batch * slices * chunks, num_threads, [&](int64_t index) {
        const int64_t first_row = index / slices % chunks * kGradientRows;
        const int64_t end_row = std::min(length, first_row + kGradientRows), tiles = tiles_of(end_row - first_row);
        const int64_t sums = tiles * kTile * columns, full = tiles * columns, table = 8 * 16 * columns;
        const Floats buffer(sums + full + table + 32 * columns);
        GradientTask task{};
        task.call = &call;
        task.b = index / (slices * chunks);
        task.first_column = index % slices * columns;
        task.first_row = first_row;
        task.end_row = end_row;
        task.sums = buffer.data();
        task.full = task.sums + sums;
        task.table = task.full + full;
        task.vectors = task.table + table;
        k.gradient(task);
    });
}

}  // namespace simctg
