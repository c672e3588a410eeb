// famseg_kernels._cuda: addresses, sizes, names and a stream in; the checks were made in Python.
// Importable without a GPU or a driver (cudart is linked statically).

#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "reassembly/cuda.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;
using Shape = std::tuple<int64_t, int64_t, int64_t, int64_t>;

void* pointer(Address address) {
  return reinterpret_cast<void*>(address);
}

famseg::Dtype dtype_named(const std::string& name) {
  if (name == "float32") return famseg::Dtype::float32;
  if (name == "bfloat16") return famseg::Dtype::bfloat16;
  if (name == "float16") return famseg::Dtype::float16;
  throw std::invalid_argument("dtype " + name + " is none of float32, bfloat16, float16");
}

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

void reassemble_forward(const std::string& dtype, const Shape& shape, Address x, Address logits,
                        Address y, int kernel_size, int scale, int groups, Address stream) {
  const auto [n, c, h, w] = shape;
  const famseg::Dtype element = dtype_named(dtype);
  py::gil_scoped_release release;
  famseg::reassembly::forward_cuda(element, pointer(x), pointer(logits), pointer(y), n, c, h, w,
                                   kernel_size, scale, groups, pointer(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of famseg_kernels. Tensors come as device addresses, contiguous.";
  m.def("device_count", &device_count, "(number of devices, why there is none or '')");
  m.def("driver_version", &driver_version,
        "(newest CUDA version the driver runs, as 13000, why there is none or '')");
  m.def("runtime_version", [] { return CUDART_VERSION; }, "The CUDA version compiled against.");
  m.def("archs", &archs,
        "The compute capabilities this module has machine code for: ['80', '90'].");
  m.def("reassemble_forward", &reassemble_forward, py::arg("dtype"), py::arg("shape"), py::arg("x"),
        py::arg("logits"), py::arg("y"), py::arg("kernel_size"), py::arg("scale"),
        py::arg("groups"), py::arg("stream"),
        "Enqueues on `stream` (torch.cuda.Stream.cuda_stream) of the current device.");
}
