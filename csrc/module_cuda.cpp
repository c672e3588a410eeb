// famseg_kernels._cuda: what each operation binds, and what the module and the driver are made for.
// Importable without a GPU or a driver (cudart is linked statically).

#ifdef FAMSEG_CUDA_ON_CPU
#include "common/cuda_on_cpu.h"
#else
#include <cuda_runtime_api.h>
#endif

#include <sstream>
#include <utility>

#include "common/bind.h"

namespace famseg {

namespace strip_conv {
void bind(py::module_& m);
}
namespace reassembly {
void bind(py::module_& m);
}

namespace {

// Errors are answers here: a machine without a GPU has 0 devices and a reason.
std::pair<int, std::string> device_count() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess) return {count, count == 0 ? "no CUDA device" : ""};
  cudaGetLastError();  // clears it, so that no later launch is blamed
  return {0, cudaGetErrorString(status)};
}

std::pair<int, std::string> driver_version() {
  int version = 0;
  const cudaError_t status = cudaDriverGetVersion(&version);
  if (status == cudaSuccess) return {version, version == 0 ? "no CUDA driver" : ""};
  cudaGetLastError();
  return {0, cudaGetErrorString(status)};
}

std::vector<std::string> archs() {
  std::vector<std::string> names;
  std::istringstream list(FAMSEG_CUDA_ARCHS);
  for (std::string name; std::getline(list, name, ',');) names.push_back(name);
  return names;
}

}  // namespace
}  // namespace famseg

PYBIND11_MODULE(_cuda, m) {
  m.doc() =
      "CUDA kernels of famseg_kernels. Tensors come as device addresses, contiguous; work is "
      "enqueued on `stream` (torch.cuda.Stream.cuda_stream) of the current device.";
  m.def("device_count", &famseg::device_count, "(number of devices, why there is none or '')");
  m.def("driver_version", &famseg::driver_version,
        "(newest CUDA version the driver runs, as 13000, why there is none or '')");
  m.def("runtime_version", [] { return CUDART_VERSION; }, "The CUDA version compiled against.");
  m.def("archs", &famseg::archs,
        "The compute capabilities this module has machine code for: ['80', '90'].");
  famseg::strip_conv::bind(m);
  famseg::reassembly::bind(m);
}
