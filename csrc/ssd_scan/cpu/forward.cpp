// The forward pass of ssd_scan and ssd_scan_2d for one instruction set (see common/simd.h: this file
// is compiled once for each).
//
// The recurrence is computed in chunks of tokens, as products of small matrices (arXiv 2405.21060,
// section 6) that stay in the L1 cache. Both sides of an axis have one index order, so nothing is
// ever reversed. Per chunk and head, with X (tokens, headdim), B and C (tokens, d_state) and
// G = C B^T of either side 0, 1:
//
//   M = tril(G_0 * L_0 * step_0) + triu(G_1 * L_1 * step_1)     L: the decay between two tokens
//   Y = M X + arrive_0 * (C_0 S_0) + arrive_1 * (C_1 S_1)       S: the state that enters the chunk
//   S = through * S + (weight * B)^T X                          the state that leaves it
//
// S_0 goes from the first chunk to the last and S_1 from the last to the first. B, C and G of a
// chunk serve all heads of a block.

#include "ssd_scan/cpu/output.h"
#include "ssd_scan/cpu/workspace.h"

namespace famseg::FAMSEG_ISA {
namespace {

// S_1 goes ahead and leaves its states in memory, then one pass over the chunks does everything
// else. A long sequence is divided into segments: S_1 goes through all of them once and leaves its
// state at each segment's end only, and then goes through each segment again before it is read
// there. So the states in memory grow with the root of the length.
template <typename T>
struct ForwardWorkspace : Workspace<T> {
  int64_t segment, segments;  // chunks of one, and how many
  Steps<T> steps[2];
  Output<T> out;
  T* scaled;    // (chunk, headdim) weight * x
  T* state;     // (heads, d_state, headdim) of side 0, at the chunk at hand
  T* entering;  // (heads, chunks of a segment, d_state, headdim) of side 1
  T* handed;    // (heads, segments, d_state, headdim) of side 1, at each segment's end
};

template <typename S, typename T>
ForwardWorkspace<T> forward_workspace(const Problem& p, int64_t heads, Arena& arena) {
  ForwardWorkspace<T> w{};
  static_cast<Workspace<T>&>(w) = lay_out<T>(p, arena);
  for (int64_t s = 0; s < w.sides; ++s) w.steps[s] = take_steps<T>(heads * w.padded_tokens, arena);
  w.scaled = arena.take<T>(w.chunk * w.p);
  w.out = take_output<S>(w, heads, arena);
  const int64_t state_size = p.d_state * w.p;
  w.state = arena.take<T>(heads * state_size);
  w.segment = segment_chunks(w.chunks, heads * state_size * static_cast<int64_t>(sizeof(T)));
  w.segments = (w.chunks + w.segment - 1) / w.segment;
  if (w.sides == 2) {
    w.entering = arena.take<T>(heads * w.segment * state_size);
    if (w.segments > 1) w.handed = arena.take<T>(heads * w.segments * state_size);
  }
  return w;
}

// to = through * from (null: 0) + (weight * B)^T X, a state (d_state, headdim).
template <typename T>
void pass_state(const Problem& p, const ForwardWorkspace<T>& w, int64_t s, int64_t at,
                int64_t count, const T* from, T* to) {
  scale_rows(w.x, w.steps[s].weight + at, count, w.p, w.scaled);
  Product<T> update{{w.side[s].b, 1, w.n}, {w.scaled, w.p}, {to, w.p}, p.d_state, w.p, count};
  update.init = from;
  update.keep = through(w, w.steps[s], s, at);
  multiply(update);
}

// The state of side 1 that enters chunk c of segment g; null: zero.
template <typename T>
T* entering_reverse(const Problem& p, const ForwardWorkspace<T>& w, int64_t g, int64_t h,
                    int64_t c) {
  const int64_t state_size = p.d_state * w.p, first = g * w.segment;
  if (c == w.chunks - 1) return nullptr;
  if (c + 1 == first + w.segment) return w.handed + (h * w.segments + g) * state_size;
  return w.entering + (h * w.segment + c - first) * state_size;
}

// Side 1 through segment g. `hand_on`: only to leave its state to segment g - 1; else to leave the
// states that enter each chunk.
template <typename S, typename T>
void scan_reverse(const Problem& p, ForwardWorkspace<T>& w, const Block& block, int64_t axis,
                  int64_t g, bool hand_on) {
  const int64_t state_size = p.d_state * w.p, first = g * w.segment;
  const int64_t last = min(first + w.segment, w.chunks) - 1;
  for (int64_t c = last; c >= (hand_on ? first : first + 1); --c) {
    const int64_t count = w.count(c);
    locate(w, axis_of(p, axis), c, w.pixels);
    pack_matrix<S>(p, w, p.B, block, 2 * axis + 1, count, w.side[1].b);
    fetch_chunk<S>(p, w, nullptr, block, axis, c - 1);
    for (int64_t h = 0; h < block.heads; ++h) {
      pack_head<S>(p, w, p.x, block.batch, block.head + h, count, w.x);
      T* handed = hand_on ? w.handed + (h * w.segments + g - 1) * state_size : nullptr;
      T* to = hand_on ? handed : entering_reverse(p, w, g, h, c - 1);
      const T* from = hand_on && c < last ? handed : entering_reverse(p, w, g, h, c);
      pass_state(p, w, 1, h * w.padded_tokens + c * w.chunk, count, from, to);
    }
  }
}

// One chunk: its y, and side 0's state passed on.
template <typename S, typename T>
void scan_chunk(const Problem& p, ForwardWorkspace<T>& w, const Block& block, int64_t axis,
                int64_t c, const Destination& to) {
  const int64_t count = w.count(c), last = w.chunks - 1;
  locate(w, axis_of(p, axis), c, w.pixels);
  load_matrices<S>(p, w, block, axis, count);
  fetch_chunk<S>(p, w, nullptr, block, axis, c + 1);
  for (int64_t h = 0; h < block.heads; ++h) {
    const int64_t at = h * w.padded_tokens + c * w.chunk;
    pack_head<S>(p, w, p.x, block.batch, block.head + h, count, w.x);
    mix_sides(w, w.steps, at, count, static_cast<T* const*>(nullptr));
    Product<T> within{{w.mixing, w.chunk, 1}, {w.x, w.p}, {w.out.y, w.p}, count, w.p, count};
    if (w.sides == 1) within.left = Left::lower;
    multiply(within);
    T* state = w.state + h * p.d_state * w.p;
    T* entering[2] = {c > 0 || p.initial_states != nullptr ? state : nullptr,
                      w.sides == 1 ? nullptr : entering_reverse(p, w, c / w.segment, h, c)};
    for (int64_t s = 0; s < w.sides; ++s) {
      if (entering[s] == nullptr) continue;
      Product<T> read{
          {w.side[s].c, w.n, 1}, {entering[s], w.p}, {w.out.y, w.p}, count, w.p, p.d_state};
      read.row_scale = w.steps[s].arrive + at;
      read.init = w.out.y;
      multiply(read);
    }
    finish_rows<S>(p, w, w.out, block, h, axis, w.pixels, count, w.x, to);
    if (c < last || to.final_states != nullptr) pass_state(p, w, 0, at, count, entering[0], state);
  }
}

template <typename S, typename T>
void scan_block(const Problem& p, const Destination& to, const Block& block, void* scratch) {
  Arena arena{static_cast<char*>(scratch)};
  ForwardWorkspace<T> w = forward_workspace<S, T>(p, block.heads, arena);
  for (int64_t h = 0; h < block.heads; ++h) {
    load_skip(p, block.head + h, w.p, w.out.skip + h * w.p);
    if (p.initial_states != nullptr) {
      load_state(p, w, block.batch, block.head + h, w.state + h * p.d_state * w.p);
    } else if (w.chunks == 0) {
      clear(w.state + h * p.d_state * w.p, p.d_state * w.p);
    }
  }
  for (int64_t axis = 0; axis < w.axes; ++axis) {
    for (int64_t s = 0; s < w.sides; ++s) {
      for (int64_t h = 0; h < block.heads; ++h) {
        fill_steps(p, w, block.batch, axis, s, block.head + h, w.steps[s], h * w.padded_tokens);
      }
    }
    for (int64_t g = w.segments - 1; w.sides == 2 && g > 0; --g) {
      scan_reverse<S>(p, w, block, axis, g, true);
    }
    for (int64_t c = 0; c < w.chunks; ++c) {
      if (w.sides == 2 && c % w.segment == 0) {
        scan_reverse<S>(p, w, block, axis, c / w.segment, false);
      }
      scan_chunk<S>(p, w, block, axis, c, to);
    }
  }
  for (int64_t h = 0; to.final_states != nullptr && h < block.heads; ++h) {
    store_state(p, w, w.state + h * p.d_state * w.p, block.batch, block.head + h, to.final_states);
  }
}

// ---- by element type ----------------------------------------------------------------------------

int64_t chunks_any(const Problem& p) {
  return by_types(p, [&](auto, auto t) {
    using T = decltype(t);
    return sizes_of<T>(p, chunk_tokens<T>(p)).chunks;
  });
}

size_t scratch_any(const Problem& p, int64_t heads) {
  return by_types(p, [&](auto s, auto t) {
    Arena counting;
    forward_workspace<decltype(s), decltype(t)>(p, heads, counting);
    return static_cast<size_t>(counting.used);
  });
}

void block_any(const Problem& p, const Destination& to, const Block& block, void* scratch) {
  const FlushToZero guard;
  by_types(p, [&](auto s, auto t) { scan_block<decltype(s), decltype(t)>(p, to, block, scratch); });
}

}  // namespace

// `extern` because a const object is otherwise local to its file.
extern const ssd_scan::ForwardKernels ssd_scan_forward_kernels;
const ssd_scan::ForwardKernels ssd_scan_forward_kernels = {chunks_any, {scratch_any, block_any}};

}  // namespace famseg::FAMSEG_ISA
