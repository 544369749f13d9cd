#include "api/cpu_features.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

namespace simctg {
namespace {

bool runs(Isa isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool fma = __builtin_cpu_supports("fma");
    if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && fma && __builtin_cpu_supports("f16c");
    if (isa == Isa::avx512_bf16) return runs(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
    if (isa == Isa::avx512) {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && fma;
    }
#endif
    return isa == Isa::generic || isa == Isa::neon;  // every processor that the build is for has these
}

Isa from_environment() {
    const char* name = std::getenv("SIMCTG_FAST_ISA");
    return name ? parse_isa(name, "SIMCTG_FAST_ISA", best_isa()) : best_isa();
}

std::atomic<Isa>& active() {
    static std::atomic<Isa> isa{from_environment()};
    return isa;
}

}  // namespace

const char* isa_name(Isa isa) {
    constexpr const char* names[] = {"generic", "avx2", "avx512", "neon", "avx512_bf16"};
    return names[static_cast<int>(isa)];
}

Isa best_isa() {
    static const Isa best = *std::find_if(std::begin(kBuiltIsas), std::end(kBuiltIsas), runs);
    return best;
}

Isa parse_isa(const char* name, const char* source, Isa best) {
    const std::string wanted = name;
    if (wanted == "auto" || wanted.empty()) return best;
    std::string allowed, lacking;
    bool has = false;
    for (const Isa isa : kBuiltIsas) {
        has = has || isa == best;
        if (wanted == isa_name(isa)) {
            if (has) return isa;
            lacking = ", which this processor lacks";
        }
        if (has) allowed += std::string(", ") + isa_name(isa);
    }
    throw std::invalid_argument(source + (" is '" + wanted) + "'" + lacking + "; it must be one of auto" + allowed);
}

bool is_amd() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_is("amd");
#else
    return false;
#endif
}

Isa active_isa() { return active().load(std::memory_order_relaxed); }

void set_isa(const char* name) { active().store(parse_isa(name, "isa", best_isa()), std::memory_order_relaxed); }

}  // namespace simctg
