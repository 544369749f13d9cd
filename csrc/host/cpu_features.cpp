#include "api/cpu_features.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace simctg {
namespace {

Isa detect() {
#if defined(__x86_64__) && defined(SIMCTG_FAST_X86_64)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
        return Isa::avx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
    return Isa::generic;
}

constexpr Isa all_isas[] = {Isa::avx512, Isa::avx2, Isa::generic};

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
    return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "generic";
}

Isa best_isa() {
    static const Isa best = detect();
    return best;
}

Isa parse_isa(const std::string& name, const std::string& source, Isa best) {
    if (name == "auto" || name.empty()) return best;
    std::string allowed, lacking;
    for (const Isa isa : all_isas) {
        if (isa > best) {
            if (name == isa_name(isa)) lacking = ", which this processor lacks";
            continue;
        }
        if (name == isa_name(isa)) return isa;
        allowed += std::string(", ") + isa_name(isa);
    }
    throw std::invalid_argument(source + " is '" + name + "'" + lacking + "; it must be one of auto" + allowed);
}

Isa active_isa() { return active().load(std::memory_order_relaxed); }

void set_isa(const std::string& name) {
    active().store(parse_isa(name, "isa", best_isa()), std::memory_order_relaxed);
}

}  // namespace simctg
