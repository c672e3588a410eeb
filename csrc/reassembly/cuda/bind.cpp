#include "common/bind.h"

#include "reassembly/cuda/launch.h"

namespace famseg::reassembly {
namespace {

// (kernel size, scale, groups)
using Window = std::tuple<int, int, int>;

CudaProblem reassembly_problem(const std::string& dtype, bool softmax, const Shape& shape,
                               Address x, Address weights, const Window& window) {
  const auto [n, c, h, w] = shape;
  const auto [kernel_size, scale, groups] = window;
  return {dtype_named(dtype), softmax,          n,           c,     h,     w,
          pointer(x),         pointer(weights), kernel_size, scale, groups};
}

void reassembly_forward(const std::string& dtype, bool softmax, const Shape& shape, Address x,
                        Address weights, const Window& window, Address y, Address stream) {
  const auto problem = reassembly_problem(dtype, softmax, shape, x, weights, window);
  py::gil_scoped_release release;
  forward_cuda(problem, pointer(y), pointer(stream));
}

void reassembly_backward(const std::string& dtype, bool softmax, const Shape& shape, Address x,
                         Address weights, const Window& window, Address y_gradient,
                         Address x_gradient, Address weights_gradient, Address sums,
                         Address stream) {
  const auto problem = reassembly_problem(dtype, softmax, shape, x, weights, window);
  py::gil_scoped_release release;
  backward_cuda(problem, pointer(y_gradient), pointer(x_gradient), pointer(weights_gradient),
                static_cast<float*>(pointer(sums)), pointer(stream));
}

}  // namespace

void bind(py::module_& m) {
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

}  // namespace famseg::reassembly
