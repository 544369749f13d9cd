// How the host finds the kernels of the instruction set in use. Each algorithm's header here names a struct of what one
// instruction set offers, with SIMCTG_TABLES behind it; its source, which the build compiles once for each instruction set
// (SIMCTG_ISA is its name then), ends with SIMCTG_TABLE and the values.
#pragma once

#include <initializer_list>

#include "api/cpu_features.h"

namespace simctg {

template <class Kernels, Isa>
const Kernels& table();

#define SIMCTG_DECLARE_TABLE(isa, Kernels) \
    template <>                            \
    const simctg::Kernels& simctg::table<simctg::Kernels, simctg::Isa::isa>();
#define SIMCTG_TABLES(Kernels) SIMCTG_ISAS(SIMCTG_DECLARE_TABLE, Kernels)

// The same for an algorithm whose source asks for what extended sets add: after Kernels come those sets.
template <class Kernels>
constexpr bool is_extended_by(Isa) { return false; }
#define SIMCTG_DECLARE_EXTENDED(isa, base, Kernels) SIMCTG_DECLARE_TABLE(isa, Kernels)
#define SIMCTG_EXTENDED_TABLES(Kernels, ...)                             \
    SIMCTG_TABLES(Kernels)                                               \
    SIMCTG_EXTENDED_ISAS(SIMCTG_DECLARE_EXTENDED, Kernels)               \
    template <>                                                          \
    constexpr bool simctg::is_extended_by<simctg::Kernels>(Isa wanted) { \
        for (const Isa isa : {__VA_ARGS__}) {                            \
            if (isa == wanted) return true;                              \
        }                                                                \
        return false;                                                    \
    }

#define SIMCTG_TABLE(space, Kernels, ...)                                                            \
    template <>                                                                                      \
    const simctg::space::Kernels& simctg::table<simctg::space::Kernels, simctg::Isa::SIMCTG_ISA>() { \
        using namespace simctg::space;                                                               \
        static constexpr simctg::space::Kernels values{__VA_ARGS__};                                 \
        return values;                                                                               \
    }

template <class Kernels>
const Kernels& kernels() {
#define SIMCTG_CASE(isa, Kernels) \
    case Isa::isa: return table<Kernels, Isa::isa>();
#define SIMCTG_EXTENDED_CASE(isa, base, Kernels) \
    case Isa::isa: return table<Kernels, is_extended_by<Kernels>(Isa::isa) ? Isa::isa : Isa::base>();
    switch (active_isa()) {
        SIMCTG_EXTENDED_ISAS(SIMCTG_EXTENDED_CASE, Kernels)
        SIMCTG_ISAS(SIMCTG_CASE, Kernels)
        default: return table<Kernels, kBuiltIsas[sizeof kBuiltIsas / sizeof *kBuiltIsas - 1]>();  // active_isa() gives none but those
    }
#undef SIMCTG_CASE
#undef SIMCTG_EXTENDED_CASE
}

}  // namespace simctg
