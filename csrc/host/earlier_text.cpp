#include "api/earlier_text.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "host/checks.h"
#include "host/parallel.h"
#include "simd/earlier_text.h"

namespace simctg {
namespace {

constexpr int64_t kSmallWork = 1 << 16;  // floats of states below which waking a thread costs more than it saves
constexpr int64_t kTokensToTask = 1 << 14;

// Of one sequence: tokens first..length-1 are its text.
struct Row {
    const int64_t* tokens;
    int64_t first, length, order;
    const int64_t* picks;

    Row(const EarlierText& text, int64_t b)
        : tokens(text.tokens + b * text.token_batch),
          first(text.starts ? text.starts[b] : 0),
          length(length_of(text.lengths, b, text.length)),
          order(text.orders[b]),
          picks(text.picks + b * text.candidates) {}

    // How many tokens in front of `at` are those at the end of the text, `most` at most.
    int64_t matching(int64_t at, int64_t most) const {
        int64_t count = 0;
        while (count < most && at - 1 - count >= first && tokens[at - 1 - count] >= 0 &&
               tokens[at - 1 - count] == tokens[length - 1 - count]) {
            ++count;
        }
        return count;
    }

    // Whether `count` positions up to and with `at` are text.
    bool is_text(int64_t at, int64_t count) const {
        for (int64_t i = 0; i < count; ++i) {
            if (at - i < first || tokens[at - i] < 0) return false;
        }
        return true;
    }
};

void check_text(const EarlierText& text, int64_t least_order, int num_threads) {
    for (const auto& [name, value] : {std::pair<const char*, int64_t>{"batch", text.batch},
                                      {"candidates", text.candidates},
                                      {"length", text.length},
                                      {"num_threads", num_threads - 1}}) {
        if (value < 0) throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + ", too small");
    }
    for (int64_t b = 0; b < text.batch; ++b) {
        const int64_t length = length_of(text.lengths, b, text.length);
        const std::string place = "[" + std::to_string(b) + "]";
        if (text.starts && (text.starts[b] < 0 || text.starts[b] > length)) fail("starts" + place, text.starts[b], length);
        check(text.orders[b] >= least_order, ("orders" + place).c_str(), text.orders[b],
              least_order == 1 ? "at least 1" : "at least 2");
    }
}

// An earlier position `at` where candidate `pick` stands.
struct Match {
    int64_t b, pick, at;
};

}  // namespace

void follower_scan(const EarlierText& text, const EarlierStates& history, int num_threads) {
    check_text(text, 2, num_threads);
    check(history.dim >= 0, "dim", history.dim, "at least 0");
    const auto dot = kernels<earlier_text::Kernels>().dot;
    std::vector<Match> matches;
    for (int64_t b = 0; b < text.batch; ++b) {
        const Row row(text, b);
        const int64_t context = row.order - 1;
        check(context < 2 || history.norms, "orders", row.order, "2 where norms are not given");
        if (row.length - row.first < row.order || !row.is_text(row.length - 1, context)) continue;
        for (int64_t at = row.first + context; at < row.length; ++at) {
            for (int64_t c = 0; c < text.candidates; ++c) {
                if (row.tokens[at] == row.picks[c] && row.tokens[at] >= 0 && row.is_text(at - 1, context)) {
                    matches.push_back({b, c, at});
                }
            }
        }
    }
    const auto cosine = [&](const Match& match) {
        const Row row(text, match.b);
        const float* states = history.states + match.b * history.state_batch;
        const auto state = [&](int64_t at) { return states + at * history.state_position; };
        if (row.order == 2) return dot(state(row.length - 1), state(match.at - 1), history.dim);
        const float* norms = history.norms + match.b * history.norm_batch;
        double product = 0, newest = 0, earlier = 0;
        for (int64_t i = 0; i < row.order - 1; ++i) {
            const int64_t now = row.length - 1 - i, then = match.at - 1 - i;
            product += static_cast<double>(norms[now]) * norms[then] * dot(state(now), state(then), history.dim);
            newest += static_cast<double>(norms[now]) * norms[now];
            earlier += static_cast<double>(norms[then]) * norms[then];
        }
        return static_cast<float>(product / std::max(std::sqrt(newest * earlier), 1e-24));
    };
    const int64_t count = static_cast<int64_t>(matches.size());
    std::vector<float> cosines(matches.size());
    if (count * history.dim < kSmallWork) num_threads = 1;
    parallel_ranges(count, std::max<int64_t>(16, ceil_div(count, 4 * num_threads)), num_threads,
                    [&](int64_t begin, int64_t many) {
                        for (int64_t i = begin; i < begin + many; ++i) cosines[i] = cosine(matches[i]);
                    });
    std::fill_n(text.penalty, text.batch * text.candidates, -std::numeric_limits<float>::infinity());
    std::fill_n(text.position, text.batch * text.candidates, -1);
    for (int64_t i = 0; i < count; ++i) {
        const int64_t to = matches[i].b * text.candidates + matches[i].pick;
        const float best = text.penalty[to];
        if (!(cosines[i] <= best) && best == best) text.penalty[to] = cosines[i], text.position[to] = matches[i].at;
    }
    for (int64_t i = 0; i < text.batch * text.candidates; ++i) {
        if (text.penalty[i] == text.penalty[i]) text.penalty[i] = std::min(std::max(text.penalty[i], 0.0f), 1.0f);
    }
}

void ngram_penalty(const EarlierText& text, const double* betas, int num_threads) {
    check_text(text, 1, num_threads);
    if (text.batch * text.length < kTokensToTask) num_threads = 1;
    parallel_for(text.batch, num_threads, [&](int64_t b) {
        const Row row(text, b);
        const int64_t k = text.candidates;
        // By the length of the context: how often it was followed, how often by a candidate, and where last.
        std::vector<int64_t> followed(static_cast<size_t>(row.order)), by(followed.size() * k), last(by.size(), -1);
        int64_t real = 0;
        for (int64_t at = row.first; at < row.length; ++at) {
            if (row.tokens[at] < 0) continue;
            ++real;
            const int64_t context = row.matching(at, row.order - 1);
            for (int64_t i = 0; i <= context; ++i) ++followed[i];
            for (int64_t c = 0; c < k; ++c) {
                if (row.tokens[at] != row.picks[c]) continue;
                for (int64_t i = 0; i <= context; ++i) ++by[i * k + c], last[i * k + c] = at;
            }
        }
        const bool is_long = real >= row.order - 1;
        for (int64_t c = 0; c < k; ++c) {
            double left = 1, penalty = 0;
            int64_t position = -1;
            for (int64_t i = row.order - 1; i >= 0 && is_long; --i) {
                const int64_t times = by[i * k + c];
                if (times == 0) continue;
                if (position < 0) position = last[i * k + c];
                const double share = static_cast<double>(times) / (followed[i] + (i > 0));
                penalty += left * share * (i > 0 ? betas[b] : 1.0);
                left *= 1 - betas[b];
            }
            text.penalty[b * k + c] = static_cast<float>(penalty);
            text.position[b * k + c] = position;
        }
    });
}

}  // namespace simctg
