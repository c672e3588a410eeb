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

#include <cstddef>
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

// One instruction set's kernels. A block is some rows of x of one (n, group) and what belongs to
// them in the result (forward) or in the gradients (backward); no two blocks write the same
// element. `scratch` is 64-byte aligned, of the stated size, and all zero before its first use; it
// may go from block to block of one problem and direction, but no farther.
struct Kernels {
  int64_t (*forward_blocks)(const Problem&);
  size_t (*forward_scratch)(const Problem&);
  void (*forward_block)(const Problem&, void* y, int64_t block, void* scratch);
  int64_t (*backward_blocks)(const Problem&, const Gradients&);
  size_t (*backward_scratch)(const Problem&, const Gradients&);
  void (*backward_block)(const Problem&, const Gradients&, int64_t block, void* scratch);
};

}  // namespace famseg::reassembly

namespace famseg {
namespace baseline {
extern const reassembly::Kernels reassembly_kernels;
}
namespace avx2 {
extern const reassembly::Kernels reassembly_kernels;
}
namespace avx512 {
extern const reassembly::Kernels reassembly_kernels;
}
}  // namespace famseg
