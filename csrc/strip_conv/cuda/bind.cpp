#include "strip_conv/bind.h"

#include "strip_conv/cuda/launch.h"

namespace famseg::strip_conv {
namespace {

void run_forward(const Problem& problem, Address y, Address stream) {
  py::gil_scoped_release release;
  forward_cuda(problem, pointer(y), pointer(stream));
}

py::dict workspace(const Problem& problem, bool weights) {
  const Workspace workspace = backward_workspace_cuda(problem, weights);
  py::dict sizes;
  sizes["da"] = workspace.da;
  sizes["partials"] = workspace.partials;
  return sizes;
}

void run_backward(const Problem& problem, Address y_gradient, Address x_gradient,
                  Address square_weight_gradient, Address square_bias_gradient,
                  Addresses row_weight_gradients, Addresses row_bias_gradients,
                  Addresses col_weight_gradients, Addresses col_bias_gradients, Address da,
                  Address partials, Address stream) {
  const auto branches = branch_gradients(problem, row_weight_gradients, row_bias_gradients,
                                         col_weight_gradients, col_bias_gradients);
  Gradients gradients;
  gradients.dy = pointer(y_gradient);
  gradients.dy_channels_last = false;
  gradients.dx = pointer(x_gradient);
  gradients.square = {pointer(square_weight_gradient), pointer(square_bias_gradient)};
  gradients.branches = branches.data();
  py::gil_scoped_release release;
  backward_cuda(problem, gradients, static_cast<float*>(pointer(da)),
                static_cast<float*>(pointer(partials)), pointer(stream));
}

}  // namespace

void bind(py::module_& m) {
  m.def("strip_conv2d_max_branches", &max_branches);
  bind_problem(m, "strip_conv2d_forward", run_forward,
               "channels_last: must be False; square_size: 0 without a square; row_..., col_...: "
               "lists, one a branch, biases may be []. An address is 0 where there is nothing.",
               py::arg("y"), py::arg("stream"));
  bind_problem(m, "strip_conv2d_workspace", workspace,
               "Float32 numbers that strip_conv2d_backward wants, by the name of its argument: "
               "'da' and 'partials'. 0: pass address 0. weights: whether any gradient of a weight "
               "or bias is wanted.",
               py::arg("weights"));
  bind_problem(m, "strip_conv2d_backward", run_backward,
               "As strip_conv2d_forward. Gradients at address 0 are not computed, but that of x "
               "must be there where the workspace holds da.",
               py::arg("y_gradient"), py::arg("x_gradient"), py::arg("square_weight_gradient"),
               py::arg("square_bias_gradient"), py::arg("row_weight_gradients"),
               py::arg("row_bias_gradients"), py::arg("col_weight_gradients"),
               py::arg("col_bias_gradients"), py::arg("da"), py::arg("partials"),
               py::arg("stream"));
}

}  // namespace famseg::strip_conv
