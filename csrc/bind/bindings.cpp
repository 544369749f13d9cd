// Python bindings. Tensors arrive as addresses and sizes: `simctg_fast/ops` has checked dtypes, devices and layouts and
// allocated the outputs. Every function releases the GIL; std::invalid_argument becomes a ValueError.
#include "bind/bindings.h"

#include <vector>

#include "api/cpu_features.h"
#include "api/prefix_commit.h"
#include "api/viterbi.h"
#include "host/parallel.h"

namespace {

void viterbi_backtrace(const std::string& dtype, address backpointers, std::array<int64_t, 3> sizes,
                       std::array<int64_t, 3> strides, address last, address lengths, address path, int num_threads) {
    for (const int64_t size : sizes) {
        if (size < 0) throw std::invalid_argument("sizes must not be negative");
    }
    const simctg::BackpointerView view{pointer<const void>(backpointers), sizes[0], sizes[1], sizes[2],
                                       strides[0], strides[1], strides[2]};
    const auto run = [&](auto trace) {
        trace(view, pointer<const int64_t>(last), pointer<const int64_t>(lengths), pointer<int64_t>(path), num_threads);
    };
    if (dtype == "uint8") return run(simctg::viterbi_backtrace<uint8_t>);
    if (dtype == "uint16") return run(simctg::viterbi_backtrace<uint16_t>);
    if (dtype == "int32") return run(simctg::viterbi_backtrace<int32_t>);
    if (dtype == "int64") return run(simctg::viterbi_backtrace<int64_t>);
    throw std::invalid_argument("dtype is " + dtype + ", must be uint8, uint16, int32 or int64");
}

// `numbers` holds the fields of one CommitItem after another.
void prefix_commit(const std::vector<int64_t>& numbers, address winners, address positions, int64_t batch,
                   int num_threads) {
    constexpr std::size_t fields = 9;
    if (numbers.size() % fields) throw std::invalid_argument("numbers must hold 9 entries an item");
    std::vector<simctg::CommitItem> items(numbers.size() / fields);
    for (std::size_t i = 0; i < items.size(); ++i) {
        const int64_t* n = numbers.data() + i * fields;
        items[i] = {pointer<char>(n[0]), n[1], n[2], n[3], pointer<const char>(n[4]), n[5], n[6], n[7], n[8]};
    }
    simctg::prefix_commit(items.data(), static_cast<int64_t>(items.size()), pointer<const int64_t>(winners),
                          pointer<const int64_t>(positions), batch, num_threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "C++ kernels of simctg_fast; called through simctg_fast.ops only.";
    m.def("viterbi_backtrace", &viterbi_backtrace, py::arg("dtype"), py::arg("backpointers"), py::arg("sizes"),
          py::arg("strides"), py::arg("last"), py::arg("lengths"), py::arg("path"), py::arg("num_threads"),
          release_gil());
    m.def("prefix_commit", &prefix_commit, py::arg("numbers"), py::arg("winners"), py::arg("positions"),
          py::arg("batch"), py::arg("num_threads"), release_gil());

    bind_decoding(m);
    bind_crf(m);
    bind_losses(m);

    m.def("best_isa", [] { return simctg::isa_name(simctg::best_isa()); });
    m.def("supported_isas", [] {  // the best one first
        std::vector<std::string> names;
        for (const simctg::Isa isa : simctg::kBuiltIsas) {
            if (simctg::is_supported(isa, simctg::best_isa())) names.emplace_back(simctg::isa_name(isa));
        }
        return names;
    });
    m.def("active_isa", [] { return simctg::isa_name(simctg::active_isa()); });
    m.def("is_amd", &simctg::is_amd);
    m.def("set_isa", &simctg::set_isa, py::arg("name").none(false));
    // What `name` would mean on a processor whose best one is `best`: so that tests reach the other processors' errors.
    m.def(
        "parse_isa",
        [](const std::string& name, const std::string& source, const std::string& best) {
            for (const simctg::Isa as : simctg::kBuiltIsas) {
                if (best == simctg::isa_name(as)) return simctg::isa_name(simctg::parse_isa(name.c_str(), source.c_str(), as));
            }
            throw std::invalid_argument("best is '" + best + "', which is not built");
        },
        py::arg("name"), py::arg("source"), py::arg("best"));
    m.def("parallel_backend", &simctg::parallel_backend);
    m.def("set_parallel_backend", &simctg::set_parallel_backend, py::arg("name"));
}
