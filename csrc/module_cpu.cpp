// famseg_kernels._cpu: what each operation binds, and the instruction set.

#include "common/bind.h"
#include "common/isa.h"

namespace famseg {

namespace strip_conv {
void bind(py::module_& m);
}
namespace ssd_scan {
void bind(py::module_& m);
}
namespace reassembly {
void bind(py::module_& m);
}

namespace {

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (Isa isa : available_isas()) names.push_back(isa_name(isa));
  return names;
}

}  // namespace
}  // namespace famseg

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of famseg_kernels. Tensors come as addresses (0: absent), contiguous.";
  m.def(
      "isa", [] { return std::string(famseg::isa_name(famseg::active_isa())); },
      "The instruction set the kernels run with; FAMSEG_CPU_ISA forces a lower one.");
  m.def("available_isas", &famseg::isa_names, "The instruction sets this CPU has, lowest first.");
  famseg::strip_conv::bind(m);
  famseg::ssd_scan::bind(m);
  famseg::reassembly::bind(m);
}
