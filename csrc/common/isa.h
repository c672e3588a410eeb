// Which instruction set the CPU kernels run with.
//
// Every kernel file is compiled once per level; the level is chosen at run time, so one binary
// serves every CPU of an architecture. FAMSEG_CPU_ISA forces a lower level (tests use that).
//
// `amx` adds to avx512 the bfloat16 conversions and the matrix tiles (Sapphire Rapids and later).
// They serve bfloat16 only: at that level a driver takes the kernels of its op's forward_amx.cpp
// where those apply, and the avx512 kernels otherwise.
#pragma once

#include <string>
#include <vector>

namespace famseg {

enum class Isa { baseline, avx2, avx512, amx };

const char* isa_name(Isa isa);

// What this CPU runs, lowest first.
const std::vector<Isa>& available_isas();

// The highest available level, or the one FAMSEG_CPU_ISA names. Throws std::invalid_argument when
// that is none of the available ones. Reads the environment on each call: call it with the GIL
// held, under which Python changes the environment.
Isa active_isa();

}  // namespace famseg
