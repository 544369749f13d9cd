// The kernels of csrc/ on their own, without Python or torch, against plain loops in double precision: what a processor
// (or an emulator of one) can be asked that no test environment runs on. `tests/ops/test_csrc.py` builds it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "api/candidate_select.h"
#include "api/contrastive_loss.h"
#include "api/cpu_features.h"
#include "api/crf.h"
#include "api/decode_attention.h"
#include "api/gelu.h"
#include "api/linear.h"
#include "api/rms_norm.h"
#include "api/top_k.h"

using namespace simctg;

namespace {

using Array = std::vector<float>;
using Truth = std::vector<double>;

std::mt19937 generator(1);
bool failed = false;

Array normal(int64_t count, float scale = 1.0f) {
    std::normal_distribution<float> law(0.0f, scale);
    Array values(static_cast<size_t>(count));
    for (float& value : values) value = law(generator);
    return values;
}

void report(const std::string& name, const Array& got, const Truth& want, double allowed) {
    double worst = 0.0;
    for (size_t i = 0; i < want.size(); ++i) {
        const double error = std::abs(got[i] - want[i]) / std::max(1.0, std::abs(want[i]));
        worst = std::isnan(error) ? HUGE_VAL : std::max(worst, error);
    }
    std::printf("%s %s %.1e\n", worst <= allowed ? "ok" : "WRONG", name.c_str(), worst);
    failed |= !(worst <= allowed);
}

template <class T>
void report_equal(const std::string& name, const std::vector<T>& got, const std::vector<T>& want) {
    std::printf("%s %s\n", got == want ? "ok" : "WRONG", name.c_str());
    failed |= got != want;
}

double log_sum_exp(const Truth& values) {
    const double top = *std::max_element(values.begin(), values.end());
    double total = 0.0;
    for (const double value : values) total += std::exp(value - top);
    return top + std::log(total);
}

void linear_layers(int64_t rows, int64_t in, int64_t out) {
    const Array x = normal(rows * in), w = normal(out * in), bias = normal(out);
    Array turned(w.size()), y(static_cast<size_t>(rows * out)), packed(static_cast<size_t>(packed_linear_size(in, out)));
    for (int64_t n = 0; n < out; ++n) {
        for (int64_t k = 0; k < in; ++k) turned[k * out + n] = w[n * in + k];
    }
    pack_linear(w.data(), in, WeightLayout::rows_are_outputs, in, out, packed.data(), 1);
    Truth want, positive, sizes;  // rounding is measured against the sum of the products' sizes
    for (int64_t m = 0; m < rows; ++m) {
        for (int64_t n = 0; n < out; ++n) {
            double sum = bias[n], above = bias[n], size = std::abs(bias[n]);
            for (int64_t k = 0; k < in; ++k) {
                const double product = static_cast<double>(x[m * in + k]) * w[n * in + k];
                sum += product, above += x[m * in + k] > 0 ? product : 0.0, size += std::abs(product);
            }
            want.push_back(sum / size), positive.push_back(above / size), sizes.push_back(size);
        }
    }
    const auto report_y = [&](const std::string& name, const Truth& truth) {
        Array scaled;
        for (size_t i = 0; i < y.size(); ++i) scaled.push_back(static_cast<float>(y[i] / sizes[i]));
        report(name, scaled, truth, 5e-7);
    };
    const std::string size = std::to_string(rows) + "x" + std::to_string(in) + "x" + std::to_string(out);
    const auto run = [&](const char* name, WeightLayout layout, const Array& weight, int64_t stride) {
        linear({x.data(), in, weight.data(), stride, bias.data(), y.data(), out, rows, in, out}, layout, 2);
        report_y(std::string("linear ") + name + " " + size, want);
    };
    run("outputs", WeightLayout::rows_are_outputs, w, in);
    run("inputs", WeightLayout::rows_are_inputs, turned, out);
    run("panels", WeightLayout::panels, packed, 0);
    Array copy = x;
    relu_linear({copy.data(), in, packed.data(), 0, bias.data(), y.data(), out, rows, in, out}, WeightLayout::panels, 1);
    report_y("relu_linear " + size, positive);
}

void element_wise() {
    const int64_t rows = 3, width = 131;
    Array x = normal(rows * width, 3.0f), weight = normal(width), y(x.size());
    x[5] = 60.0f, x[6] = -60.0f, x[7] = 1e-30f;
    Truth want, normed;
    for (const double v : x) {
        want.push_back(0.5 * v * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (v + 0.044715 * v * v * v))));
    }
    gelu_tanh(x.data(), y.data(), rows * width, 1);
    report("gelu_tanh", y, want, 1e-6);
    for (int64_t r = 0; r < rows; ++r) {
        double squares = 0.0;
        for (int64_t i = 0; i < width; ++i) squares += static_cast<double>(x[r * width + i]) * x[r * width + i];
        const double root = std::sqrt(squares / width + 1e-6);
        for (int64_t i = 0; i < width; ++i) normed.push_back(weight[i] * x[r * width + i] / root);
    }
    rms_norm(x.data(), weight.data(), 1e-6f, rows, width, y.data(), 1);
    report("rms_norm", y, normed, 1e-6);
}

void top_k() {
    const int64_t count = 1003, k = 5;
    const Array logits = normal(count, 4.0f);
    Array probs(k);
    std::vector<int64_t> tokens(k), order(count);
    for (int64_t i = 0; i < count; ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return logits[a] > logits[b]; });
    order.resize(k);
    const double total = log_sum_exp(Truth(logits.begin(), logits.end()));
    Truth want;
    for (const int64_t token : order) want.push_back(std::exp(logits[token] - total));
    top_k_probs(logits.data(), 1, count, k, probs.data(), tokens.data(), 1);
    report("top_k probabilities", probs, want, 1e-6);
    report_equal("top_k tokens", tokens, order);
}

// Elements of a type, as they lie in memory.
struct Elements {
    std::vector<uint8_t> bytes;
    void* data() { return bytes.data(); }
};

// Leaves in `values` what all types hold exactly: 8 bits of mantissa, and no exponent below float16's.
Elements elements(ElementType type, Array& values) {
    Elements out{std::vector<uint8_t>(values.size() * static_cast<size_t>(size_of(type)))};
    for (size_t i = 0; i < values.size(); ++i) {
        if (std::abs(values[i]) < 0x1p-14f) values[i] = 0.0f;
        uint32_t bits;
        std::memcpy(&bits, &values[i], 4);
        bits &= 0xFFFF0000u;
        std::memcpy(&values[i], &bits, 4);
        const uint32_t magnitude = bits & 0x7FFFFFFFu, half = magnitude ? (magnitude - (112u << 23)) >> 13 : 0u;
        const auto narrow = static_cast<uint16_t>(type == ElementType::bfloat16 ? bits >> 16 : bits >> 31 << 15 | half);
        if (type == ElementType::float32) std::memcpy(&out.bytes[4 * i], &bits, 4);
        else std::memcpy(&out.bytes[2 * i], &narrow, 2);
    }
    return out;
}

Array widened(ElementType type, const Elements& from) {
    Array values(from.bytes.size() / static_cast<size_t>(size_of(type)));
    for (size_t i = 0; i < values.size(); ++i) {
        uint16_t narrow;
        if (type == ElementType::float32) {
            std::memcpy(&values[i], &from.bytes[4 * i], 4);
            continue;
        }
        std::memcpy(&narrow, &from.bytes[2 * i], 2);
        const uint32_t bits = static_cast<uint32_t>(narrow) << 16;
        if (type == ElementType::bfloat16) {
            std::memcpy(&values[i], &bits, 4);
            continue;
        }
        const int exponent = narrow >> 10 & 31, mantissa = (narrow & 1023) | (exponent ? 1024 : 0);
        values[i] = std::ldexp(static_cast<float>(narrow >> 15 ? -mantissa : mantissa), std::max(exponent, 1) - 25);
    }
    return values;
}

void attention(int64_t dim, int64_t length, ElementType type) {
    const int64_t batch = 2, candidates = 3, kv_heads = 2, groups = 2, heads = kv_heads * groups;
    Array query = normal(batch * candidates * heads * dim), key = normal(batch * kv_heads * length * dim);
    Array value = normal(batch * kv_heads * length * dim), sinks = normal(heads);
    const int64_t rows = batch * candidates;
    Array new_key = normal(rows * kv_heads * dim), new_value = normal(rows * kv_heads * dim);
    Elements q = elements(type, query), k = elements(type, key), v = elements(type, value);
    Elements own_k = elements(type, new_key), own_v = elements(type, new_value), out = q;
    std::vector<uint8_t> mask(static_cast<size_t>(batch * (length + 1)));
    for (uint8_t& open : mask) open = generator() % 4 > 0;
    DecodeAttention call{};
    call.type = type;
    call.batch = batch, call.candidates = candidates, call.kv_heads = kv_heads, call.groups = groups;
    call.dim = call.value_dim = dim, call.length = length;
    call.query = q.data(), call.query_row = heads * dim, call.query_head = dim;
    call.key = k.data(), call.value = v.data(), call.key_batch = call.value_batch = kv_heads * length * dim;
    call.key_head = call.value_head = length * dim, call.key_position = call.value_position = dim;
    call.new_key = own_k.data(), call.new_key_row = kv_heads * dim, call.new_key_head = dim;
    call.new_value = own_v.data(), call.new_value_row = kv_heads * dim, call.new_value_head = dim;
    call.scaling = 0.2f, call.softcap = 6.0f, call.mask = mask.data(), call.mask_batch = length + 1;
    call.sinks = sinks.data(), call.out = out.data();
    decode_attention(call, 2);
    Truth want;
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t h = 0; h < heads; ++h) {
            const int64_t b = row / candidates, g = h / groups;
            Truth sum(static_cast<size_t>(dim), 0.0);
            double total = std::exp(sinks[h]);
            for (int64_t j = 0; j <= length; ++j) {
                if (!mask[b * (length + 1) + j]) continue;
                const bool own = j == length;
                const int64_t at = (own ? row * kv_heads + g : (b * kv_heads + g) * length + j) * dim;
                const float *k = own ? &new_key[at] : &key[at], *v = own ? &new_value[at] : &value[at];
                double score = 0.0;
                for (int64_t d = 0; d < dim; ++d) score += static_cast<double>(query[(row * heads + h) * dim + d]) * k[d];
                const double weight = std::exp(6.0 * std::tanh(score * 0.2 / 6.0));
                total += weight;
                for (int64_t d = 0; d < dim; ++d) sum[d] += weight * v[d];
            }
            for (int64_t d = 0; d < dim; ++d) want.push_back(sum[d] / total);
        }
    }
    const char* name = type == ElementType::float32 ? " float32" : type == ElementType::bfloat16 ? " bfloat16" : " float16";
    const double rounding = type == ElementType::float32 ? 0.0 : type == ElementType::bfloat16 ? 0x1p-8 : 0x1p-11;
    report("decode_attention " + std::to_string(dim) + " " + std::to_string(length) + name, widened(type, out), want,
           5e-6 + rounding);
}

void candidates() {
    const int64_t count = 5, dim = 67, length = 203;
    const Array states = normal(count * dim);
    Array history = normal(length * dim), penalty(count);
    std::vector<int64_t> position(count), where;
    const auto norm = [&](const float* v) {
        double squares = 0.0;
        for (int64_t d = 0; d < dim; ++d) squares += static_cast<double>(v[d]) * v[d];
        return std::sqrt(squares);
    };
    for (int64_t t = 0; t < length; ++t) {
        const double size = norm(&history[t * dim]);
        for (int64_t d = 0; d < dim; ++d) history[t * dim + d] = static_cast<float>(history[t * dim + d] / size);
    }
    Truth want;
    for (int64_t c = 0; c < count; ++c) {
        double best = -2.0;
        int64_t at = 0;
        for (int64_t t = 0; t < length; ++t) {
            double cosine = 0.0;
            for (int64_t d = 0; d < dim; ++d) cosine += static_cast<double>(states[c * dim + d]) * history[t * dim + d];
            cosine /= norm(&states[c * dim]);
            if (cosine > best) best = cosine, at = t;
        }
        want.push_back(best), where.push_back(at);
    }
    CandidateScan call{};
    call.batch = 1, call.candidates = count, call.dim = dim, call.length = length;
    call.states = states.data(), call.state_batch = count * dim, call.state_candidate = dim;
    call.history = history.data(), call.history_batch = length * dim, call.history_position = dim;
    call.penalty = penalty.data(), call.position = position.data();
    candidate_scan(call, 1);
    report("candidate_scan", penalty, want, 1e-6);
    report_equal("candidate_scan positions", position, where);
}

// Of states that share a direction twenty times as long as they differ.
void centered_candidates() {
    const int64_t count = 5, dim = 67, length = 203;
    const Array common = normal(dim, 20.0f);
    Array states = normal(count * dim), raw = normal(length * dim), history = raw, squares(length), sums(dim);
    for (int64_t i = 0; i < count * dim; ++i) states[i] += common[i % dim];
    Truth mean(dim);
    for (int64_t t = 0; t < length; ++t) {
        double square = 0.0;
        for (int64_t d = 0; d < dim; ++d) {
            raw[t * dim + d] += common[d];
            history[t * dim + d] = raw[t * dim + d] - common[d];
            mean[d] += static_cast<double>(raw[t * dim + d]) / length;
            square += static_cast<double>(history[t * dim + d]) * history[t * dim + d];
            sums[d] += history[t * dim + d];
        }
        squares[t] = static_cast<float>(square);
    }
    Array penalty(count);
    std::vector<int64_t> position(count), where;
    Truth want;
    for (int64_t c = 0; c < count; ++c) {
        double best = -2.0;
        int64_t at = 0;
        for (int64_t t = 0; t < length; ++t) {
            double product = 0.0, own = 0.0, other = 0.0;
            for (int64_t d = 0; d < dim; ++d) {
                const double x = states[c * dim + d] - mean[d], y = raw[t * dim + d] - mean[d];
                product += x * y, own += x * x, other += y * y;
            }
            const double cosine = product / std::sqrt(own * other);
            if (cosine > best) best = cosine, at = t;
        }
        want.push_back(best), where.push_back(at);
    }
    CenteredScan call{};
    call.batch = 1, call.candidates = count, call.dim = dim, call.length = length;
    call.states = states.data(), call.state_batch = count * dim, call.state_candidate = dim;
    call.history = history.data(), call.history_batch = length * dim, call.history_position = dim;
    call.shift = common.data(), call.squares = squares.data(), call.sums = sums.data();
    call.penalty = penalty.data(), call.position = position.data();
    centered_scan(call, 1);
    report("centered_scan", penalty, want, 2e-6);
    report_equal("centered_scan positions", position, where);
}

// Against the derivative of the sum of the hinges as well, threshold 0.1.
void contrastive(int64_t length, int64_t width, float shared) {
    const float threshold = 0.1f;
    Array states = normal(length * width);
    const Array common = normal(width, shared);
    for (int64_t i = 0; i < length * width; ++i) states[i] += common[i % width];
    const int64_t tiles = (length + 127) / 128, padded = tiles * 128;
    Array hinge(length), inverse(length), radial(length), gradient(states.size()), scale{1.0f};
    std::vector<uint32_t> bits(static_cast<size_t>(padded * padded / 32));
    std::vector<uint8_t> flags(static_cast<size_t>(tiles * tiles));
    const States view{states.data(), ElementType::float32, 1, length, width, length * width, width};
    contrastive_hinge(
        {view, nullptr, threshold, hinge.data(), inverse.data(), radial.data(), bits.data(), flags.data()}, 2);
    contrastive_gradient(
        {view, scale.data(), inverse.data(), radial.data(), bits.data(), flags.data(), gradient.data()}, 2);
    Truth unit(states.begin(), states.end()), sums(static_cast<size_t>(length), 0.0), slope(states.size(), 0.0), norms;
    for (int64_t i = 0; i < length; ++i) {
        double squares = 0.0;
        for (int64_t k = 0; k < width; ++k) squares += unit[i * width + k] * unit[i * width + k];
        norms.push_back(std::sqrt(squares));
        for (int64_t k = 0; k < width; ++k) unit[i * width + k] /= norms.back();
    }
    for (int64_t i = 0; i < length; ++i) {
        for (int64_t j = 0; j < length; ++j) {
            double cosine = 0.0;
            for (int64_t k = 0; k < width; ++k) cosine += unit[i * width + k] * unit[j * width + k];
            if (i == j || cosine <= threshold) continue;
            sums[i] += cosine - threshold;
            for (int64_t k = 0; k < width; ++k) {
                slope[i * width + k] += (unit[j * width + k] - cosine * unit[i * width + k]) / norms[i];
            }
        }
    }
    const std::string size = std::to_string(length) + "x" + std::to_string(width) + (shared > 0 ? ", shared" : "");
    report("contrastive_hinge " + size, hinge, sums, 1e-5);
    report("contrastive_gradient " + size, gradient, slope, 1e-4);
}

void low_rank_crf(int64_t beam, int64_t rank) {
    const int64_t length = 5, vocabulary = 200;
    const Array emissions = normal(length * vocabulary, 2.0f);
    const Array left = normal(vocabulary * rank, 0.4f), right = normal(vocabulary * rank, 0.4f);
    std::vector<int64_t> tokens(static_cast<size_t>(length * beam)), slots(length), sampled(length * 3);
    Array scores(tokens.size()), messages(tokens.size()), norms(length), grad(tokens.size()), grad_scores(tokens.size());
    Array grad_left(left.size()), grad_right(right.size());
    crf_beam_select({emissions.data(), ElementType::float32, 1, length, vocabulary, length * vocabulary, vocabulary}, beam,
                    nullptr, nullptr, 0, tokens.data(), scores.data(), 1);
    std::vector<int64_t> chosen;
    for (int64_t t = 0; t < length; ++t) {
        std::vector<int64_t> order(vocabulary);
        for (int64_t v = 0; v < vocabulary; ++v) order[v] = v;
        const float* row = &emissions[t * vocabulary];
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return row[a] > row[b]; });
        chosen.insert(chosen.end(), order.begin(), order.begin() + beam);
    }
    report_equal("crf_beam_select", tokens, chosen);
    const Crf crf{1, length, beam, vocabulary, rank, scores.data(), tokens.data(), left.data(), right.data(), nullptr, 1.0f};
    const auto step = [&](int64_t t, int64_t k, int64_t j) {
        double sum = 0.0;
        for (int64_t d = 0; d < rank; ++d) {
            sum += static_cast<double>(left[tokens[t * beam + k] * rank + d]) * right[tokens[(t + 1) * beam + j] * rank + d];
        }
        return sum;
    };
    // log Z and the best score forwards; the marginals, by log Z's derivative, from the two directions together.
    std::vector<Truth> alpha(length, Truth(beam)), beta(length, Truth(beam, 0.0));
    Truth best(scores.begin(), scores.begin() + beam);
    for (int64_t t = 0; t < length; ++t) {
        Truth next(beam);
        for (int64_t j = 0; j < beam; ++j) {
            Truth into, ways;
            for (int64_t k = 0; t > 0 && k < beam; ++k) {
                into.push_back(alpha[t - 1][k] + step(t - 1, k, j)), ways.push_back(best[k] + step(t - 1, k, j));
            }
            alpha[t][j] = scores[t * beam + j] + (t > 0 ? log_sum_exp(into) : 0.0);
            next[j] = scores[t * beam + j] + (t > 0 ? *std::max_element(ways.begin(), ways.end()) : 0.0);
        }
        best = next;
    }
    for (int64_t t = length - 2; t >= 0; --t) {
        for (int64_t k = 0; k < beam; ++k) {
            Truth out;
            for (int64_t j = 0; j < beam; ++j) out.push_back(step(t, k, j) + scores[(t + 1) * beam + j] + beta[t + 1][j]);
            beta[t][k] = log_sum_exp(out);
        }
    }
    const double log_z = log_sum_exp(alpha[length - 1]);
    crf_filter(crf, messages.data(), norms.data(), 1);
    const int64_t last = (length - 1) * beam;
    Truth end;
    double total = 0.0;
    for (int64_t j = 0; j < beam; ++j) end.push_back(static_cast<double>(messages[last + j]) + scores[last + j]);
    for (int64_t t = 0; t + 1 < length; ++t) total += norms[t];
    const std::string size = " " + std::to_string(beam) + "x" + std::to_string(rank);
    report("crf_filter" + size, {static_cast<float>(log_sum_exp(end) + total)}, {log_z}, 1e-6);
    // The gradient of log Z: what flows back from the last messages are the last position's marginals.
    Truth marginals;
    for (int64_t j = 0; j < beam; ++j) grad[last + j] = static_cast<float>(std::exp(alpha[length - 1][j] - log_z));
    for (int64_t t = 0; t + 1 < length; ++t) {
        for (int64_t k = 0; k < beam; ++k) marginals.push_back(std::exp(alpha[t][k] + beta[t][k] - log_z));
    }
    crf_filter_backward(crf, grad.data(), messages.data(), norms.data(), grad_scores.data(), grad_left.data(),
                        grad_right.data(), 1);
    report("crf_filter_backward" + size, grad_scores, marginals, 1e-5);
    Truth tables(left.size(), 0.0);
    for (int64_t t = 0; t + 1 < length; ++t) {
        for (int64_t k = 0; k < beam; ++k) {
            for (int64_t j = 0; j < beam; ++j) {
                const double score = alpha[t][k] + step(t, k, j) + scores[(t + 1) * beam + j] + beta[t + 1][j];
                const double share = std::exp(score - log_z);
                for (int64_t d = 0; d < rank; ++d) {
                    tables[tokens[t * beam + k] * rank + d] += share * right[tokens[(t + 1) * beam + j] * rank + d];
                }
            }
        }
    }
    report("crf_filter_backward tables" + size, grad_left, tables, 1e-5);
    const auto score_of = [&](const int64_t* path, int64_t stride) {
        double sum = scores[path[0]];
        for (int64_t t = 1; t < length; ++t) {
            sum += step(t - 1, path[(t - 1) * stride], path[t * stride]) + scores[t * beam + path[t * stride]];
        }
        return sum;
    };
    crf_viterbi(crf, slots.data(), 1);
    const double top = *std::max_element(best.begin(), best.end());
    report("crf_viterbi" + size, {static_cast<float>(score_of(slots.data(), 1))}, {top}, 1e-6);
    crf_kbest(crf, 3, sampled.data(), 1);
    report("crf_kbest" + size, {static_cast<float>(score_of(sampled.data(), 3))}, {top}, 1e-6);
}

// One step, many samples: how often each last slot is drawn.
void samplers() {
    const int64_t beam = 7, rank = 3, samples = 4000;
    const Array scores = normal(2 * beam), left = normal(beam * rank), right = normal(beam * rank);
    std::vector<int64_t> tokens, slots(2 * samples);
    for (int64_t i = 0; i < 2 * beam; ++i) tokens.push_back(i % beam);
    const Crf crf{1, 2, beam, beam, rank, scores.data(), tokens.data(), left.data(), right.data(), nullptr, 1.0f};
    Array messages(2 * beam), norms(2), share(beam, 0.0f);
    crf_filter(crf, messages.data(), norms.data(), 1);
    crf_ffbs(crf, messages.data(), norms.data(), samples, 5, nullptr, slots.data(), 1);
    for (int64_t n = 0; n < samples; ++n) share[slots[samples + n]] += 1.0f / samples;
    Truth law;
    for (int64_t j = 0; j < beam; ++j) law.push_back(static_cast<double>(messages[beam + j]) + scores[beam + j]);
    const double total = log_sum_exp(law);
    for (double& p : law) p = std::exp(p - total);
    report("crf_ffbs", share, law, 0.04);  // five standard deviations
    Array prefixes(2 * beam * samples), chosen(beam, 0.0f);
    std::vector<uint8_t> pointers(prefixes.size());
    crf_stochastic_viterbi(crf, 1.0f, samples, 5, nullptr, slots.data(), prefixes.data(), pointers.data(), 1);
    for (int64_t n = 0; n < samples; ++n) chosen[pointers[beam * samples + n]] += 1.0f / samples;  // the sources of slot 0
    Truth sources;
    for (int64_t k = 0; k < beam; ++k) {
        double sum = scores[k];
        for (int64_t d = 0; d < rank; ++d) sum += static_cast<double>(left[k * rank + d]) * right[d];
        sources.push_back(sum);
    }
    const double all = log_sum_exp(sources);
    for (double& p : sources) p = std::exp(p - all);
    report("crf_stochastic_viterbi", chosen, sources, 0.04);
}

void dense_crf(float spread) {
    const int64_t tags = 13, length = 6;
    const Array emissions = normal(length * tags), transitions = normal(tags * tags, spread);
    const DenseCrf crf{1, length, tags, emissions.data(), transitions.data(), nullptr};
    double log_z = 0.0;
    dense_filter(crf, nullptr, nullptr, &log_z, 1);
    Truth alpha(emissions.begin(), emissions.begin() + tags), best = alpha;
    for (int64_t t = 1; t < length; ++t) {
        Truth next(tags), top(tags);
        for (int64_t j = 0; j < tags; ++j) {
            Truth into, ways;
            for (int64_t i = 0; i < tags; ++i) {
                into.push_back(alpha[i] + transitions[i * tags + j]), ways.push_back(best[i] + transitions[i * tags + j]);
            }
            next[j] = log_sum_exp(into) + emissions[t * tags + j];
            top[j] = *std::max_element(ways.begin(), ways.end()) + emissions[t * tags + j];
        }
        alpha = next, best = top;
    }
    std::vector<int64_t> slots(length);
    dense_viterbi(crf, slots.data(), 1);
    double path = emissions[slots[0]];
    for (int64_t t = 1; t < length; ++t) {
        path += transitions[slots[t - 1] * tags + slots[t]] + emissions[t * tags + slots[t]];
    }
    report("dense_filter, spread " + std::to_string(spread), {static_cast<float>(log_z)}, {log_sum_exp(alpha)}, 1e-6);
    report("dense_viterbi", {static_cast<float>(path)}, {*std::max_element(best.begin(), best.end())}, 1e-6);
}

}  // namespace

int main() {
    bool has = false;
    for (const Isa isa : kBuiltIsas) {
        has |= isa == best_isa();
        if (!has) continue;
        set_isa(isa_name(isa));
        std::printf("%s\n", isa_name(isa));
        for (const int64_t rows : {1, 3, 4, 9, 26}) linear_layers(rows, 389, 53);
        linear_layers(2, 1024, 128);
        element_wise();
        top_k();
        for (const ElementType type : {ElementType::float32, ElementType::bfloat16, ElementType::float16}) {
            attention(64, 700, type);
            attention(19, 37, type);
        }
        candidates();
        centered_candidates();
        contrastive(150, 40, 0.0f);
        contrastive(270, 70, 1.5f);
        low_rank_crf(33, 16);
        low_rank_crf(6, 5);
        samplers();
        dense_crf(1.0f);
        dense_crf(40.0f);
    }
    return failed ? 1 : 0;
}
