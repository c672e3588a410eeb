// The CPU kernels of ssd_scan and ssd_scan_2d, one instruction set's to a table.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ssd_scan/problem.h"

namespace famseg::ssd_scan {

// Heads [head, head + heads) of one group and one image: they share B and C.
struct Block {
  int64_t batch, group, head, heads;
};

// A block's backward pass on one axis, row-major or column-major.
struct Part {
  Block block;
  int64_t axis;
  bool first, last;  // of those that add to the same gradients of B and C
  void* tape;        // what its steps hand on
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

// One instruction set's kernels. `scratch` and tapes are 64-byte aligned and of the stated size;
// what they hold before does not matter. Calls of the same line may run at once.
struct Forward {
  size_t (*scratch)(const Problem&, int64_t heads);
  void (*block)(const Problem&, const Results&, const Block&, void* scratch);
};

struct Kernels {
  Forward forward;
  // The gradient of z needs y before the gate, the forward pass once more; with its scratch.
  void (*gate_block)(const Problem&, const Gradients&, const Block&, void* scratch);
  int64_t (*chunks)(const Problem&);
  size_t (*backward_tape)(const Problem&, int64_t heads);
  size_t (*backward_scratch)(const Problem&);
  // Backward goes first over the sides (directions of the axis) and heads of a part,
  void (*backward_pass)(const Problem&, const Gradients&, const Part&, int64_t side, int64_t head,
                        void* scratch);
  // then over its chunks,
  void (*backward_chunk)(const Problem&, const Gradients&, const Sums&, const Part&, int64_t chunk,
                         void* scratch);
  // then over its sides and heads again,
  void (*backward_steps)(const Problem&, const Gradients&, const Sums&, const Part&, int64_t side,
                         int64_t head);
  // and at last to the gradients of A, dt_bias and D.
  void (*reduce_parameters)(const Problem&, const Gradients&, const Sums&);
};

}  // namespace famseg::ssd_scan

namespace famseg {
namespace baseline {
extern const ssd_scan::Kernels ssd_scan_kernels;
}
namespace avx2 {
extern const ssd_scan::Kernels ssd_scan_kernels;
}
namespace avx512 {
extern const ssd_scan::Kernels ssd_scan_kernels;
}
namespace amx {
extern const ssd_scan::Forward ssd_scan_bf16_forward;
}
}  // namespace famseg
