#include "common/bind.h"

#include "reassembly/cpu/kernels.h"

namespace famseg::reassembly {
namespace {

// (kernel size, scale, groups)
using Window = std::tuple<int64_t, int64_t, int64_t>;
// (x and what is shaped like it, weights): NHWC in memory
using ChannelsLast = std::tuple<bool, bool>;

Problem reassembly_from(const std::string& dtype, bool softmax, const Shape& shape, Address x,
                        Address weights, const ChannelsLast& channels_last, const Window& window) {
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
  const Isa isa = active_isa();
  py::gil_scoped_release release;
  forward(isa, problem, pointer(y), threads);
}

void reassembly_backward(const std::string& dtype, bool softmax, const Shape& shape, Address x,
                         Address weights, const ChannelsLast& channels_last, const Window& window,
                         Address y_gradient, Address x_gradient, Address weights_gradient,
                         int threads) {
  const auto problem = reassembly_from(dtype, softmax, shape, x, weights, channels_last, window);
  const Gradients gradients = {pointer(y_gradient), pointer(x_gradient), pointer(weights_gradient)};
  const Isa isa = active_isa();
  py::gil_scoped_release release;
  backward(isa, problem, gradients, threads);
}

}  // namespace

void bind(py::module_& m) {
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
}

}  // namespace famseg::reassembly
