#include "strip_conv/bind.h"

namespace famseg::strip_conv {
namespace {

void run_forward(const Problem& problem, Address y, int threads) {
  const Isa isa = active_isa();
  py::gil_scoped_release release;
  forward(isa, problem, pointer(y), threads);
}

void run_backward(const Problem& problem, Address y_gradient, bool y_gradient_channels_last,
                  Address x_gradient, Address square_weight_gradient, Address square_bias_gradient,
                  Addresses row_weight_gradients, Addresses row_bias_gradients,
                  Addresses col_weight_gradients, Addresses col_bias_gradients, int threads) {
  const auto branches = branch_gradients(problem, row_weight_gradients, row_bias_gradients,
                                         col_weight_gradients, col_bias_gradients);
  Gradients gradients;
  gradients.dy = pointer(y_gradient);
  gradients.dy_channels_last = y_gradient_channels_last;
  gradients.dx = pointer(x_gradient);
  gradients.square = {pointer(square_weight_gradient), pointer(square_bias_gradient)};
  gradients.branches = branches.data();
  const Isa isa = active_isa();
  py::gil_scoped_release release;
  backward(isa, problem, gradients, threads);
}

}  // namespace

void bind(py::module_& m) {
  bind_problem(m, "strip_conv2d_forward", run_forward,
               "channels_last: x and y are (N, H, W, C) in memory; square_size: 0 without a "
               "square; row_..., col_...: lists, one a branch, biases may be [].",
               py::arg("y"), py::arg("threads"));
  bind_problem(m, "strip_conv2d_backward", run_backward,
               "As strip_conv2d_forward; channels_last: of x and its gradient. Gradients at "
               "address 0 are not computed.",
               py::arg("y_gradient"), py::arg("y_gradient_channels_last"), py::arg("x_gradient"),
               py::arg("square_weight_gradient"), py::arg("square_bias_gradient"),
               py::arg("row_weight_gradients"), py::arg("row_bias_gradients"),
               py::arg("col_weight_gradients"), py::arg("col_bias_gradients"), py::arg("threads"));
}

}  // namespace famseg::strip_conv
