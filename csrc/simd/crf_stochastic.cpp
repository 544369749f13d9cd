// The published sampler of the low-rank CRF: a table of sources for every slot, drawn for each sample, then traced back.
//
// Floor: K² (R multiply-adds and an exponential) a step for all samples, and K² (two multiply-adds, a comparison and an
// addition) for each, as exp((state + step) / temperature) is a product of two factors. Layout: factors
// [padded][tables] by source, terms [padded][kPanel] a panel of targets; kTables samples take one vector of targets
// through all sources in registers.
#include "simd/crf_draw.h"

namespace simctg::crf {
namespace {

constexpr int kTables = kRegisters == 32 ? 8 : 2;  // samples whose tables are drawn together
constexpr float kTiny = 1e-25f;                    // a smaller total has lost terms to underflow

// One vector of targets, kTables samples: sources drawn from factors[k][n] · terms[k], in slot order.
SIMCTG_INLINE void draw_tables(const float* factors, int64_t stride, const float* terms, int64_t padded,
                               const float* uniform, float* chosen, float* totals) {
    Vec total[kTables], run[kTables], index[kTables];
#pragma GCC unroll 8
    for (int n = 0; n < kTables; ++n) total[n] = run[n] = index[n] = zeros();
    for (int64_t k = 0; k < padded; ++k) {
        const Vec term = load(terms + k * kPanel);
#pragma GCC unroll 8
        for (int n = 0; n < kTables; ++n) {
            total[n] = multiply_add(broadcast(factors[k * stride + n]), term, total[n]);
        }
    }
#pragma GCC unroll 8
    for (int n = 0; n < kTables; ++n) {
        store(totals + n * kLanes, total[n]);
        total[n] = mul(total[n], load(uniform + n * kPanel));
    }
    for (int64_t k = 0; k < padded; ++k) {
        const Vec term = load(terms + k * kPanel);
#pragma GCC unroll 8
        for (int n = 0; n < kTables; ++n) {
            run[n] = multiply_add(broadcast(factors[k * stride + n]), term, run[n]);
            index[n] = add(index[n], not_above(run[n], total[n]));
        }
    }
#pragma GCC unroll 8
    for (int n = 0; n < kTables; ++n) store(chosen + n * kLanes, index[n]);
}

// The same for one sample, with every exponential taken of its own sum: right whatever the spread of the scores.
void draw_directly(const float* state, const float* steps, int64_t padded, float inverse, const float* uniform,
                   float* weights, float* chosen) {
    for (int64_t k = 0; k < padded; ++k) {
        const Vec total = add(broadcast(state[k]), load(steps + k * kPanel));
        store(weights + k * kLanes, mul(total, broadcast(inverse)));
    }
    choose<1>(weights, padded, uniform, chosen);
}

template <class Pointer>
void stochastic_item(const Item& item, float temperature, int64_t all, uint64_t seed, const float* uniforms,
                     int64_t first, int64_t samples, int64_t* slots, float* prefixes, Pointer* backpointers,
                     float* scratch) {
    // From here on n counts from `first`; what is read and written holds `all` samples side by side.
    if (uniforms) uniforms += first;
    slots += first, prefixes += first, backpointers += first;
    if (item.length == 0) return;
    const FlushToZero flush;
    Arena arena{scratch};
    Step step(item, arena);
    const int64_t beam = item.beam, rank = item.rank, padded = step.padded;
    const int64_t tables = round_up(samples, kTables), columns = round_up(beam, kPanel);
    float* state = arena.take(padded * tables);      // [n][padded], each sample's largest score taken off
    float* following = arena.take(padded * tables);  // the next one
    float* factors = arena.take(padded * tables);    // exp(state / temperature), [padded][tables]
    float* steps = arena.take(padded * kPanel);      // transitions into a panel
    float* terms = arena.take(padded * kPanel);      // their exponentials
    float* weights = arena.take(padded * kLanes);
    float* zero = arena.take(padded);
    float* uniform = arena.take(tables * columns);  // [n][columns]
    alignas(64) float chosen[kTables * kLanes], totals[kTables * kLanes], direct[kLanes];
    const float inverse = 1.0f / temperature;
    for (int64_t k = 0; k < padded; ++k) zero[k] = k < beam ? 0.0f : -kInfinity;
    for (int64_t n = 0; n < samples; ++n) {
        float* own = state + n * padded;
        for (int64_t k = 0; k < beam; ++k) own[k] = item.scores[k];
        take_off_largest(own, beam);
        for (int64_t k = 0; k < beam; ++k) {
            prefixes[k * all + n] = own[k];
            backpointers[k * all + n] = 0;
        }
    }
    for (int64_t t = 1; t < item.length; ++t) {
        step.load_step(item, t - 1);
        for (int64_t n = 0; n < tables; ++n) {
            for (int64_t k = 0; k < padded; ++k) {
                factors[k * tables + n] = n < samples && k < beam ? state[n * padded + k] * inverse : -kInfinity;
            }
            if (n >= samples) continue;
            float* own = uniform + n * columns;
            if (uniforms) {
                for (int64_t j = 0; j < columns; ++j) {
                    own[j] = j < beam ? uniforms[((t - 1) * beam + j) * all + n] : 0.0f;
                }
            } else {
                for (int64_t j = 0; j < columns; j += 4) {
                    uint32_t words[4];
                    philox(seed, static_cast<uint32_t>(1 + j / 4), static_cast<uint32_t>(t - 1),
                           static_cast<uint32_t>(first + n), static_cast<uint32_t>(item.index), words);
                    for (int i = 0; i < 4; ++i) own[j + i] = to_uniform(words[i]);
                }
            }
        }
        static_assert(kRows * kTables % kLanes == 0, "padded * tables must be whole vectors");
        for (int64_t i = 0; i < padded * tables; i += kLanes) store(factors + i, exponential(load(factors + i)));
        const float* score = item.scores + t * beam;
        for (int64_t begin = 0; begin < beam; begin += kPanel) {
            const int vecs = vectors_of(beam - begin);
            for (int64_t k = 0; k < padded; k += kRows) {
                Vec acc[kRows * kVecs];
                score_tile<kVecs>(step.rows + k * rank, rank, step.panels + begin * rank, zero + k, acc);
                for (int i = 0; i < kRows * kVecs; ++i) store(steps + k * kPanel + i * kLanes, acc[i]);
            }
            for (int c = 0; c < vecs; ++c) {
                Vec top = broadcast(kLowest);
                for (int64_t k = 0; k < padded; ++k) top = max(load(steps + k * kPanel + c * kLanes), top);
                for (int64_t k = 0; k < padded; ++k) {
                    const Vec x = mul(sub(load(steps + k * kPanel + c * kLanes), top), broadcast(inverse));
                    store(terms + k * kPanel + c * kLanes, exponential(x));
                }
                for (int64_t n = 0; n < samples; n += kTables) {
                    // Tables behind `samples` draw too, with some other table's uniforms; nobody reads them.
                    alignas(64) float own[kTables * kPanel];
                    for (int i = 0; i < kTables; ++i) {
                        const int64_t from = smaller(n + i, samples - 1);
                        store(own + i * kPanel, load(uniform + from * columns + begin + c * kLanes));
                    }
                    draw_tables(factors + n, tables, terms + c * kLanes, padded, own, chosen, totals);
                    for (int i = 0; i < kTables && n + i < samples; ++i) {
                        const float* source = state + (n + i) * padded;
                        bool again = false;
                        for (int l = 0; l < kLanes; ++l) again |= !(totals[i * kLanes + l] >= kTiny);
                        if (again) {
                            draw_directly(source, steps + c * kLanes, padded, inverse, own + i * kPanel, weights, direct);
                        }
                        for (int l = 0; l < kLanes; ++l) {
                            const int64_t j = begin + c * kLanes + l;
                            if (j >= beam) break;
                            int64_t k;
                            if (again && !(totals[i * kLanes + l] >= kTiny)) {
                                k = static_cast<int64_t>(direct[l]);
                            } else {
                                k = smaller<int64_t>(static_cast<int64_t>(chosen[i * kLanes + l]), beam - 1);
                                // Rounding: the last slot that has any weight.
                                while (k > 0 && !(factors[k * tables + n + i] * terms[k * kPanel + c * kLanes + l] > 0)) --k;
                            }
                            k = smaller<int64_t>(k, beam - 1);
                            backpointers[(t * beam + j) * all + n + i] = static_cast<Pointer>(k);
                            following[(n + i) * padded + j] = source[k] + steps[k * kPanel + c * kLanes + l] + score[j];
                        }
                    }
                }
            }
        }
        for (int64_t n = 0; n < samples; ++n) {
            float* own = following + n * padded;
            take_off_largest(own, beam);
            for (int64_t j = 0; j < beam; ++j) prefixes[(t * beam + j) * all + n] = own[j];
        }
        float* swap = state;
        state = following;
        following = swap;
    }
    for (int64_t n = 0; n < samples; ++n) {
        int64_t slot = first_largest(state + n * padded, beam);
        for (int64_t t = item.length - 1; t >= 0; --t) {
            slots[t * all + n] = slot;
            slot = backpointers[(t * beam + slot) * all + n];
        }
    }
}

void stochastic(const Item& item, float temperature, int64_t samples, uint64_t seed, const float* uniforms,
                int64_t first, int64_t count, int64_t* slots, float* prefixes, void* backpointers, float* scratch) {
    if (item.beam <= 256) {
        stochastic_item(item, temperature, samples, seed, uniforms, first, count, slots, prefixes,
                        static_cast<uint8_t*>(backpointers), scratch);
    } else {
        stochastic_item(item, temperature, samples, seed, uniforms, first, count, slots, prefixes,
                        static_cast<uint16_t*>(backpointers), scratch);
    }
}

int64_t scratch(int64_t beam, int64_t rank, int64_t samples) {
    const int64_t padded = round_up(beam, kRows), columns = round_up(beam, kPanel), tables = round_up(samples, kTables);
    return step_floats(beam, rank) + 3 * padded * tables + 2 * padded * kPanel + padded * kLanes + padded +
           tables * columns + kSlack;
}

}  // namespace
}  // namespace simctg::crf

SIMCTG_TABLE(crf, Stochastic, scratch, stochastic, kTables)
