#include "reassembly/bind.h"

#include "reassembly/cuda/launch.h"

namespace famseg::reassembly {
namespace {

void run_forward(const Problem& problem, Address y, Address stream) {
  py::gil_scoped_release release;
  forward_cuda(problem, pointer(y), pointer(stream));
}

void run_backward(const Problem& problem, Address y_gradient, Address x_gradient,
                  Address weights_gradient, Address log_sums, Address stream) {
  const Gradients gradients = {pointer(y_gradient), pointer(x_gradient), pointer(weights_gradient)};
  py::gil_scoped_release release;
  backward_cuda(problem, gradients, static_cast<float*>(pointer(log_sums)), pointer(stream));
}

}  // namespace

void bind(py::module_& m) {
  bind_problem(m, "reassembly_forward", run_forward,
               "shape: of x; weights: logits with `softmax`, else finished masks; "
               "x_channels_last, weights_channels_last: must be False.",
               py::arg("y"), py::arg("stream"));
  bind_problem(m, "reassembly_backward", run_backward,
               "As reassembly_forward. Gradients at address 0 are not computed. log_sums: room for "
               "N groups scale^2 H W float32 with `softmax`, else 0.",
               py::arg("y_gradient"), py::arg("x_gradient"), py::arg("weights_gradient"),
               py::arg("log_sums"), py::arg("stream"));
}

}  // namespace famseg::reassembly
