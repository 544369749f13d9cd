#include "api/block_layers.h"

#include <stdexcept>
#include <string>

#include "api/gelu.h"
#include "api/rms_norm.h"
#include "host/memory.h"

namespace simctg {
namespace {

thread_local Scratch normed_scratch, inner_scratch, gate_scratch;

Linear call_of(const LinearLayer& layer, const float* x, int64_t rows, float* y) {
    const bool outputs = layer.layout == WeightLayout::rows_are_outputs;
    return {x, layer.in_features, layer.weight, outputs ? layer.in_features : layer.out_features, layer.bias, y,
            layer.out_features, rows, layer.in_features, layer.out_features, layer.type, layer.weight_type};
}

void run(const LinearLayer& layer, const float* x, int64_t rows, float* y, int num_threads) {
    linear(call_of(layer, x, rows, y), layer.layout, num_threads);
}

void check_width(const char* name, int64_t width, int64_t expected) {
    if (width != expected) {
        throw std::invalid_argument(std::string(name) + " is " + std::to_string(width) + ", must be " +
                                    std::to_string(expected));
    }
}

const float* normed(const float* x, int64_t rows, const RmsNorm& norm, int64_t width, int num_threads) {
    float* y = normed_scratch.get(rows * width);
    rms_norm(x, norm.weight, norm.epsilon, rows, width, y, num_threads);
    return y;
}

void add_to(float* y, const float* x, int64_t count) {
    for (int64_t i = 0; i < count; ++i) y[i] += x[i];
}

}  // namespace

void norm_linears(const float* x, int64_t rows, const RmsNorm& norm, const std::vector<const LinearLayer*>& layers,
                  const std::vector<float*>& y, int num_threads) {
    check_width("number of results", static_cast<int64_t>(y.size()), static_cast<int64_t>(layers.size()));
    if (layers.empty()) return;
    const int64_t width = layers[0]->in_features;
    const float* input = normed(x, rows, norm, width, num_threads);
    for (size_t i = 0; i < layers.size(); ++i) {
        check_width("in_features", layers[i]->in_features, width);
        run(*layers[i], input, rows, y[i], num_threads);
    }
}

void linear_residual(const float* x, int64_t rows, const LinearLayer& layer, const float* residual, float* y,
                     int num_threads) {
    run(layer, x, rows, y, num_threads);
    add_to(y, residual, rows * layer.out_features);
}

void feed_forward(const float* x, int64_t rows, const RmsNorm& norm, const LinearLayer& inner, const LinearLayer* gate,
                  Activation act, const LinearLayer& outer, float* y, int num_threads) {
    check_width("outer.in_features", outer.in_features, inner.out_features);
    check_width("outer.out_features", outer.out_features, inner.in_features);
    const int64_t count = rows * inner.out_features;
    const float* input = normed(x, rows, norm, inner.in_features, num_threads);
    float* middle = inner_scratch.get(count);
    run(inner, input, rows, middle, num_threads);
    if (gate) {
        check_width("gate.in_features", gate->in_features, inner.in_features);
        check_width("gate.out_features", gate->out_features, inner.out_features);
        float* factor = gate_scratch.get(count);
        run(*gate, input, rows, factor, num_threads);
        if (act == Activation::gelu_tanh) gelu_tanh(middle, middle, count, num_threads);
        for (int64_t i = 0; i < count; ++i) {
            const float value = act == Activation::relu && middle[i] <= 0.0f ? 0.0f : middle[i];
            middle[i] = value * factor[i];
        }
        run(outer, middle, rows, y, num_threads);
    } else if (act == Activation::relu) {
        relu_linear(call_of(outer, middle, rows, y), outer.layout, num_threads);
    } else {
        gelu_tanh(middle, middle, count, num_threads);
        run(outer, middle, rows, y, num_threads);
    }
    add_to(y, x, rows * inner.in_features);
}

}  // namespace simctg
