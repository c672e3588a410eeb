#include "common/isa.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(FAMSEG_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace famseg {
namespace {

#if defined(__x86_64__)
// Clang before 19 has no name for it in __builtin_cpu_supports.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & (1u << 29)) != 0;
}
#endif

#if defined(FAMSEG_AMX)
bool has_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  if ((edx & amx_bf16) == 0 || (edx & amx_tile) == 0) return false;
  if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned avx512_bf16 = 1u << 5;
  if ((eax & avx512_bf16) == 0) return false;
  // Linux hands out the tiles' 8 KB of state to those processes that ask; for all their threads.
  // It refuses where the kernel or the hypervisor does not know them.
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

std::vector<Isa> detect() {
  std::vector<Isa> isas = {Isa::baseline};
#if defined(__x86_64__)
  // __builtin_cpu_supports also asks whether the operating system saves the wide registers.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) {
    isas.push_back(Isa::avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      isas.push_back(Isa::avx512);
#if defined(FAMSEG_AMX)
      if (has_amx()) isas.push_back(Isa::amx);
#endif
    }
  }
#endif
  return isas;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::baseline:
      return "baseline";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::amx:
      return "amx";
  }
  return "unknown";
}

const std::vector<Isa>& available_isas() {
  // The CPU does not change, so ask it once.
  static const std::vector<Isa> isas = detect();
  return isas;
}

Isa active_isa() {
  const std::vector<Isa>& isas = available_isas();
  const char* wish = std::getenv("FAMSEG_CPU_ISA");
  if (wish == nullptr || *wish == '\0') return isas.back();
  std::string names;
  for (Isa isa : isas) {
    if (std::string(wish) == isa_name(isa)) return isa;
    names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  throw std::invalid_argument("FAMSEG_CPU_ISA=" + std::string(wish) +
                              " is not available on this CPU; available: " + names);
}

}  // namespace famseg
