#include "api/block_layers.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "api/gelu.h"
#include "api/layer_norm.h"
#include "api/rms_norm.h"
#include "host/memory.h"
#include "host/parallel.h"
#include "simd/block_layers.h"

namespace simctg {
namespace {

constexpr int64_t kTask = 1 << 14;  // elements: some microseconds, so that waking a thread pays

// Memory that a thread keeps, as elements of any type.
class Elements {
  public:
    void* get(int64_t count, ElementType type) {
        return scratch_.get((count * size_of(type) + 3) / static_cast<int64_t>(sizeof(float)));
    }

  private:
    Scratch scratch_;
};

thread_local Elements summed_scratch, normed_scratch, inner_scratch, gate_scratch, attended_scratch;

Linear call_of(const LinearLayer& layer, const void* x, int64_t rows, void* y) {
    const bool outputs = layer.layout == WeightLayout::rows_are_outputs;
    return {x, layer.in_features, layer.weight, outputs ? layer.in_features : layer.out_features, layer.bias, y,
            layer.out_features, rows, layer.in_features, layer.out_features, layer.type, layer.weight_type};
}

void run(const LinearLayer& layer, const void* x, int64_t rows, void* y, int num_threads) {
    linear(call_of(layer, x, rows, y), layer.layout, num_threads);
}

void check_equal(const char* name, int64_t value, int64_t expected) {
    if (value != expected) {
        throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + ", must be " +
                                    std::to_string(expected));
    }
}

void check_type(const LinearLayer& layer, ElementType type) {
    if (layer.type != type) throw std::invalid_argument("layers are of different types");
}

const void* normed(const void* x, int64_t rows, const Norm& norm, int64_t width, ElementType type, int num_threads) {
    void* y = normed_scratch.get(rows * width, type);
    if (norm.kind == NormKind::layer) {
        layer_norm(x, norm.weight, norm.bias, norm.epsilon, rows, width, y, num_threads, type);
    } else {
        rms_norm(x, norm.weight, norm.epsilon, rows, width, y, num_threads, type);
    }
    return y;
}

void activate(Activation act, ElementType type, void* y, int64_t count, int num_threads) {
    if (act == Activation::gelu_tanh) return gelu_tanh(y, y, count, num_threads, type);
    const block::Kernels& k = kernels<block::Kernels>();
    const auto function = act == Activation::silu ? k.silu : k.relu;
    parallel_ranges(count, kTask, num_threads, [&](int64_t begin, int64_t size) { function(type, y, begin, size); });
}

void add_to(ElementType type, void* y, const void* x, int64_t count, int num_threads) {
    const auto add = kernels<block::Kernels>().add;
    parallel_ranges(count, kTask, num_threads, [&](int64_t begin, int64_t size) { add(type, y, x, begin, size); });
}

void feed_forward(const void* x, int64_t rows, const Norm& norm, const LinearLayer& inner, const LinearLayer* gate,
                  Activation act, const LinearLayer& outer, void* y, int num_threads) {
    const ElementType type = inner.type;
    check_type(outer, type);
    check_equal("outer.in_features", outer.in_features, inner.out_features);
    check_equal("outer.out_features", outer.out_features, inner.in_features);
    const int64_t count = rows * inner.out_features;
    const void* input = normed(x, rows, norm, inner.in_features, type, num_threads);
    void* middle = inner_scratch.get(count, type);
    run(inner, input, rows, middle, num_threads);
    if (!gate && act == Activation::relu && type == ElementType::float32) {
        relu_linear(call_of(outer, middle, rows, y), outer.layout, num_threads);
    } else {
        void* factor = nullptr;
        if (gate) {
            check_type(*gate, type);
            check_equal("gate.in_features", gate->in_features, inner.in_features);
            check_equal("gate.out_features", gate->out_features, inner.out_features);
            factor = gate_scratch.get(count, type);
            run(*gate, input, rows, factor, num_threads);
        }
        activate(act, type, middle, count, num_threads);
        if (gate) {
            const auto multiply = kernels<block::Kernels>().multiply;
            parallel_ranges(count, kTask, num_threads,
                            [&](int64_t begin, int64_t size) { multiply(type, middle, factor, begin, size); });
        }
        run(outer, middle, rows, y, num_threads);
    }
    add_to(type, y, x, rows * inner.in_features, num_threads);
}

}  // namespace

void norm_linears(const void* x, int64_t rows, const Norm& norm, const std::vector<const LinearLayer*>& layers,
                  const Rotation* rotation, const std::vector<void*>& y, int num_threads) {
    check_equal("number of results", static_cast<int64_t>(y.size()), static_cast<int64_t>(layers.size()));
    if (layers.empty()) return;
    const int64_t width = layers[0]->in_features;
    const ElementType type = layers[0]->type;
    const void* input = normed(x, rows, norm, width, type, num_threads);
    for (size_t i = 0; i < layers.size(); ++i) {
        check_type(*layers[i], type);
        check_equal("in_features", layers[i]->in_features, width);
        run(*layers[i], input, rows, y[i], num_threads);
        if (!rotation || static_cast<int64_t>(i) >= rotation->results) continue;
        const int64_t features = layers[i]->out_features, heads = features / rotation->width;
        check_equal("out_features", features, heads * rotation->width);
        const auto rotate = kernels<block::Kernels>().rotate;
        const int64_t height = std::max<int64_t>(1, kTask / std::max<int64_t>(1, features));
        parallel_ranges(rows, height, num_threads, [&](int64_t begin, int64_t count) {
            rotate(type, y[i], rotation->cos, rotation->sin, rotation->stride, begin, count, heads, rotation->width);
        });
    }
}

void linear_residual(const void* x, int64_t rows, const LinearLayer& layer, const void* residual, void* y,
                     int num_threads) {
    run(layer, x, rows, y, num_threads);
    add_to(layer.type, y, residual, rows * layer.out_features, num_threads);
}

void linear_feed_forward(const void* x, int64_t rows, const LinearLayer& layer, const void* residual, const Norm& norm,
                         const LinearLayer& inner, const LinearLayer* gate, Activation act, const LinearLayer& outer,
                         void* y, int num_threads) {
    check_type(layer, inner.type);
    check_equal("layer.out_features", layer.out_features, inner.in_features);
    void* summed = summed_scratch.get(rows * layer.out_features, layer.type);
    linear_residual(x, rows, layer, residual, summed, num_threads);
    feed_forward(summed, rows, norm, inner, gate, act, outer, y, num_threads);
}

void decoder_blocks(const void* x, int64_t rows, const std::vector<const DecoderBlock*>& blocks,
                    const std::vector<BlockArrays>& arrays, DecodeAttention attention, const Rotation* rotation,
                    int num_threads) {
    check_equal("number of arrays", static_cast<int64_t>(arrays.size()), static_cast<int64_t>(blocks.size()));
    check_equal("rows of the attention", attention.rows(), rows);
    const int64_t width = attention.kv_heads * attention.groups * attention.value_dim;
    for (size_t i = 0; i < blocks.size(); ++i) {
        const DecoderBlock& block = *blocks[i];
        const BlockArrays& array = arrays[i];
        check_type(block.output, attention.type);
        check_equal("output.in_features", block.output.in_features, width);
        check_equal("output.out_features", block.output.out_features, block.inner.in_features);
        std::vector<const LinearLayer*> projections;
        int64_t projected_width = 0;
        for (const LinearLayer& projection : block.projections) {
            projections.push_back(&projection);
            projected_width += projection.out_features;
        }
        check_equal("out_features of the projections", projected_width,
                    (attention.groups + 1) * attention.kv_heads * attention.dim + attention.kv_heads * attention.value_dim);
        std::vector<void*> projected{array.query, array.new_key, array.new_value};
        projected.resize(projections.size() == 1 ? 1 : 3);
        norm_linears(x, rows, block.attention_norm, projections, rotation, projected, num_threads);
        attention.query = array.query, attention.new_key = array.new_key, attention.new_value = array.new_value;
        attention.key = array.key, attention.value = array.value;
        attention.scaling = block.scaling;
        attention.out = attended_scratch.get(rows * width, attention.type);
        decode_attention(attention, num_threads);
        linear_feed_forward(attention.out, rows, block.output, x, block.norm, block.inner,
                            block.gate ? &*block.gate : nullptr, block.act, block.outer, array.y, num_threads);
        x = array.y;
    }
}

}  // namespace simctg
