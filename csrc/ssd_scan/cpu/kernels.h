// The CPU kernels of ssd_scan and ssd_scan_2d, one instruction set's to a table.
//
// `scratch` and tapes are 64-byte aligned and of the stated size; what they hold before does not
// matter. Calls of the same function pointer may run at once.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ssd_scan/problem.h"

namespace famseg::ssd_scan {

// Heads [head, head + heads) of one group and one image: they share B and C.
struct Block {
  int64_t batch, group, head, heads;
};

// Where the rows of y go; with `z_gradient` they go there instead, times y_gradient and the slope
// of the gate.
struct Destination {
  void* y;
  void* final_states;
  const void* y_gradient;
  void* z_gradient;
};

struct BlockKernel {
  size_t (*scratch)(const Problem&, int64_t heads);
  void (*run)(const Problem&, const Destination&, const Block&, void* scratch);
};

struct ForwardKernels {
  int64_t (*chunks)(const Problem&);  // also those of the backward pass
  BlockKernel block;
};

// A block's backward pass on one axis.
struct Part {
  Block block;
  int64_t axis;
  bool first, last;  // of those that add to the same gradients of B and C
  void* tape;        // what one stage hands on to the next
};

// What is left to be added up, or to be rounded only when it is.
struct Sums {
  // In the type of the arithmetic and the shape of x, B and C; null where the gradient itself has
  // that type or has one part only.
  void* x;
  void* B;
  void* C;
  double* A;        // (batch, directions, heads)
  double* dt_bias;  // (batch, directions, heads)
  double* steps;    // (batch, directions, heads), before any step is clamped
  double* D;        // (batch, heads, headdim)
};

struct BackwardKernels {
  size_t (*tape)(const Problem&, int64_t heads);
  size_t (*scratch)(const Problem&);
  // First over the sides and heads of a part,
  void (*scan_states)(const Problem&, const Gradients&, const Part&, int64_t side, int64_t head,
                      void* scratch);
  // then over its chunks,
  void (*chunk_gradients)(const Problem&, const Gradients&, const Sums&, const Part&, int64_t chunk,
                          void* scratch);
  // then over its sides and heads again,
  void (*step_gradients)(const Problem&, const Gradients&, const Sums&, const Part&, int64_t side,
                         int64_t head);
  // and when all parts are done, once.
  void (*parameter_gradients)(const Problem&, const Gradients&, const Sums&);
};

}  // namespace famseg::ssd_scan

namespace famseg {
namespace baseline {
extern const ssd_scan::ForwardKernels ssd_scan_forward_kernels;
extern const ssd_scan::BackwardKernels ssd_scan_backward_kernels;
}  // namespace baseline
namespace avx2 {
extern const ssd_scan::ForwardKernels ssd_scan_forward_kernels;
extern const ssd_scan::BackwardKernels ssd_scan_backward_kernels;
}  // namespace avx2
namespace avx512 {
extern const ssd_scan::ForwardKernels ssd_scan_forward_kernels;
extern const ssd_scan::BackwardKernels ssd_scan_backward_kernels;
}  // namespace avx512
namespace amx {
extern const ssd_scan::BlockKernel ssd_scan_bf16_block;
}
}  // namespace famseg
