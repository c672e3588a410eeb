// famseg_kernels._cuda: addresses, sizes, names and a stream in; the checks were made in Python.
// Importable without a GPU or a driver (cudart is linked statically).

#ifdef FAMSEG_CUDA_ON_CPU
#include "common/cuda_on_cpu.h"
#else
#include <cuda_runtime_api.h>
#endif
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
#include "strip_conv/cuda.h"

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

// (weight, bias, size)
using Square = std::tuple<Address, Address, int>;
// (row weight, row bias, row size, column weight, column bias, column size)
using Branch = std::tuple<Address, Address, int, Address, Address, int>;
// Gradients (row weight, row bias, column weight, column bias)
using BranchGradient = std::tuple<Address, Address, Address, Address>;

famseg::strip_conv::CudaProblem strip_problem(const std::string& dtype, const Shape& shape,
                                              Address x, const Square& square,
                                              const std::vector<Branch>& branches) {
  const auto [n, c, h, w] = shape;
  const auto [weight, bias, size] = square;
  famseg::strip_conv::CudaProblem problem = {
      dtype_named(dtype), n, c, h, w, pointer(x), pointer(weight), pointer(bias), size, {}};
  if (branches.size() > static_cast<size_t>(famseg::strip_conv::max_branches())) {
    throw std::invalid_argument("too many branches");
  }
  for (const auto& [row, row_bias, row_size, column, column_bias, column_size] : branches) {
    problem.branches.push_back({pointer(row), pointer(row_bias), row_size, pointer(column),
                                pointer(column_bias), column_size});
  }
  return problem;
}

void strip_conv2d_forward(const std::string& dtype, const Shape& shape, Address x,
                          const Square& square, const std::vector<Branch>& branches, Address y,
                          Address stream) {
  const auto problem = strip_problem(dtype, shape, x, square, branches);
  py::gil_scoped_release release;
  famseg::strip_conv::forward_cuda(problem, pointer(y), pointer(stream));
}

std::pair<int64_t, int64_t> strip_conv2d_workspace(const std::string& dtype, const Shape& shape,
                                                   Address x, const Square& square,
                                                   const std::vector<Branch>& branches,
                                                   bool weights) {
  const auto workspace = famseg::strip_conv::backward_workspace_cuda(
      strip_problem(dtype, shape, x, square, branches), weights);
  return {workspace.middle, workspace.partial};
}

void strip_conv2d_backward(const std::string& dtype, const Shape& shape, Address x,
                           const Square& square, const std::vector<Branch>& branches,
                           Address y_gradient,
                           const std::tuple<Address, Address, Address>& gradients,
                           const std::vector<BranchGradient>& branch_gradients,
                           const std::pair<Address, Address>& workspace, Address stream) {
  if (branch_gradients.size() != branches.size()) {
    throw std::invalid_argument("branch_gradients needs one entry for each branch");
  }
  const auto problem = strip_problem(dtype, shape, x, square, branches);
  const auto [x_gradient, square_weight, square_bias] = gradients;
  famseg::strip_conv::CudaGradients native = {
      pointer(x_gradient), pointer(square_weight), pointer(square_bias), {}};
  for (const auto& [row, row_bias, column, column_bias] : branch_gradients) {
    native.branches.push_back(
        {pointer(row), pointer(row_bias), pointer(column), pointer(column_bias)});
  }
  py::gil_scoped_release release;
  famseg::strip_conv::backward_cuda(
      problem, pointer(y_gradient), native, static_cast<float*>(pointer(workspace.first)),
      static_cast<float*>(pointer(workspace.second)), pointer(stream));
}

// (kernel size, scale, groups)
using Window = std::tuple<int, int, int>;

famseg::reassembly::CudaProblem reassembly_problem(const std::string& dtype, bool softmax,
                                                   const Shape& shape, Address x, Address weights,
                                                   const Window& window) {
  const auto [n, c, h, w] = shape;
  const auto [kernel_size, scale, groups] = window;
  return {dtype_named(dtype), softmax,          n,           c,     h,     w,
          pointer(x),         pointer(weights), kernel_size, scale, groups};
}

void reassembly_forward(const std::string& dtype, bool softmax, const Shape& shape, Address x,
                        Address weights, const Window& window, Address y, Address stream) {
  const auto problem = reassembly_problem(dtype, softmax, shape, x, weights, window);
  py::gil_scoped_release release;
  famseg::reassembly::forward_cuda(problem, pointer(y), pointer(stream));
}

void reassembly_backward(const std::string& dtype, bool softmax, const Shape& shape, Address x,
                         Address weights, const Window& window, Address y_gradient,
                         Address x_gradient, Address weights_gradient, Address sums,
                         Address stream) {
  const auto problem = reassembly_problem(dtype, softmax, shape, x, weights, window);
  py::gil_scoped_release release;
  famseg::reassembly::backward_cuda(problem, pointer(y_gradient), pointer(x_gradient),
                                    pointer(weights_gradient), static_cast<float*>(pointer(sums)),
                                    pointer(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() =
      "CUDA kernels of famseg_kernels. Tensors come as device addresses, contiguous; work is "
      "enqueued on `stream` (torch.cuda.Stream.cuda_stream) of the current device.";
  m.def("device_count", &device_count, "(number of devices, why there is none or '')");
  m.def("driver_version", &driver_version,
        "(newest CUDA version the driver runs, as 13000, why there is none or '')");
  m.def("runtime_version", [] { return CUDART_VERSION; }, "The CUDA version compiled against.");
  m.def("archs", &archs,
        "The compute capabilities this module has machine code for: ['80', '90'].");
  m.def("strip_conv2d_max_branches", &famseg::strip_conv::max_branches);
  m.def("strip_conv2d_forward", &strip_conv2d_forward, py::arg("dtype"), py::arg("shape"),
        py::arg("x"), py::arg("square"), py::arg("branches"), py::arg("y"), py::arg("stream"),
        "square: (weight, bias, size), size 0 for none; branches: [(row weight, bias, size, column "
        "weight, bias, size)]; an address is 0 where there is nothing.");
  m.def("strip_conv2d_workspace", &strip_conv2d_workspace, py::arg("dtype"), py::arg("shape"),
        py::arg("x"), py::arg("square"), py::arg("branches"), py::arg("weights"),
        "Float32 numbers that strip_conv2d_backward wants: (gradient of the square, partial sums); "
        "weights: whether any gradient of a weight or bias is wanted. 0: pass address 0.");
  m.def("strip_conv2d_backward", &strip_conv2d_backward, py::arg("dtype"), py::arg("shape"),
        py::arg("x"), py::arg("square"), py::arg("branches"), py::arg("y_gradient"),
        py::arg("gradients"), py::arg("branch_gradients"), py::arg("workspace"), py::arg("stream"),
        "As strip_conv2d_forward; gradients: (x, square weight, square bias); branch_gradients: "
        "[(row, row bias, column, column bias)]; those at address 0 are not written, but that of x "
        "must be there where the workspace holds a gradient of the square.");
  m.def("reassembly_forward", &reassembly_forward, py::arg("dtype"), py::arg("softmax"),
        py::arg("shape"), py::arg("x"), py::arg("weights"), py::arg("window"), py::arg("y"),
        py::arg("stream"),
        "shape: of x; window: (kernel size, scale, groups); weights: logits with `softmax`, else "
        "finished masks.");
  m.def(
      "reassembly_backward", &reassembly_backward, py::arg("dtype"), py::arg("softmax"),
      py::arg("shape"), py::arg("x"), py::arg("weights"), py::arg("window"), py::arg("y_gradient"),
      py::arg("x_gradient"), py::arg("weights_gradient"), py::arg("sums"), py::arg("stream"),
      "As reassembly_forward. Gradients at address 0 are not computed. sums: N groups scale^2 H W "
      "float32 with `softmax`, else 0.");
}
