// Products with weights of float32: in place, packed in panels, and with what a ReLU leaves of x.
//
// Floor and layouts: linear_tiles.h.
#include "simd/linear_tiles.h"

namespace simctg::linear_layer {
namespace {

using Floats = Product<float, float>;

// A panel against all rows of x, where registers are few: a block of it stays in the first cache while the row tiles pass
// by, and they share the asking for the next one.
constexpr int64_t kPanelBlock = 128;  // k's: 8 kB of a panel 16 wide, and 3 kB of x for a row tile
constexpr int64_t kPanelRows = 64;    // of x, for which all panels pass before the next: the second cache holds them
constexpr int kPanelEvery = 8;        // k's between two requests
static_assert(kChunk % kPanelBlock == 0, "a chunk is a whole number of blocks");

template <int Lines>
void panel_tiles(AxpyStep<float, float> step, int64_t rows, int64_t tiles, bool fetch) {
    constexpr int vectors = static_cast<int>(kPanelWidth / kLanes);
    const AxpyStep<float, float> whole = step;
    const int64_t lines = step.count * kPanelWidth / kLineFloats, share = step.count / kPanelEvery * Lines;
    step.ahead_stride = Lines * kLineBytes;
    for (int64_t index = 0; index < tiles; ++index) {
        const RowTile tile(rows, tiles, index);
        step.x = whole.x + tile.begin * whole.x_stride;
        step.sums = whole.sums + tile.begin * whole.sums_stride;
        if (whole.y) step.y = whole.y + tile.begin * whole.y_stride;
        step.ahead = whole.ahead + index * share * kLineBytes;
        if (fetch && index * share < lines) axpy_step<vectors, Lines, false, kPanelEvery>(tile.count, step, Mask());
        else axpy_step<vectors, 0, false, kPanelEvery>(tile.count, step, Mask());
    }
}

void panel_blocks(const Floats& call, int64_t begin, int64_t end, float* sums) {
    const int64_t most = tile_rows(static_cast<int>(kPanelWidth / kLanes)), tiles = (call.rows + most - 1) / most;
    for (int64_t n = begin; n < end; n += kPanelWidth) {
        for (int64_t k = 0; k < call.in_features; k += kPanelBlock) {
            const int64_t count = smaller(kPanelBlock, call.in_features - k);
            const bool last = k + count == call.in_features, chunk_ends = last || (k + count) % kChunk == 0;
            AxpyStep<float, float> step{};
            step.x = call.x + k;
            step.x_stride = call.x_stride;
            step.w = call.weight + n * call.in_features + k * kPanelWidth;
            step.w_stride = kPanelWidth;
            step.count = count;
            step.ahead = reinterpret_cast<const char*>(step.w + count * kPanelWidth);  // panels follow one another
            step.sums = sums;
            step.sums_stride = kPanelWidth;
            step.first = k % kChunk == 0;
            step.y = chunk_ends ? call.y + n : nullptr;
            step.y_stride = call.y_stride;
            step.add = k >= kChunk;
            step.bias = last && call.bias ? call.bias + n : nullptr;
            const bool fetch = !last || n + kPanelWidth < end;
            if (n + kPanelWidth > end) {
                for (int64_t lane = 0; n + lane < end; lane += kLanes) {
                    AxpyStep<float, float> part = step;
                    part.w += lane;
                    part.sums += lane;
                    if (part.y) part.y += lane;
                    if (part.bias) part.bias += lane;
                    axpy_piece<1, true>(part, call.rows, false, first_lanes(smaller<int64_t>(kLanes, end - n - lane)));
                }
            } else if (tiles == 1) {
                panel_tiles<8>(step, call.rows, tiles, fetch);
            } else if (tiles == 2) {
                panel_tiles<4>(step, call.rows, tiles, fetch);
            } else if (tiles == 3) {
                panel_tiles<3>(step, call.rows, tiles, fetch);
            } else if (tiles < 8) {
                panel_tiles<2>(step, call.rows, tiles, fetch);
            } else {
                panel_tiles<1>(step, call.rows, tiles, fetch);
            }
        }
    }
}

void panels(const Floats& call, int64_t begin, int64_t end, float* sums) {
    if constexpr (kRegisters < 32) {
        const int64_t parts = (call.rows + kPanelRows - 1) / kPanelRows;
        for (int64_t i = 0; i < parts; ++i) {
            const RowTile tile(call.rows, parts, i);
            Floats part = call;
            part.x += tile.begin * call.x_stride;
            part.y += tile.begin * call.y_stride;
            part.rows = tile.count;
            panel_blocks(part, begin, end, sums);
        }
        return;
    }
    const AxpyChunks<float, float> run = axpy_for<float, float>(call.rows);
    const int64_t chunks = (call.in_features + kChunk - 1) / kChunk;
    for (int64_t n = begin; n < end; n += kPanelWidth) {
        Floats panel = call;
        panel.weight = call.weight + n * call.in_features;
        panel.weight_stride = kPanelWidth;
        panel.bias = call.bias ? call.bias + n : nullptr;
        panel.y = call.y + n;
        run(panel, 0, smaller(kPanelWidth, end - n), 0, chunks, sums, kPanelWidth, true, n + 2 * kPanelWidth <= end);
    }
}

#if defined(__AVX2__) && !defined(__AVX512F__)

// Eight rows of the source become eight columns of the target.
SIMCTG_INLINE void transpose8(const float* source, int64_t stride, float* target) {
    const float* lower = source + 4 * stride;
    const auto rows = [&](int r, int k) __attribute__((always_inline)) {  // four of row r, four of row r + 4
        return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(source + r * stride + k)),
                                    _mm_loadu_ps(lower + r * stride + k), 1);
    };
#pragma GCC unroll 2
    for (int k = 0; k < 8; k += 4) {
        const Vec a = rows(0, k), b = rows(1, k), c = rows(2, k), d = rows(3, k);
        const Vec ab = _mm256_unpacklo_ps(a, b), cd = _mm256_unpacklo_ps(c, d);
        const Vec ab_high = _mm256_unpackhi_ps(a, b), cd_high = _mm256_unpackhi_ps(c, d);
        store(target + (k + 0) * kPanelWidth, _mm256_shuffle_ps(ab, cd, 0x44));
        store(target + (k + 1) * kPanelWidth, _mm256_shuffle_ps(ab, cd, 0xEE));
        store(target + (k + 2) * kPanelWidth, _mm256_shuffle_ps(ab_high, cd_high, 0x44));
        store(target + (k + 3) * kPanelWidth, _mm256_shuffle_ps(ab_high, cd_high, 0xEE));
    }
}

void pack_rows(const float* weight, int64_t stride, int64_t in_features, float* panel) {
    int64_t k = 0;
    for (; k + 8 <= in_features; k += 8) {
#pragma GCC unroll 2
        for (int64_t n = 0; n < kPanelWidth; n += 8) {
            transpose8(weight + n * stride + k, stride, panel + k * kPanelWidth + n);
        }
    }
    for (; k < in_features; ++k) {
        for (int64_t n = 0; n < kPanelWidth; ++n) panel[k * kPanelWidth + n] = weight[n * stride + k];
    }
}

// For each mask of eight lanes, the numbers of those that are set, a byte each, the lowest first.
struct SetLanes {
    uint64_t lanes[256];
    constexpr SetLanes() : lanes() {
        for (int mask = 0; mask < 256; ++mask) {
            int count = 0;
            for (uint64_t lane = 0; lane < 8; ++lane) {
                if (mask >> lane & 1) lanes[mask] |= lane << 8 * count++;
            }
        }
    }
};
constexpr SetLanes kSetLanes;

int64_t find_entries(const float* x, int64_t count, uint8_t* entries) {
    int64_t found = 0;
    for (int64_t k = 0; k < count; k += kLanes) {
        const Vec v = k + kLanes <= count ? load(x + k) : load(x + k, first_lanes(count - k));
        const int mask = _mm256_movemask_ps(_mm256_cmp_ps(v, zeros(), _CMP_NLE_UQ));
        const uint64_t lanes = kSetLanes.lanes[mask] + 0x0101010101010101u * static_cast<uint64_t>(k);
        __builtin_memcpy(entries + found, &lanes, sizeof lanes);
        found += __builtin_popcount(static_cast<unsigned>(mask));
    }
    return found;
}

// `sums` += the entries' rows of Panels panels, panel_floats apart.
template <int Panels>
SIMCTG_INLINE void sparse_step(const float* x, const uint8_t* entries, int64_t count, const float* panels,
                               int64_t panel_floats, bool first, float* sums) {
    Vec acc[2 * Panels];
#pragma GCC unroll 8
    for (int v = 0; v < 2 * Panels; ++v) acc[v] = first ? zeros() : load(sums + v * kLanes);
    for (int64_t i = 0; i < count; ++i) {
        const int64_t k = entries[i];
        const Vec a = broadcast(x[k]);
        const float* w = panels + k * kPanelWidth;
#pragma GCC unroll 8
        for (int v = 0; v < 2 * Panels; ++v) {
            acc[v] = multiply_add(a, load(w + v / 2 * panel_floats + v % 2 * kLanes), acc[v]);
        }
    }
#pragma GCC unroll 8
    for (int v = 0; v < 2 * Panels; ++v) store(sums + v * kLanes, acc[v]);
}

template <int Panels>
void sparse_group(const Floats& call, const SparseRows& x, int64_t begin, int64_t end, float* sums) {
    const int64_t panel_floats = call.in_features * kPanelWidth, width = Panels * kPanelWidth;
    const float* panels = call.weight + begin * call.in_features;
    for (int64_t block = 0; block < x.blocks; ++block) {
        const int64_t k = block * kSparseBlock, k_end = smaller(k + kSparseBlock, call.in_features);
        const bool last = k_end == call.in_features, chunk_ends = last || k_end % kChunk == 0;
        // The next block's lines, shared among the rows.
        const float* ahead = panels + k_end * kPanelWidth;
        const int64_t lines = last ? 0 : smaller(kSparseBlock, call.in_features - k_end);
        const int64_t share = (Panels * lines + call.rows - 1) / call.rows;
        int64_t asked = 0;
        for (int64_t m = 0; m < call.rows; ++m) {
            for (int64_t i = 0; i < share && asked < Panels * lines; ++i, ++asked) {
                prefetch_l2(ahead + asked / lines * panel_floats + asked % lines * kLineFloats);
            }
            const int64_t entry = m * x.blocks + block;
            float* row_sums = sums + m * width;
            sparse_step<Panels>(call.x + m * call.x_stride + k, x.entries + entry * kSparseRoom, x.counts[entry],
                                panels + k * kPanelWidth, panel_floats, k % kChunk == 0, row_sums);
            if (!chunk_ends) continue;
            float* y = call.y + m * call.y_stride + begin;
            for (int64_t n = 0; n < end - begin; n += kLanes) {
                const int64_t columns = end - begin - n;
                const Mask mask = first_lanes(smaller<int64_t>(kLanes, columns));
                Vec total = load(row_sums + n);
                if (k >= kChunk) total = add(load(y + n, mask), total);
                if (last && call.bias) total = add(total, load(call.bias + begin + n, mask));
                store_first(y + n, total, columns);
            }
        }
    }
}

void sparse_panels(const Floats& call, const SparseRows& rows, int64_t begin, int64_t end, float* sums) {
    constexpr int64_t width = kSparsePanels * kPanelWidth;
    int64_t n = begin;
    for (; n + width <= end; n += width) sparse_group<kSparsePanels>(call, rows, n, n + width, sums);
    for (; n < end; n += kPanelWidth) sparse_group<1>(call, rows, n, smaller(n + kPanelWidth, end), sums);
}

#else
constexpr int64_t (*find_entries)(const float*, int64_t, uint8_t*) = nullptr;
constexpr void (*sparse_panels)(const Floats&, const SparseRows&, int64_t, int64_t, float*) = nullptr;
constexpr void (*pack_rows)(const float*, int64_t, int64_t, float*) = nullptr;
#endif

}  // namespace
}  // namespace simctg::linear_layer

SIMCTG_TABLE(linear_layer, Kernels, kPanelWidth, (in_place<float, float>()), panels, find_entries, sparse_panels, pack_rows)
