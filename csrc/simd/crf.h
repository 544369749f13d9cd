// The kernels of api/crf.h that one instruction set offers, a struct an algorithm. No threads inside, no allocation,
// nothing thrown. `scratch` says how many floats of working memory, aligned to 64 bytes, the others of a struct need.
#pragma once

#include <cstdint>

#include "simd/table.h"

namespace simctg::crf {

// One item, cut to its own length.
struct Item {
    int64_t index, length, beam, rank;
    const float* scores;
    const int64_t* tokens;
    const float* left;
    const float* right;
    float scale;
};

// One row of emissions: what is kept of it are candidates for the beam.
struct Candidate {
    float value;
    uint32_t token;
};

struct Select {
    // Largest values of ceil(count / (group · lanes)) · lanes groups of up to `group` floats; returns how many groups.
    // *nan becomes true where a NaN is among them.
    int64_t (*group_maxima)(const float* row, int64_t count, int64_t group, float* maxima, bool* nan);
    // A value that at least `wanted` of `values` (a multiple of lanes) reach and few more; NaN: not found quickly.
    float (*threshold)(const float* values, int64_t count, int64_t wanted);
    // All elements >= threshold, in order; returns how many. The row at `next` is fetched meanwhile.
    int64_t (*collect)(const float* row, int64_t count, float threshold, const float* next, Candidate* out);
    int64_t lanes;
};

struct Filter {
    int64_t (*scratch)(int64_t beam, int64_t rank);
    void (*filter)(const Item& item, float* messages, float* norms, float* scratch);
};

struct Backward {
    int64_t (*scratch)(int64_t beam, int64_t rank);
    // `into` [length, beam]: the gradient of the scores; tables null: left out.
    void (*reverse)(const Item& item, const float* grad, const float* messages, const float* norms, float* into,
                    float* grad_left, float* grad_right, float* scratch);
};

struct Viterbi {
    int64_t (*scratch)(int64_t beam, int64_t rank);
    // best [length, beam]: score of the best prefix into every slot, each position's largest taken off and put in
    // offsets [length]. slots [length]; null: only the scores.
    void (*max_filter)(const Item& item, float* best, float* offsets, int64_t* slots, float* scratch);
    // out[k] = start[k] + transition(k at t, slot j at t + 1), for all k.
    void (*into_slot)(const Item& item, int64_t t, int64_t slot, const float* start, float* out, float* scratch);
};

// The samples first..first + count - 1 of `samples` that stand side by side in slots, uniforms and prefixes.
struct Ffbs {
    int64_t (*scratch)(int64_t beam, int64_t rank);
    void (*ffbs)(const Item& item, const float* messages, const float* norms, int64_t samples, uint64_t seed,
                 const float* uniforms, int64_t first, int64_t count, int64_t* slots, float* scratch);
};

struct Stochastic {
    int64_t (*scratch)(int64_t beam, int64_t rank, int64_t count);
    void (*stochastic)(const Item& item, float temperature, int64_t samples, uint64_t seed, const float* uniforms,
                       int64_t first, int64_t count, int64_t* slots, float* prefixes, void* backpointers,
                       float* scratch);
    int64_t tables;  // samples that it takes together
};

// Dense transitions: `rows` items (at most `together`) of `tags` states, `stride` (a multiple of lanes) floats each.
struct Dense {
    // next[r, j] = sum_k state[r, k] · matrix[k, j]
    void (*sum)(const float* state, const float* matrix, int64_t tags, int64_t stride, int64_t rows, float* next);
    // next[r, j] = max_k state[r, k] + matrix[k, j]
    void (*max)(const float* state, const float* matrix, int64_t tags, int64_t stride, int64_t rows, float* next);
    // next[r, j] = log sum_k exp(state[r, k] + matrix[k, j])
    void (*lse)(const float* state, const float* matrix, int64_t tags, int64_t stride, int64_t rows, float* next);
    float (*largest)(const float* values, int64_t count);  // -inf for none
    // out = exp(in + shift) for `count` values, a multiple of lanes.
    void (*exponentials)(const float* in, float shift, int64_t count, float* out);
    int64_t lanes, together;
};

}  // namespace simctg::crf

SIMCTG_TABLES(crf::Select)
SIMCTG_TABLES(crf::Filter)
SIMCTG_TABLES(crf::Backward)
SIMCTG_TABLES(crf::Viterbi)
SIMCTG_TABLES(crf::Ffbs)
SIMCTG_TABLES(crf::Stochastic)
SIMCTG_TABLES(crf::Dense)
