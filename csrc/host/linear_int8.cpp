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

thread_local Scratch x_scratch, y_scratch;
thread_local Scratch found_scratch;  // of whichever thread looks through a row

constexpr int64_t kSmallRows = 1 << 14;  // elements of x: below, waking a thread costs more than rounding them
constexpr int64_t kSmallWork = 1 << 18;  // multiply-adds likewise
constexpr int64_t kTasksPerThread = 4;

// The parts of a copy, each at a multiple of 64 bytes.
Weight parts(const void* copy, int64_t in_features, int64_t out_features) {
    const int64_t outputs = ceil_div(out_features, kPanel) * kPanel;
    char* at = static_cast<char*>(const_cast<void*>(copy));
    Weight weight;
    weight.panels = reinterpret_cast<uint8_t*>(at);
    weight.scales = reinterpret_cast<float*>(at + outputs * ceil_div(in_features, kQuad) * kQuad);
    weight.errors = weight.scales + outputs;
    return weight;
}

void check_features(int64_t in_features, int64_t out_features) {
    check(in_features >= 1, "in_features", in_features, ">= 1");
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
    Rows rows{};
    rows.count = call.rows, rows.digits = digits, rows.norms = norms;
    rows.quads = ceil_div(call.in_features, kQuad), rows.groups = ceil_div(call.in_features, kGroup);
    const int64_t groups = ceil_div(call.rows * rows.groups, 16) * 16, x_bytes = call.x_stride * size_of(call.type);
    const int64_t integers = call.rows * digits * rows.quads * kQuad * k.element_bytes;
    rows.scales = x_scratch.get((1 + digits) * groups + ceil_div(integers, sizeof(float)));
    rows.excesses = reinterpret_cast<int32_t*>(rows.scales + groups);
    rows.x = rows.excesses + digits * groups;
    parallel_for(call.rows, call.rows * call.in_features < kSmallRows ? 1 : num_threads, [&](int64_t m) {
        k.round(call.type, static_cast<const char*>(call.x) + m * x_bytes, call.in_features, rows, m);
    });
    const Call product{rows, parts(copy, call.in_features, call.out_features), call.bias, y, y_stride, call.type, type};
    if (call.rows * call.in_features * call.out_features < kSmallWork) num_threads = 1;
    const int64_t units = ceil_div(call.out_features, kColumns), tasks = std::min(units, num_threads * kTasksPerThread);
    parallel_for(tasks, num_threads, [&](int64_t task) {
        k.columns(product, units * task / tasks * kColumns, std::min(call.out_features, units * (task + 1) / tasks * kColumns));
    });
}

}  // namespace

int64_t int8_linear_size(int64_t in_features, int64_t out_features) {
    check_features(in_features, out_features);
    return ceil_div(out_features, kPanel) * kPanel * (ceil_div(in_features, kQuad) * kQuad + 8);
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
                          whole.errors + begin};
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
        float* values = found_scratch.get(top + call.out_features);
        int32_t* columns = reinterpret_cast<int32_t*>(values + top);
        const int64_t count = k.contenders(y + m * stride, weight.errors, norms[static_cast<size_t>(m)], call.out_features,
                                           top, values, columns);
        found[static_cast<size_t>(m)].assign(columns, columns + count);
    });
    std::vector<Element> elements;
    for (int64_t m = 0; m < call.rows; ++m) {
        for (const int32_t n : found[static_cast<size_t>(m)]) elements.push_back({m, n});
    }
    linear_elements(call, elements.data(), static_cast<int64_t>(elements.size()), y, stride, num_threads);
    if (!floats) narrow_rows(call, y, stride, num_threads);
}

}  // namespace simctg
