#include "api/linear_int8.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <vector>

#include "host/checks.h"
#include "host/linear.h"
#include "host/memory.h"
#include "host/parallel.h"
#include "simd/linear_int8.h"

namespace simctg {
namespace {

using namespace int8;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

thread_local Scratch x_scratch, y_scratch;

constexpr int64_t kSmallRows = 1 << 14;  // elements of x: below, waking a thread costs more than rounding them
constexpr int64_t kSmallWork = 1 << 18;  // multiply-adds likewise
constexpr int64_t kTasksPerThread = 4;

// The parts of a copy, each at a multiple of 64 bytes.
Weight parts(const void* copy, int64_t in_features, int64_t out_features) {
    const int64_t outputs = ceil_div(out_features, kPanel) * kPanel;
    char* at = static_cast<char*>(const_cast<void*>(copy));
    Weight weight;
    weight.panels = reinterpret_cast<int8_t*>(at);
    at += outputs * ceil_div(in_features, kQuad) * kQuad;
    weight.scales = reinterpret_cast<float*>(at);
    weight.sums = reinterpret_cast<int32_t*>(at + outputs * 4);
    weight.errors = reinterpret_cast<float*>(at + outputs * 8);
    return weight;
}

void check_features(int64_t in_features, int64_t out_features) {
    check(in_features >= 1, "in_features", in_features, ">= 1");
    check(in_features <= kMostInt8Inputs, "in_features", in_features, "<= 65536");
    check(out_features >= 0, "out_features", out_features, ">= 0");
}

void check_call(const Linear& call, int num_threads) {
    check_features(call.in_features, call.out_features);
    check(call.rows >= 0, "rows", call.rows, ">= 0");
    check(num_threads >= 1, "num_threads", num_threads, ">= 1");
    check(call.rows < 2 || call.y_stride >= call.out_features, "y_stride", call.y_stride, ">= out_features");
}

// y = x · copy + bias in `type`, x rounded to so many digits. `norms` [rows], or null, gets the lengths of x's rows.
void run(const Linear& call, const void* copy, int digits, void* y, int64_t y_stride, ElementType type, float* norms,
         int num_threads) {
    const Kernels& k = kernels<Kernels>();
    const int64_t quads = ceil_div(call.in_features, kQuad), stride = quads * kQuad;
    const int64_t row_bytes = digits * stride * k.element_bytes;
    float* scales = x_scratch.get(call.rows + 16 + ceil_div(call.rows * row_bytes, sizeof(float)));
    char* x = reinterpret_cast<char*>(scales + ceil_div(call.rows, 16) * 16);
    const int64_t x_bytes = call.x_stride * size_of(call.type);
    parallel_for(call.rows, call.rows * call.in_features < kSmallRows ? 1 : num_threads, [&](int64_t m) {
        const RoundedRow row = k.round(call.type, static_cast<const char*>(call.x) + m * x_bytes, call.in_features, digits,
                                       stride, x + m * row_bytes);
        scales[m] = row.scale;
        if (norms) norms[m] = row.norm;
    });
    const Call product{x, scales, parts(copy, call.in_features, call.out_features), call.bias, y, y_stride, call.rows, quads,
                       call.out_features, digits, call.type, type};
    if (call.rows * call.in_features * call.out_features < kSmallWork) num_threads = 1;
    const int64_t units = ceil_div(call.out_features, kColumns), tasks = std::min(units, num_threads * kTasksPerThread);
    parallel_for(tasks, num_threads, [&](int64_t task) {
        k.columns(product, units * task / tasks * kColumns, std::min(call.out_features, units * (task + 1) / tasks * kColumns));
    });
}

}  // namespace

int64_t int8_linear_size(int64_t in_features, int64_t out_features) {
    check_features(in_features, out_features);
    return ceil_div(out_features, kPanel) * kPanel * (ceil_div(in_features, kQuad) * kQuad + 12);
}

bool quantize_linear(const void* weight, ElementType type, int64_t weight_stride, WeightLayout from, int64_t in_features,
                     int64_t out_features, void* copy, int num_threads) {
    check_features(in_features, out_features);
    check(num_threads >= 1, "num_threads", num_threads, ">= 1");
    const bool outputs = from == WeightLayout::rows_are_outputs;
    if (!outputs && from != WeightLayout::rows_are_inputs) throw std::invalid_argument("from must be a layout in place");
    check(weight_stride >= (outputs ? in_features : out_features), "weight_stride", weight_stride, "at least a row");
    const Weight whole = parts(copy, in_features, out_features);
    const Kernels& k = kernels<Kernels>();
    std::atomic<bool> finite{true};
    parallel_for(ceil_div(out_features, kPanel), num_threads, [&](int64_t panel) {
        const int64_t begin = panel * kPanel, n_stride = outputs ? weight_stride : 1, k_stride = outputs ? 1 : weight_stride;
        const Weight part{whole.panels + begin * ceil_div(in_features, kQuad) * kQuad, whole.scales + begin,
                          whole.sums + begin, whole.errors + begin};
        const char* w = static_cast<const char*>(weight) + begin * n_stride * size_of(type);
        if (!k.quantize(type, w, n_stride, k_stride, in_features, std::min(kPanel, out_features - begin), part)) {
            finite.store(false, std::memory_order_relaxed);
        }
    });
    return finite.load();
}

void int8_linear(const Linear& call, int num_threads) {
    check_call(call, num_threads);
    if (call.rows == 0 || call.out_features == 0) return;
    run(call, call.weight, 1, call.y, call.y_stride, call.type, nullptr, num_threads);
}

void certified_linear(const Linear& call, const void* copy, int64_t top, int num_threads) {
    check_call(call, num_threads);
    check(top >= 1, "top", top, ">= 1");
    check(call.weight_stride >= call.in_features, "weight_stride", call.weight_stride, ">= in_features");
    if (call.rows == 0 || call.out_features == 0) return;
    const bool floats = call.type == ElementType::float32;
    const int64_t stride = floats ? call.y_stride : call.out_features;
    float* y = floats ? static_cast<float*>(call.y) : y_scratch.get(call.rows * stride);
    std::vector<float> norms(static_cast<size_t>(call.rows));
    run(call, copy, 2, y, stride, ElementType::float32, norms.data(), num_threads);
    const Kernels& k = kernels<Kernels>();
    const Weight weight = parts(copy, call.in_features, call.out_features);
    std::vector<std::vector<int32_t>> found(static_cast<size_t>(call.rows));
    parallel_for(call.rows, num_threads, [&](int64_t m) {
        std::vector<int32_t>& of_row = found[static_cast<size_t>(m)];
        std::vector<float> values(static_cast<size_t>(top));
        of_row.resize(static_cast<size_t>(call.out_features));
        of_row.resize(static_cast<size_t>(k.contenders(y + m * stride, weight.errors, norms[static_cast<size_t>(m)],
                                                       call.out_features, top, values.data(), of_row.data())));
    });
    std::vector<Element> elements;
    for (int64_t m = 0; m < call.rows; ++m) {
        for (const int32_t n : found[static_cast<size_t>(m)]) elements.push_back({m, n});
    }
    linear_elements(call, elements.data(), static_cast<int64_t>(elements.size()), y, stride, num_threads);
    if (!floats) narrow_rows(call, y, stride, num_threads);
}

}  // namespace simctg
