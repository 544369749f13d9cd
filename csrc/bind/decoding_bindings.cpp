// Bindings of what a decoding step computes on the CPU; see bindings.cpp.
#include "bind/bindings.h"

#include <vector>

#include "api/block_layers.h"
#include "api/candidate_select.h"
#include "api/decode_attention.h"
#include "api/earlier_text.h"
#include "api/gelu.h"
#include "api/linear.h"
#include "api/linear_int8.h"
#include "api/repeated_suffix.h"
#include "api/rms_norm.h"
#include "api/top_k.h"

namespace {

void linear(simctg::WeightLayout layout, address x, int64_t x_stride, address weight, int64_t weight_stride,
            address bias, address y, int64_t y_stride, int64_t rows, int64_t in_features, int64_t out_features,
            int num_threads, simctg::ElementType type, simctg::ElementType weight_type) {
    simctg::linear({pointer<const void>(x), x_stride, pointer<const void>(weight), weight_stride,
                    pointer<const void>(bias), pointer<void>(y), y_stride, rows, in_features, out_features, type,
                    weight_type},
                   layout, num_threads);
}

void pack_linear(address weight, int64_t weight_stride, simctg::WeightLayout from, int64_t in_features,
                 int64_t out_features, address packed, int num_threads) {
    simctg::pack_linear(pointer<const float>(weight), weight_stride, from, in_features, out_features,
                        pointer<float>(packed), num_threads);
}

bool quantize_linear(address weight, simctg::ElementType type, int64_t weight_stride, simctg::WeightLayout from,
                     int64_t in_features, int64_t out_features, address copy, int num_threads) {
    return simctg::quantize_linear(pointer<const void>(weight), type, weight_stride, from, in_features, out_features,
                                   pointer<void>(copy), num_threads);
}

void certified_linear(address x, int64_t x_stride, address weight, address bias, address y, int64_t rows,
                      int64_t in_features, int64_t out_features, int num_threads, simctg::ElementType type, address copy,
                      int64_t top) {
    simctg::certified_linear({pointer<const void>(x), x_stride, pointer<const void>(weight), in_features,
                              pointer<const void>(bias), pointer<void>(y), out_features, rows, in_features, out_features,
                              type, type},
                             pointer<const void>(copy), top, num_threads);
}

// An array: its address, then the strides that the kernel wants. Address 0: there is none.
template <std::size_t Strides>
using Array = std::array<int64_t, Strides + 1>;

simctg::DecodeAttention attention_call(std::array<int64_t, 6> sizes, Array<2> query, Array<3> key, Array<3> value,
                                       int64_t length, address lengths, address starts, int64_t start, Array<2> new_key,
                                       Array<2> new_value, float scaling, float softcap, Array<3> mask, Array<3> bias,
                                       address sinks, address out, simctg::ElementType type,
                                       simctg::ElementType bias_type, address offsets) {
    simctg::DecodeAttention call{};
    call.type = type, call.bias_type = bias_type;
    call.batch = sizes[0], call.candidates = sizes[1], call.kv_heads = sizes[2];
    call.offsets = pointer<const int64_t>(offsets);
    call.groups = sizes[3], call.dim = sizes[4], call.value_dim = sizes[5];
    call.query = pointer<const void>(query[0]);
    call.query_row = query[1], call.query_head = query[2];
    call.key = pointer<const void>(key[0]);
    call.key_batch = key[1], call.key_head = key[2], call.key_position = key[3];
    call.value = pointer<const void>(value[0]);
    call.value_batch = value[1], call.value_head = value[2], call.value_position = value[3];
    call.length = length;
    call.lengths = pointer<const int64_t>(lengths);
    call.starts = pointer<const int64_t>(starts);
    call.start = start;
    call.new_key = pointer<const void>(new_key[0]);
    call.new_key_row = new_key[1], call.new_key_head = new_key[2];
    call.new_value = pointer<const void>(new_value[0]);
    call.new_value_row = new_value[1], call.new_value_head = new_value[2];
    call.scaling = scaling;
    call.softcap = softcap;
    call.mask = pointer<const uint8_t>(mask[0]);
    call.mask_batch = mask[1], call.mask_candidate = mask[2], call.mask_head = mask[3];
    call.bias = pointer<const void>(bias[0]);
    call.bias_batch = bias[1], call.bias_candidate = bias[2], call.bias_head = bias[3];
    call.sinks = pointer<const float>(sinks);
    call.out = pointer<void>(out);
    return call;
}

// Addresses and strides of cosines and sines, their width, and how many results are rotated: 0, none.
simctg::Rotation rotation_of(const std::array<int64_t, 5>& rotation) {
    return {pointer<const void>(rotation[0]), pointer<const void>(rotation[1]), rotation[2], rotation[3], rotation[4]};
}

// Of each block the addresses of `BlockArrays`, in its order.
void decoder_blocks(address x, int64_t rows, const std::vector<const simctg::DecoderBlock*>& blocks,
                    const std::vector<std::array<address, 6>>& arrays, const simctg::DecodeAttention& attention,
                    const std::array<int64_t, 5>& rotation, int num_threads) {
    std::vector<simctg::BlockArrays> of_blocks;
    for (const auto& array : arrays) {
        of_blocks.push_back({pointer<void>(array[0]), pointer<void>(array[1]), pointer<void>(array[2]),
                             pointer<const void>(array[3]), pointer<const void>(array[4]), pointer<void>(array[5])});
    }
    const simctg::Rotation rotated = rotation_of(rotation);
    simctg::decoder_blocks(pointer<const void>(x), rows, blocks, of_blocks, attention,
                           rotated.results > 0 ? &rotated : nullptr, num_threads);
}

void norm_linears(address x, int64_t rows, const simctg::Norm& norm,
                  const std::vector<const simctg::LinearLayer*>& layers, const std::vector<address>& y, int num_threads,
                  const std::array<int64_t, 5>& rotation) {
    std::vector<void*> results;
    for (const address result : y) results.push_back(pointer<void>(result));
    const simctg::Rotation rotated = rotation_of(rotation);
    simctg::norm_linears(pointer<const void>(x), rows, norm, layers, rotated.results > 0 ? &rotated : nullptr, results,
                         num_threads);
}

void linear_residual(address x, int64_t rows, const simctg::LinearLayer& layer, address residual, address y,
                     int num_threads) {
    simctg::linear_residual(pointer<const void>(x), rows, layer, pointer<const void>(residual), pointer<void>(y),
                            num_threads);
}

void linear_feed_forward(address x, int64_t rows, const simctg::LinearLayer& layer, address residual,
                         const simctg::Norm& norm, const simctg::LinearLayer& inner, const simctg::LinearLayer* gate,
                         simctg::Activation act, const simctg::LinearLayer& outer, address y, int num_threads) {
    simctg::linear_feed_forward(pointer<const void>(x), rows, layer, pointer<const void>(residual), norm, inner, gate,
                                act, outer, pointer<void>(y), num_threads);
}

void gelu_tanh(address x, address y, int64_t count, int num_threads, simctg::ElementType type) {
    simctg::gelu_tanh(pointer<const void>(x), pointer<void>(y), count, num_threads, type);
}

void rms_norm(address x, address weight, float epsilon, int64_t rows, int64_t width, address y, int num_threads,
              simctg::ElementType type) {
    simctg::rms_norm(pointer<const void>(x), pointer<const void>(weight), epsilon, rows, width, pointer<void>(y),
                     num_threads, type);
}

void top_k_probs(address logits, int64_t rows, int64_t count, int64_t k, address probs, address tokens,
                 int num_threads) {
    simctg::top_k_probs(pointer<const float>(logits), rows, count, k, pointer<float>(probs), pointer<int64_t>(tokens),
                        num_threads);
}

void set_scan(simctg::CandidateScan& call, const std::array<int64_t, 4>& sizes, const Array<2>& states,
              const Array<2>& history, address lengths, const Array<1>& mask, address penalty, address position) {
    call.batch = sizes[0], call.candidates = sizes[1], call.dim = sizes[2], call.length = sizes[3];
    call.states = pointer<const float>(states[0]);
    call.state_batch = states[1], call.state_candidate = states[2];
    call.history = pointer<const float>(history[0]);
    call.history_batch = history[1], call.history_position = history[2];
    call.lengths = pointer<const int64_t>(lengths);
    call.mask = pointer<const uint8_t>(mask[0]);
    call.mask_batch = mask[1];
    call.penalty = pointer<float>(penalty);
    call.position = pointer<int64_t>(position);
}

void candidate_scan(std::array<int64_t, 4> sizes, Array<2> states, Array<2> history, address lengths, Array<1> mask,
                    address penalty, address position, int num_threads) {
    simctg::CandidateScan call{};
    set_scan(call, sizes, states, history, lengths, mask, penalty, position);
    simctg::candidate_scan(call, num_threads);
}

void centered_scan(std::array<int64_t, 4> sizes, Array<2> states, Array<1> shift, Array<2> history, Array<1> squares,
                   Array<1> sums, address lengths, Array<1> mask, address penalty, address position, int num_threads) {
    simctg::CenteredScan call{};
    set_scan(call, sizes, states, history, lengths, mask, penalty, position);
    call.shift = pointer<const float>(shift[0]), call.shift_batch = shift[1];
    call.squares = pointer<const float>(squares[0]), call.squares_batch = squares[1];
    call.sums = pointer<const float>(sums[0]), call.sums_batch = sums[1];
    simctg::centered_scan(call, num_threads);
}

simctg::EarlierText earlier_text(std::array<int64_t, 3> sizes, Array<1> tokens, address picks, address lengths,
                                 address starts, address orders, address penalty, address position) {
    return {sizes[0], sizes[1], sizes[2], pointer<const int64_t>(tokens[0]), tokens[1], pointer<const int64_t>(picks),
            pointer<const int64_t>(lengths), pointer<const int64_t>(starts), pointer<const int64_t>(orders),
            pointer<float>(penalty), pointer<int64_t>(position)};
}

void follower_scan(std::array<int64_t, 3> sizes, Array<1> tokens, address picks, address lengths, address starts,
                   address orders, int64_t dim, Array<2> states, Array<1> norms, address penalty, address position,
                   int num_threads) {
    simctg::follower_scan(earlier_text(sizes, tokens, picks, lengths, starts, orders, penalty, position),
                          {dim, pointer<const float>(states[0]), states[1], states[2], pointer<const float>(norms[0]),
                           norms[1]},
                          num_threads);
}

void ngram_penalty(std::array<int64_t, 3> sizes, Array<1> tokens, address picks, address lengths, address starts,
                   address orders, address betas, address penalty, address position, int num_threads) {
    simctg::ngram_penalty(earlier_text(sizes, tokens, picks, lengths, starts, orders, penalty, position),
                          pointer<const double>(betas), num_threads);
}

int64_t repeated_suffix(std::array<int64_t, 2> sizes, Array<1> tokens, address starts, address lengths, address limits,
                        int64_t longest, address repeats, int num_threads) {
    return simctg::repeated_suffix({pointer<const int64_t>(tokens[0]), sizes[0], sizes[1], tokens[1],
                                    pointer<const int64_t>(starts), pointer<const int64_t>(lengths),
                                    pointer<const int64_t>(limits), longest, pointer<int64_t>(repeats)},
                                   num_threads);
}

}  // namespace

void bind_decoding(py::module_& m) {
    py::enum_<simctg::ElementType>(m, "ElementType")
        .value("float32", simctg::ElementType::float32)
        .value("bfloat16", simctg::ElementType::bfloat16)
        .value("float16", simctg::ElementType::float16);
    py::enum_<simctg::WeightLayout>(m, "WeightLayout")
        .value("rows_are_outputs", simctg::WeightLayout::rows_are_outputs)
        .value("rows_are_inputs", simctg::WeightLayout::rows_are_inputs)
        .value("panels", simctg::WeightLayout::panels)
        .value("int8", simctg::WeightLayout::int8);
    m.def("linear", &linear, py::arg("layout"), py::arg("x"), py::arg("x_stride"), py::arg("weight"),
          py::arg("weight_stride"), py::arg("bias"), py::arg("y"), py::arg("y_stride"), py::arg("rows"),
          py::arg("in_features"), py::arg("out_features"), py::arg("num_threads"),
          py::arg("type") = simctg::ElementType::float32, py::arg("weight_type") = simctg::ElementType::float32,
          release_gil());
    m.def("packed_linear_size", &simctg::packed_linear_size, py::arg("in_features"), py::arg("out_features"));
    m.def("pack_linear", &pack_linear, py::arg("weight"), py::arg("weight_stride"), py::arg("from_layout"),
          py::arg("in_features"), py::arg("out_features"), py::arg("packed"), py::arg("num_threads"), release_gil());
    m.def("int8_linear_size", &simctg::int8_linear_size, py::arg("in_features"), py::arg("out_features"));
    m.def("quantize_linear", &quantize_linear, py::arg("weight"), py::arg("type"), py::arg("weight_stride"),
          py::arg("from_layout"), py::arg("in_features"), py::arg("out_features"), py::arg("copy"),
          py::arg("num_threads"), release_gil());
    m.def("certified_linear", &certified_linear, py::arg("x"), py::arg("x_stride"), py::arg("weight"), py::arg("bias"),
          py::arg("y"), py::arg("rows"), py::arg("in_features"), py::arg("out_features"), py::arg("num_threads"),
          py::arg("type"), py::arg("copy"), py::arg("top"), release_gil());
    py::enum_<simctg::Activation>(m, "Activation")
        .value("relu", simctg::Activation::relu)
        .value("gelu_tanh", simctg::Activation::gelu_tanh)
        .value("silu", simctg::Activation::silu);
    py::enum_<simctg::NormKind>(m, "NormKind")
        .value("root_mean_square", simctg::NormKind::root_mean_square)
        .value("layer", simctg::NormKind::layer);
    py::class_<simctg::Norm>(m, "Norm")
        .def(py::init([](simctg::NormKind kind, address weight, address bias, float epsilon) {
                 return simctg::Norm{kind, pointer<const void>(weight), pointer<const void>(bias), epsilon};
             }),
             py::arg("kind"), py::arg("weight"), py::arg("bias"), py::arg("epsilon"));
    py::class_<simctg::LinearLayer>(m, "LinearLayer")
        .def(py::init([](simctg::WeightLayout layout, address weight, address bias, int64_t in_features,
                         int64_t out_features, simctg::ElementType type, simctg::ElementType weight_type) {
                 return simctg::LinearLayer{layout,      pointer<const void>(weight), pointer<const void>(bias),
                                            in_features, out_features,                type,
                                            weight_type};
             }),
             py::arg("layout"), py::arg("weight"), py::arg("bias"), py::arg("in_features"), py::arg("out_features"),
             py::arg("type") = simctg::ElementType::float32, py::arg("weight_type") = simctg::ElementType::float32)
        .def_property_readonly("products", [](const simctg::LinearLayer&) { return 1; });
    m.def("norm_linears", &norm_linears, py::arg("x"), py::arg("rows"), py::arg("norm"), py::arg("layers"), py::arg("y"),
          py::arg("num_threads"), py::arg("rotation") = std::array<int64_t, 5>{}, release_gil());
    m.def("linear_residual", &linear_residual, py::arg("x"), py::arg("rows"), py::arg("layer"), py::arg("residual"),
          py::arg("y"), py::arg("num_threads"), release_gil());
    m.def("linear_feed_forward", &linear_feed_forward, py::arg("x"), py::arg("rows"), py::arg("layer"),
          py::arg("residual"), py::arg("norm"), py::arg("inner"), py::arg("gate").none(true), py::arg("act"),
          py::arg("outer"), py::arg("y"), py::arg("num_threads"), release_gil());
    py::class_<simctg::DecodeAttention>(m, "DecodeAttention")
        .def(py::init(&attention_call), py::arg("sizes"), py::arg("query"), py::arg("key"), py::arg("value"),
             py::arg("length"), py::arg("lengths"), py::arg("starts"), py::arg("start"), py::arg("new_key"),
             py::arg("new_value"), py::arg("scaling"), py::arg("softcap"), py::arg("mask"), py::arg("bias"),
             py::arg("sinks"), py::arg("out"), py::arg("type") = simctg::ElementType::float32,
             py::arg("bias_type") = simctg::ElementType::float32, py::arg("offsets") = 0);
    m.def("decode_attention", &simctg::decode_attention, py::arg("call"), py::arg("num_threads"), release_gil());
    py::class_<simctg::DecoderBlock>(m, "DecoderBlock")
        .def(py::init<simctg::Norm, std::vector<simctg::LinearLayer>, float, simctg::LinearLayer, simctg::Norm,
                      simctg::LinearLayer, std::optional<simctg::LinearLayer>, simctg::Activation,
                      simctg::LinearLayer>(),
             py::arg("attention_norm"), py::arg("projections"), py::arg("scaling"), py::arg("output"), py::arg("norm"),
             py::arg("inner"), py::arg("gate"), py::arg("act"), py::arg("outer"))
        .def_property_readonly("products", [](const simctg::DecoderBlock& block) {
            return block.projections.size() + (block.gate ? 4 : 3);
        });
    m.def("decoder_blocks", &decoder_blocks, py::arg("x"), py::arg("rows"), py::arg("blocks"), py::arg("arrays"),
          py::arg("attention"), py::arg("rotation"), py::arg("num_threads"), release_gil());
    m.def("candidate_scan", &candidate_scan, py::arg("sizes"), py::arg("states"), py::arg("history"), py::arg("lengths"),
          py::arg("mask"), py::arg("penalty"), py::arg("position"), py::arg("num_threads"), release_gil());
    m.def("centered_scan", &centered_scan, py::arg("sizes"), py::arg("states"), py::arg("shift"), py::arg("history"),
          py::arg("squares"), py::arg("sums"), py::arg("lengths"), py::arg("mask"), py::arg("penalty"),
          py::arg("position"), py::arg("num_threads"), release_gil());
    m.def("follower_scan", &follower_scan, py::arg("sizes"), py::arg("tokens"), py::arg("picks"), py::arg("lengths"),
          py::arg("starts"), py::arg("orders"), py::arg("dim"), py::arg("states"), py::arg("norms"), py::arg("penalty"),
          py::arg("position"), py::arg("num_threads"), release_gil());
    m.def("ngram_penalty", &ngram_penalty, py::arg("sizes"), py::arg("tokens"), py::arg("picks"), py::arg("lengths"),
          py::arg("starts"), py::arg("orders"), py::arg("betas"), py::arg("penalty"), py::arg("position"),
          py::arg("num_threads"), release_gil());
    m.def("repeated_suffix", &repeated_suffix, py::arg("sizes"), py::arg("tokens"), py::arg("starts"), py::arg("lengths"),
          py::arg("limits"), py::arg("longest"), py::arg("repeats"), py::arg("num_threads"), release_gil());
    m.def("rms_norm", &rms_norm, py::arg("x"), py::arg("weight"), py::arg("epsilon"), py::arg("rows"), py::arg("width"),
          py::arg("y"), py::arg("num_threads"), py::arg("type") = simctg::ElementType::float32, release_gil());
    m.def("top_k_probs", &top_k_probs, py::arg("logits"), py::arg("rows"), py::arg("count"), py::arg("k"),
          py::arg("probs"), py::arg("tokens"), py::arg("num_threads"), release_gil());
    m.def("gelu_tanh", &gelu_tanh, py::arg("x"), py::arg("y"), py::arg("count"), py::arg("num_threads"),
          py::arg("type") = simctg::ElementType::float32, release_gil());
}
