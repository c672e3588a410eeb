// famseg_kernels._cpu: addresses, sizes and names in; the checks were made in Python.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common/isa.h"
#include "reassembly/cpu.h"
#include "ssd_scan/cpu.h"
#include "strip_conv/cpu.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;

void* pointer(Address address) {
  return reinterpret_cast<void*>(address);
}

famseg::Dtype dtype_named(const std::string& name) {
  if (name == "float32") return famseg::Dtype::float32;
  if (name == "float64") return famseg::Dtype::float64;
  if (name == "bfloat16") return famseg::Dtype::bfloat16;
  if (name == "float16") return famseg::Dtype::float16;
  throw std::invalid_argument("dtype " + name + " is none of float32, float64, bfloat16, float16");
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (famseg::Isa isa : famseg::available_isas()) names.push_back(famseg::isa_name(isa));
  return names;
}

// (n, c, h, w)
using Shape = std::tuple<int64_t, int64_t, int64_t, int64_t>;
// (address, bias address, size)
using Square = std::tuple<Address, Address, int64_t>;
// (row, row bias, row size, column, column bias, column size)
using Branch = std::tuple<Address, Address, int64_t, Address, Address, int64_t>;
// (row, row bias, column, column bias)
using BranchGradient = std::tuple<Address, Address, Address, Address>;

std::vector<famseg::strip_conv::Branch> branches_from(const std::vector<Branch>& branches) {
  std::vector<famseg::strip_conv::Branch> result;
  for (const auto& [row, row_bias, row_size, column, column_bias, column_size] : branches) {
    result.push_back({pointer(row), pointer(row_bias), row_size, pointer(column),
                      pointer(column_bias), column_size});
  }
  return result;
}

famseg::strip_conv::Problem problem_from(const std::string& dtype, const Shape& shape,
                                         bool channels_last, Address x, const Square& square,
                                         const std::vector<famseg::strip_conv::Branch>& branches) {
  const auto [n, c, h, w] = shape;
  const auto [weight, bias, size] = square;
  return {dtype_named(dtype),
          n,
          c,
          h,
          w,
          channels_last,
          pointer(x),
          pointer(weight),
          pointer(bias),
          size,
          branches.data(),
          static_cast<int64_t>(branches.size())};
}

void strip_conv2d_forward(const std::string& dtype, const Shape& shape, bool channels_last,
                          Address x, const Square& square, const std::vector<Branch>& branches,
                          Address y, int threads) {
  const auto native_branches = branches_from(branches);
  const auto problem = problem_from(dtype, shape, channels_last, x, square, native_branches);
  const famseg::Isa isa = famseg::active_isa();
  py::gil_scoped_release release;
  famseg::strip_conv::forward(isa, problem, pointer(y), threads);
}

void strip_conv2d_backward(const std::string& dtype, const Shape& shape,
                           const std::tuple<bool, bool>& channels_last, Address x,
                           const Square& square, const std::vector<Branch>& branches,
                           Address y_gradient, Address x_gradient,
                           const std::tuple<Address, Address>& square_gradients,
                           const std::vector<BranchGradient>& branch_gradients, int threads) {
  if (branch_gradients.size() != branches.size()) {
    throw std::invalid_argument("branch_gradients needs one entry for each branch");
  }
  const auto native_branches = branches_from(branches);
  const auto [x_last, y_last] = channels_last;
  const auto problem = problem_from(dtype, shape, x_last, x, square, native_branches);
  std::vector<famseg::strip_conv::BranchGradients> native_gradients;
  for (const auto& [row, row_bias, column, column_bias] : branch_gradients) {
    native_gradients.push_back(
        {pointer(row), pointer(row_bias), pointer(column), pointer(column_bias)});
  }
  const famseg::strip_conv::Gradients gradients = {pointer(y_gradient),
                                                   y_last,
                                                   pointer(x_gradient),
                                                   pointer(std::get<0>(square_gradients)),
                                                   pointer(std::get<1>(square_gradients)),
                                                   native_gradients.data()};
  const famseg::Isa isa = famseg::active_isa();
  py::gil_scoped_release release;
  famseg::strip_conv::backward(isa, problem, gradients, threads);
}

// (kernel size, scale, groups)
using Window = std::tuple<int64_t, int64_t, int64_t>;
// (x and what is shaped like it, weights): NHWC in memory
using ChannelsLast = std::tuple<bool, bool>;

famseg::reassembly::Problem reassembly_from(const std::string& dtype, bool softmax,
                                            const Shape& shape, Address x, Address weights,
                                            const ChannelsLast& channels_last,
                                            const Window& window) {
  const auto [n, c, h, w] = shape;
  const auto [kernel_size, scale, groups] = window;
  const auto [x_last, weights_last] = channels_last;
  return {dtype_named(dtype),
          softmax,
          x_last,
          weights_last,
          n,
          c,
          h,
          w,
          kernel_size,
          scale,
          groups,
          pointer(x),
          pointer(weights)};
}

void reassembly_forward(const std::string& dtype, bool softmax, const Shape& shape, Address x,
                        Address weights, const ChannelsLast& channels_last, const Window& window,
                        Address y, int threads) {
  const auto problem = reassembly_from(dtype, softmax, shape, x, weights, channels_last, window);
  const famseg::Isa isa = famseg::active_isa();
  py::gil_scoped_release release;
  famseg::reassembly::forward(isa, problem, pointer(y), threads);
}

void reassembly_backward(const std::string& dtype, bool softmax, const Shape& shape, Address x,
                         Address weights, const ChannelsLast& channels_last, const Window& window,
                         Address y_gradient, Address x_gradient, Address weights_gradient,
                         int threads) {
  const auto problem = reassembly_from(dtype, softmax, shape, x, weights, channels_last, window);
  const famseg::reassembly::Gradients gradients = {pointer(y_gradient), pointer(x_gradient),
                                                   pointer(weights_gradient)};
  const famseg::Isa isa = famseg::active_isa();
  py::gil_scoped_release release;
  famseg::reassembly::backward(isa, problem, gradients, threads);
}

// (batch, height, width, heads, headdim, groups, state, directions, matrices of B and C)
using ScanShape =
    std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;
// (softplus, low, high)
using StepRule = std::tuple<bool, double, double>;
// (x, dt, A, B, C, D, z, dt_bias, initial states, resets)
using ScanTensors = std::tuple<Address, Address, Address, Address, Address, Address, Address,
                               Address, Address, Address>;
// (x, dt, A, B, C, D, z, dt_bias, initial states)
using ScanGradients =
    std::tuple<Address, Address, Address, Address, Address, Address, Address, Address, Address>;

famseg::ssd_scan::Problem scan_from(const std::string& dtype, const ScanShape& shape,
                                    const StepRule& step, int64_t chunk,
                                    const ScanTensors& tensors) {
  const auto [batch, height, width, heads, headdim, groups, state, directions, matrices] = shape;
  const auto [softplus, low, high] = step;
  const auto [x, dt, A, B, C, D, z, dt_bias, initial, resets] = tensors;
  return {dtype_named(dtype),
          batch,
          height,
          width,
          heads,
          headdim,
          groups,
          state,
          directions,
          matrices,
          softplus,
          low,
          high,
          chunk,
          pointer(x),
          pointer(dt),
          pointer(A),
          pointer(B),
          pointer(C),
          pointer(D),
          pointer(z),
          pointer(dt_bias),
          pointer(initial),
          static_cast<const uint8_t*>(pointer(resets))};
}

bool ssd_scan_forward(const std::string& dtype, const ScanShape& shape, const StepRule& step,
                      int64_t chunk, const ScanTensors& tensors, Address y, Address final_states,
                      int threads) {
  const auto problem = scan_from(dtype, shape, step, chunk, tensors);
  const famseg::Isa isa = famseg::active_isa();
  py::gil_scoped_release release;
  return famseg::ssd_scan::forward(isa, problem, {pointer(y), pointer(final_states)}, threads);
}

bool ssd_scan_backward(const std::string& dtype, const ScanShape& shape, const StepRule& step,
                       int64_t chunk, const ScanTensors& tensors, Address y_gradient,
                       Address final_states_gradient, const ScanGradients& gradients, int threads) {
  const auto problem = scan_from(dtype, shape, step, chunk, tensors);
  const auto [x, dt, A, B, C, D, z, dt_bias, initial] = gradients;
  const famseg::ssd_scan::Gradients native = {pointer(y_gradient), pointer(final_states_gradient),
                                              pointer(x),          pointer(dt),
                                              pointer(A),          pointer(B),
                                              pointer(C),          pointer(D),
                                              pointer(z),          pointer(dt_bias),
                                              pointer(initial)};
  const famseg::Isa isa = famseg::active_isa();
  py::gil_scoped_release release;
  return famseg::ssd_scan::backward(isa, problem, native, threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of famseg_kernels. Tensors come as addresses (0: absent), contiguous.";
  m.def(
      "isa", [] { return std::string(famseg::isa_name(famseg::active_isa())); },
      "The instruction set the kernels run with; FAMSEG_CPU_ISA forces a lower one.");
  m.def("available_isas", &available_isas, "The instruction sets this CPU has, lowest first.");
  m.def(
      "strip_conv2d_forward", &strip_conv2d_forward, py::arg("dtype"), py::arg("shape"),
      py::arg("channels_last"), py::arg("x"), py::arg("square"), py::arg("branches"), py::arg("y"),
      py::arg("threads"),
      "channels_last: x and y are (N, H, W, C) in memory; square: (weight, bias, size); branches: "
      "[(row, row bias, row size, column, column bias, column size)].");
  m.def(
      "strip_conv2d_backward", &strip_conv2d_backward, py::arg("dtype"), py::arg("shape"),
      py::arg("channels_last"), py::arg("x"), py::arg("square"), py::arg("branches"),
      py::arg("y_gradient"), py::arg("x_gradient"), py::arg("square_gradients"),
      py::arg("branch_gradients"), py::arg("threads"),
      "As strip_conv2d_forward; channels_last: whether (x and its gradient, the gradient of y) are "
      "(N, H, W, C) in memory; square_gradients: (weight, bias); "
      "branch_gradients: [(row, row "
      "bias, column, column bias)]. Gradients at address 0 are not computed.");
  m.def("reassembly_forward", &reassembly_forward, py::arg("dtype"), py::arg("softmax"),
        py::arg("shape"), py::arg("x"), py::arg("weights"), py::arg("channels_last"),
        py::arg("window"), py::arg("y"), py::arg("threads"),
        "shape: of x; window: (kernel size, scale, groups); weights: logits with `softmax`, else "
        "finished masks; channels_last: whether (x and y, weights) are NHWC in memory.");
  m.def("reassembly_backward", &reassembly_backward, py::arg("dtype"), py::arg("softmax"),
        py::arg("shape"), py::arg("x"), py::arg("weights"), py::arg("channels_last"),
        py::arg("window"), py::arg("y_gradient"), py::arg("x_gradient"),
        py::arg("weights_gradient"), py::arg("threads"),
        "As reassembly_forward. Gradients at address 0 are not computed.");
  m.def(
      "ssd_scan_forward", &ssd_scan_forward, py::arg("dtype"), py::arg("shape"), py::arg("step"),
      py::arg("chunk"), py::arg("tensors"), py::arg("y"), py::arg("final_states"),
      py::arg("threads"),
      "shape: (batch, height, width, heads, headdim, groups, state, directions, matrices of B and "
      "C); step: (softplus, low, high) of dt; tensors: (x, dt, A, B, C, D, z, dt_bias, initial "
      "states, resets), all but x, B, C, z and resets in the type of the arithmetic. Returns "
      "whether all is finite that the results are made of; if not, they are not to be used.");
  m.def("ssd_scan_backward", &ssd_scan_backward, py::arg("dtype"), py::arg("shape"),
        py::arg("step"), py::arg("chunk"), py::arg("tensors"), py::arg("y_gradient"),
        py::arg("final_states_gradient"), py::arg("gradients"), py::arg("threads"),
        "As ssd_scan_forward; gradients: of the tensors but resets. Gradients at address 0 are not "
        "computed. Returns as ssd_scan_forward does.");
}
