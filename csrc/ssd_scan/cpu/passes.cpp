// The kernels of ssd_scan and ssd_scan_2d for one instruction set (see common/simd.h: this file is
// compiled once for each).
//
// The recurrence is computed in chunks of tokens, as products of small matrices (arXiv 2405.21060,
// section 6) that stay in the L1 cache. A forward direction and the backward one of the same token
// order share one index order, so nothing is ever reversed. Per chunk and head, with X (tokens,
// headdim), B and C (tokens, state) and G = C B^T of either direction f, b:
//
//   M = tril(G_f * L_f * step_f) + triu(G_b * L_b * step_b)     L: the decay between two tokens
//   Y = M X + arrive_f * (C_f S_f) + arrive_b * (C_b S_b)       S: the state that enters the chunk
//   S = through * S + (weight * B)^T X                          the state that leaves it
//
// S_f goes from the first chunk to the last and S_b from the last to the first.
//
// Decays are products of the steps' own decays, multiplied up token by token: one exponential for
// each token. A sum of their logarithms would lose its digits to one huge step, and would need as
// many exponentials as L has entries. Where a sequence is to start anew the step's decay is 0, and
// nothing else has to know.
//
// What the tokens of a chunk hold of B and C, and G, serves all heads of a block.

#include "ssd_scan/cpu/chunk.h"
#include "ssd_scan/cpu/kernels.h"
#include "ssd_scan/cpu/matrix.h"

namespace famseg::FAMSEG_ISA {
namespace {

using ssd_scan::Gradients;
using ssd_scan::Part;
using ssd_scan::Results;
using ssd_scan::Sums;

// Tokens of a chunk. Longer ones make the products of M dearer, shorter ones those of the states:
// of 16, 32 and 64, 32 was the fastest or close to it from headdim and state 16 to 64.
template <typename T>
int64_t chunk_tokens(const Problem& p) {
  int64_t chunk = smaller(32, p.tokens() > 0 ? p.tokens() : 1);
  if (p.chunk > 0) chunk = smaller(chunk, p.chunk);
  return round_up(chunk, kLanes<T>);
}

// Of the chunk at hand and one direction of the two that share a token order: [0] goes forward, [1]
// backward. Where both share B and C they share these.
template <typename T>
struct Side {
  T* b;             // (chunk, state)
  T* c;             // (chunk, state)
  T* b_transposed;  // (state, chunk)
  T* gram;          // (chunk, chunk)
};

// The buffers of a chunk that forward and backward both need.
template <typename T>
struct Space : Sizes<T> {
  int64_t* pixels;  // (chunk)
  Side<T> side[2];
  T* x;       // (chunk, headdim)
  T* mixing;  // (chunk, chunk)
};

template <typename T>
Space<T> lay_out(const Problem& p, Arena& arena) {
  Space<T> w{};
  static_cast<Sizes<T>&>(w) = sizes_of<T>(p, chunk_tokens<T>(p));
  w.pixels = arena.take<int64_t>(w.chunk);
  for (int64_t s = 0; s < w.sides; ++s) {
    Side<T>& side = w.side[s];
    if (s == 1 && w.shared) {
      side = w.side[0];
      continue;
    }
    side.b = arena.take<T>(w.chunk * w.n);
    side.c = arena.take<T>(w.chunk * w.n);
    side.b_transposed = arena.take<T>(w.n * w.chunk);
    side.gram = arena.take<T>(w.chunk * w.chunk);
  }
  w.x = arena.take<T>(w.chunk * w.p);
  w.mixing = arena.take<T>(w.chunk * w.chunk);
  return w;
}

template <typename S, typename T>
void pack_head(const Problem& p, const Space<T>& w, const void* x, int64_t batch, int64_t head,
               int64_t count, T* to) {
  pack(head_of(p, static_cast<const S*>(x), batch, head), p.heads * p.headdim, p.headdim, w.pixels,
       count, w.chunk, to, w.p);
}

template <typename S, typename T>
void pack_matrix(const Problem& p, const Space<T>& w, const void* matrix, const Block& block,
                 int64_t direction, int64_t count, T* to) {
  const S* from = static_cast<const S*>(matrix) + matrix_offset(p, block, direction);
  pack(from, p.matrices * p.groups * p.state, p.state, w.pixels, count, w.chunk, to, w.n);
}

// B, C and G of a chunk, for all sides.
template <typename S, typename T>
void load_matrices(const Problem& p, Space<T>& w, const Block& block, int64_t axis, int64_t count) {
  for (int64_t s = 0; s < (w.shared ? 1 : w.sides); ++s) {
    Side<T>& side = w.side[s];
    pack_matrix<S>(p, w, p.B, block, 2 * axis + s, count, side.b);
    pack_matrix<S>(p, w, p.C, block, 2 * axis + s, count, side.c);
    transpose(side.b, w.n, w.chunk, w.n, side.b_transposed, w.chunk);
    Product<T> gram{side.c,    w.n,     1,     side.b_transposed, w.chunk,
                    side.gram, w.chunk, count, w.chunk,           p.state};
    multiply(gram);
  }
}

// M of a chunk and head. `decays`: L of either side, or null.
template <typename T>
void mix_sides(const Space<T>& w, const Steps<T>* steps, int64_t at, int64_t count,
               T* const* decays) {
  mix<false>(w, w.side[0].gram, steps[0], at, count, decays == nullptr ? nullptr : decays[0],
             w.mixing);
  if (w.sides == 2) {
    mix<true>(w, w.side[1].gram, steps[1], at, count, decays == nullptr ? nullptr : decays[1],
              w.mixing);
  }
}

// Rows of `from`, each times its factor.
template <typename T>
void scale_rows(const T* from, const T* factors, int64_t rows, int64_t columns, T* to) {
  for (int64_t i = 0; i < rows; ++i) {
    const Vector<T> factor = broadcast(factors[i]);
    for (int64_t j = 0; j < columns; j += kLanes<T>) {
      store(to + i * columns + j, load(from + i * columns + j) * factor);
    }
  }
}

// ---- forward ------------------------------------------------------------------------------------

// S_b goes ahead and leaves its states in memory, then one pass over the chunks does everything
// else. A long sequence is divided into segments: S_b goes through all of them once and leaves its
// state at each segment's end only, and then goes through each segment again before it is read
// there. So the states in memory grow with the root of the length.
template <typename T>
struct ForwardSpace : Space<T> {
  int64_t segment, segments;  // chunks of one, and how many
  Steps<T> steps[2];
  Output<T> out;
  T* scaled;    // (chunk, headdim) weight * x
  T* state;     // (heads, state, headdim) of side 0, at the chunk at hand
  T* entering;  // (heads, chunks of a segment, state, headdim) of side 1
  T* handed;    // (heads, segments, state, headdim) of side 1, at each segment's end
};

template <typename S, typename T>
ForwardSpace<T> forward_space(const Problem& p, int64_t heads, Arena& arena) {
  ForwardSpace<T> w{};
  static_cast<Space<T>&>(w) = lay_out<T>(p, arena);
  for (int64_t s = 0; s < w.sides; ++s) w.steps[s] = take_steps<T>(heads * w.padded_tokens, arena);
  w.scaled = arena.take<T>(w.chunk * w.p);
  w.out = take_output<S>(w, heads, arena);
  const int64_t state = p.state * w.p;
  w.state = arena.take<T>(heads * state);
  w.segment = segment_chunks(w.chunks, heads * state * static_cast<int64_t>(sizeof(T)));
  w.segments = (w.chunks + w.segment - 1) / w.segment;
  if (w.sides == 2) {
    w.entering = arena.take<T>(heads * w.segment * state);
    if (w.segments > 1) w.handed = arena.take<T>(heads * w.segments * state);
  }
  return w;
}

// to = through * from (null: 0) + (weight * B)^T X, a state (state, headdim).
template <typename T>
void pass_state(const Problem& p, const ForwardSpace<T>& w, int64_t s, int64_t at, int64_t count,
                const T* from, T* to) {
  scale_rows(w.x, w.steps[s].weight + at, count, w.p, w.scaled);
  Product<T> update{w.side[s].b, 1, w.n, w.scaled, w.p, to, w.p, p.state, w.p, count};
  update.init = from;
  update.keep = through(w, w.steps[s], s, at);
  multiply(update);
}

// The state of side 1 that enters chunk c of segment g; null: zero.
template <typename T>
T* entering_backward(const Problem& p, const ForwardSpace<T>& w, int64_t g, int64_t h, int64_t c) {
  const int64_t state = p.state * w.p, first = g * w.segment;
  if (c == w.chunks - 1) return nullptr;
  if (c + 1 == first + w.segment) return w.handed + (h * w.segments + g) * state;
  return w.entering + (h * w.segment + c - first) * state;
}

// Side 1 through segment g. `hand_on`: only to leave its state to segment g - 1; else to leave the
// states that enter each chunk.
template <typename S, typename T>
void go_backward(const Problem& p, ForwardSpace<T>& w, const Block& block, int64_t axis, int64_t g,
                 bool hand_on) {
  const int64_t state = p.state * w.p, first = g * w.segment;
  const int64_t last = smaller(first + w.segment, w.chunks) - 1;
  for (int64_t c = last; c >= (hand_on ? first : first + 1); --c) {
    const int64_t count = w.count(c);
    locate(w, axis_of(p, axis), c, w.pixels);
    pack_matrix<S>(p, w, p.B, block, 2 * axis + 1, count, w.side[1].b);
    fetch_chunk<S>(p, w, nullptr, block, axis, c - 1);
    for (int64_t h = 0; h < block.heads; ++h) {
      pack_head<S>(p, w, p.x, block.batch, block.head + h, count, w.x);
      T* handed = hand_on ? w.handed + (h * w.segments + g - 1) * state : nullptr;
      T* to = hand_on ? handed : entering_backward(p, w, g, h, c - 1);
      const T* from = hand_on && c < last ? handed : entering_backward(p, w, g, h, c);
      pass_state(p, w, 1, h * w.padded_tokens + c * w.chunk, count, from, to);
    }
  }
}

// One chunk: its y, and side 0's state passed on.
template <typename S, typename T>
void forward_chunk(const Problem& p, ForwardSpace<T>& w, const Block& block, int64_t axis,
                   int64_t c, bool wants_final, const Destination<S>& to) {
  const int64_t count = w.count(c), last = w.chunks - 1;
  locate(w, axis_of(p, axis), c, w.pixels);
  load_matrices<S>(p, w, block, axis, count);
  fetch_chunk<S>(p, w, nullptr, block, axis, c + 1);
  for (int64_t h = 0; h < block.heads; ++h) {
    const int64_t at = h * w.padded_tokens + c * w.chunk;
    pack_head<S>(p, w, p.x, block.batch, block.head + h, count, w.x);
    mix_sides(w, w.steps, at, count, static_cast<T* const*>(nullptr));
    Product<T> within{w.mixing, w.chunk, 1, w.x, w.p, w.out.part, w.p, count, w.p, count};
    if (w.sides == 1) within.left = Left::lower;
    multiply(within);
    T* state = w.state + h * p.state * w.p;
    T* entering[2] = {c > 0 || p.initial != nullptr ? state : nullptr,
                      w.sides == 1 ? nullptr : entering_backward(p, w, c / w.segment, h, c)};
    for (int64_t s = 0; s < w.sides; ++s) {
      if (entering[s] == nullptr) continue;
      Product<T> read{w.side[s].c, w.n, 1, entering[s], w.p, w.out.part, w.p, count, w.p, p.state};
      read.row_scale = w.steps[s].arrive + at;
      read.init = w.out.part;
      multiply(read);
    }
    finish_rows(p, w, w.out, block, h, axis, w.pixels, count, w.x, to);
    if (c < last || wants_final) pass_state(p, w, 0, at, count, entering[0], state);
  }
}

template <typename S, typename T>
void scan_block(const Problem& p, const Block& block, void* final_states,
                const Destination<S>& destination, void* scratch) {
  Arena arena{static_cast<char*>(scratch)};
  ForwardSpace<T> w = forward_space<S, T>(p, block.heads, arena);
  for (int64_t h = 0; h < block.heads; ++h) {
    load_skip(p, block.head + h, w.p, w.out.skip + h * w.p);
    if (p.initial != nullptr) {
      load_state(p, w, block.batch, block.head + h, w.state + h * p.state * w.p);
    } else if (w.chunks == 0) {
      clear(w.state + h * p.state * w.p, p.state * w.p);
    }
  }
  for (int64_t axis = 0; axis < w.axes; ++axis) {
    for (int64_t s = 0; s < w.sides; ++s) {
      for (int64_t h = 0; h < block.heads; ++h) {
        fill_steps(p, w, block.batch, axis, s, block.head + h, w.steps[s], h * w.padded_tokens);
      }
    }
    for (int64_t g = w.segments - 1; w.sides == 2 && g > 0; --g) {
      go_backward<S>(p, w, block, axis, g, true);
    }
    for (int64_t c = 0; c < w.chunks; ++c) {
      if (w.sides == 2 && c % w.segment == 0) {
        go_backward<S>(p, w, block, axis, c / w.segment, false);
      }
      forward_chunk(p, w, block, axis, c, final_states != nullptr, destination);
    }
  }
  for (int64_t h = 0; final_states != nullptr && h < block.heads; ++h) {
    store_state(p, w, w.state + h * p.state * w.p, block.batch, block.head + h, final_states);
  }
}

// ---- backward -----------------------------------------------------------------------------------

// From dY, with dS the gradient of the state that leaves a chunk and everything of the forward pass
// computed again:
//
//   dM = dY X^T             dG = dM * L * step       dC = dG B + arrive * (dY S^T)
//                                                    dB = dG^T C + weight * (X dS^T)
//   dX = M^T dY + weight * (B dS)                    dS = through * dS + dY^T (arrive * C)
//
// The states lie as (headdim, state) here, and dX is made as its transpose: so every right factor
// has whole vectors as rows but two, X in dM and B in G and dX, which are transposed.
//
// In three steps, each of them parallel. First every head and direction takes S and dS through all
// chunks, one after the other, and leaves both at each chunk (backward_pass). Then every chunk by
// itself does everything else for all heads (backward_chunk): so the sums over heads in dB and dC
// need neither shares nor an order of threads. Then the gradients of steps and decays become those
// of dt, A and dt_bias (backward_steps).
//
// A decay's logarithm has as its gradient the sum over all pairs of tokens it lies between. Those
// sums are built up term by term: a difference of running sums would lose small ones beside large.

// What the steps hand on, for one block's heads on one axis.
template <typename T>
struct Tape {
  Steps<T> steps[2];
  T* step_gradient[2];   // (heads, padded tokens)
  T* log_gradient[2];    // (heads, padded tokens) of step * A
  T* state[2];           // (chunks, heads, headdim, state) that enters
  T* state_gradient[2];  // (chunks, heads, headdim, state) of the one that leaves
  T* skip_gradient;      // (heads, chunks, headdim)
};

template <typename T>
Tape<T> lay_out_tape(const Problem& p, const Sizes<T>& w, int64_t heads, Arena& arena) {
  Tape<T> tape{};
  for (int64_t s = 0; s < w.sides; ++s) {
    tape.steps[s] = take_steps<T>(heads * w.padded_tokens, arena);
    tape.step_gradient[s] = arena.take<T>(heads * w.padded_tokens);
    tape.log_gradient[s] = arena.take<T>(heads * w.padded_tokens);
    tape.state[s] = arena.take<T>(w.chunks * heads * p.headdim * w.n);
    tape.state_gradient[s] = arena.take<T>(w.chunks * heads * p.headdim * w.n);
  }
  tape.skip_gradient = arena.take<T>(heads * w.chunks * w.p);
  return tape;
}

// A thread's buffers.
template <typename T>
struct BackwardSpace : Space<T> {
  T* y_gradient;             // (chunk, headdim)
  T* x_transposed;           // (headdim, chunk)
  T* mixing_gradient;        // (chunk, chunk)
  T* x_gradient_transposed;  // (headdim, chunk)
  T* x_gradient;             // (chunk, headdim)
  T* decays[2];              // (chunk, chunk) L of either side
  T* gram_gradient[2];       // (chunk, chunk), the sum over heads
  T* b_gradient[2];          // (chunk, state), the sum over heads
  T* c_gradient[2];          // (chunk, state), the sum over heads
  T* product;                // (chunk, state)
  T* scaled;                 // (chunk, state) or (state, chunk)
  T* row_lanes;              // (chunk, one vector) sums of rows, a lane each
  T* between;                // (chunk) gradients of log-decays from pairs within the chunk
  T* arriving;               // (chunk) of arrive's logarithm
  T* leaving;                // (chunk) of leave's
  T* gate;                   // (headdim)
  T* skip;                   // (headdim)
  T* final_state;            // (headdim, state)
};

template <typename T>
BackwardSpace<T> backward_space(const Problem& p, Arena& arena) {
  BackwardSpace<T> w{};
  static_cast<Space<T>&>(w) = lay_out<T>(p, arena);
  w.y_gradient = arena.take<T>(w.chunk * w.p);
  w.x_transposed = arena.take<T>(w.p * w.chunk);
  w.mixing_gradient = arena.take<T>(w.chunk * w.chunk);
  w.x_gradient_transposed = arena.take<T>(w.p * w.chunk);
  w.x_gradient = arena.take<T>(w.chunk * w.p);
  w.product = arena.take<T>(w.chunk * w.n);
  w.scaled = arena.take<T>(w.chunk * w.n);
  w.row_lanes = arena.take<T>(w.chunk * kLanes<T>);
  w.between = arena.take<T>(w.chunk);
  w.arriving = arena.take<T>(w.chunk);
  w.leaving = arena.take<T>(w.chunk);
  w.gate = arena.take<T>(w.p);
  w.skip = arena.take<T>(w.p);
  w.final_state = arena.take<T>(p.headdim * w.n);
  for (int64_t s = 0; s < w.sides; ++s) {
    w.decays[s] = arena.take<T>(w.chunk * w.chunk);
    const bool own = s == 0 || !w.shared;
    w.gram_gradient[s] = own ? arena.take<T>(w.chunk * w.chunk) : w.gram_gradient[0];
    w.b_gradient[s] = own ? arena.take<T>(w.chunk * w.n) : w.b_gradient[0];
    w.c_gradient[s] = own ? arena.take<T>(w.chunk * w.n) : w.c_gradient[0];
  }
  return w;
}

// dy of the scan itself: through the gate, where there is one.
template <typename S, typename T>
void pack_y_gradient(const Problem& p, const BackwardSpace<T>& w, const Gradients& gradients,
                     int64_t batch, int64_t head, int64_t count) {
  if (gradients.y == nullptr) {
    clear(w.y_gradient, w.chunk * w.p);
    return;
  }
  pack_head<S>(p, w, gradients.y, batch, head, count, w.y_gradient);
  if (p.z == nullptr) return;
  const S* z = head_of(p, static_cast<const S*>(p.z), batch, head);
  for (int64_t t = 0; t < count; ++t) {
    pack(z, p.heads * p.headdim, p.headdim, w.pixels + t, 1, 1, w.gate, w.p);
    T* row = w.y_gradient + t * w.p;
    for (int64_t i = 0; i < w.p; i += kLanes<T>) {
      const Vector<T> gate = load(w.gate + i);
      store(row + i, load(row + i) * gate * sigmoid<T>(gate));
    }
  }
}

// to = keep * from (null: 0) + a^T (factors * b), a state (headdim, state).
template <typename T>
void pass_on(const Problem& p, const BackwardSpace<T>& w, T keep, const T* factors, const T* a,
             const T* b, int64_t count, const T* from, T* to) {
  scale_rows(b, factors, count, w.n, w.scaled);
  Product<T> update{a, 1, w.p, w.scaled, w.n, to, w.n, p.headdim, w.n, count};
  update.init = from;
  update.keep = keep;
  multiply(update);
}

// States in memory have no padding.
template <typename T>
void load_padded(const Problem& p, const Sizes<T>& w, const void* states, int64_t batch,
                 int64_t head, T* to) {
  const T* from = static_cast<const T*>(states) + (batch * p.heads + head) * p.headdim * p.state;
  for (int64_t i = 0; i < p.headdim; ++i) {
    for (int64_t n = 0; n < p.state; ++n) to[i * w.n + n] = from[i * p.state + n];
    for (int64_t n = p.state; n < w.n; ++n) to[i * w.n + n] = T(0);
  }
}

// Whether a state enters a chunk at all, and a gradient comes to the state that leaves it.
template <typename T>
bool enters(const Problem& p, const Sizes<T>& w, int64_t s, int64_t c) {
  return s == 0 ? c > 0 || p.initial != nullptr : c < w.chunks - 1;
}

template <typename T>
bool leaves(const Gradients& gradients, const Sizes<T>& w, int64_t s, int64_t c) {
  return s == 0 ? c < w.chunks - 1 || gradients.final_states != nullptr : c > 0;
}

// One head's states and their gradients at all chunks, for side s.
template <typename S, typename T>
void backward_pass(const Problem& p, const Gradients& gradients, const Part& part, int64_t s,
                   int64_t h, void* scratch) {
  Arena arena{static_cast<char*>(scratch)}, shared{static_cast<char*>(part.tape)};
  const BackwardSpace<T> w = backward_space<T>(p, arena);
  const Block& block = part.block;
  const Tape<T> tape = lay_out_tape<T>(p, w, block.heads, shared);
  const int64_t state = p.headdim * w.n, head = block.head + h, last = w.chunks - 1;
  const Steps<T>& steps = tape.steps[s];
  fill_steps(p, w, block.batch, part.axis, s, head, steps, h * w.padded_tokens);
  const auto place = [&](T* states, int64_t c) { return states + (c * block.heads + h) * state; };
  // The states go with the direction, their gradients against it.
  T* states = tape.state[s];
  T* state_gradients = tape.state_gradient[s];
  const int64_t step = s == 0 ? 1 : -1;
  if (s == 0 && p.initial != nullptr && w.chunks > 0) {
    load_padded(p, w, p.initial, block.batch, head, place(states, 0));
  }
  for (int64_t c = s == 0 ? 0 : last; 0 <= c + step && c + step <= last; c += step) {
    const int64_t count = w.count(c), at = h * w.padded_tokens + c * w.chunk;
    locate(w, axis_of(p, part.axis), c, w.pixels);
    pack_matrix<S>(p, w, p.B, block, 2 * part.axis + s, count, w.side[s].b);
    pack_head<S>(p, w, p.x, block.batch, head, count, w.x);
    pass_on(p, w, through(w, steps, s, at), steps.weight + at, w.x, w.side[s].b, count,
            enters(p, w, s, c) ? place(states, c) : nullptr, place(states, c + step));
  }
  // With a gradient of the initial state the last step goes one further, to there.
  T* beyond = nullptr;
  if (s == 0 && gradients.final_states != nullptr) {
    beyond = w.chunks > 0 ? place(state_gradients, last) : w.final_state;
    load_padded(p, w, gradients.final_states, block.batch, head, beyond);
  }
  for (int64_t c = s == 0 ? last : 0; 0 <= c && c <= last; c -= step) {
    const bool inside = 0 <= c - step && c - step <= last;
    if (!inside && gradients.initial == nullptr) break;
    const int64_t count = w.count(c), at = h * w.padded_tokens + c * w.chunk;
    beyond = inside ? place(state_gradients, c - step) : w.final_state;
    locate(w, axis_of(p, part.axis), c, w.pixels);
    pack_matrix<S>(p, w, p.C, block, 2 * part.axis + s, count, w.side[s].c);
    pack_y_gradient<S>(p, w, gradients, block.batch, head, count);
    pass_on(p, w, through(w, steps, s, at), steps.arrive + at, w.y_gradient, w.side[s].c, count,
            leaves(gradients, w, s, c) ? place(state_gradients, c) : nullptr, beyond);
  }
  if (s != 0 || gradients.initial == nullptr) return;
  T* to = static_cast<T*>(gradients.initial) + (block.batch * p.heads + head) * p.headdim * p.state;
  for (int64_t i = 0; i < p.headdim; ++i) {
    for (int64_t n = 0; n < p.state; ++n) {
      to[i * p.state + n] = beyond == nullptr ? T(0) : beyond[i * w.n + n];
    }
  }
}

// From dM: adds to dG, writes the gradients of the steps and of the decays' logarithms that come
// from pairs of tokens within the chunk.
template <bool BACKWARD, typename T>
void pair_gradients(const BackwardSpace<T>& w, const T* gram, const T* steps, int64_t count,
                    const T* decays, T* gram_gradient, T* step_gradient) {
  const int64_t lanes = kLanes<T>;
  clear(w.row_lanes, w.chunk * lanes);
  for (int64_t j = 0; j < w.chunk; j += lanes) {
    const Vector<T> step = load(steps + j);
    const Vector<T> column = lane_numbers<T>() + static_cast<T>(j);
    Vector<T> total = {};   // over the rows
    Vector<T> across = {};  // over the rows so far: pairs across the decay of row i
    const auto row = [&](int64_t i) {
      const int64_t place = i * w.chunk + j;
      const Vector<T> pair = load(w.mixing_gradient + place) * load(decays + place);
      store(gram_gradient + place, load(gram_gradient + place) + pair * step);
      const Vector<T> of_step = pair * load(gram + place);
      total += of_step;
      across += of_step * step;
      const Vector<T> number = broadcast(static_cast<T>(i));
      T* sum = w.row_lanes + i * lanes;
      store(sum,
            load(sum) + ((BACKWARD ? column > number : column < number) ? across : Vector<T>{}));
    };
    if (BACKWARD) {
      for (int64_t i = 0; i < smaller(count, j + lanes); ++i) row(i);
    } else {
      for (int64_t i = count - 1; i >= j; --i) row(i);
    }
    store(step_gradient + j, total);
  }
  add_lanes(w.row_lanes, w.chunk, w.between);
}

// Adds the rows of `w.product`, each times its factor, to `gradient`; dots[i] is the product of row
// i, without its factor, and row i of `other`.
template <typename T>
void add_rows(const BackwardSpace<T>& w, const T* factors, int64_t count, const T* other,
              T* gradient, T* dots) {
  const int64_t lanes = kLanes<T>;
  for (int64_t i = 0; i < count; ++i) {
    const Vector<T> factor = broadcast(factors[i]);
    Vector<T> dot = {};
    for (int64_t n = 0; n < w.n; n += lanes) {
      const int64_t place = i * w.n + n;
      const Vector<T> value = load(w.product + place);
      store(gradient + place, load(gradient + place) + value * factor);
      dot += value * load(other + place);
    }
    store(w.row_lanes + i * lanes, dot);
  }
  clear(w.row_lanes + count * lanes, (w.chunk - count) * lanes);
  add_lanes(w.row_lanes, w.chunk, dots);
}

// The sum of the products of two states' entries.
template <typename T>
T inner_product(const T* a, const T* b, int64_t count) {
  Vector<T> sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes<T> <= count; i += 4 * kLanes<T>) {
    for (int k = 0; k < 4; ++k) sum[k] += load(a + i + k * kLanes<T>) * load(b + i + k * kLanes<T>);
  }
  for (; i < count; i += kLanes<T>) sum[0] += load(a + i) * load(b + i);
  const Vector<T> all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  T total = 0;
  for (int k = 0; k < kLanes<T>; ++k) total += all[k];
  return total;
}

// What side s of a chunk and head adds to all gradients.
template <typename T>
void side_gradients(const Problem& p, BackwardSpace<T>& w, const Tape<T>& tape, int64_t s,
                    int64_t at, int64_t count, const T* entering, const T* leaving) {
  const Side<T>& side = w.side[s];
  const T* step = tape.steps[s].step + at;
  const T* arrive = tape.steps[s].arrive + at;
  const T* leave = tape.steps[s].leave + at;
  const T* weight = tape.steps[s].weight + at;
  T* step_gradient = tape.step_gradient[s] + at;
  T* log_gradient = tape.log_gradient[s] + at;
  if (s == 0) {
    pair_gradients<false>(w, side.gram, step, count, w.decays[s], w.gram_gradient[s],
                          step_gradient);
  } else {
    pair_gradients<true>(w, side.gram, step, count, w.decays[s], w.gram_gradient[s], step_gradient);
  }
  clear(w.arriving, w.chunk);
  clear(w.leaving, w.chunk);
  T passing = 0;
  if (entering != nullptr) {
    multiply(
        Product<T>{w.y_gradient, w.p, 1, entering, w.n, w.product, w.n, count, w.n, p.headdim});
    add_rows(w, arrive, count, side.c, w.c_gradient[s], w.arriving);
    for (int64_t i = 0; i < w.chunk; ++i) w.arriving[i] *= arrive[i];
  }
  if (leaving != nullptr) {
    multiply(Product<T>{w.x, w.p, 1, leaving, w.n, w.product, w.n, count, w.n, p.headdim});
    add_rows(w, weight, count, side.b, w.b_gradient[s], w.leaving);
    for (int64_t j = 0; j < w.chunk; ++j) {
      w.leaving[j] *= leave[j];
      step_gradient[j] += w.leaving[j];
      w.leaving[j] *= step[j];
    }
    for (int64_t n = 0; n < p.state; ++n) {
      for (int64_t j = 0; j < w.chunk; j += kLanes<T>) {
        const int64_t place = n * w.chunk + j;
        store(w.scaled + place, load(side.b_transposed + place) * load(weight + j));
      }
    }
    Product<T> of_x{leaving, w.n,       1,       w.scaled, w.chunk, w.x_gradient_transposed,
                    w.chunk, p.headdim, w.chunk, p.state};
    of_x.init = w.x_gradient_transposed;
    multiply(of_x);
  }
  if (entering != nullptr && leaving != nullptr) {
    passing = through(w, tape.steps[s], s, at) * inner_product(entering, leaving, p.headdim * w.n);
  }
  // A token's decay lies between the entering state and the tokens from it on (in the side's own
  // direction), and between the tokens before it and the leaving state.
  const auto token = [&](int64_t i) { return s == 0 ? i : w.chunk - 1 - i; };
  T before = passing;
  for (int64_t i = 0; i < w.chunk; ++i) {
    log_gradient[token(i)] = w.between[token(i)] + before;
    before += w.leaving[token(i)];
  }
  T after = 0;
  for (int64_t i = w.chunk - 1; i >= 0; --i) {
    after += w.arriving[token(i)];
    log_gradient[token(i)] += after;
  }
}

// Completes the gradients of B and C of a chunk by the part that goes through G, and puts them.
template <typename S, typename T>
void matrix_gradients(const Problem& p, const BackwardSpace<T>& w, const Gradients& gradients,
                      const Sums& sums, const Part& part, int64_t count) {
  for (int64_t s = 0; s < (w.shared ? 1 : w.sides); ++s) {
    const Side<T>& side = w.side[s];
    const bool both = w.shared && w.sides == 2;
    const int64_t offset = matrix_offset(p, part.block, 2 * part.axis + s);
    const int64_t stride = p.matrices * p.groups * p.state;
    const auto put = [&](const T* from, void* gradient, void* sum) {
      put_rows(from, w.n, p.state, w.pixels, count, Turn{part.first, part.last},
               static_cast<S*>(gradient) + offset, stride,
               sum == nullptr ? nullptr : static_cast<T*>(sum) + offset, stride);
    };
    if (gradients.C != nullptr) {
      Product<T> of_c{w.gram_gradient[s], w.chunk, 1,     side.b, w.n,
                      w.c_gradient[s],    w.n,     count, w.n,    count};
      of_c.init = w.c_gradient[s];
      of_c.left = both ? Left::full : s == 0 ? Left::lower : Left::upper;
      multiply(of_c);
      put(w.c_gradient[s], gradients.C, sums.C);
    }
    if (gradients.B != nullptr) {
      Product<T> of_b{w.gram_gradient[s], 1,   w.chunk, side.c, w.n,
                      w.b_gradient[s],    w.n, count,   w.n,    count};
      of_b.init = w.b_gradient[s];
      of_b.left = both ? Left::full : s == 0 ? Left::upper : Left::lower;
      multiply(of_b);
      put(w.b_gradient[s], gradients.B, sums.B);
    }
  }
}

// The gradient of x of a chunk and head, with its part through D, and D's own.
template <typename S, typename T>
void put_x_gradient(const Problem& p, const BackwardSpace<T>& w, const Gradients& gradients,
                    const Sums& sums, const Part& part, const Tape<T>& tape, int64_t c, int64_t h,
                    int64_t count) {
  const int64_t head = part.block.head + h;
  transpose(w.x_gradient_transposed, w.chunk, w.p, w.chunk, w.x_gradient, w.p);
  if (part.axis == 0 && p.D != nullptr) {
    load_skip(p, head, w.p, w.skip);
    for (int64_t i = 0; i < w.p; i += kLanes<T>) {
      Vector<T> sum = {};
      for (int64_t t = 0; t < count; ++t) {
        const int64_t place = t * w.p + i;
        const Vector<T> dy = load(w.y_gradient + place);
        store(w.x_gradient + place, load(w.x_gradient + place) + dy * load(w.skip + i));
        sum += dy * load(w.x + place);
      }
      store(tape.skip_gradient + (h * w.chunks + c) * w.p + i, sum);
    }
  }
  if (gradients.x == nullptr) return;
  put_rows(
      w.x_gradient, w.p, p.headdim, w.pixels, count, Turn{part.axis == 0, part.axis == w.axes - 1},
      head_of(p, static_cast<S*>(gradients.x), part.block.batch, head), p.heads * p.headdim,
      sums.x == nullptr ? nullptr : head_of(p, static_cast<T*>(sums.x), part.block.batch, head),
      p.heads * p.headdim);
}

// One chunk, when all states are there.
template <typename S, typename T>
void backward_chunk(const Problem& p, const Gradients& gradients, const Sums& sums,
                    const Part& part, int64_t c, void* scratch) {
  Arena arena{static_cast<char*>(scratch)}, shared{static_cast<char*>(part.tape)};
  BackwardSpace<T> w = backward_space<T>(p, arena);
  const Block& block = part.block;
  const Tape<T> tape = lay_out_tape<T>(p, w, block.heads, shared);
  const int64_t count = w.count(c);
  locate(w, axis_of(p, part.axis), c, w.pixels);
  load_matrices<S>(p, w, block, part.axis, count);
  for (int64_t s = 0; s < (w.shared ? 1 : w.sides); ++s) {
    clear(w.gram_gradient[s], w.chunk * w.chunk);
    clear(w.b_gradient[s], w.chunk * w.n);
    clear(w.c_gradient[s], w.chunk * w.n);
  }
  for (int64_t h = 0; h < block.heads; ++h) {
    const int64_t at = h * w.padded_tokens + c * w.chunk, head = block.head + h;
    pack_head<S>(p, w, p.x, block.batch, head, count, w.x);
    pack_y_gradient<S>(p, w, gradients, block.batch, head, count);
    transpose(w.x, w.p, w.chunk, w.p, w.x_transposed, w.chunk);
    multiply(Product<T>{w.y_gradient, w.p, 1, w.x_transposed, w.chunk, w.mixing_gradient, w.chunk,
                        count, w.chunk, p.headdim});
    mix_sides(w, tape.steps, at, count, w.decays);
    multiply(Product<T>{w.y_gradient, 1, w.p, w.mixing, w.chunk, w.x_gradient_transposed, w.chunk,
                        p.headdim, w.chunk, count});
    for (int64_t s = 0; s < w.sides; ++s) {
      const int64_t place = (c * block.heads + h) * p.headdim * w.n;
      side_gradients(p, w, tape, s, at, count, enters(p, w, s, c) ? tape.state[s] + place : nullptr,
                     leaves(gradients, w, s, c) ? tape.state_gradient[s] + place : nullptr);
    }
    put_x_gradient<S>(p, w, gradients, sums, part, tape, c, h, count);
  }
  matrix_gradients<S>(p, w, gradients, sums, part, count);
}

// From the gradients of steps and log-decays: those of dt, A and dt_bias. Side 0 of axis 0 also
// adds up D's.
template <typename T>
void backward_steps(const Problem& p, const Gradients& gradients, const Sums& sums,
                    const Part& part, int64_t s, int64_t h) {
  Arena shared{static_cast<char*>(part.tape)};
  const Sizes<T> w = sizes_of<T>(p, chunk_tokens<T>(p));
  const Block& block = part.block;
  const Tape<T> tape = lay_out_tape<T>(p, w, block.heads, shared);
  const int64_t direction = 2 * part.axis + s, head = block.head + h;
  const StepRule<T> rule = step_rule<T>(p, direction, head);
  T* of_step = tape.step_gradient[s] + h * w.padded_tokens;
  T* of_log = tape.log_gradient[s] + h * w.padded_tokens;
  const T* step = tape.steps[s].step + h * w.padded_tokens;
  // Its decays are no longer needed: their place takes dt.
  T* raw = tape.steps[s].decay + h * w.padded_tokens;
  gather_dt(p, axis_of(p, part.axis), block.batch, direction, head, rule.bias, raw);
  // A step's gradient has a share of every tensor that the scan reads, incoming gradients too; A
  // comes in below.
  double of_steps = 0 * rule.A;
  for (int64_t t = 0; t < w.tokens; ++t) of_steps += of_step[t] + of_log[t] * step[t];
  for (int64_t t = 0; t < w.padded_tokens; t += kLanes<T>) {
    const Vector<T> steps = load(step + t), dt = load(raw + t);
    const Vector<T> live =
        steps * rule.A < static_cast<T>(kLowestLogDecay) ? Vector<T>{} : load(of_log + t);
    Vector<T> gradient = load(of_step + t) + live * rule.A;
    const Vector<T> value = rule.unclamped(dt);
    gradient = value < rule.low ? Vector<T>{} : gradient;
    gradient = value > rule.high ? Vector<T>{} : gradient;
    if (rule.softplus) gradient = dt > T(20) ? gradient : gradient * sigmoid<T>(dt);
    store(of_log + t, live * steps);
    store(of_step + t, gradient);
  }
  double of_A = 0, of_bias = 0;
  for (int64_t t = 0; t < w.tokens; ++t) {
    of_A += of_log[t];
    of_bias += of_step[t];
  }
  const int64_t at = (block.batch * p.directions + direction) * p.heads + head;
  sums.A[at] = of_A;
  sums.dt_bias[at] = of_bias;
  sums.steps[at] = of_steps;
  for (int64_t i = 0; direction == 0 && p.D != nullptr && i < p.headdim; ++i) {
    double of_D = 0;
    for (int64_t c = 0; c < w.chunks; ++c) of_D += tape.skip_gradient[(h * w.chunks + c) * w.p + i];
    sums.D[(block.batch * p.heads + head) * p.headdim + i] = of_D;
  }
  if (gradients.dt == nullptr) return;
  const int64_t stride = p.directions * p.heads;
  T* to =
      static_cast<T*>(gradients.dt) + block.batch * w.tokens * stride + direction * p.heads + head;
  each_token(axis_of(p, part.axis), 0, w.tokens,
             [&](int64_t t, int64_t pixel) { to[pixel * stride] = of_step[t]; });
}

// ---- sums over images ---------------------------------------------------------------------------

template <typename T>
void reduce_batch(const double* parts, int64_t batch, int64_t count, void* gradient) {
  if (gradient == nullptr) return;
  for (int64_t i = 0; i < count; ++i) {
    double sum = 0;
    for (int64_t n = 0; n < batch; ++n) sum += parts[n * count + i];
    static_cast<T*>(gradient)[i] = static_cast<T>(sum);
  }
}

// ---- by element type ----------------------------------------------------------------------------

// Calls f with a value of the element type and one of the arithmetic's.
template <typename F>
auto by_types(const Problem& p, const F& f) {
  return by_dtype(p.dtype, [&](auto element) {
    using S = decltype(element);
    return f(element, Compute<S>());
  });
}

size_t forward_scratch_any(const Problem& p, int64_t heads) {
  return by_types(p, [&](auto s, auto t) {
    Arena counting;
    forward_space<decltype(s), decltype(t)>(p, heads, counting);
    return static_cast<size_t>(counting.used);
  });
}

void forward_block_any(const Problem& p, const Results& results, const Block& block,
                       void* scratch) {
  const FlushToZero guard;
  by_types(p, [&](auto s, auto t) {
    using S = decltype(s);
    scan_block<S, decltype(t)>(p, block, results.final_states,
                               Destination<S>{static_cast<S*>(results.y), nullptr, nullptr},
                               scratch);
  });
}

void gate_block_any(const Problem& p, const Gradients& gradients, const Block& block,
                    void* scratch) {
  const FlushToZero guard;
  by_types(p, [&](auto s, auto t) {
    using S = decltype(s);
    const Destination<S> to{nullptr, static_cast<const S*>(gradients.y),
                            static_cast<S*>(gradients.z)};
    scan_block<S, decltype(t)>(p, block, nullptr, to, scratch);
  });
}

size_t backward_tape_any(const Problem& p, int64_t heads) {
  return by_types(p, [&](auto, auto t) {
    using T = decltype(t);
    Arena counting;
    lay_out_tape<T>(p, sizes_of<T>(p, chunk_tokens<T>(p)), heads, counting);
    return static_cast<size_t>(counting.used);
  });
}

size_t backward_scratch_any(const Problem& p) {
  return by_types(p, [&](auto, auto t) {
    Arena counting;
    backward_space<decltype(t)>(p, counting);
    return static_cast<size_t>(counting.used);
  });
}

void backward_pass_any(const Problem& p, const Gradients& gradients, const Part& part, int64_t side,
                       int64_t head, void* scratch) {
  const FlushToZero guard;
  by_types(p, [&](auto s, auto t) {
    backward_pass<decltype(s), decltype(t)>(p, gradients, part, side, head, scratch);
  });
}

void backward_chunk_any(const Problem& p, const Gradients& gradients, const Sums& sums,
                        const Part& part, int64_t chunk, void* scratch) {
  const FlushToZero guard;
  by_types(p, [&](auto s, auto t) {
    backward_chunk<decltype(s), decltype(t)>(p, gradients, sums, part, chunk, scratch);
  });
}

void backward_steps_any(const Problem& p, const Gradients& gradients, const Sums& sums,
                        const Part& part, int64_t side, int64_t head) {
  const FlushToZero guard;
  by_types(
      p, [&](auto, auto t) { backward_steps<decltype(t)>(p, gradients, sums, part, side, head); });
}

int64_t chunks_any(const Problem& p) {
  return by_types(p, [&](auto, auto t) {
    using T = decltype(t);
    return sizes_of<T>(p, chunk_tokens<T>(p)).chunks;
  });
}

void reduce_parameters_any(const Problem& p, const Gradients& gradients, const Sums& sums) {
  by_types(p, [&](auto, auto t) {
    using T = decltype(t);
    reduce_batch<T>(sums.A, p.batch, p.directions * p.heads, gradients.A);
    reduce_batch<T>(sums.dt_bias, p.batch, p.directions * p.heads, gradients.dt_bias);
    reduce_batch<T>(sums.D, p.batch, p.heads * p.headdim, gradients.D);
  });
}

}  // namespace

// `extern` because a const object is otherwise local to its file.
extern const ssd_scan::Kernels ssd_scan_kernels;
const ssd_scan::Kernels ssd_scan_kernels = {{forward_scratch_any, forward_block_any},
                                            gate_block_any,
                                            chunks_any,
                                            backward_tape_any,
                                            backward_scratch_any,
                                            backward_pass_any,
                                            backward_chunk_any,
                                            backward_steps_any,
                                            reduce_parameters_any};

}  // namespace famseg::FAMSEG_ISA
