#include "api/linear.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include "api/linear_int8.h"
#include "host/checks.h"
#include "host/linear.h"
#include "host/memory.h"
#include "host/parallel.h"
#include "simd/linear.h"

namespace simctg {
namespace {

using namespace linear_layer;

thread_local Scratch scratch;
// The caller's: `scratch` is of whichever thread runs a task.
thread_local Scratch x_scratch, y_scratch, bias_scratch;

constexpr int64_t kSmallWork = 1 << 16;  // multiply-adds below which waking a thread costs more than it saves
constexpr int64_t kTasksPerThread = 4;   // enough to even out threads that are held up
constexpr int64_t kStep = 192;           // columns: a multiple of the pieces of rows_are_inputs, long enough to stream
constexpr int64_t kDotStep = 48;         // columns: a multiple of the tiles of rows_are_outputs
constexpr int64_t kSplitRows = 16;       // up to here rows_are_inputs is split over k as well
constexpr double kSparseShare = 0.35;    // of x, at most, where going from entry to entry is faster
constexpr int64_t kElements = 16;        // single results that a thread computes in a go
constexpr int64_t kNarrowed = 1 << 13;   // columns that it narrows
constexpr int64_t kCopiedRows = 16;      // from here on a copy of x pays that a product finds in the cache

// Calls fill(begin, end) over ranges of columns, cut at multiples of `step`, in parallel.
template <class Fill>
void split_columns(int64_t columns, int64_t step, int num_threads, int64_t tasks_per_thread, const Fill& fill) {
    const int64_t units = ceil_div(columns, step), tasks = std::min(units, num_threads * tasks_per_thread);
    parallel_for(tasks, num_threads, [&](int64_t task) {
        fill(units * task / tasks * step, std::min(columns, units * (task + 1) / tasks * step));
    });
}

// Whether that many equal tasks keep the threads busy for nine tenths of the time.
bool even(int64_t tasks, int64_t threads) { return 10 * tasks >= 9 * ceil_div(tasks, threads) * threads; }

// Calls finished(begin, end) for every range of columns whose sums stand in y.
template <class X, class Weight, class Finished>
void run_rows_are_inputs(const InPlace<X, Weight>& k, const Product<X, Weight>& call, int num_threads,
                         const Finished& finished) {
    const int64_t chunks = ceil_div(call.in_features, kChunk);
    if (num_threads == 1 || call.rows > kSplitRows || chunks == 1) {
        return split_columns(call.out_features, kStep, num_threads, num_threads == 1 ? 1 : 2, [&](int64_t begin, int64_t end) {
            const int64_t stride = ceil_div(end - begin, 16) * 16;
            k.rows_are_inputs(call, begin, end, 0, chunks, scratch.get(call.rows * stride), stride, true);
            finished(begin, end);
        });
    }
    // Few rows: let every thread read whole weight rows. The sums of each chunk wait until the last one is there.
    const int64_t most = ceil_div(call.out_features, kStep);
    int64_t blocks = 1;
    while (blocks < most && !even(chunks * blocks, num_threads)) ++blocks;
    const int64_t width = ceil_div(ceil_div(call.out_features, blocks), kStep) * kStep;
    const int64_t block_floats = chunks * call.rows * width;
    float* sums = scratch.get(blocks * block_floats);
    const auto missing = std::make_unique<std::atomic<int64_t>[]>(static_cast<size_t>(blocks));
    for (int64_t block = 0; block < blocks; ++block) missing[block].store(chunks, std::memory_order_relaxed);
    parallel_for(chunks * blocks, num_threads, [&](int64_t task) {
        const int64_t chunk = task / blocks, block = task % blocks;
        const int64_t begin = block * width, end = std::min(call.out_features, begin + width);
        if (begin >= end) return;
        float* block_sums = sums + block * block_floats;
        k.rows_are_inputs(call, begin, end, chunk, chunk + 1, block_sums + chunk * call.rows * width, width, false);
        if (missing[block].fetch_sub(1, std::memory_order_acq_rel) == 1) {
            k.add_chunks(call, begin, end, chunks, block_sums, width);
            finished(begin, end);
        }
    });
}

template <class X, class Weight, class Finished>
void run_in_place(const InPlace<X, Weight>& k, const Product<X, Weight>& call, WeightLayout layout, int num_threads,
                  const Finished& finished) {
    if (layout == WeightLayout::rows_are_inputs) return run_rows_are_inputs(k, call, num_threads, finished);
    split_columns(call.out_features, kDotStep, num_threads, kTasksPerThread, [&](int64_t begin, int64_t end) {
        k.rows_are_outputs(call, begin, end, scratch.get(kDotSums));
        finished(begin, end);
    });
}

constexpr int64_t kLineBytes = 64, kPageBytes = 4096;

// Rows of x that are a multiple of a page apart meet in the same few lines of the first cache, where those of the weight
// are already. The stride at which they are not.
int64_t stride_apart(int64_t stride, int64_t element_bytes) {
    return stride * element_bytes % kPageBytes == 0 ? stride + kLineBytes / element_bytes : stride;
}

// The call with a copy of x whose rows do not meet, if that pays.
template <class X, class Weight>
Product<X, Weight> rows_apart(Product<X, Weight> call) {
    const int64_t size = sizeof(X), stride = call.rows < kCopiedRows ? call.x_stride : stride_apart(call.x_stride, size);
    if (stride == call.x_stride) return call;
    const int64_t apart = stride_apart(ceil_div(call.in_features * size, kLineBytes) * kLineBytes / size, size);
    X* copy = reinterpret_cast<X*>(x_scratch.get(ceil_div(call.rows * apart * size, sizeof(float))));
    for (int64_t m = 0; m < call.rows; ++m) {
        std::copy_n(call.x + m * call.x_stride, call.in_features, copy + m * apart);
    }
    call.x = copy;
    call.x_stride = apart;
    return call;
}

template <class X, class Weight>
Product<X, Weight> product_of(const Linear& call) {
    return {static_cast<const X*>(call.x), call.x_stride, static_cast<const Weight*>(call.weight),
            call.weight_stride, static_cast<const float*>(call.bias), static_cast<float*>(call.y), call.y_stride,
            call.rows, call.in_features, call.out_features};
}

// The call in the types that its kernels compute with: x and the bias of 16 bits are widened, unless they are taken as they are.
template <class X, class Weight>
Product<X, Weight> widened(const Linear& call) {
    const NarrowKernels& convert = kernels<NarrowKernels>();
    Product<X, Weight> product = product_of<X, Weight>(call);
    if (call.type == ElementType::float32) return product;
    if constexpr (sizeof(X) == sizeof(float)) {
        const int64_t stride = stride_apart(ceil_div(call.in_features, 16) * 16, sizeof(float));
        float* x = x_scratch.get(call.rows * stride);
        for (int64_t m = 0; m < call.rows; ++m) {
            convert.widen(call.type, static_cast<const uint16_t*>(call.x) + m * call.x_stride, call.in_features, x + m * stride);
        }
        product.x = x;
        product.x_stride = stride;
    }
    if (call.bias) {
        float* bias = bias_scratch.get(call.out_features);
        convert.widen(call.type, call.bias, call.out_features, bias);
        product.bias = bias;
    }
    return product;
}

// Calls f with the kernels in place for the call's types, and the call in theirs.
template <class F>
void with_kernels(const Linear& call, const F& f) {
    const NarrowKernels& narrow = kernels<NarrowKernels>();
    if (call.weight_type == ElementType::float32) {
        f(kernels<Kernels>().in_place, product_of<float, float>(call));
    } else if (call.weight_type == ElementType::float16) {
        f(narrow.float16, widened<float, Float16>(call));
    } else if (call.type != ElementType::float32 && narrow.pairs.rows_are_outputs) {
        f(narrow.pairs, widened<BFloat16, BFloat16>(call));
    } else {
        f(narrow.bfloat16, widened<float, BFloat16>(call));
    }
}

void narrow_columns(const Linear& call, const float* y, int64_t y_stride, int64_t begin, int64_t end) {
    const NarrowKernels& convert = kernels<NarrowKernels>();
    for (int64_t m = 0; m < call.rows; ++m) {
        convert.narrow(call.type, y + m * y_stride + begin, end - begin,
                       static_cast<uint16_t*>(call.y) + m * call.y_stride + begin);
    }
}

// A product with a weight in place; where y is of 16 bits, it is narrowed as its columns are finished.
template <class X, class Weight>
void run_typed(const InPlace<X, Weight>& k, Product<X, Weight> product, const Linear& call, WeightLayout layout,
               int num_threads) {
    const bool floats = call.type == ElementType::float32;
    // A Conv1D's x is read one element at a time.
    if (layout == WeightLayout::rows_are_outputs || sizeof(Weight) < sizeof(float)) product = rows_apart(product);
    if (floats) return run_in_place(k, product, layout, num_threads, [](auto...) {});
    product.y_stride = ceil_div(call.out_features, 16) * 16;
    float* y = y_scratch.get(call.rows * product.y_stride);
    product.y = y;
    run_in_place(k, product, layout, num_threads,
                 [&](int64_t begin, int64_t end) { narrow_columns(call, y, product.y_stride, begin, end); });
}

void write_bias(const Linear& call) {
    const int64_t size = size_of(call.type);
    for (int64_t m = 0; m < call.rows; ++m) {
        char* y = static_cast<char*>(call.y) + m * call.y_stride * size;
        if (call.bias) std::memcpy(y, call.bias, static_cast<size_t>(call.out_features * size));
        else std::memset(y, 0, static_cast<size_t>(call.out_features * size));
    }
}

void check_sizes(const Linear& call, int num_threads) {
    check(call.rows >= 0, "rows", call.rows, ">= 0");
    check(call.in_features >= 0, "in_features", call.in_features, ">= 0");
    check(call.out_features >= 0, "out_features", call.out_features, ">= 0");
    check(num_threads >= 1, "num_threads", num_threads, ">= 1");
    check(call.rows < 2 || call.y_stride >= call.out_features, "y_stride", call.y_stride, ">= out_features");
}

}  // namespace

void linear(const Linear& call, WeightLayout layout, int num_threads) {
    if (layout == WeightLayout::int8) return int8_linear(call, num_threads);
    check_sizes(call, num_threads);
    const bool floats = call.type == ElementType::float32, panels = layout == WeightLayout::panels;
    if (call.type != call.weight_type && !floats) throw std::invalid_argument("weight_type must be type, or type float32");
    if (panels && call.weight_type != ElementType::float32) throw std::invalid_argument("packed weights are float32");
    if (call.rows == 0 || call.out_features == 0) return;
    if (call.in_features == 0) return write_bias(call);
    const bool outputs = layout == WeightLayout::rows_are_outputs;
    if (outputs) check(call.weight_stride >= call.in_features, "weight_stride", call.weight_stride, ">= in_features");
    else if (!panels) check(call.weight_stride >= call.out_features, "weight_stride", call.weight_stride, ">= out_features");
    if (call.rows * call.in_features * call.out_features < kSmallWork) num_threads = 1;
    if (panels) {
        const Kernels& k = kernels<Kernels>();
        const auto product = product_of<float, float>(call);
        return split_columns(call.out_features, k.panel_width, num_threads, kTasksPerThread, [&](int64_t begin, int64_t end) {
            k.panels(product, begin, end, scratch.get(call.rows * k.panel_width));
        });
    }
    with_kernels(call, [&](const auto& k, const auto& product) { run_typed(k, product, call, layout, num_threads); });
}

void linear_elements(const Linear& call, const Element* elements, int64_t count, float* y, int64_t y_stride, int num_threads) {
    with_kernels(call, [&](const auto& k, const auto& product) {
        parallel_ranges(count, kElements, num_threads, [&](int64_t begin, int64_t size) {
            for (const Element* e = elements + begin; e < elements + begin + size; ++e) {
                auto row = product;
                row.rows = 1;
                row.x += e->row * product.x_stride;
                row.y = y + e->row * y_stride;
                k.rows_are_outputs(row, e->column, e->column + 1, scratch.get(kDotSums));
            }
        });
    });
}

void narrow_rows(const Linear& call, const float* y, int64_t y_stride, int num_threads) {
    parallel_ranges(call.out_features, kNarrowed, num_threads, [&](int64_t begin, int64_t size) {
        narrow_columns(call, y, y_stride, begin, begin + size);
    });
}

void relu_linear(const Linear& call, WeightLayout layout, int num_threads) {
    const Kernels& k = kernels<Kernels>();
    check_sizes(call, num_threads);
    if (call.type != ElementType::float32) throw std::invalid_argument("type must be float32");
    const auto product = product_of<float, float>(call);
    const int64_t elements = call.rows * call.in_features;
    if (layout == WeightLayout::panels && k.sparse_panels && elements > 0) {
        const int64_t blocks = ceil_div(call.in_features, kSparseBlock), counts = call.rows * blocks;
        float* memory = x_scratch.get(counts + ceil_div(counts * kSparseRoom, sizeof(float)));
        const SparseRows rows{reinterpret_cast<uint8_t*>(memory + counts), reinterpret_cast<int32_t*>(memory), blocks};
        std::atomic<int64_t> found{0};
        parallel_for(call.rows, elements < kSmallWork ? 1 : num_threads, [&](int64_t m) {
            int64_t of_row = 0;
            for (int64_t b = 0; b < blocks; ++b) {
                const int64_t entry = m * blocks + b, first = b * kSparseBlock;
                const int64_t count = k.find_entries(product.x + m * call.x_stride + first,
                                                     std::min(kSparseBlock, call.in_features - first),
                                                     rows.entries + entry * kSparseRoom);
                rows.counts[entry] = static_cast<int32_t>(count);
                of_row += count;
            }
            found.fetch_add(of_row, std::memory_order_relaxed);
        });
        if (found.load() < kSparseShare * static_cast<double>(elements)) {
            if (call.rows * call.in_features * call.out_features < kSmallWork) num_threads = 1;
            const int64_t width = kSparsePanels * k.panel_width;
            return split_columns(call.out_features, width, num_threads, kTasksPerThread, [&](int64_t begin, int64_t end) {
                k.sparse_panels(product, rows, begin, end, scratch.get(call.rows * width));
            });
        }
    }
    float* x = const_cast<float*>(product.x);
    for (int64_t m = 0; m < call.rows; ++m, x += call.x_stride) {
        for (int64_t i = 0; i < call.in_features; ++i) x[i] = x[i] <= 0.0f ? 0.0f : x[i];
    }
    linear(call, layout, num_threads);
}

int64_t packed_linear_size(int64_t in_features, int64_t out_features) {
    check(in_features >= 0, "in_features", in_features, ">= 0");
    check(out_features >= 0, "out_features", out_features, ">= 0");
    const int64_t width = kernels<Kernels>().panel_width;
    return ceil_div(out_features, width) * width * in_features;
}

void pack_linear(const float* weight, int64_t weight_stride, WeightLayout from, int64_t in_features,
                 int64_t out_features, float* packed, int num_threads) {
    if (from == WeightLayout::panels) throw std::invalid_argument("from is panels, must be a layout in place");
    const bool outputs = from == WeightLayout::rows_are_outputs;
    check(num_threads >= 1, "num_threads", num_threads, ">= 1");
    check(weight_stride >= (outputs ? in_features : out_features), "weight_stride", weight_stride, "at least a row");
    const Kernels& kernel = kernels<Kernels>();
    const int64_t width = kernel.panel_width;
    parallel_for(ceil_div(out_features, width), num_threads, [&](int64_t panel) {
        float* target = packed + panel * width * in_features;
        const int64_t begin = panel * width, columns = std::min(width, out_features - begin);
        const int64_t stride_k = outputs ? 1 : weight_stride, stride_n = outputs ? weight_stride : 1;
        const float* source = weight + begin * stride_n;
        if (outputs && columns == width && kernel.pack_rows) {
            return kernel.pack_rows(source, weight_stride, in_features, target);
        }
        if (columns < width) std::fill(target, target + width * in_features, 0.0f);
        constexpr int64_t block = 32;  // k's: a square that the first cache holds whichever way it is walked
        for (int64_t k = 0; k < in_features; k += block) {
            const int64_t k_end = std::min(in_features, k + block);
            for (int64_t n = 0; outputs && n < columns; ++n) {
                for (int64_t i = k; i < k_end; ++i) target[i * width + n] = source[n * stride_n + i];
            }
            for (int64_t i = k; !outputs && i < k_end; ++i) {
                for (int64_t n = 0; n < columns; ++n) target[i * width + n] = source[i * stride_k + n];
            }
        }
    });
}

}  // namespace simctg
