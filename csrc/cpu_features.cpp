#include "cpu_features.h"

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

Isa parse(const std::string& name, const char* source) {
    if (name == "auto" || name.empty()) return best_isa();
    for (const Isa isa : {Isa::generic, Isa::avx2, Isa::avx512}) {
        if (name != isa_name(isa)) continue;
        if (isa > best_isa()) {
            throw std::invalid_argument(std::string(source) + " is '" + name + "', the best supported here is '" +
                                        isa_name(best_isa()) + "'");
        }
        return isa;
    }
    throw std::invalid_argument(std::string(source) + " is '" + name + "', must be generic, avx2, avx512 or auto");
}

Isa from_environment() {
    const char* name = std::getenv("SIMCTG_FAST_ISA");
    return name ? parse(name, "SIMCTG_FAST_ISA") : best_isa();
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

Isa active_isa() { return active().load(std::memory_order_relaxed); }

void set_isa(const std::string& name) { active().store(parse(name, "isa"), std::memory_order_relaxed); }

}  // namespace simctg
