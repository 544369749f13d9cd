// The kernels of crf.h that one instruction set offers. No threads inside, no allocation, nothing thrown.
#pragma once

#include <cstdint>

namespace simctg {

// One item, cut to its own length.
struct CrfItem {
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

struct CrfKernels {
    // Floats of scratch memory (64-byte aligned) that the kernels below need.
    int64_t (*scratch)(int64_t beam, int64_t rank, int64_t samples);

    // Largest values of ceil(count / (group · lanes)) · lanes groups of up to `group` floats; returns how many groups.
    // *nan becomes true where a NaN is among them.
    int64_t (*group_maxima)(const float* row, int64_t count, int64_t group, float* maxima, bool* nan);
    // A value that at least `wanted` of `values` (a multiple of lanes) reach and few more; NaN: not found quickly.
    float (*threshold)(const float* values, int64_t count, int64_t wanted);
    // All elements >= threshold, in order; returns how many. The row at `next` is fetched meanwhile.
    int64_t (*collect)(const float* row, int64_t count, float threshold, const float* next, Candidate* out);

    void (*filter)(const CrfItem& item, float* messages, float* norms, float* scratch);
    // `into` [length, beam]: the gradient of the scores; tables null: left out.
    void (*reverse)(const CrfItem& item, const float* grad, const float* messages, const float* norms, float* into,
                    float* grad_left, float* grad_right, float* scratch);
    // best [length, beam]: score of the best prefix into every slot, each position's largest taken off and put in
    // offsets [length]. slots [length]; null: only the scores.
    void (*max_filter)(const CrfItem& item, float* best, float* offsets, int64_t* slots, float* scratch);
    // out[k] = start[k] + transition(k at t, slot j at t + 1), for all k.
    void (*into_slot)(const CrfItem& item, int64_t t, int64_t slot, const float* start, float* out, float* scratch);
    void (*ffbs)(const CrfItem& item, const float* messages, const float* norms, int64_t samples, uint64_t seed,
                 const float* uniforms, int64_t first, int64_t count, int64_t* slots, float* scratch);
    void (*stochastic)(const CrfItem& item, float temperature, int64_t samples, uint64_t seed, const float* uniforms,
                       int64_t first, int64_t count, int64_t* slots, float* prefixes, void* backpointers,
                       float* scratch);
    int64_t tables;  // samples that `stochastic` takes together

    // Dense transitions: `rows` items (at most dense_rows) of `tags` states, `stride` (a multiple of lanes) floats each.
    // next[r, j] = sum_k state[r, k] · matrix[k, j]
    void (*dense_sum)(const float* state, const float* matrix, int64_t tags, int64_t stride, int64_t rows, float* next);
    // next[r, j] = max_k state[r, k] + matrix[k, j]
    void (*dense_max)(const float* state, const float* matrix, int64_t tags, int64_t stride, int64_t rows, float* next);
    // next[r, j] = log sum_k exp(state[r, k] + matrix[k, j])
    void (*dense_lse)(const float* state, const float* matrix, int64_t tags, int64_t stride, int64_t rows, float* next);
    float (*largest)(const float* values, int64_t count);  // -inf for none
    // out = exp(in + shift) for `count` values, a multiple of lanes.
    void (*exponentials)(const float* in, float shift, int64_t count, float* out);
    int64_t lanes;
    int64_t dense_rows;
};

const CrfKernels& crf_kernels_generic();
#if defined(SIMCTG_FAST_X86_64)
const CrfKernels& crf_kernels_avx2();
const CrfKernels& crf_kernels_avx512();
#endif

}  // namespace simctg
