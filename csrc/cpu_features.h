// Which instruction set the kernels run with: the best one this processor has, unless told otherwise.
#pragma once

#include <string>

namespace simctg {

enum class Isa { generic = 0, avx2 = 1, avx512 = 2 };

// The best instruction set that this processor, this operating system and this build support.
Isa best_isa();

// The one in use: `best_isa()`, lowered by SIMCTG_FAST_ISA or by `set_isa`.
Isa active_isa();

// Chooses by name: "generic", "avx2", "avx512" or "auto". Throws std::invalid_argument on any other name and on a set
// that is not supported here. Meant for tests and benchmarks; calls that are under way keep what they began with.
void set_isa(const std::string& name);

const char* isa_name(Isa isa);

}  // namespace simctg
