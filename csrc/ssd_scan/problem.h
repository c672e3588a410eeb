// ssd_scan and ssd_scan_2d on the CPU, on plain pointers: Mamba-2's recurrence
//
//   step  = clamp(softplus?(dt + dt_bias), dt_min, dt_max)
//   h_t   = exp(max(step_t A, -110)) h_{t-1} + step_t B_t x_t^T,   y_t = C_t h_t
//
// over an image (batch, height, width) in one, two or four directions, added up. Then
// y = (y + D x) silu(z). A sequence is an image of one column, in one direction.
//
// x, z, y, B and C are in the problem's dtype; all else, and every state, is in the type of the
// arithmetic: double for float64, otherwise float. Everything is contiguous.
//
// The words of this room:
//
//   direction  0 row-major, 1 row-major in reverse, 2 column-major, 3 column-major in reverse
//   axis       the order of the tokens, 0 row-major or 1 column-major: two directions share one
//   side       which of these two: 0 goes with the axis, 1 in reverse; direction = 2 axis + side
//   token      a place in the axis' order; pixel: its place in memory, row-major
//   step       of a token, direction and head: as above
//   decay      of a step: exp(max(step A, -110)), or 0 where a sequence starts anew
//   state      h of one head: (headdim, d_state)
//   chunk      tokens computed together; segment: chunks between two states that are kept
//   block      heads of one group and one image: they share B and C
//   G, L, M    of a chunk: C B^T (`gram`), the decays between two tokens (`decays`), and what x is
//              multiplied by to give y (`mixing`)
//   enter      a state enters a chunk at the end where the direction comes from, and leaves it at
//              the other
//   arrive     what is left of the state that enters when a token reads it
//   leave      what is left of a token's share when the state leaves
//   reverse    always the direction, and backward always the pass that computes gradients. The
//              gradient of x is x_gradient and never dx: dt is a tensor
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace famseg::ssd_scan {

struct Problem {
  Dtype dtype;
  int64_t batch, height, width, heads, headdim, groups, d_state;
  int64_t directions;  // 1, 2 or 4
  int64_t matrices;    // of B and C: as many as directions, or 1 shared by all
  bool dt_softplus;
  double dt_min, dt_max;
  int64_t chunk_size;          // the most tokens a chunk shall have; 0: as it pleases the kernel
  const void* x;               // (batch, height, width, heads, headdim)
  const void* dt;              // (batch, height, width, directions, heads)
  const void* A;               // (directions, heads)
  const void* B;               // (batch, height, width, matrices, groups, d_state)
  const void* C;               // as B
  const void* D;               // (heads, headdim) or null
  const void* z;               // as x, or null
  const void* dt_bias;         // (directions, heads) or null
  const void* initial_states;  // (batch, heads, headdim, d_state) or null; one direction only
  const uint8_t* resets;  // (batch, height * width): not 0 where the state starts anew; or null

  int64_t tokens() const { return height * width; }
  // Elements of x, y and z.
  int64_t elements() const { return batch * tokens() * heads * headdim; }
  // Elements of a state of every image.
  int64_t state_elements() const { return batch * heads * headdim * d_state; }
  // Elements of B and of C.
  int64_t matrix_elements() const { return batch * tokens() * matrices * groups * d_state; }
};

struct Results {
  void* y;
  void* final_states;  // (batch, heads, headdim, d_state) or null; one direction only
};

// The incoming gradients (null: zero) and where the others go (null: not wanted).
struct Gradients {
  const void* y;
  const void* final_states;
  void* x;
  void* dt;
  void* A;
  void* B;
  void* C;
  void* D;
  void* z;
  void* dt_bias;
  void* initial_states;
};

// Whether all is finite that a result is made of. If it is not, the results are not to be used:
// products of matrices multiply by zeros what a token must not read at all, and 0 times NaN or
// infinity is NaN, in places where the recurrence has none.
[[nodiscard]] bool forward(Isa isa, const Problem& problem, const Results& results, int threads);
[[nodiscard]] bool backward(Isa isa, const Problem& problem, const Gradients& gradients,
                            int threads);

}  // namespace famseg::ssd_scan
