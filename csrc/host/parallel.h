// Running independent tasks on several threads.
#pragma once

#include <cstdint>
#include <type_traits>

namespace simctg {

// Calls fn(task) once for every task in 0..tasks-1, on up to `num_threads` threads, the caller among them; which thread
// takes which task is not fixed. Returns when all are done. An exception leaves through here (the first one; tasks not
// begun by then are dropped). Called from inside a parallel region it runs serially.
//
// The threads are those of the OpenMP runtime that PyTorch has loaded, so that two pools never fight for the cores;
// where none is loaded they are started for the call. No launch at all for one task or one thread.
void parallel_for_erased(int64_t tasks, int num_threads, void (*fn)(void* context, int64_t task), void* context);

template <class Fn>
void parallel_for(int64_t tasks, int num_threads, Fn&& fn) {
    using Plain = std::remove_reference_t<Fn>;
    parallel_for_erased(
        tasks, num_threads, [](void* context, int64_t task) { (*static_cast<Plain*>(context))(task); },
        const_cast<void*>(static_cast<const void*>(&fn)));
}

// Ranges of `b` that hold `a`.
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls fn(begin, count) over 0..count-1 in ranges of `most`, the last one of what is left, as `parallel_for` does.
template <class Fn>
void parallel_ranges(int64_t count, int64_t most, int num_threads, const Fn& fn) {
    parallel_for(ceil_div(count, most), num_threads, [&](int64_t task) {
        const int64_t begin = task * most;
        fn(begin, count - begin < most ? count - begin : most);
    });
}

// "openmp" or "std::thread".
const char* parallel_backend();

// "openmp", "std::thread" or "auto"; for tests. Throws std::invalid_argument on another name or a missing runtime.
void set_parallel_backend(const char* name);

}  // namespace simctg
