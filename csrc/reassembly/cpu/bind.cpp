#include "reassembly/bind.h"

namespace famseg::reassembly {
namespace {

void run_forward(const Problem& problem, Address y, int threads) {
  const Isa isa = active_isa();
  py::gil_scoped_release release;
  forward(isa, problem, pointer(y), threads);
}

void run_backward(const Problem& problem, Address y_gradient, Address x_gradient,
                  Address weights_gradient, int threads) {
  const Gradients gradients = {pointer(y_gradient), pointer(x_gradient), pointer(weights_gradient)};
  const Isa isa = active_isa();
  py::gil_scoped_release release;
  backward(isa, problem, gradients, threads);
}

}  // namespace

void bind(py::module_& m) {
  bind_problem(m, "reassembly_forward", run_forward,
               "shape: of x; weights: logits with `softmax`, else finished masks; "
               "x_channels_last, weights_channels_last: whether x and y, and the weights, are NHWC "
               "in memory.",
               py::arg("y"), py::arg("threads"));
  bind_problem(m, "reassembly_backward", run_backward,
               "As reassembly_forward. Gradients at address 0 are not computed.",
               py::arg("y_gradient"), py::arg("x_gradient"), py::arg("weights_gradient"),
               py::arg("threads"));
}

}  // namespace famseg::reassembly
