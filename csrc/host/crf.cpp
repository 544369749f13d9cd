#include "api/crf.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "host/best_paths.h"
#include "host/checks.h"
#include "host/memory.h"
#include "host/parallel.h"
#include "simd/crf.h"
#include "simd/element.h"

namespace simctg {
namespace {

using crf::Candidate;
using crf::Item;

Item item_of(const Crf& crf, int64_t b) {
    const int64_t length = length_of(crf.lengths, b, crf.length), begin = b * crf.length * crf.beam;
    const Item item{b,        length,    crf.beam,  crf.rank, crf.scores + begin, crf.tokens + begin,
                       crf.left, crf.right, crf.scale};
    for (int64_t i = 0; i < length * crf.beam; ++i) {
        if (static_cast<uint64_t>(item.tokens[i]) < static_cast<uint64_t>(crf.vocabulary)) continue;
        fail("tokens[" + std::to_string(b) + ", " + std::to_string(i / crf.beam) + ", " + std::to_string(i % crf.beam) + "]",
             item.tokens[i], crf.vocabulary - 1);
    }
    return item;
}

template <class Kernels>
Floats scratch_of(const Kernels& k, const Crf& crf) {
    return Floats(k.scratch(crf.beam, crf.rank));
}

// ---- beam selection -------------------------------------------------------------------------------------------------

// Rising with the value; -0 and 0 are one value, NaN is the largest.
uint32_t rank_of(float value) {
    if (std::isnan(value)) return 0xFFFFFFFFu;
    value += 0.0f;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Falling values, then rising tokens: the smaller key comes first.
uint64_t key_of(const Candidate& c) { return static_cast<uint64_t>(~rank_of(c.value)) << 32 | c.token; }

// The smallest `wanted` of `keys`, in order, to the front: by bytes from the low end, as the keys are few and the tokens
// already in order.
void sort_keys(std::vector<uint64_t>& keys, std::vector<uint64_t>& spare, int64_t wanted) {
    if (static_cast<int64_t>(keys.size()) > 4 * wanted + 4096) {  // a flood of equal values
        std::nth_element(keys.begin(), keys.begin() + wanted - 1, keys.end());
        keys.resize(static_cast<size_t>(wanted));
        std::sort(keys.begin(), keys.end());
        return;
    }
    spare.resize(keys.size());
    for (int shift = 32; shift < 64; shift += 8) {
        uint32_t counts[256] = {};
        for (const uint64_t key : keys) ++counts[key >> shift & 255];
        if (counts[keys[0] >> shift & 255] == keys.size()) continue;
        uint32_t place = 0;
        for (uint32_t& count : counts) place += std::exchange(count, place);
        for (const uint64_t key : keys) spare[counts[key >> shift & 255]++] = key;
        keys.swap(spare);
    }
}

struct Selection {
    std::vector<float> row;
    Floats maxima;
    std::unique_ptr<Candidate[]> candidates;  // as many as the row is long; few are touched
    std::vector<uint64_t> keys, spare;
    std::vector<int64_t> forced;
};

// Groups of 32 are read fastest; where the beam is a large part of the row the threshold they give is too low.
int64_t group_size(int64_t count, int64_t beam, int64_t lanes) {
    int64_t group = 32;
    while (group > 1 && ((count / (group * lanes)) * lanes < 2 * beam)) group /= 2;
    return group;
}

void select_row(const crf::Select& k, const float* row, const float* next, int64_t count, int64_t beam, Selection& s) {
    const int64_t group = group_size(count, beam, k.lanes);
    if (!s.maxima) s.maxima = Floats((count / (group * k.lanes) + 1) * k.lanes);
    bool nan = false;
    const int64_t groups = k.group_maxima(row, count, group, s.maxima.data(), &nan);
    if (s.candidates == nullptr) s.candidates.reset(new Candidate[static_cast<size_t>(count)]);
    s.keys.clear();
    // As many groups as the beam is wide hold an element that is not below the threshold: enough elements pass it.
    float threshold = -std::numeric_limits<float>::infinity();
    if (nan || groups < beam) {
        for (int64_t i = 0; i < count; ++i) s.keys.push_back(key_of({row[i], static_cast<uint32_t>(i)}));
    } else {
        threshold = k.threshold(s.maxima.data(), groups, beam);
        if (std::isnan(threshold)) {
            float* maxima = s.maxima.data();
            std::nth_element(maxima, maxima + beam - 1, maxima + groups, std::greater<float>());
            threshold = maxima[beam - 1];
        }
        const int64_t found = k.collect(row, count, threshold, next, s.candidates.get());
        for (int64_t i = 0; i < found; ++i) s.keys.push_back(key_of(s.candidates[static_cast<size_t>(i)]));
    }
    sort_keys(s.keys, s.spare, beam);
}

}  // namespace

void crf_beam_select(const Emissions& e, int64_t beam, const int64_t* lengths, const int64_t* forced,
                     int64_t forced_count, int64_t* tokens, float* values, int num_threads) {
    if (beam < 1 || beam > e.vocabulary) fail("beam", beam, e.vocabulary);
    if (forced_count > beam) fail("forced_count", forced_count, beam);
    const crf::Select& k = kernels<crf::Select>();
    constexpr int64_t rows_per_task = 8;
    const int64_t rows = e.batch * e.length;
    parallel_for((rows + rows_per_task - 1) / rows_per_task, num_threads, [&](int64_t task) {
        Selection s;
        for (int64_t index = task * rows_per_task; index < std::min(rows, (task + 1) * rows_per_task); ++index) {
            const int64_t b = index / e.length, t = index % e.length;
            int64_t* out = tokens + index * beam;
            float* value = values + index * beam;
            if (t >= length_of(lengths, b, e.length)) {
                for (int64_t i = 0; i < beam; ++i) out[i] = i, value[i] = 0.0f;
                continue;
            }
            const int64_t offset = b * e.stride_batch + t * e.stride_length;
            const float* row = static_cast<const float*>(e.data) + offset;
            const float* next = t + 1 < e.length ? row + e.stride_length : row;
            if (e.type != ElementType::float32) {
                s.row.resize(static_cast<size_t>(e.vocabulary));
                simd::with_type(e.type, e.data, [&](const auto* data) {
                    simd::widen_array(data + offset, e.vocabulary, s.row.data());
                });
                row = next = s.row.data();
            }
            select_row(k, row, next, e.vocabulary, beam, s);
            s.forced.clear();
            for (int64_t i = 0; i < forced_count; ++i) {
                const int64_t token = forced[index * forced_count + i];
                if (token >= e.vocabulary) fail("forced token", token, e.vocabulary - 1);
                if (token >= 0) s.forced.push_back(token);
            }
            std::sort(s.forced.begin(), s.forced.end());
            s.forced.erase(std::unique(s.forced.begin(), s.forced.end()), s.forced.end());
            int64_t filled = 0;
            for (const int64_t token : s.forced) out[filled++] = token;
            for (int64_t i = 0; filled < beam; ++i) {
                const int64_t token = static_cast<int64_t>(s.keys[static_cast<size_t>(i)] & 0xFFFFFFFFu);
                if (!std::binary_search(s.forced.begin(), s.forced.end(), token)) out[filled++] = token;
            }
            for (int64_t i = 0; i < beam; ++i) value[i] = row[out[i]];
        }
    });
}

// ---- filters --------------------------------------------------------------------------------------------------------

void crf_filter(const Crf& crf, float* messages, float* norms, int num_threads) {
    const crf::Filter& k = kernels<crf::Filter>();
    parallel_for(crf.batch, num_threads, [&](int64_t b) {
        const Item item = item_of(crf, b);
        const Floats scratch = scratch_of(k, crf);
        float* message = messages + b * crf.length * crf.beam;
        k.filter(item, message, norms + b * crf.length, scratch.data());
        std::fill(message + item.length * crf.beam, message + crf.length * crf.beam, 0.0f);
        std::fill(norms + b * crf.length + item.length, norms + (b + 1) * crf.length, 0.0f);
    });
}

void crf_filter_backward(const Crf& crf, const float* grad, const float* messages, const float* norms,
                         float* grad_scores, float* grad_left, float* grad_right, int num_threads) {
    const crf::Backward& k = kernels<crf::Backward>();
    // Tables are added to by a fixed number of groups of items, each in order and into tables of its own (the first into
    // the result), so that sums run in the same order for any number of threads.
    const int64_t table = crf.vocabulary * crf.rank, budget = int64_t{16} << 20;
    const int64_t pairs = std::max<int64_t>(1, budget / std::max<int64_t>(1, 2 * table * int64_t{sizeof(float)}));
    const int64_t groups = grad_left ? std::min(crf.batch, 1 + pairs) : crf.batch;
    std::vector<float> own(grad_left ? static_cast<size_t>(std::max<int64_t>(0, groups - 1) * 2 * table) : 0, 0.0f);
    parallel_for(groups, num_threads, [&](int64_t group) {
        const Floats scratch = scratch_of(k, crf);
        float* left = grad_left;
        float* right = grad_right;
        if (grad_left && group > 0) {
            left = own.data() + (group - 1) * 2 * table;
            right = left + table;
        }
        for (int64_t b = group; b < crf.batch; b += groups) {
            const Item item = item_of(crf, b);
            const int64_t begin = b * crf.length * crf.beam;
            k.reverse(item, grad + begin, messages + begin, norms + b * crf.length, grad_scores + begin, left, right,
                      scratch.data());
            std::fill(grad_scores + begin + item.length * crf.beam, grad_scores + begin + crf.length * crf.beam, 0.0f);
        }
    });
    for (int64_t group = 1; grad_left && group < groups; ++group) {
        const float* left = own.data() + (group - 1) * 2 * table;
        for (int64_t i = 0; i < table; ++i) grad_left[i] += left[i], grad_right[i] += left[table + i];
    }
}

void crf_viterbi(const Crf& crf, int64_t* slots, int num_threads) {
    const crf::Viterbi& k = kernels<crf::Viterbi>();
    parallel_for(crf.batch, num_threads, [&](int64_t b) {
        const Item item = item_of(crf, b);
        const Floats scratch = scratch_of(k, crf), best(crf.length * crf.beam), offsets(crf.length);
        int64_t* path = slots + b * crf.length;
        k.max_filter(item, best.data(), offsets.data(), path, scratch.data());
        std::fill(path + item.length, path + crf.length, int64_t{-1});
    });
}

// ---- the n best paths -----------------------------------------------------------------------------------------------

void crf_kbest(const Crf& crf, int64_t paths, int64_t* slots, int num_threads) {
    if (paths < 1) throw std::invalid_argument("paths is " + std::to_string(paths) + ", must be at least 1");
    const crf::Viterbi& k = kernels<crf::Viterbi>();
    parallel_for(crf.batch, num_threads, [&](int64_t b) {
        const Item item = item_of(crf, b);
        const int64_t beam = crf.beam;
        const Floats scratch = scratch_of(k, crf), best(item.length * beam), offsets(item.length), nothing(beam);
        std::fill(nothing.data(), nothing.data() + beam, 0.0f);
        int64_t* own = slots + b * crf.length * paths;
        std::fill(own, own + crf.length * paths, int64_t{-1});
        k.max_filter(item, best.data(), offsets.data(), nullptr, scratch.data());
        const auto edges = [&](int64_t t, int64_t slot, float* out) {
            k.into_slot(item, t - 1, slot, nothing.data(), out, scratch.data());
        };
        BestPaths(item.length, beam, best.data(), edges).write(paths, own);
    });
}

// ---- sampling -------------------------------------------------------------------------------------------------------

namespace {

// Few items: their samples are shared out as well, in whole vectors.
struct Shares {
    int64_t parts, size;
    Shares(int64_t batch, int64_t samples, int64_t vector, int num_threads) {
        const int64_t blocks = (samples + vector - 1) / vector;
        parts = std::clamp<int64_t>(num_threads / std::max<int64_t>(1, batch), 1, blocks);
        size = (blocks + parts - 1) / parts * vector;
    }
};

}  // namespace

void crf_stochastic_viterbi(const Crf& crf, float temperature, int64_t samples, uint64_t seed, const float* uniforms,
                            int64_t* slots, float* prefixes, void* backpointers, int num_threads) {
    if (samples < 1) throw std::invalid_argument("samples is " + std::to_string(samples) + ", must be at least 1");
    const crf::Stochastic& k = kernels<crf::Stochastic>();
    const int64_t width = crf.beam <= 256 ? 1 : 2;
    const Shares shares(crf.batch, samples, k.tables, num_threads);
    parallel_for(crf.batch * shares.parts, num_threads, [&](int64_t task) {
        const int64_t b = task / shares.parts, first = task % shares.parts * shares.size;
        if (first >= samples) return;
        const int64_t count = std::min(shares.size, samples - first);
        const Item item = item_of(crf, b);
        const Floats scratch(k.scratch(crf.beam, crf.rank, count));
        const int64_t size = crf.length * crf.beam * samples;
        int64_t* own = slots + b * crf.length * samples;
        float* scores = prefixes + b * size;
        char* pointers = static_cast<char*>(backpointers) + b * size * width;
        k.stochastic(item, temperature, samples, seed,
                     uniforms ? uniforms + b * (crf.length - 1) * crf.beam * samples : nullptr, first, count, own, scores,
                     pointers, scratch.data());
        for (int64_t t = item.length; t < crf.length; ++t) {
            std::fill(own + t * samples + first, own + t * samples + first + count, int64_t{-1});
        }
        for (int64_t row = item.length * crf.beam; row < crf.length * crf.beam; ++row) {
            const int64_t begin = row * samples + first;
            std::fill(scores + begin, scores + begin + count, 0.0f);
            std::memset(pointers + begin * width, 0, static_cast<size_t>(count * width));
        }
    });
}

void crf_ffbs(const Crf& crf, const float* messages, const float* norms, int64_t samples, uint64_t seed,
              const float* uniforms, int64_t* slots, int num_threads) {
    if (samples < 1) throw std::invalid_argument("samples is " + std::to_string(samples) + ", must be at least 1");
    const crf::Ffbs& k = kernels<crf::Ffbs>();
    const Shares shares(crf.batch, samples, 64, num_threads);
    parallel_for(crf.batch * shares.parts, num_threads, [&](int64_t task) {
        const int64_t b = task / shares.parts, first = task % shares.parts * shares.size;
        if (first >= samples) return;
        const Item item = item_of(crf, b);
        const Floats scratch = scratch_of(k, crf);
        int64_t* own = slots + b * crf.length * samples;
        const int64_t count = std::min(shares.size, samples - first);
        k.ffbs(item, messages + b * crf.length * crf.beam, norms + b * crf.length, samples, seed,
               uniforms ? uniforms + b * crf.length * samples : nullptr, first, count, own, scratch.data());
        for (int64_t t = item.length; t < crf.length; ++t) {
            std::fill(own + t * samples + first, own + t * samples + first + count, int64_t{-1});
        }
    });
}

}  // namespace simctg
