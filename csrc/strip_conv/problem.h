// strip_conv2d: what it computes, and what its CPU and CUDA kernels are called with.
//
//   a   = square(x) + bias                   x itself without a square convolution
//   r_i = row_i(a) + bias                    of branch i
//   y   = a + sum_i (col_i(r_i) + bias)
//
// All convolutions are depthwise, of stride 1, with "same" zero padding at every stage: a and r_i,
// biases included, are zero outside the image. A kernel of size k reaches k / 2 pixels to either
// side: its reach.
//
// d and a name is the gradient of that name. A prime is the adjoint: the same convolution with the
// kernel mirrored.
//
//   dr_i = col_i'(dy)
//   da   = dy + sum_i row_i'(dr_i)
//   dx   = square'(da)
//
// The gradient of a weight is a sum of products of what its convolution read and the gradient of
// what that made: x and da, a and dr_i, r_i and dy. The gradient of a bias is the sum of the latter.
//
// All code of this operation keeps to these names.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace famseg::strip_conv {

struct Convolution {
  const void* weight;  // (C, size), or (C, size, size) of the square; null: no square convolution
  const void* bias;    // (C) or null
  int size;            // odd; 0 without a square convolution
};

struct Branch {
  Convolution row, col;
};

// Tensors are contiguous (N, C, H, W), or (N, H, W, C) where it says channels_last.
struct Problem {
  Dtype dtype;
  int64_t n, c, h, w;
  bool channels_last;  // x, y and dx
  const void* x;
  Convolution square;
  const Branch* branches;
  int64_t branch_count;
};

// Where the gradients go, laid out as what they are the gradients of; null for those not wanted.
struct ConvolutionGradient {
  void* weight;
  void* bias;
};

struct BranchGradient {
  ConvolutionGradient row, col;
};

struct Gradients {
  const void* dy;  // the one that comes in
  bool dy_channels_last;
  void* dx;
  ConvolutionGradient square;
  const BranchGradient* branches;  // branch_count
};

// On the CPU; CUDA's are in cuda/launch.h.
void forward(Isa isa, const Problem& problem, void* y, int threads);
void backward(Isa isa, const Problem& problem, const Gradients& gradients, int threads);

}  // namespace famseg::strip_conv
