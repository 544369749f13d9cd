// Bindings of the CRFs; see bindings.cpp.
#include "bind/bindings.h"

#include "api/crf.h"

namespace {

// Batch, length, beam, vocabulary, rank.
simctg::Crf crf_of(const std::array<int64_t, 5>& sizes, address scores, address tokens, address left, address right,
                   address lengths, double scale) {
    for (const int64_t size : sizes) {
        if (size < 0) throw std::invalid_argument("sizes must not be negative");
    }
    if (sizes[2] < 1 || sizes[4] < 1) throw std::invalid_argument("beam and rank must be at least 1");
    return {sizes[0],
            sizes[1],
            sizes[2],
            sizes[3],
            sizes[4],
            pointer<const float>(scores),
            pointer<const int64_t>(tokens),
            pointer<const float>(left),
            pointer<const float>(right),
            pointer<const int64_t>(lengths),
            static_cast<float>(scale)};
}

using Sizes = std::array<int64_t, 5>;

}  // namespace

void bind_crf(py::module_& m) {
        m.def(
        "crf_beam_select",
        [](const std::string& dtype, address emissions, std::array<int64_t, 3> sizes, std::array<int64_t, 2> strides,
           int64_t beam, address lengths, address forced, int64_t forced_count, address tokens, address values,
           int threads) {
            const simctg::Emissions e{pointer<const void>(emissions), element_type(dtype), sizes[0], sizes[1], sizes[2],
                                      strides[0], strides[1]};
            simctg::crf_beam_select(e, beam, pointer<const int64_t>(lengths), pointer<const int64_t>(forced),
                                    forced_count, pointer<int64_t>(tokens), pointer<float>(values), threads);
        },
        release_gil());
    m.def(
        "crf_filter",
        [](Sizes sizes, address scores, address tokens, address left, address right, address lengths, double scale,
           address messages, address norms, int threads) {
            simctg::crf_filter(crf_of(sizes, scores, tokens, left, right, lengths, scale), pointer<float>(messages),
                               pointer<float>(norms), threads);
        },
        release_gil());
    m.def(
        "crf_filter_backward",
        [](Sizes sizes, address grad, address messages, address norms, address scores, address tokens, address left,
           address right, address lengths, double scale, address grad_scores, address grad_left, address grad_right,
           int threads) {
            simctg::crf_filter_backward(crf_of(sizes, scores, tokens, left, right, lengths, scale),
                                        pointer<const float>(grad), pointer<const float>(messages),
                                        pointer<const float>(norms), pointer<float>(grad_scores),
                                        pointer<float>(grad_left), pointer<float>(grad_right), threads);
        },
        release_gil());
    m.def(
        "crf_viterbi",
        [](Sizes sizes, address scores, address tokens, address left, address right, address lengths, address slots,
           int threads) {
            simctg::crf_viterbi(crf_of(sizes, scores, tokens, left, right, lengths, 1.0), pointer<int64_t>(slots),
                                threads);
        },
        release_gil());
    m.def(
        "crf_kbest",
        [](Sizes sizes, address scores, address tokens, address left, address right, address lengths, int64_t paths,
           address slots, int threads) {
            simctg::crf_kbest(crf_of(sizes, scores, tokens, left, right, lengths, 1.0), paths, pointer<int64_t>(slots),
                              threads);
        },
        release_gil());
    m.def(
        "crf_stochastic_viterbi",
        [](Sizes sizes, address scores, address tokens, address left, address right, address lengths, double temperature,
           int64_t samples, uint64_t seed, address uniforms, address slots, address prefixes, address backpointers,
           int threads) {
            simctg::crf_stochastic_viterbi(crf_of(sizes, scores, tokens, left, right, lengths, 1.0),
                                           static_cast<float>(temperature), samples, seed,
                                           pointer<const float>(uniforms), pointer<int64_t>(slots),
                                           pointer<float>(prefixes), pointer<void>(backpointers), threads);
        },
        release_gil());
    m.def(
        "crf_ffbs",
        [](Sizes sizes, address messages, address norms, address scores, address tokens, address left, address right,
           address lengths, double scale, int64_t samples, uint64_t seed, address uniforms, address slots, int threads) {
            simctg::crf_ffbs(crf_of(sizes, scores, tokens, left, right, lengths, scale), pointer<const float>(messages),
                             pointer<const float>(norms), samples, seed, pointer<const float>(uniforms),
                             pointer<int64_t>(slots), threads);
        },
        release_gil());
    const auto dense = [](std::array<int64_t, 3> sizes, address emissions, address transitions, address lengths) {
        if (sizes[0] < 0 || sizes[1] < 0 || sizes[2] < 1) throw std::invalid_argument("sizes must not be negative");
        return simctg::DenseCrf{sizes[0], sizes[1], sizes[2], pointer<const float>(emissions),
                                pointer<const float>(transitions), pointer<const int64_t>(lengths)};
    };
    m.def(
        "dense_filter",
        [dense](std::array<int64_t, 3> sizes, address emissions, address transitions, address lengths, address messages,
                address norms, address log_partition, int threads) {
            simctg::dense_filter(dense(sizes, emissions, transitions, lengths), pointer<float>(messages),
                                 pointer<float>(norms), pointer<double>(log_partition), threads);
        },
        release_gil());
    m.def(
        "dense_filter_backward",
        [dense](std::array<int64_t, 3> sizes, address emissions, address transitions, address lengths, address grad,
                address messages, address norms, address grad_emissions, address grad_transitions, int threads) {
            simctg::dense_filter_backward(dense(sizes, emissions, transitions, lengths), pointer<const float>(grad),
                                          pointer<const float>(messages), pointer<const float>(norms),
                                          pointer<float>(grad_emissions), pointer<float>(grad_transitions), threads);
        },
        release_gil());
    m.def(
        "dense_viterbi",
        [dense](std::array<int64_t, 3> sizes, address emissions, address transitions, address lengths, address slots,
                int threads) {
            simctg::dense_viterbi(dense(sizes, emissions, transitions, lengths), pointer<int64_t>(slots), threads);
        },
        release_gil());
    m.def(
        "dense_kbest",
        [dense](std::array<int64_t, 3> sizes, address emissions, address transitions, address lengths, int64_t paths,
                address slots, int threads) {
            simctg::dense_kbest(dense(sizes, emissions, transitions, lengths), paths, pointer<int64_t>(slots), threads);
        },
        release_gil());
}
