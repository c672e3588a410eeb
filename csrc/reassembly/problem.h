// reassemble, carafe and feature_aware_upsample: what they compute, and what their CPU and CUDA
// kernels are called with.
//
//   y[n, c, s i + dy, s j + dx] = sum_tap w[tap, phase, i, j] x[n, c, i + ky - r, j + kx - r]
//
// k is the kernel size, s the scale, r = k / 2 the radius. x is zero outside the image, where w
// keeps its share. All code of this operation uses these names:
//
//   pixel    (i, j), of x
//   tap      ky k + kx: one of the k^2 neighbours that a pixel of y is a sum over
//   phase    dy s + dx: one of the s^2 pixels of y that lie above a pixel of x
//   group    of channels, which share their weights: channel c is in group c / (C / groups)
//   weights  reassemble's logits (N, groups k^2 s^2, H, W), channel (group k^2 + tap) s^2 + phase,
//            with w their softmax over the taps; or carafe's masks (N, groups k^2, s H, s W),
//            channel group k^2 + tap, with w the masks themselves
//   plane    tap s^2 + phase: one of the k^2 s^2 logits of a pixel and group
//
// feature_aware_upsample is given what the logits are made of, the content encoder's convolution:
//
//   logits[n, group k^2 s^2 + plane, i, j] =
//     bias + sum_{c, ty, tx} weight[.., c, ty, tx] compressed[n, c, i + ty d, j + tx d]
//
// d is the dilation; ty and tx count from the kernel's middle, and compressed is zero outside the
// image.
//
// The gradients of y, x and the weights are y_gradient, x_gradient and weights_gradient (dy and dx
// are offsets here).
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace famseg::reassembly {

// The convolution that makes the logits.
struct Encoder {
  int64_t channels, kernel_size, dilation;
  const void* compressed;
  const void* weight;      // contiguous
  const void* bias;        // or null
  bool channels_last;      // compressed
  void* packed = nullptr;  // the weights as the CPU kernels read them, see cpu/encoder.h
};

// Tensors are contiguous (N, C, H, W), or (N, H, W, C) where it says channels_last.
struct Problem {
  Dtype dtype;
  bool softmax;        // weights are logits (reassemble), not masks (carafe)
  int64_t n, c, h, w;  // of x
  int64_t kernel_size, scale, groups;
  const void* x;
  const void* weights;
  bool x_channels_last;  // x, y and their gradients
  bool weights_channels_last;
  const Encoder* encoder =
      nullptr;  // the weights are the logits that it makes; then `weights` is null
};

// Where the gradients go, laid out as what they are the gradients of; null for those not wanted.
struct Gradients {
  const void* y;  // the one that comes in
  void* x;
  void* weights;
  // With an encoder the gradient of the weights, which is nowhere in memory, goes on to these.
  void* compressed = nullptr;
  void* weight = nullptr;
  void* bias = nullptr;

  bool of_weights() const {
    return weights != nullptr || compressed != nullptr || weight != nullptr || bias != nullptr;
  }
};

// On the CPU; CUDA's are in cuda/launch.h.
void forward(Isa isa, const Problem& problem, void* y, int threads);
void backward(Isa isa, const Problem& problem, const Gradients& gradients, int threads);
void upsample_forward(Isa isa, const Problem& problem, void* y, int threads);
void upsample_backward(Isa isa, const Problem& problem, const Gradients& gradients, int threads);

}  // namespace famseg::reassembly
