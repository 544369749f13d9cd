// One matrix of transitions for all steps: filter, its reverse sweep, the best path and the n best. Scores of -inf are
// forbidden moves.
//
// With shared transitions a step is a product of matrices in the space of exponentials, for several items at once: the
// exponentials of the matrix are taken once. What underflows is lost there, 1e-38 beside states whose largest was
// `scale` before it was made 1, so the sum into a tag is right to K · 1.4e-12 where sum · scale >= e^-60 (`kSafe`).
// Transitions that span at most 30 nats and forbid nothing cannot miss that; otherwise every step is looked at, and an
// item that misses it is filtered again in logarithms.
#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "host/best_paths.h"
#include "api/crf.h"
#include "host/checks.h"
#include "host/memory.h"
#include "host/parallel.h"
#include "simd/crf.h"

namespace simctg {
namespace {

using crf::Dense;

constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr float kSafe = 8.7565108e-27f;     // e^-60
constexpr float kSafeLog = -60.0f, kSafeSpan = 30.0f, kWidestSpan = 60.0f;

struct DenseMatrix {
    int64_t tags, stride;  // rows are padded to whole pairs of vectors
    Floats logs;           // [tags, stride], -inf behind
    Floats factors;        // exp(logs - high), 0 behind
    float high = kNever;
    bool forbidden = false, exponential = false, guarded = false;

    DenseMatrix(const Dense& k, const DenseCrf& crf, bool sums)
        : tags(crf.tags),
          stride((crf.tags + 2 * k.lanes - 1) / (2 * k.lanes) * (2 * k.lanes)),
          logs(tags * stride),
          factors(sums ? tags * stride : 0) {
        for (int64_t i = 0; i < tags; ++i) {
            float* row = logs.data() + i * stride;
            std::copy_n(crf.transitions + i * tags, tags, row);
            std::fill(row + tags, row + stride, kNever);
        }
        // Sixteen at a time, which the compiler makes vectors of; -inf counts as +inf in the minima.
        constexpr int64_t wide = 16;
        float lows[wide];
        int wrong[wide] = {};
        std::fill(lows, lows + wide, -kNever);
        const int64_t count = tags * tags;
        for (int64_t i = 0; i < count; i += wide) {
            const int64_t here = std::min(wide, count - i);
            for (int64_t l = 0; l < here; ++l) {
                const float value = crf.transitions[i + l], finite = value == kNever ? -kNever : value;
                lows[l] = finite < lows[l] ? finite : lows[l];
                wrong[l] |= !(value < -kNever);
            }
        }
        if (std::count(wrong, wrong + wide, 0) < wide) refuse(crf.transitions);
        if (!sums) return;
        const float low = *std::min_element(lows, lows + wide);
        high = k.largest(crf.transitions, count);
        forbidden = std::count(crf.transitions, crf.transitions + count, kNever) > 0;
        exponential = high - low <= kWidestSpan;  // false where all is forbidden
        guarded = forbidden || high - low > kSafeSpan;
        if (exponential) k.exponentials(logs.data(), -high, tags * stride, factors.data());
    }

    [[noreturn]] void refuse(const float* transitions) const {
        int64_t at = 0;
        while (transitions[at] < -kNever) ++at;
        throw std::invalid_argument("transitions[" + std::to_string(at / tags) + ", " + std::to_string(at % tags) + "] is " +
                                    std::to_string(transitions[at]) + ", must be finite or -inf");
    }
};

// Items taken together: as many as the kernels like, fewer where threads would have nothing to do.
int64_t rows_together(const Dense& k, int64_t batch, int num_threads) {
    return std::clamp<int64_t>((batch + num_threads - 1) / std::max(1, num_threads), 1, k.together);
}

// What is wanted of a filter; `messages` and `norms` may be null.
struct Filtered {
    float* messages;
    float* norms;
    double* log_partition;
};

// Filters `count` items from `first` on.
class Filter {
public:
    Filter(const Dense& k, const DenseCrf& crf, const DenseMatrix& matrix, const Filtered& out, int64_t first,
           int64_t count)
        : k_(k), crf_(crf), matrix_(matrix), out_(out), first_(first), count_(count), tags_(crf.tags),
          stride_(matrix.stride), state_(count * stride_), next_(count * stride_), offsets_(static_cast<size_t>(count), 0.0) {
        for (int64_t r = 0; r < count; ++r) lengths_.push_back(length_of(crf.lengths, first + r, crf.length));
        longest_ = *std::max_element(lengths_.begin(), lengths_.end());
    }

    void logarithms() {
        for (int64_t t = 0; t < longest_; ++t) {
            if (t > 0) k_.lse(state_.data(), matrix_.logs.data(), tags_, stride_, count_, next_.data());
            for (int64_t r = 0; r < count_; ++r) {
                if (t >= lengths_[static_cast<size_t>(r)]) continue;
                float* own = state_.data() + r * stride_;
                float* from = next_.data() + r * stride_;
                const float* emission = emissions(r, t);
                if (t == 0) std::fill(from, from + tags_, 0.0f);
                for (int64_t j = 0; j < tags_; ++j) own[j] = from[j] + emission[j];
                const float top = k_.largest(own, tags_);
                if (top > kNever) {
                    for (int64_t j = 0; j < tags_; ++j) own[j] -= top;
                }
                offsets_[static_cast<size_t>(r)] += static_cast<double>(top);
                keep(r, t, from, top);
            }
        }
        for (int64_t r = 0; r < count_; ++r) finish(r, [](float value) { return std::exp(static_cast<double>(value)); });
    }

    // False for an item whose numbers would not do: nothing is promised of its results.
    std::vector<char> exponentials() {
        std::vector<char> fine(static_cast<size_t>(count_), 1);
        std::vector<float> scales(static_cast<size_t>(count_), 1.0f), message(static_cast<size_t>(tags_));
        std::vector<char> live(static_cast<size_t>(count_ * tags_), 1);
        Floats padded(stride_);
        std::fill(padded.data(), padded.data() + stride_, kNever);
        std::fill(state_.data(), state_.data() + count_ * stride_, 0.0f);
        for (int64_t t = 0; t < longest_; ++t) {
            if (t > 0) k_.sum(state_.data(), matrix_.factors.data(), tags_, stride_, count_, next_.data());
            for (int64_t r = 0; r < count_; ++r) {
                if (t >= lengths_[static_cast<size_t>(r)] || !fine[static_cast<size_t>(r)]) continue;
                float* own = state_.data() + r * stride_;
                const float* from = next_.data() + r * stride_;
                const float* emission = emissions(r, t);
                char* alive = live.data() + r * tags_;
                const float top = k_.largest(emission, tags_);
                if (matrix_.guarded && !certain(alive, emission, t > 0 ? from : nullptr, scales[static_cast<size_t>(r)])) {
                    fine[static_cast<size_t>(r)] = 0;
                    continue;
                }
                std::copy(emission, emission + tags_, padded.data());
                k_.exponentials(padded.data(), -top, stride_, own);
                if (t > 0) {
                    for (int64_t j = 0; j < tags_; ++j) own[j] *= from[j];
                }
                const float scale = k_.largest(own, tags_);
                if (!(scale >= kSafe)) {
                    fine[static_cast<size_t>(r)] = 0;
                    continue;
                }
                for (int64_t j = 0; j < tags_; ++j) own[j] /= scale;
                scales[static_cast<size_t>(r)] = scale;
                const double norm = static_cast<double>(top) + std::log(static_cast<double>(scale)) +
                                    (t > 0 ? static_cast<double>(matrix_.high) : 0.0);
                offsets_[static_cast<size_t>(r)] += norm;
                if (out_.messages == nullptr) continue;
                for (int64_t j = 0; j < tags_; ++j) message[static_cast<size_t>(j)] = t > 0 ? std::log(from[j]) + matrix_.high : 0.0f;
                keep(r, t, message.data(), static_cast<float>(norm));
            }
        }
        for (int64_t r = 0; r < count_; ++r) {
            if (fine[static_cast<size_t>(r)]) finish(r, [](float value) { return static_cast<double>(value); });
        }
        return fine;
    }

private:
    const float* emissions(int64_t r, int64_t t) const {
        return crf_.emissions + ((first_ + r) * crf_.length + t) * tags_;
    }

    // Whether the sums `from` (null: the first position) into all tags that can be reached are right; `alive`: the tags
    // that have a path, of the position before when called, of this one on return.
    bool certain(char* alive, const float* emission, const float* from, float scale) {
        if (from != nullptr) {
            reached_.assign(static_cast<size_t>(tags_), 1);
            for (int64_t j = 0; j < tags_; ++j) {
                if (from[j] * scale >= kSafe) continue;
                bool reached = !matrix_.forbidden;
                for (int64_t i = 0; !reached && i < tags_; ++i) {
                    reached = alive[i] && matrix_.logs.data()[i * stride_ + j] > kNever;
                }
                if (reached) return false;
                reached_[static_cast<size_t>(j)] = 0;
            }
            std::copy(reached_.begin(), reached_.end(), alive);
        }
        for (int64_t j = 0; j < tags_; ++j) alive[j] = alive[j] && emission[j] > kNever;
        return true;
    }

    void keep(int64_t r, int64_t t, const float* message, float norm) {
        if (out_.messages == nullptr) return;
        const int64_t row = (first_ + r) * crf_.length + t;
        std::copy(message, message + tags_, out_.messages + row * tags_);
        out_.norms[row] = norm;
    }

    template <class Weight>
    void finish(int64_t r, Weight weight) {
        const int64_t b = first_ + r, length = lengths_[static_cast<size_t>(r)];
        double total = 0.0;
        for (int64_t j = 0; length > 0 && j < tags_; ++j) total += weight(state_.data()[r * stride_ + j]);
        out_.log_partition[b] = length == 0 ? 0.0 : offsets_[static_cast<size_t>(r)] + std::log(total);
        if (out_.messages == nullptr) return;
        std::fill(out_.messages + (b * crf_.length + length) * tags_, out_.messages + (b + 1) * crf_.length * tags_, 0.0f);
        std::fill(out_.norms + b * crf_.length + length, out_.norms + (b + 1) * crf_.length, 0.0f);
    }

    const Dense& k_;
    const DenseCrf& crf_;
    const DenseMatrix& matrix_;
    const Filtered& out_;
    int64_t first_, count_, tags_, stride_, longest_ = 0;
    Floats state_, next_;
    std::vector<double> offsets_;
    std::vector<int64_t> lengths_;
    std::vector<char> reached_;
};

}  // namespace

void dense_filter(const DenseCrf& crf, float* messages, float* norms, double* log_partition, int num_threads) {
    if (crf.batch == 0) return;
    const Dense& k = kernels<Dense>();
    const DenseMatrix matrix(k, crf, true);
    const Filtered out{messages, norms, log_partition};
    const int64_t rows = rows_together(k, crf.batch, num_threads);
    parallel_for((crf.batch + rows - 1) / rows, num_threads, [&](int64_t task) {
        const int64_t first = task * rows, count = std::min(rows, crf.batch - first);
        if (!matrix.exponential) return Filter(k, crf, matrix, out, first, count).logarithms();
        const std::vector<char> fine = Filter(k, crf, matrix, out, first, count).exponentials();
        for (int64_t r = 0; r < count; ++r) {
            if (!fine[static_cast<size_t>(r)]) Filter(k, crf, matrix, out, first + r, 1).logarithms();
        }
    });
}

void dense_filter_backward(const DenseCrf& crf, const float* grad, const float* messages, const float* norms,
                           float* grad_emissions, float* grad_transitions, int num_threads) {
    const int64_t tags = crf.tags;
    std::fill(grad_transitions, grad_transitions + tags * tags, 0.0f);
    if (crf.batch == 0) return;
    const Dense& k = kernels<Dense>();
    const DenseMatrix matrix(k, crf, true);
    const int64_t stride = matrix.stride, length = crf.length;
    // A step shares flow[j] out among its sources by exp(alpha[i] + transition - message[j]). Where the messages allow
    // it that is weight[i] · factor · ratio[j], weight = e^alpha, ratio = flow / e^(message - high); otherwise the two
    // buffers hold alpha and flow themselves.
    Floats weights(crf.batch * length * stride), ratios(crf.batch * length * stride), transposed(tags * stride);
    std::vector<char> plain(static_cast<size_t>(crf.batch), 0);
    if (matrix.exponential) {
        std::fill(transposed.data(), transposed.data() + tags * stride, 0.0f);
        for (int64_t i = 0; i < tags; ++i) {
            for (int64_t j = 0; j < tags; ++j) transposed.data()[j * stride + i] = matrix.factors.data()[i * stride + j];
        }
    }
    const auto shares = [&](int64_t i, const float* message, float alpha, const float* flow, float* out, float* spare) {
        for (int64_t j = 0; j < stride; ++j) {
            const bool never = j >= tags || message[j] == kNever || flow[j] == 0.0f;
            spare[j] = never ? kNever : std::min(0.0f, matrix.logs.data()[i * stride + j] - message[j] + alpha);
        }
        k.exponentials(spare, 0.0f, stride, out);
        for (int64_t j = 0; j < tags; ++j) out[j] *= flow[j];
    };
    parallel_for(crf.batch, num_threads, [&](int64_t b) {
        const int64_t own = length_of(crf.lengths, b, length), begin = b * length;
        float* result = grad_emissions + begin * tags;
        std::fill(result, result + length * tags, 0.0f);
        if (own == 0) return;
        bool fits = matrix.exponential;
        for (int64_t i = tags; fits && i < own * tags; ++i) {
            const float message = messages[begin * tags + i] - matrix.high;
            fits = message >= kSafeLog || message == kNever;
        }
        plain[static_cast<size_t>(b)] = fits;
        Floats flow(stride), into(stride), spare(stride);
        std::fill(flow.data(), flow.data() + stride, 0.0f);
        std::copy(grad + (begin + own - 1) * tags, grad + (begin + own) * tags, flow.data());
        for (int64_t t = own - 1; t > 0; --t) {
            const float* message = messages + (begin + t) * tags;
            float* weight = weights.data() + (begin + t - 1) * stride;
            float* ratio = ratios.data() + (begin + t) * stride;
            for (int64_t i = 0; i < stride; ++i) {
                const int64_t at = (begin + t - 1) * tags + i;
                weight[i] = i < tags ? messages[at] + crf.emissions[at] - norms[begin + t - 1] : kNever;
            }
            std::copy(flow.data(), flow.data() + stride, ratio);
            if (fits) {
                for (int64_t j = 0; j < stride; ++j) {
                    spare.data()[j] = j < tags && message[j] > kNever ? matrix.high - message[j] : kNever;
                }
                k.exponentials(spare.data(), 0.0f, stride, spare.data());
                for (int64_t j = 0; j < tags; ++j) ratio[j] *= spare.data()[j];
                k.exponentials(weight, 0.0f, stride, weight);
                k.sum(ratio, transposed.data(), tags, stride, 1, into.data());
                for (int64_t i = 0; i < tags; ++i) into.data()[i] *= weight[i];
            } else {
                for (int64_t i = 0; i < tags; ++i) {
                    double total = 0.0;
                    if (weight[i] > kNever) {
                        shares(i, message, weight[i], ratio, into.data(), spare.data());
                        for (int64_t j = 0; j < tags; ++j) total += static_cast<double>(into.data()[j]);
                    }
                    result[(t - 1) * tags + i] = static_cast<float>(total);
                }
                std::copy(result + (t - 1) * tags, result + t * tags, into.data());
            }
            std::copy(into.data(), into.data() + tags, result + (t - 1) * tags);
            for (int64_t i = 0; i < tags; ++i) flow.data()[i] = into.data()[i] + grad[(begin + t - 1) * tags + i];
        }
    });
    // The sum over items and positions by rows of the matrix, so that its order depends on no thread: eight sources are
    // the "items" of a product whose inner dimension is time.
    const int64_t rows = k.together;
    parallel_for((tags + rows - 1) / rows, num_threads, [&](int64_t task) {
        const int64_t first = task * rows, count = std::min(rows, tags - first);
        Floats sources(count * stride), product(count * stride), spare(stride);
        for (int64_t b = 0; b < crf.batch; ++b) {
            const int64_t own = length_of(crf.lengths, b, length), begin = b * length;
            for (int64_t from = 1; plain[static_cast<size_t>(b)] && from < own; from += stride) {
                const int64_t steps = std::min(stride, own - from);
                for (int64_t r = 0; r < count; ++r) {
                    for (int64_t s = 0; s < steps; ++s) {
                        sources.data()[r * stride + s] = weights.data()[(begin + from + s - 1) * stride + first + r];
                    }
                }
                k.sum(sources.data(), ratios.data() + (begin + from) * stride, steps, stride, count, product.data());
                for (int64_t r = 0; r < count; ++r) {
                    const float* factor = matrix.factors.data() + (first + r) * stride;
                    float* out = grad_transitions + (first + r) * tags;
                    for (int64_t j = 0; j < tags; ++j) out[j] += product.data()[r * stride + j] * factor[j];
                }
            }
            for (int64_t t = 1; !plain[static_cast<size_t>(b)] && t < own; ++t) {
                for (int64_t r = 0; r < count; ++r) {
                    const float alpha = weights.data()[(begin + t - 1) * stride + first + r];
                    if (!(alpha > kNever)) continue;
                    shares(first + r, messages + (begin + t) * tags, alpha, ratios.data() + (begin + t) * stride,
                           product.data(), spare.data());
                    float* out = grad_transitions + (first + r) * tags;
                    for (int64_t j = 0; j < tags; ++j) out[j] += product.data()[j];
                }
            }
        }
    });
}

namespace {

// `states` [longest, count, stride]: score of the best prefix into every tag of `count` items, relative to the largest of
// each position; `next` [count, stride] is scratch.
void best_prefixes(const Dense& k, const DenseCrf& crf, const DenseMatrix& matrix, int64_t first, int64_t count,
                   int64_t longest, float* states, float* next) {
    const int64_t tags = crf.tags, stride = matrix.stride;
    for (int64_t t = 0; t < longest; ++t) {
        float* here = states + t * count * stride;
        if (t > 0) k.max(here - count * stride, matrix.logs.data(), tags, stride, count, next);
        for (int64_t r = 0; r < count; ++r) {
            const float* emission = crf.emissions + ((first + r) * crf.length + t) * tags;
            float* own = here + r * stride;
            const float* from = next + r * stride;
            for (int64_t j = 0; j < tags; ++j) own[j] = (t > 0 ? from[j] : 0.0f) + emission[j];
            const float top = k.largest(own, tags);
            if (top > kNever && top < -kNever) {
                for (int64_t j = 0; j < tags; ++j) own[j] -= top;
            }
        }
    }
}

}  // namespace

void dense_viterbi(const DenseCrf& crf, int64_t* slots, int num_threads) {
    const Dense& k = kernels<Dense>();
    if (crf.batch == 0) return;
    const DenseMatrix matrix(k, crf, false);
    const int64_t tags = crf.tags, stride = matrix.stride;
    const int64_t rows = rows_together(k, crf.batch, num_threads);
    parallel_for((crf.batch + rows - 1) / rows, num_threads, [&](int64_t task) {
        const int64_t first = task * rows, count = std::min(rows, crf.batch - first);
        // The sources on the path are found again from the states. Memory of up to 4 MB is kept: taken from the system
        // and given back in every call, its page faults would cost a third of the time.
        static thread_local Scratch kept;
        const int64_t size = crf.length * count * stride;
        const bool keep = size <= int64_t{1} << 20;
        Floats given(keep ? 0 : size), next(count * stride);
        float* states = keep ? kept.get(size) : given.data();
        std::vector<int64_t> lengths;
        for (int64_t r = 0; r < count; ++r) lengths.push_back(length_of(crf.lengths, first + r, crf.length));
        const int64_t longest = *std::max_element(lengths.begin(), lengths.end());
        best_prefixes(k, crf, matrix, first, count, longest, states, next.data());
        for (int64_t r = 0; r < count; ++r) {
            int64_t* path = slots + (first + r) * crf.length;
            const int64_t length = lengths[static_cast<size_t>(r)];
            std::fill(path, path + crf.length, int64_t{-1});
            for (int64_t t = length - 1, slot = -1; t >= 0; --t) {
                const float* own = states + (t * count + r) * stride;
                int64_t best = -1;
                float top = kNever;
                for (int64_t j = 0; j < tags; ++j) {
                    const float score = slot < 0 ? own[j] : own[j] + matrix.logs.data()[j * stride + slot];
                    if (score > top) top = score, best = j;
                }
                if (best < 0) break;  // no path: all of it stays -1
                path[t] = slot = best;
            }
        }
    });
}

void dense_kbest(const DenseCrf& crf, int64_t paths, int64_t* slots, int num_threads) {
    if (paths < 1) throw std::invalid_argument("paths is " + std::to_string(paths) + ", must be at least 1");
    const Dense& k = kernels<Dense>();
    const DenseMatrix matrix(k, crf, false);
    const int64_t tags = crf.tags, stride = matrix.stride;
    const auto edges = [&](int64_t, int64_t tag, float* out) {
        for (int64_t i = 0; i < tags; ++i) out[i] = matrix.logs.data()[i * stride + tag];
    };
    parallel_for(crf.batch, num_threads, [&](int64_t b) {
        const int64_t length = length_of(crf.lengths, b, crf.length);
        int64_t* own = slots + b * crf.length * paths;
        std::fill(own, own + crf.length * paths, int64_t{-1});
        Floats states(length * stride), next(stride);
        best_prefixes(k, crf, matrix, b, 1, length, states.data(), next.data());
        for (int64_t t = 1; t < length; ++t) std::copy_n(states.data() + t * stride, tags, states.data() + t * tags);
        BestPaths(length, tags, states.data(), edges).write(paths, own);
    });
}

}  // namespace simctg
