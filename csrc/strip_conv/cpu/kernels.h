// The CPU kernels of strip_conv2d, one instruction set's to a table.
#pragma once

#include <cstddef>
#include <cstdint>

#include "strip_conv/problem.h"

namespace famseg::strip_conv {

// One instruction set's kernels. `scratch` is 64-byte aligned, of the stated size, and all zero
// before its first use; it may go from one piece of work to the next of one problem, but not to
// another problem.

// Pieces of work are blocks: some channels and columns of an image.
struct ForwardKernels {
  int64_t (*blocks)(const Problem&);
  size_t (*scratch)(const Problem&);
  void (*block)(const Problem&, void* y, int64_t block, void* scratch);
};

// Pieces of work are some channels and columns of some images, or some rows of one.
struct BackwardPlan {
  int64_t pieces, groups;  // groups of channels
  size_t scratch_bytes, partial_bytes;
};

struct BackwardKernels {
  BackwardPlan (*plan)(const Problem&, const Gradients&);
  // Writes the piece's part of the gradient of x, and its share of the gradients of weights and
  // biases to `partial`, partial_bytes.
  void (*piece)(const Problem&, const Gradients&, int64_t piece, void* partial, void* scratch);
  // Adds up the `partials` of all pieces, in order, for one group of channels.
  void (*reduce_group)(const Problem&, const Gradients&, int64_t group, const void* partials,
                       void* scratch);
};

// The forward direction in bfloat16 as products of matrices (forward_amx.cpp). Pieces of work are
// channels of all images. False: a plane is not finite, and the whole result is for ForwardKernels
// to compute.
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
