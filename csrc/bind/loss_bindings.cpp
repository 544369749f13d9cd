// Bindings of the losses; see bindings.cpp.
#include "bind/bindings.h"

#include <optional>

#include "api/contrastive_loss.h"

namespace {

simctg::States view(const std::string& dtype, address data, std::array<int64_t, 3> sizes,
                    std::array<int64_t, 2> strides) {
    return {pointer<const void>(data), element_type(dtype), sizes[0], sizes[1], sizes[2], strides[0], strides[1]};
}

void contrastive_hinge(const std::string& dtype, address states, std::array<int64_t, 3> sizes,
                       std::array<int64_t, 2> strides, address real, float threshold, address hinge, address inverse,
                       address radial, address bits, address flags, int num_threads) {
    if (!(threshold >= 0.0f)) throw std::invalid_argument("threshold must not be negative");
    simctg::contrastive_hinge({view(dtype, states, sizes, strides), pointer<const uint8_t>(real), threshold,
                               pointer<float>(hinge), pointer<float>(inverse), pointer<float>(radial),
                               pointer<uint32_t>(bits), pointer<uint8_t>(flags)},
                              num_threads);
}

void contrastive_reduce(address hinge, address inverse, address real, std::array<int64_t, 2> sizes, double margin,
                        const std::string& reduction, std::optional<double> normalizer, address loss, address weights) {
    simctg::Reduction kind;
    if (reduction == "pairs") {
        kind = simctg::Reduction::pairs;
    } else if (reduction == "paper") {
        kind = simctg::Reduction::paper;
    } else if (reduction == "dense") {
        kind = simctg::Reduction::dense;
    } else {
        throw std::invalid_argument("reduction is " + reduction + ", must be pairs, paper or dense");
    }
    simctg::contrastive_reduce({pointer<const float>(hinge), pointer<const float>(inverse), pointer<const uint8_t>(real),
                                sizes[0], sizes[1], margin, kind, normalizer, pointer<float>(loss),
                                pointer<float>(weights)});
}

void contrastive_gradient(const std::string& dtype, address states, std::array<int64_t, 3> sizes,
                          std::array<int64_t, 2> strides, address scale, address inverse, address radial, address bits,
                          address flags, address gradient, int num_threads) {
    simctg::contrastive_gradient(
        {view(dtype, states, sizes, strides), pointer<const float>(scale), pointer<const float>(inverse),
         pointer<const float>(radial), pointer<const uint32_t>(bits), pointer<const uint8_t>(flags),
         pointer<void>(gradient)},
        num_threads);
}

}  // namespace

void bind_losses(py::module_& m) {
        m.def("contrastive_hinge", &contrastive_hinge, py::arg("dtype"), py::arg("states"), py::arg("sizes"),
          py::arg("strides"), py::arg("real"), py::arg("threshold"), py::arg("hinge"), py::arg("inverse"),
          py::arg("radial"), py::arg("bits"), py::arg("flags"), py::arg("num_threads"), release_gil());
    m.def("contrastive_reduce", &contrastive_reduce, py::arg("hinge"), py::arg("inverse"), py::arg("real"),
          py::arg("sizes"), py::arg("margin"), py::arg("reduction"), py::arg("normalizer"), py::arg("loss"),
          py::arg("weights"), release_gil());
    m.def("contrastive_gradient", &contrastive_gradient, py::arg("dtype"), py::arg("states"), py::arg("sizes"),
          py::arg("strides"), py::arg("scale"), py::arg("inverse"), py::arg("radial"), py::arg("bits"),
          py::arg("flags"), py::arg("gradient"), py::arg("num_threads"), release_gil());
}
