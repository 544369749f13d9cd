// The low-rank beam CRF: beam selection, filters, back-tracing, sampling, n best paths and the reverse sweep.
//
// Sizes: `batch` items of `length` positions, `beam` slots a position, `vocabulary` rows of `rank` in both tables. The
// transition from slot k at t to slot j at t + 1 is scale · left[tokens[b, t, k]] · right[tokens[b, t + 1, j]]; it is
// computed tile by tile and never stored. Everything is contiguous, float unless said otherwise; lengths may be null.
// Each function opens one parallel region. A result depends on neither the number of threads nor other items.
//
// All throw std::invalid_argument on a token or a length out of range.
#pragma once

#include <cstdint>

#include "api/element_type.h"

namespace simctg {

struct Crf {
    int64_t batch, length, beam, vocabulary, rank;
    const float* scores;     // [batch, length, beam]
    const int64_t* tokens;   // [batch, length, beam]
    const float* left;       // [vocabulary, rank]
    const float* right;      // [vocabulary, rank]
    const int64_t* lengths;  // [batch]
    float scale;
};

struct Emissions {
    const void* data;  // [batch, length, vocabulary], rows contiguous
    ElementType type;
    int64_t batch, length, vocabulary;
    int64_t stride_batch, stride_length;  // in elements
};

// The `beam` largest emissions of every position: by falling value, ties by the lower token. NaN counts as largest.
// `forced` [batch, length, forced_count] (null: none; negative entries: none) are put in front, by rising token.
// tokens [batch, length, beam] int64; values, the same shape. Beyond an item's length slot k holds token k and 0.
void crf_beam_select(const Emissions& emissions, int64_t beam, const int64_t* lengths, const int64_t* forced,
                     int64_t forced_count, int64_t* tokens, float* values, int num_threads);

// messages [batch, length, beam], norms [batch, length]: see simctg_fast/ops/crf_filter.py.
void crf_filter(const Crf& crf, float* messages, float* norms, int num_threads);

// grad, messages, grad_scores [batch, length, beam]; norms [batch, length]. grad_left and grad_right [vocabulary, rank]
// must hold zeros; null leaves them out.
void crf_filter_backward(const Crf& crf, const float* grad, const float* messages, const float* norms,
                         float* grad_scores, float* grad_left, float* grad_right, int num_threads);

// slots [batch, length], -1 beyond the lengths. `scale` must be 1 here and in the next two.
void crf_viterbi(const Crf& crf, int64_t* slots, int num_threads);

// slots [batch, length, paths], -1 beyond the lengths and where there are fewer paths of finite score; order and memory as
// best_paths.h says.
void crf_kbest(const Crf& crf, int64_t paths, int64_t* slots, int num_threads);

// The published sampler. uniforms [batch, length - 1, beam, samples] or null (Philox under `seed`); slots [batch, length,
// samples]; prefixes [batch, length, beam, samples]; backpointers, the same shape, of uint8 for beams up to 256, else
// uint16.
void crf_stochastic_viterbi(const Crf& crf, float temperature, int64_t samples, uint64_t seed, const float* uniforms,
                            int64_t* slots, float* prefixes, void* backpointers, int num_threads);

// Exact samples. uniforms [batch, length, samples] or null; slots [batch, length, samples].
void crf_ffbs(const Crf& crf, const float* messages, const float* norms, int64_t samples, uint64_t seed,
              const float* uniforms, int64_t* slots, int num_threads);

// One dense matrix of transitions [tags, tags], from row to column, for all steps.
struct DenseCrf {
    int64_t batch, length, tags;
    const float* emissions;    // [batch, length, tags]
    const float* transitions;  // [tags, tags]
    const int64_t* lengths;
};

// log_partition [batch], in double; -inf where no path has a finite score. messages [batch, length, tags] and norms [batch,
// length] (both or neither null): see simctg_fast/ops/crf_dense.py.
void dense_filter(const DenseCrf& crf, float* messages, float* norms, double* log_partition, int num_threads);

// The gradients of emissions (by way of the messages alone) and of transitions for a gradient of the messages.
void dense_filter_backward(const DenseCrf& crf, const float* grad, const float* messages, const float* norms,
                           float* grad_emissions, float* grad_transitions, int num_threads);

// slots [batch, length], -1 beyond the lengths, and throughout where no path has a finite score.
void dense_viterbi(const DenseCrf& crf, int64_t* slots, int num_threads);

// slots [batch, length, paths], as crf_kbest's.
void dense_kbest(const DenseCrf& crf, int64_t paths, int64_t* slots, int num_threads);

}  // namespace simctg
