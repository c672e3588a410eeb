#include "common/isa.h"

#include <cstdlib>
#include <stdexcept>

namespace famseg {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::baseline:
      return "baseline";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
  }
  return "unknown";
}

std::vector<Isa> available_isas() {
  std::vector<Isa> isas = {Isa::baseline};
#if defined(__x86_64__)
  // __builtin_cpu_supports also asks whether the operating system saves the wide registers.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    isas.push_back(Isa::avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      isas.push_back(Isa::avx512);
    }
  }
#endif
  return isas;
}

Isa active_isa() {
  // The CPU does not change, so ask it once.
  static const std::vector<Isa> isas = available_isas();
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
