// Which instruction set the kernels run with: the best one this processor has, unless told otherwise.
#pragma once

namespace simctg {

enum class Isa { generic, avx2, avx512, neon, avx2_vnni, avx512_vnni, avx512_bf16 };

// The build says which instruction sets csrc/simd/ is compiled for: SIMCTG_ISAS(DO, …) is DO(isa, …) of each, the best one
// first; and SIMCTG_EXTENDED_ISAS(DO, …) is DO(isa, base, …) of those that add instructions for a few of its sources to the
// set `base`, whose kernels serve for all others.
#if !defined(SIMCTG_EXTENDED_ISAS)
#define SIMCTG_EXTENDED_ISAS(DO, ...)
#endif

#define SIMCTG_LISTED(isa, ...) Isa::isa,
constexpr Isa kBuiltIsas[] = {SIMCTG_EXTENDED_ISAS(SIMCTG_LISTED, ) SIMCTG_ISAS(SIMCTG_LISTED, )};
#undef SIMCTG_LISTED

// The best instruction set that this processor, this operating system and this build support.
Isa best_isa();

// Whether it can be used on a processor whose best one is `best`: what that adds to can, and what this processor has if it
// is that one.
bool is_supported(Isa isa, Isa best);

// The one that `name` (as `isa_name` gives it; "auto" or nothing for `best`) stands for on a processor whose best one is
// `best`. Throws std::invalid_argument, which calls the name `source` and lists what is allowed, on any other name and on
// a set above `best`.
Isa parse_isa(const char* name, const char* source, Isa best);

// The one in use: `best_isa()`, lowered by SIMCTG_FAST_ISA or by `set_isa`. Throws as `parse_isa` does, at every call,
// where that variable has a value that cannot be used.
Isa active_isa();

// Chooses by name, as `parse_isa` does. Meant for tests and benchmarks; calls that are under way keep what they began with.
void set_isa(const char* name);

const char* isa_name(Isa isa);

// Whether AMD made this processor: how fast other libraries are on it is not a matter of instruction sets alone.
bool is_amd();

}  // namespace simctg
