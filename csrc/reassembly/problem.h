// reassemble and carafe on the CPU, on plain pointers.
//
//   y[n, c, s i + dy, s j + dx] = sum_tap w[tap, dy, dx, i, j] x[n, c, i + ky - r, j + kx - r]
//
// with tap = ky k + kx, r = k / 2, x zero outside the image. Channel c takes the weights of group
// c / (C / groups). The weights are the softmax over the taps of logits (N, groups k^2 s^2, H, W),
// channel (group k^2 + tap) s^2 + dy s + dx, or finished masks (N, groups k^2, s H, s W), channel
// group k^2 + tap. x, y and their gradients are NCHW or NHWC, all of them; so are the weights and
// their gradient.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace famseg::reassembly {

struct Problem {
  Dtype dtype;
  bool softmax;  // weights are logits (reassemble), not masks (carafe)
  bool x_channels_last, weights_channels_last;
  int64_t n, c, h, w;
  int64_t kernel_size, scale, groups;
  const void* x;
  const void* weights;
};

// Where the gradients go; null for those not wanted.
struct Gradients {
  const void* y;  // the incoming gradient
  void* x;
  void* weights;
};

void forward(Isa isa, const Problem& problem, void* y, int threads);
void backward(Isa isa, const Problem& problem, const Gradients& gradients, int threads);

}  // namespace famseg::reassembly
