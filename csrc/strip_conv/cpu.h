// strip_conv2d on the CPU, on plain pointers.
//
//   a = square(x) + square_bias            (a = x without a square kernel)
//   y = a + sum_i column_i(row_i(a) + row_bias_i) + column_bias_i
//
// depthwise, stride 1, "same" zero padding at every stage: a and the row results, biases included,
// are zero outside the image. Tensors are contiguous (N, C, H, W), or (N, H, W, C) where it says
// channels_last; weights are (C, taps).
#pragma once

#include <cstddef>
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

// One instruction set's kernels. `scratch` is 64-byte aligned, of the stated size, and all zero
// before its first use; it may go from one piece of work to the next of one problem, but not to
// another problem.

// Pieces of work are blocks: some channels and columns of an image.
struct ForwardKernels {
  int64_t (*blocks)(const Problem&);
  size_t (*scratch)(const Problem&);
  void (*block)(const Problem&, void* y, int64_t block, void* scratch);
};

// Pieces of work are some channels and columns of some images.
struct BackwardPlan {
  int64_t pieces, groups;  // groups of channels
  size_t scratch_bytes, partial_bytes;
};

struct BackwardKernels {
  BackwardPlan (*plan)(const Problem&);
  // Writes the piece's part of the gradient of x, and its share of the gradients of weights and
  // biases to `partial`, partial_bytes.
  void (*piece)(const Problem&, const Gradients&, int64_t piece, void* partial, void* scratch);
  // Adds up the `partials` of all pieces, in order, for one group of channels.
  void (*reduce_group)(const Problem&, const Gradients&, int64_t group, const void* partials,
                       void* scratch);
};

// The forward direction in bfloat16 as products of matrices (bf16.cpp). Pieces of work are channels
// of all images. False: a plane is not finite, and the whole result is for ForwardKernels to
// compute.
struct MatrixKernels {
  bool (*suits)(const Problem&);
  size_t (*scratch)(const Problem&);
  bool (*channel)(const Problem&, void* y, int64_t channel, void* scratch);
};

}  // namespace famseg::strip_conv

namespace famseg {
namespace baseline {
extern const strip_conv::ForwardKernels strip_conv_forward_kernels;
extern const strip_conv::BackwardKernels strip_conv_backward_kernels;
}  // namespace baseline
namespace avx2 {
extern const strip_conv::ForwardKernels strip_conv_forward_kernels;
extern const strip_conv::BackwardKernels strip_conv_backward_kernels;
}  // namespace avx2
namespace avx512 {
extern const strip_conv::ForwardKernels strip_conv_forward_kernels;
extern const strip_conv::BackwardKernels strip_conv_backward_kernels;
}  // namespace avx512
namespace amx {
extern const strip_conv::MatrixKernels strip_conv_matrix_kernels;
}
}  // namespace famseg
