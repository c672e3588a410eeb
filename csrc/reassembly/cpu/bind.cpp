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

Encoder encoder_of(Address compressed, Address weight, Address bias, int64_t channels,
                   int64_t kernel_size, int64_t dilation, bool channels_last) {
  return {channels,        kernel_size,   dilation,     pointer(compressed),
          pointer(weight), pointer(bias), channels_last};
}

void run_upsample_forward(const Problem& problem, Address compressed, Address weight, Address bias,
                          int64_t channels, int64_t kernel_size, int64_t dilation,
                          bool channels_last, Address y, int threads) {
  const Encoder encoder =
      encoder_of(compressed, weight, bias, channels, kernel_size, dilation, channels_last);
  Problem encoded = problem;
  encoded.encoder = &encoder;
  const Isa isa = active_isa();
  py::gil_scoped_release release;
  upsample_forward(isa, encoded, pointer(y), threads);
}

void run_upsample_backward(const Problem& problem, Address compressed, Address weight, Address bias,
                           int64_t channels, int64_t kernel_size, int64_t dilation,
                           bool channels_last, Address y_gradient, Address x_gradient,
                           Address compressed_gradient, Address weight_gradient,
                           Address bias_gradient, int threads) {
  const Encoder encoder =
      encoder_of(compressed, weight, bias, channels, kernel_size, dilation, channels_last);
  Problem encoded = problem;
  encoded.encoder = &encoder;
  const Gradients gradients = {
      pointer(y_gradient),          pointer(x_gradient),      nullptr,
      pointer(compressed_gradient), pointer(weight_gradient), pointer(bias_gradient)};
  const Isa isa = active_isa();
  py::gil_scoped_release release;
  upsample_backward(isa, encoded, gradients, threads);
}

// Binds run(problem, encoder's arguments..., more...).
template <typename Run, typename... Names>
void bind_encoded(py::module_& m, const char* name, Run run, const char* doc,
                  const Names&... names) {
  bind_problem(m, name, run, doc, py::arg("compressed"), py::arg("weight"), py::arg("bias"),
               py::arg("compressed_channels"), py::arg("encoder_kernel_size"), py::arg("dilation"),
               py::arg("compressed_channels_last"), names...);
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
  bind_encoded(m, "upsample_forward", run_upsample_forward,
               "As reassembly_forward, of the logits that the encoder makes of compressed; "
               "weights: 0; bias: may be 0.",
               py::arg("y"), py::arg("threads"));
  bind_encoded(m, "upsample_backward", run_upsample_backward,
               "As upsample_forward. Gradients at address 0 are not computed.",
               py::arg("y_gradient"), py::arg("x_gradient"), py::arg("compressed_gradient"),
               py::arg("weight_gradient"), py::arg("bias_gradient"), py::arg("threads"));
}

}  // namespace famseg::reassembly
