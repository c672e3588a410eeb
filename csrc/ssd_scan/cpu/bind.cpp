#include "common/bind.h"

#include "ssd_scan/cpu/kernels.h"

namespace famseg::ssd_scan {
namespace {

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

Problem scan_from(const std::string& dtype, const ScanShape& shape, const StepRule& step,
                  int64_t chunk, const ScanTensors& tensors) {
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
  const Isa isa = active_isa();
  py::gil_scoped_release release;
  return forward(isa, problem, {pointer(y), pointer(final_states)}, threads);
}

bool ssd_scan_backward(const std::string& dtype, const ScanShape& shape, const StepRule& step,
                       int64_t chunk, const ScanTensors& tensors, Address y_gradient,
                       Address final_states_gradient, const ScanGradients& gradients, int threads) {
  const auto problem = scan_from(dtype, shape, step, chunk, tensors);
  const auto [x, dt, A, B, C, D, z, dt_bias, initial] = gradients;
  const Gradients native = {pointer(y_gradient), pointer(final_states_gradient),
                            pointer(x),          pointer(dt),
                            pointer(A),          pointer(B),
                            pointer(C),          pointer(D),
                            pointer(z),          pointer(dt_bias),
                            pointer(initial)};
  const Isa isa = active_isa();
  py::gil_scoped_release release;
  return backward(isa, problem, native, threads);
}

}  // namespace

void bind(py::module_& m) {
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

}  // namespace famseg::ssd_scan
