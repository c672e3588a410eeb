// The CPU kernels of this room, one instruction set's to a table.
#pragma once

#include <cstddef>
#include <cstdint>

#include "reassembly/problem.h"

namespace famseg::reassembly {

// One instruction set's kernels. A block is some rows of x of one (n, group) and what belongs to
// them in the result (forward) or in the gradients (backward); no two blocks write the same
// element. `scratch` is 64-byte aligned, of the stated size, and all zero before its first use; it
// may go from block to block of one problem and direction, but no farther.
struct ForwardKernels {
  int64_t (*blocks)(const Problem&);
  size_t (*scratch)(const Problem&);
  void (*block)(const Problem&, void* y, int64_t block, void* scratch);
};

struct BackwardKernels {
  int64_t (*blocks)(const Problem&, const Gradients&);
  size_t (*scratch)(const Problem&, const Gradients&);
  void (*block)(const Problem&, const Gradients&, int64_t block, void* scratch);
};

// What feature_aware_upsample does before a forward or backward, and its backward. A piece is some
// blocks of one (n, group), from top to bottom; it leaves its part of the encoder's gradients in its
// part of `partial`, and `sum` adds these parts in an order that does not depend on threads.
struct EncoderKernels {
  size_t (*packed)(const Problem&);  // bytes of Encoder::packed
  int64_t (*pack_pieces)(const Problem&);
  void (*pack)(const Problem&, bool backward, int64_t piece);

  int64_t (*pieces)(const Problem&, const Gradients&);
  size_t (*scratch)(const Problem&, const Gradients&);
  size_t (*partial)(const Problem&, const Gradients&);
  void (*piece)(const Problem&, const Gradients&, void* partial, int64_t piece, void* scratch);
  int64_t (*sums)(const Problem&, const Gradients&);
  void (*sum)(const Problem&, const Gradients&, const void* partial, int64_t sum, void* scratch);
};

}  // namespace famseg::reassembly

namespace famseg {
namespace baseline {
extern const reassembly::ForwardKernels reassembly_forward_kernels;
extern const reassembly::BackwardKernels reassembly_backward_kernels;
extern const reassembly::EncoderKernels reassembly_encoder_kernels;
}  // namespace baseline
namespace avx2 {
extern const reassembly::ForwardKernels reassembly_forward_kernels;
extern const reassembly::BackwardKernels reassembly_backward_kernels;
extern const reassembly::EncoderKernels reassembly_encoder_kernels;
}  // namespace avx2
namespace avx512 {
extern const reassembly::ForwardKernels reassembly_forward_kernels;
extern const reassembly::BackwardKernels reassembly_backward_kernels;
extern const reassembly::EncoderKernels reassembly_encoder_kernels;
}  // namespace avx512
}  // namespace famseg
