// The CPU kernels of reassemble and carafe, one instruction set's to a table.
#pragma once

#include <cstddef>
#include <cstdint>

#include "reassembly/problem.h"

namespace famseg::reassembly {

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
