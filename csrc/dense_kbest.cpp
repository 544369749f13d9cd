#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "best_paths.h"
#include "crf.h"
#include "crf_host.h"
#include "parallel.h"

namespace simctg {

void dense_kbest(const DenseCrf& crf, int64_t paths, int64_t* slots, int num_threads) {
    if (paths < 1) throw std::invalid_argument("paths is " + std::to_string(paths) + ", must be at least 1");
    const CrfKernels& k = crf_kernels();
    constexpr float never = -std::numeric_limits<float>::infinity();
    const int64_t tags = crf.tags, stride = (tags + 2 * k.lanes - 1) / (2 * k.lanes) * (2 * k.lanes);
    Floats matrix(tags * stride);
    std::vector<float> into(static_cast<size_t>(tags * tags));  // the transposed matrix
    for (int64_t i = 0; i < tags; ++i) {
        const float* row = crf.transitions + i * tags;
        std::copy(row, row + tags, matrix.data() + i * stride);
        std::fill(matrix.data() + i * stride + tags, matrix.data() + (i + 1) * stride, never);
        for (int64_t j = 0; j < tags; ++j) into[static_cast<size_t>(j * tags + i)] = row[j];
    }
    const auto edges = [&](int64_t, int64_t tag, float* out) {
        std::copy_n(into.data() + tag * tags, tags, out);
    };
    parallel_for(crf.batch, num_threads, [&](int64_t b) {
        const int64_t length = length_of(crf.lengths, b, crf.length);
        int64_t* own = slots + b * crf.length * paths;
        std::fill(own, own + crf.length * paths, int64_t{-1});
        Floats best(length * tags), state(stride), next(stride);
        for (int64_t t = 0; t < length; ++t) {
            const float* emission = crf.emissions + (b * crf.length + t) * tags;
            if (t > 0) k.dense_max(state.data(), matrix.data(), tags, stride, 1, next.data());
            for (int64_t j = 0; j < tags; ++j) state.data()[j] = (t > 0 ? next.data()[j] : 0.0f) + emission[j];
            const float top = k.largest(state.data(), tags);
            if (top > never && top < -never) {
                for (int64_t j = 0; j < tags; ++j) state.data()[j] -= top;
            }
            std::copy_n(state.data(), tags, best.data() + t * tags);
        }
        BestPaths(length, tags, best.data(), edges).write(paths, own);
    });
}

}  // namespace simctg
