// strip_conv2d on the CPU, on plain pointers.
//
//   a = square(x) + square_bias            (a = x without a square kernel)
//   y = a + sum_i column_i(row_i(a) + row_bias_i) + column_bias_i
//
// depthwise, stride 1, "same" zero padding at every stage: a and the row results, biases included,
// are zero outside the image. Tensors are contiguous (N, C, H, W), or (N, H, W, C) where it says
// channels_last; weights are (C, taps).
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace famseg::strip_conv {

struct Branch {
  const void* row_weight;  // (C, row_size)
  const void* row_bias;    // (C) or null
  int64_t row_size;
  const void* column_weight;  // (C, column_size)
  const void* column_bias;    // (C) or null
  int64_t column_size;
};

struct Problem {
  Dtype dtype;
  int64_t n, c, h, w;
  bool channels_last;  // x, y of the forward direction, the gradient of x
  const void* x;
  const void* square_weight;  // (C, square_size, square_size) or null
  const void* square_bias;    // (C) or null
  int64_t square_size;        // 0 without a square kernel
  const Branch* branches;
  int64_t branch_count;
};

// Where the gradients go; null for those not wanted.
struct BranchGradients {
  void* row_weight;
  void* row_bias;
  void* column_weight;
  void* column_bias;
};

struct Gradients {
  const void* y;  // the incoming gradient
  bool y_channels_last;
  void* x;
  void* square_weight;
  void* square_bias;
  const BranchGradients* branches;
};

void forward(Isa isa, const Problem& problem, void* y, int threads);
void backward(Isa isa, const Problem& problem, const Gradients& gradients, int threads);

}  // namespace famseg::strip_conv
