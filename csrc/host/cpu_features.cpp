#include "api/cpu_features.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace simctg {
namespace {

#if defined(__x86_64__)
bool has_avx_vnni() {  // compilers learned the name late
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

bool runs(Isa isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool fma = __builtin_cpu_supports("fma");
    if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && fma && __builtin_cpu_supports("f16c");
    if (isa == Isa::avx2_vnni) return runs(Isa::avx2) && has_avx_vnni();
    if (isa == Isa::avx512_vnni) return runs(Isa::avx512) && __builtin_cpu_supports("avx512vnni");
    if (isa == Isa::avx512_bf16) return runs(Isa::avx512_vnni) && __builtin_cpu_supports("avx512bf16");
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

// A bit for each step that a set is above `generic`.
unsigned bits_of(Isa isa) {
    switch (isa) {
        case Isa::avx2: return 0b1;
        case Isa::avx2_vnni: return 0b11;
        case Isa::avx512: return 0b101;
        case Isa::avx512_vnni: return 0b1101;
        case Isa::avx512_bf16: return 0b11101;
        case Isa::neon: return 0b100000;
        default: return 0;
    }
}

std::atomic<Isa>& active() {
    static std::atomic<Isa> isa{from_environment()};
    return isa;
}

}  // namespace

const char* isa_name(Isa isa) {
    constexpr const char* names[] = {"generic", "avx2", "avx512", "neon", "avx2_vnni", "avx512_vnni", "avx512_bf16"};
    return names[static_cast<int>(isa)];
}

Isa best_isa() {
    static const Isa best = *std::find_if(std::begin(kBuiltIsas), std::end(kBuiltIsas), runs);
    return best;
}

bool is_supported(Isa isa, Isa best) {
    const unsigned bits = bits_of(isa);
    return (bits & bits_of(best)) == bits || (best == best_isa() && runs(isa));
}

Isa parse_isa(const char* name, const char* source, Isa best) {
    const std::string wanted = name;
    if (wanted == "auto" || wanted.empty()) return best;
    std::string allowed, lacking;
    for (const Isa isa : kBuiltIsas) {
        const bool has = is_supported(isa, best);
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
