// The tables of kernels of the instruction set that the driver was asked for.
//
// Each kernel file is compiled once per level and defines its table in that level's namespace:
// famseg::avx2::strip_conv_forward_kernels. These are macros because the table's name is their
// parameter, to be looked up in several namespaces, and because a level that is not in the build
// must not be named: its table would be missing when the module is linked.
#pragma once

#include "common/isa.h"

// A reference to the table of the highest level up to `isa` that has one. The level `amx` has
// tables of its own only for what tiles serve, FAMSEG_AMX_KERNELS; otherwise it is avx512.
#if defined(__x86_64__)
#define FAMSEG_KERNELS(isa, table)                          \
  ((isa) >= ::famseg::Isa::avx512 ? ::famseg::avx512::table \
   : (isa) == ::famseg::Isa::avx2 ? ::famseg::avx2::table   \
                                  : ::famseg::baseline::table)
#else
#define FAMSEG_KERNELS(isa, table) (static_cast<void>(isa), ::famseg::baseline::table)
#endif

// The address of the table for matrix tiles, or null.
#if defined(FAMSEG_AMX)
#define FAMSEG_AMX_KERNELS(isa, table) \
  ((isa) == ::famseg::Isa::amx ? &::famseg::amx::table : nullptr)
#else
#define FAMSEG_AMX_KERNELS(isa, table) \
  (static_cast<void>(isa), static_cast<decltype(&::famseg::amx::table)>(nullptr))
#endif
