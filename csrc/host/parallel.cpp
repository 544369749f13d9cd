#include "host/parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

namespace simctg {
namespace {

// The entry point that GCC compiles `#pragma omp parallel` into; LLVM's and Intel's runtimes offer it too.
using GompParallel = void (*)(void (*fn)(void*), void* data, unsigned num_threads, unsigned flags);
using OmpInParallel = int (*)();

struct OpenMp {
    GompParallel parallel = nullptr;
    OmpInParallel in_parallel = nullptr;
    OpenMp() {
        parallel = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
        in_parallel = reinterpret_cast<OmpInParallel>(dlsym(RTLD_DEFAULT, "omp_in_parallel"));
        if (parallel == nullptr || in_parallel == nullptr) parallel = nullptr;
    }
};

const OpenMp& openmp() {
    static const OpenMp runtime;
    return runtime;
}

std::atomic<bool> openmp_allowed{true};

bool use_openmp() { return openmp_allowed.load(std::memory_order_relaxed) && openmp().parallel != nullptr; }

thread_local bool inside = false;  // a thread of one of our regions, whichever runtime started it

struct Region {
    int64_t tasks;
    void (*fn)(void*, int64_t);
    void* context;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr error;  // written by the thread that set `failed`

    void work() {
        const bool outer = inside;
        inside = true;
        try {
            for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) fn(context, task);
        } catch (...) {
            if (!failed.exchange(true)) error = std::current_exception();
            next.store(tasks, std::memory_order_relaxed);
        }
        inside = outer;
    }
};

void run_std_threads(Region& region, int num_threads) {
    std::vector<std::thread> threads;
    threads.reserve(static_cast<size_t>(num_threads - 1));
    try {
        for (int i = 1; i < num_threads; ++i) threads.emplace_back([&region] { region.work(); });
    } catch (const std::system_error&) {
        // No more threads to be had: those that run, and the caller, do the work.
    }
    region.work();
    for (std::thread& thread : threads) thread.join();
}

}  // namespace

void parallel_for_erased(int64_t tasks, int num_threads, void (*fn)(void*, int64_t), void* context) {
    const int threads = static_cast<int>(std::min<int64_t>(tasks, num_threads));
    if (threads <= 1 || inside || (use_openmp() && openmp().in_parallel())) {
        for (int64_t task = 0; task < tasks; ++task) fn(context, task);
        return;
    }
    Region region;
    region.tasks = tasks;
    region.fn = fn;
    region.context = context;
    if (use_openmp()) {
        openmp().parallel([](void* data) { static_cast<Region*>(data)->work(); }, &region,
                          static_cast<unsigned>(threads), 0);
    } else {
        run_std_threads(region, threads);
    }
    if (region.error) std::rethrow_exception(region.error);
}

const char* parallel_backend() { return use_openmp() ? "openmp" : "std::thread"; }

void set_parallel_backend(const char* name) {
    const std::string wanted = name;
    if (wanted != "auto" && wanted != "openmp" && wanted != "std::thread") {
        throw std::invalid_argument("backend is '" + wanted + "', must be openmp, std::thread or auto");
    }
    if (wanted == "openmp" && openmp().parallel == nullptr) {
        throw std::invalid_argument("backend is 'openmp', but no OpenMP runtime is loaded in this process");
    }
    openmp_allowed.store(wanted != "std::thread", std::memory_order_relaxed);
}

}  // namespace simctg
