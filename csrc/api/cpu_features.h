// Which instruction set the kernels run with: the best one this processor has, unless told otherwise.
#pragma once

#include <string>

namespace simctg {

enum class Isa { generic = 0, avx2 = 1, avx512 = 2 };

// The best instruction set that this processor, this operating system and this build support.
Isa best_isa();

// The one that `name` ("avx512", "avx2", "generic"; "auto" or nothing for `best`) stands for on a processor whose best one
// is `best`. Throws std::invalid_argument, which calls the name `source` and lists what is allowed, on any other name and
// on a set above `best`.
Isa parse_isa(const std::string& name, const std::string& source, Isa best);

// The one in use: `best_isa()`, lowered by SIMCTG_FAST_ISA or by `set_isa`. Throws as `parse_isa` does, at every call,
// where that variable has a value that cannot be used.
Isa active_isa();

// Chooses by name, as `parse_isa` does. Meant for tests and benchmarks; calls that are under way keep what they began with.
void set_isa(const std::string& name);

const char* isa_name(Isa isa);

}  // namespace simctg
