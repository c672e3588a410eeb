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
// S_f goes from the first chunk to the last and S_b from the last to the first. One of them goes
// ahead and leaves its states in memory; then one pass over the chunks does everything else.
//
// Decays are products of the steps' own decays, multiplied up token by token: one exponential for
// each token. A sum of their logarithms would lose its digits to one huge step, and would need as
// many exponentials as L has entries. Where a sequence is to start anew the step's decay is 0, and
// nothing else has to know.
//
// A work item is a block of heads of one group and image. What the tokens of a chunk hold of B and
// C, and G, serves all heads of the block.

#include "ssd_scan/cpu.h"

#include "common/half.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "ssd_scan/matrix.h"

namespace famseg::FAMSEG_ISA {
namespace {

using ssd_scan::Block;
using ssd_scan::Gradients;
using ssd_scan::Partials;
using ssd_scan::Problem;
using ssd_scan::Results;
using ssd_scan::Shares;

// exp(-110) is 0 in float. The gradient of a step's decay is 0 below, as that of torch.clamp.
constexpr double kLowestLogDecay = -110.0;

// ---- geometry -----------------------------------------------------------------------------------

// A token order: token t is pixel t / inner * outer_step + t % inner * inner_step.
struct Axis {
  int64_t inner, outer_step, inner_step;
};

Axis axis_of(const Problem& p, int64_t index) {
  return index == 0 ? Axis{p.width, p.width, 1} : Axis{p.height, 1, p.width};
}

// Calls f(token, pixel) for `count` tokens from `first` on, numbered from 0.
template <typename F>
[[gnu::always_inline]] inline void each_token(const Axis& axis, int64_t first, int64_t count,
                                              const F& f) {
  if (count == 0) return;
  int64_t outer = first / axis.inner, inner = first % axis.inner;
  for (int64_t t = 0; t < count; ++t) {
    f(t, outer * axis.outer_step + inner * axis.inner_step);
    if (++inner == axis.inner) {
      inner = 0;
      ++outer;
    }
  }
}

// Tokens of a chunk. Longer ones make the products of M dearer, shorter ones those of the states:
// of 16, 32 and 64, 32 was the fastest or close to it from headdim and state 16 to 64.
template <typename T>
int64_t chunk_tokens(const Problem& p) {
  int64_t chunk = smaller(32, p.tokens() > 0 ? p.tokens() : 1);
  if (p.chunk > 0) chunk = smaller(chunk, p.chunk);
  return round_up(chunk, kLanes<T>);
}

// One direction of the two that share a token order: [0] goes forward, [1] backward.
template <typename T>
struct Side {
  // Of the chunk. Sides that share B and C share these.
  T* b;             // (chunk, state)
  T* c;             // (chunk, state)
  T* b_transposed;  // (state, chunk)
  T* gram;          // (chunk, chunk)
  // Of all tokens.
  T* step;   // (heads, padded tokens)
  T* decay;  // (heads, padded tokens)
  // Of the chunk and head.
  T* arrive;  // (chunk) what is left of the entering state when a token reads it
  T* leave;   // (chunk) what is left of a token's share when the state leaves
  T* weight;  // (chunk) leave * step
  T through;  // what is left of the entering state when it leaves
};

// Sizes, with the innermost one of every matrix rounded up to whole vectors, and the buffers that
// forward and backward both need.
template <typename T>
struct Space {
  int64_t tokens, chunk, chunks, padded_tokens;
  int64_t p, n;  // padded headdim and state
  int64_t axes, sides;
  bool shared;      // both sides read the same B and C
  int64_t* pixels;  // (chunk)
  Side<T> side[2];
  T* x;       // (chunk, headdim)
  T* mixing;  // (chunk, chunk)

  int64_t count(int64_t c) const { return smaller(chunk, tokens - c * chunk); }
};

template <typename T>
Space<T> lay_out(const Problem& p, int64_t heads, Arena& arena) {
  Space<T> w{};
  w.tokens = p.tokens();
  w.chunk = chunk_tokens<T>(p);
  w.chunks = (w.tokens + w.chunk - 1) / w.chunk;
  w.padded_tokens = w.chunks * w.chunk;
  w.p = round_up(p.headdim, kLanes<T>);
  w.n = round_up(p.state, kLanes<T>);
  w.axes = p.directions == 4 ? 2 : 1;
  w.sides = p.directions == 1 ? 1 : 2;
  w.shared = p.matrices == 1;
  w.pixels = arena.take<int64_t>(w.chunk);
  for (int64_t s = 0; s < w.sides; ++s) {
    Side<T>& side = w.side[s];
    if (s == 0 || !w.shared) {
      side.b = arena.take<T>(w.chunk * w.n);
      side.c = arena.take<T>(w.chunk * w.n);
      side.b_transposed = arena.take<T>(w.n * w.chunk);
      side.gram = arena.take<T>(w.chunk * w.chunk);
    } else {
      side = w.side[0];
    }
    side.step = arena.take<T>(heads * w.padded_tokens);
    side.decay = arena.take<T>(heads * w.padded_tokens);
    side.arrive = arena.take<T>(w.chunk);
    side.leave = arena.take<T>(w.chunk);
    side.weight = arena.take<T>(w.chunk);
  }
  w.x = arena.take<T>(w.chunk * w.p);
  w.mixing = arena.take<T>(w.chunk * w.chunk);
  return w;
}

// ---- moving tensors in and out ------------------------------------------------------------------

template <typename T>
void clear(T* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = T(0);
}

template <typename S, typename T>
[[gnu::always_inline]] inline void copy_row(const S* from, int64_t width, T* to) {
  for (int64_t i = 0; i < width; ++i) to[i] = widen(from[i]);
}

// The rows are short, so what a compiler does before and after a loop over vectors would cost more
// than the loop.
template <typename T>
[[gnu::always_inline]] inline void copy_row(const T* from, int64_t width, T* to) {
  int64_t i = 0;
  for (; i + kLanes<T> <= width; i += kLanes<T>) store(to + i, load(from + i));
  for (; i < width; ++i) to[i] = from[i];
}

// What the tokens of a chunk hold of a tensor, as a matrix: `width` elements of each pixel, zeros
// up to the stride and down to `rows` rows.
template <typename S, typename T>
void pack(const S* from, int64_t pixel_stride, int64_t width, const int64_t* pixels, int64_t count,
          int64_t rows, T* to, int64_t stride) {
  for (int64_t t = 0; t < count; ++t) {
    T* out = to + t * stride;
    copy_row(from + pixels[t] * pixel_stride, width, out);
    for (int64_t i = width; i < stride; ++i) out[i] = T(0);
  }
  clear(to + count * stride, (rows - count) * stride);
}

// The element of a tensor like x where this image and head start.
template <typename S>
auto head_of(const Problem& p, S* x, int64_t batch, int64_t head) {
  return x + (batch * p.tokens() * p.heads + head) * p.headdim;
}

template <typename S, typename T>
void pack_head(const Problem& p, const Space<T>& w, const void* x, int64_t batch, int64_t head,
               int64_t count, T* to) {
  pack(head_of(p, static_cast<const S*>(x), batch, head), p.heads * p.headdim, p.headdim, w.pixels,
       count, w.chunk, to, w.p);
}

// The element of B and C where this image, direction and group start.
int64_t matrix_offset(const Problem& p, const Block& block, int64_t direction) {
  const int64_t which = p.matrices == 1 ? 0 : direction;
  return ((block.batch * p.tokens() * p.matrices + which) * p.groups + block.group) * p.state;
}

template <typename S, typename T>
void pack_matrix(const Problem& p, const Space<T>& w, const void* matrix, const Block& block,
                 int64_t direction, int64_t count, T* to) {
  const S* from = static_cast<const S*>(matrix) + matrix_offset(p, block, direction);
  pack(from, p.matrices * p.groups * p.state, p.state, w.pixels, count, w.chunk, to, w.n);
}

template <typename T>
void locate(const Space<T>& w, const Axis& axis, int64_t c) {
  each_token(axis, c * w.chunk, w.count(c), [&](int64_t t, int64_t pixel) { w.pixels[t] = pixel; });
}

// Asks for a chunk's rows of a tensor to be brought into the L2 cache. In column-major order they
// are far apart, and no hardware prefetcher sees them coming.
template <bool WRITE, typename S>
void fetch(const Axis& axis, int64_t first, int64_t count, const S* from, int64_t pixel_stride,
           int64_t width) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(S));
  each_token(axis, first, count, [&](int64_t, int64_t pixel) {
    const S* row = from + pixel * pixel_stride;
    for (int64_t i = 0; i < width; i += line) __builtin_prefetch(row + i, WRITE ? 1 : 0, 2);
  });
}

template <typename S, typename T>
void fetch_heads(const Problem& p, const Space<T>& w, const void* x, const Block& block,
                 int64_t axis, int64_t c) {
  if (x == nullptr) return;
  fetch<false>(axis_of(p, axis), c * w.chunk, w.count(c),
               head_of(p, static_cast<const S*>(x), block.batch, block.head), p.heads * p.headdim,
               block.heads * p.headdim);
}

template <bool WRITE, typename S, typename T>
void fetch_matrices(const Problem& p, const Space<T>& w, const S* matrix, const Block& block,
                    int64_t axis, int64_t c) {
  if (matrix == nullptr) return;
  for (int64_t s = 0; s < (w.shared ? 1 : w.sides); ++s) {
    fetch<WRITE>(axis_of(p, axis), c * w.chunk, w.count(c),
                 matrix + matrix_offset(p, block, 2 * axis + s), p.matrices * p.groups * p.state,
                 p.state);
  }
}

// What a chunk reads of x, B and C, and of y's gradient unless that is null.
template <typename S, typename T>
void fetch_chunk(const Problem& p, const Space<T>& w, const void* y_gradient, const Block& block,
                 int64_t axis, int64_t c) {
  if (c < 0 || c >= w.chunks) return;
  fetch_heads<S>(p, w, p.x, block, axis, c);
  fetch_heads<S>(p, w, y_gradient, block, axis, c);
  fetch_matrices<false>(p, w, static_cast<const S*>(p.B), block, axis, c);
  fetch_matrices<false>(p, w, static_cast<const S*>(p.C), block, axis, c);
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

// ---- steps and decays ---------------------------------------------------------------------------

// ln(1 + u) for 0 <= u <= 1, by the series of 2 artanh(u / (2 + u)).
template <typename T>
[[gnu::always_inline]] inline Vector<T> log_one_plus(Vector<T> u) {
  constexpr int terms = sizeof(T) == sizeof(float) ? 8 : 17;
  const Vector<T> s = u / (u + T(2));
  const Vector<T> square = s * s;
  Vector<T> sum = {};
#pragma GCC unroll 17
  for (int k = terms - 1; k >= 0; --k) sum = sum * square + T(1) / T(2 * k + 1);
  return T(2) * s * sum;
}

template <typename T>
[[gnu::always_inline]] inline Vector<T> softplus(Vector<T> x) {
  const Vector<T> size = x < T(0) ? -x : x;
  const Vector<T> low = (x < T(0) ? Vector<T>{} : x) + log_one_plus<T>(exponential<T>(-size));
  return x > T(20) ? x : low;
}

template <typename T>
[[gnu::always_inline]] inline Vector<T> sigmoid(Vector<T> x) {
  return T(1) / (T(1) + exponential<T>(-x));
}

// The rule by which dt becomes the step and its decay, for one direction and head.
template <typename T>
struct StepRule {
  bool softplus;
  T low, high, bias, A;

  [[gnu::always_inline]] Vector<T> unclamped(Vector<T> raw) const {
    return softplus ? FAMSEG_ISA::softplus<T>(raw) : raw;
  }
};

template <typename T>
StepRule<T> step_rule(const Problem& p, int64_t direction, int64_t head) {
  const int64_t at = direction * p.heads + head;
  return {p.softplus, static_cast<T>(p.dt_min), static_cast<T>(p.dt_max),
          p.dt_bias == nullptr ? T(0) : static_cast<const T*>(p.dt_bias)[at],
          static_cast<const T*>(p.A)[at]};
}

template <typename T>
[[gnu::always_inline]] inline Vector<T> clamp(Vector<T> v, T low, T high) {
  const Vector<T> raised = v < low ? broadcast(low) : v;
  return raised > high ? broadcast(high) : raised;
}

// dt + bias of all tokens.
template <typename T>
void gather_dt(const Problem& p, const Axis& axis, int64_t batch, int64_t direction, int64_t head,
               T bias, T* to) {
  const int64_t stride = p.directions * p.heads;
  const T* dt =
      static_cast<const T*>(p.dt) + batch * p.tokens() * stride + direction * p.heads + head;
  each_token(axis, 0, p.tokens(),
             [&](int64_t t, int64_t pixel) { to[t] = dt[pixel * stride] + bias; });
}

// Tokens beyond the last have step 0 and decay 1: they keep the state and add nothing.
template <typename T>
void fill_steps(const Problem& p, const Space<T>& w, const Axis& axis, int64_t batch,
                int64_t direction, int64_t head, T* step, T* decay) {
  const StepRule<T> rule = step_rule<T>(p, direction, head);
  gather_dt(p, axis, batch, direction, head, rule.bias, step);
  for (int64_t t = w.tokens; t < w.padded_tokens; ++t) step[t] = T(0);
  for (int64_t t = 0; t < w.padded_tokens; t += kLanes<T>) {
    const Vector<T> value = clamp(rule.unclamped(load(step + t)), rule.low, rule.high);
    store(step + t, value);
    const Vector<T> log_decay = value * rule.A;
    const Vector<T> lowest = broadcast(static_cast<T>(kLowestLogDecay));
    store(decay + t, exponential<T>(log_decay < lowest ? lowest : log_decay));
  }
  for (int64_t t = w.tokens; t < w.padded_tokens; ++t) {
    step[t] = T(0);
    decay[t] = T(1);
  }
  if (p.resets != nullptr) {
    for (int64_t t = 0; t < w.tokens; ++t) {
      if (p.resets[batch * w.tokens + t] != 0) decay[t] = T(0);
    }
  }
}

template <typename T>
void fill_all_steps(const Problem& p, Space<T>& w, const Block& block, int64_t axis) {
  for (int64_t s = 0; s < w.sides; ++s) {
    for (int64_t h = 0; h < block.heads; ++h) {
      fill_steps(p, w, axis_of(p, axis), block.batch, 2 * axis + s, block.head + h,
                 w.side[s].step + h * w.padded_tokens, w.side[s].decay + h * w.padded_tokens);
    }
  }
}

// arrive, leave, weight and through of a chunk; `at`: its first token among those of all heads.
template <bool BACKWARD, typename T>
void carry(const Space<T>& w, Side<T>& side, int64_t at) {
  const T* decay = side.decay + at;
  const T* step = side.step + at;
  const auto token = [&](int64_t i) { return BACKWARD ? w.chunk - 1 - i : i; };
  T in = 1, out = 1;
  for (int64_t i = 0; i < w.chunk; ++i) {
    in *= decay[token(i)];
    side.arrive[token(i)] = in;
    const int64_t j = token(w.chunk - 1 - i);
    side.leave[j] = out;
    side.weight[j] = out * step[j];
    out *= decay[j];
  }
  side.through = in;
}

template <typename T>
void carry(const Space<T>& w, Side<T>& side, int64_t s, int64_t at) {
  s == 0 ? carry<false>(w, side, at) : carry<true>(w, side, at);
}

template <typename T>
[[gnu::always_inline]] inline Vector<T> lane_numbers() {
  Vector<T> numbers;
  for (int i = 0; i < kLanes<T>; ++i) numbers[i] = static_cast<T>(i);
  return numbers;
}

// This side's part of M: mixing = or += gram * L * step. Stores L, where it is not zero by being on
// the other side of the diagonal, unless `decays` is null.
template <bool BACKWARD, typename T>
void mix(const Space<T>& w, const Side<T>& side, int64_t at, int64_t count, T* decays, T* mixing) {
  const T* decay = side.decay + at;
  const int64_t lanes = kLanes<T>;
  // By columns of one vector: the running products then stay in a register.
  for (int64_t j = 0; j < w.chunk; j += lanes) {
    const Vector<T> step = load(side.step + at + j);
    const Vector<T> column = lane_numbers<T>() + static_cast<T>(j);
    Vector<T> product = {};
    const auto row = [&](int64_t i) {
      const int64_t place = i * w.chunk + j;
      product = column == static_cast<T>(i) ? broadcast(T(1)) : product * decay[i];
      if (decays != nullptr) store(decays + place, product);
      Vector<T> value = load(side.gram + place) * product * step;
      if (BACKWARD) value += load(mixing + place);
      store(mixing + place, value);
    };
    if (BACKWARD) {
      for (int64_t i = smaller(count, j + lanes) - 1; i >= 0; --i) row(i);
    } else {
      for (int64_t i = 0; i < smaller(count, j); ++i) store(mixing + i * w.chunk + j, Vector<T>{});
      for (int64_t i = j; i < count; ++i) row(i);
    }
  }
}

// M of a chunk and head. `decays`: L of either side, or null.
template <typename T>
void mix_sides(const Space<T>& w, int64_t at, int64_t count, T* const* decays) {
  mix<false>(w, w.side[0], at, count, decays == nullptr ? nullptr : decays[0], w.mixing);
  if (w.sides == 2) {
    mix<true>(w, w.side[1], at, count, decays == nullptr ? nullptr : decays[1], w.mixing);
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

template <typename T>
struct ForwardSpace : Space<T> {
  T* scaled;    // (chunk, headdim) weight * x
  T* part;      // (chunk, headdim) of y
  T* y;         // (heads, pixels, headdim) the sum over directions
  T* state;     // (heads, state, headdim) of side 0, at the chunk at hand
  T* entering;  // (heads, chunks, state, headdim) of side 1
};

template <typename T>
ForwardSpace<T> forward_space(const Problem& p, int64_t heads, Arena& arena) {
  ForwardSpace<T> w{lay_out<T>(p, heads, arena), nullptr, nullptr, nullptr, nullptr, nullptr};
  w.scaled = arena.take<T>(w.chunk * w.p);
  w.part = arena.take<T>(w.chunk * w.p);
  w.y = arena.take<T>(heads * w.tokens * w.p);
  w.state = arena.take<T>(heads * p.state * w.p);
  if (w.sides == 2) w.entering = arena.take<T>(heads * w.chunks * p.state * w.p);
  return w;
}

// to = through * from (null: 0) + (weight * B)^T X, a state (state, headdim).
template <typename T>
void pass_state(const Problem& p, const ForwardSpace<T>& w, const Side<T>& side, int64_t count,
                const T* from, T* to) {
  scale_rows(w.x, side.weight, count, w.p, w.scaled);
  Product<T> update{side.b, 1, w.n, w.scaled, w.p, to, w.p, p.state, w.p, count};
  update.init = from;
  update.keep = side.through;
  multiply(update);
}

// The states of side 1 that enter each chunk but the last, from the last to the first.
template <typename S, typename T>
void enter_backward(const Problem& p, ForwardSpace<T>& w, const Block& block, int64_t axis) {
  const int64_t state = p.state * w.p;
  for (int64_t c = w.chunks - 1; c > 0; --c) {
    const int64_t count = w.count(c);
    locate(w, axis_of(p, axis), c);
    pack_matrix<S>(p, w, p.B, block, 2 * axis + 1, count, w.side[1].b);
    fetch_chunk<S>(p, w, nullptr, block, axis, c - 1);
    for (int64_t h = 0; h < block.heads; ++h) {
      carry<true>(w, w.side[1], h * w.padded_tokens + c * w.chunk);
      pack_head<S>(p, w, p.x, block.batch, block.head + h, count, w.x);
      T* to = w.entering + (h * w.chunks + c - 1) * state;
      pass_state(p, w, w.side[1], count, c == w.chunks - 1 ? nullptr : to + state, to);
    }
  }
}

// Adds (axis 0: writes) one axis' directions to y, and takes the state of side 0 to the end.
template <typename S, typename T>
void forward_axis(const Problem& p, ForwardSpace<T>& w, const Block& block, int64_t axis,
                  bool wants_final) {
  const int64_t state = p.state * w.p;
  fill_all_steps(p, w, block, axis);
  if (w.sides == 2) enter_backward<S>(p, w, block, axis);
  for (int64_t c = 0; c < w.chunks; ++c) {
    const int64_t count = w.count(c);
    locate(w, axis_of(p, axis), c);
    load_matrices<S>(p, w, block, axis, count);
    fetch_chunk<S>(p, w, nullptr, block, axis, c + 1);
    for (int64_t h = 0; h < block.heads; ++h) {
      const int64_t at = h * w.padded_tokens + c * w.chunk;
      T* y = w.y + h * w.tokens * w.p;
      // The first axis goes through the pixels in order.
      T* part = axis == 0 ? y + c * w.chunk * w.p : w.part;
      pack_head<S>(p, w, p.x, block.batch, block.head + h, count, w.x);
      mix_sides(w, at, count, static_cast<T* const*>(nullptr));
      Product<T> within{w.mixing, w.chunk, 1, w.x, w.p, part, w.p, count, w.p, count};
      if (w.sides == 1) within.left = Left::lower;
      multiply(within);
      for (int64_t s = 0; s < w.sides; ++s) {
        const bool enters = s == 0 ? c > 0 || p.initial != nullptr : c < w.chunks - 1;
        if (!enters && (s == 1 || (c == w.chunks - 1 && !wants_final))) continue;
        carry(w, w.side[s], s, at);
        T* entering = s == 0 ? w.state + h * state : w.entering + (h * w.chunks + c) * state;
        if (enters) {
          Product<T> read{w.side[s].c, w.n, 1, entering, w.p, part, w.p, count, w.p, p.state};
          read.row_scale = w.side[s].arrive;
          read.init = part;
          multiply(read);
        }
        if (s == 0 && (c < w.chunks - 1 || wants_final)) {
          pass_state(p, w, w.side[0], count, enters ? entering : nullptr, entering);
        }
      }
      if (axis == 0) continue;
      for (int64_t t = 0; t < count; ++t) {
        T* to = y + w.pixels[t] * w.p;
        for (int64_t i = 0; i < w.p; i += kLanes<T>) {
          store(to + i, load(to + i) + load(part + t * w.p + i));
        }
      }
    }
  }
}

// States (headdim, state) in memory are (state, headdim) here.
template <typename T>
void load_state(const Problem& p, const ForwardSpace<T>& w, const void* states, const Block& block,
                int64_t h) {
  const int64_t index = block.batch * p.heads + block.head + h;
  const T* from = static_cast<const T*>(states) + index * p.headdim * p.state;
  T* to = w.state + h * p.state * w.p;
  for (int64_t n = 0; n < p.state; ++n) {
    for (int64_t i = 0; i < p.headdim; ++i) to[n * w.p + i] = from[i * p.state + n];
    for (int64_t i = p.headdim; i < w.p; ++i) to[n * w.p + i] = T(0);
  }
}

template <typename T>
void store_state(const Problem& p, const ForwardSpace<T>& w, void* states, const Block& block,
                 int64_t h) {
  const int64_t index = block.batch * p.heads + block.head + h;
  const T* from = w.state + h * p.state * w.p;
  T* to = static_cast<T*>(states) + index * p.headdim * p.state;
  for (int64_t i = 0; i < p.headdim; ++i) {
    for (int64_t n = 0; n < p.state; ++n) to[i * p.state + n] = from[n * w.p + i];
  }
}

// y of the block before D and z; writes the final states.
template <typename S, typename T>
void scan_block(const Problem& p, ForwardSpace<T>& w, const Block& block, void* final_states) {
  const bool wants_final = final_states != nullptr;
  for (int64_t h = 0; h < block.heads; ++h) {
    if (p.initial != nullptr) {
      load_state(p, w, p.initial, block, h);
    } else if (w.chunks == 0) {
      clear(w.state + h * p.state * w.p, p.state * w.p);
    }
  }
  for (int64_t axis = 0; axis < w.axes; ++axis) {
    forward_axis<S>(p, w, block, axis, wants_final && axis == 0);
  }
  for (int64_t h = 0; wants_final && h < block.heads; ++h) {
    store_state(p, w, final_states, block, h);
  }
}

// D's row of a head, in whole vectors; zeros without D.
template <typename T>
void load_skip(const Problem& p, int64_t head, int64_t width, T* to) {
  clear(to, width);
  if (p.D == nullptr) return;
  for (int64_t i = 0; i < p.headdim; ++i) {
    to[i] = static_cast<const T*>(p.D)[head * p.headdim + i];
  }
}

template <typename S, typename T>
void forward_block(const Problem& p, const Results& results, const Block& block, void* scratch) {
  Arena arena{static_cast<char*>(scratch)};
  ForwardSpace<T> w = forward_space<T>(p, block.heads, arena);
  T* skip = arena.take<T>(w.p);
  T* z = arena.take<T>(w.p);
  scan_block<S>(p, w, block, results.final_states);
  for (int64_t h = 0; h < block.heads; ++h) {
    const int64_t head = block.head + h;
    const S* x = head_of(p, static_cast<const S*>(p.x), block.batch, head);
    const S* gates =
        p.z == nullptr ? nullptr : head_of(p, static_cast<const S*>(p.z), block.batch, head);
    S* out = head_of(p, static_cast<S*>(results.y), block.batch, head);
    load_skip(p, head, w.p, skip);
    for (int64_t pixel = 0; pixel < w.tokens; ++pixel) {
      T* y = w.y + (h * w.tokens + pixel) * w.p;
      const int64_t at = pixel * p.heads * p.headdim;
      if (p.D != nullptr) {
        for (int64_t i = 0; i < p.headdim; ++i) y[i] += skip[i] * widen(x[at + i]);
      }
      if (p.z != nullptr) {
        const int64_t first = 0;
        pack(gates + at, 0, p.headdim, &first, 1, 1, z, w.p);
        for (int64_t i = 0; i < w.p; i += kLanes<T>) {
          store(y + i, load(y + i) * load(z + i) * sigmoid<T>(load(z + i)));
        }
      }
      for (int64_t i = 0; i < p.headdim; ++i) narrow(out[at + i], y[i]);
    }
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
// A decay's logarithm has as its gradient the sum over all pairs of tokens it lies between. Those
// sums are built up term by term: a difference of running sums would lose small ones beside large.
template <typename T>
struct BackwardSpace : Space<T> {
  T* y_gradient;             // (chunk, headdim)
  T* x_transposed;           // (headdim, chunk)
  T* mixing_gradient;        // (chunk, chunk)
  T* x_gradient_transposed;  // (headdim, chunk)
  T* x_gradient_part;        // (chunk, headdim)
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
  T* step_gradient[2];       // (heads, padded tokens)
  T* log_gradient[2];        // (heads, padded tokens) of step * A
  T* x_gradient;             // (heads, pixels, headdim)
  // Side 0's states and side 1's gradients go ahead and are kept: (heads, chunks, headdim, state).
  T* kept[2];
  // Side 1's state and side 0's gradient at the chunk at hand: (heads, headdim, state).
  T* running[2];
  T* gate;                // (headdim) or null without z
  T* skip;                // (headdim)
  T* sums;                // (headdim)
  double* skip_gradient;  // (headdim)
};

template <typename T>
BackwardSpace<T> backward_space(const Problem& p, int64_t heads, Arena& arena) {
  BackwardSpace<T> w{};
  static_cast<Space<T>&>(w) = lay_out<T>(p, heads, arena);
  w.y_gradient = arena.take<T>(w.chunk * w.p);
  w.x_transposed = arena.take<T>(w.p * w.chunk);
  w.mixing_gradient = arena.take<T>(w.chunk * w.chunk);
  w.x_gradient_transposed = arena.take<T>(w.p * w.chunk);
  w.x_gradient_part = arena.take<T>(w.chunk * w.p);
  w.product = arena.take<T>(w.chunk * w.n);
  w.scaled = arena.take<T>(w.chunk * w.n);
  w.row_lanes = arena.take<T>(w.chunk * kLanes<T>);
  w.between = arena.take<T>(w.chunk);
  w.arriving = arena.take<T>(w.chunk);
  w.leaving = arena.take<T>(w.chunk);
  w.x_gradient = arena.take<T>(heads * w.tokens * w.p);
  w.gate = arena.take<T>(w.p);
  w.skip = arena.take<T>(w.p);
  w.sums = arena.take<T>(w.p);
  w.skip_gradient = arena.take<double>(w.p);
  for (int64_t s = 0; s < w.sides; ++s) {
    w.decays[s] = arena.take<T>(w.chunk * w.chunk);
    if (s == 0 || !w.shared) {
      w.gram_gradient[s] = arena.take<T>(w.chunk * w.chunk);
      w.b_gradient[s] = arena.take<T>(w.chunk * w.n);
      w.c_gradient[s] = arena.take<T>(w.chunk * w.n);
    } else {
      w.gram_gradient[s] = w.gram_gradient[0];
      w.b_gradient[s] = w.b_gradient[0];
      w.c_gradient[s] = w.c_gradient[0];
    }
    w.step_gradient[s] = arena.take<T>(heads * w.padded_tokens);
    w.log_gradient[s] = arena.take<T>(heads * w.padded_tokens);
    w.kept[s] = arena.take<T>(heads * w.chunks * p.headdim * w.n);
    w.running[s] = arena.take<T>(heads * p.headdim * w.n);
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

// to = through * from (null: 0) + a^T (factors * b), a state (headdim, state).
template <typename T>
void pass_on(const Problem& p, const BackwardSpace<T>& w, T through, const T* factors, const T* a,
             const T* b, int64_t count, const T* from, T* to) {
  scale_rows(b, factors, count, w.n, w.scaled);
  Product<T> update{a, 1, w.p, w.scaled, w.n, to, w.n, p.headdim, w.n, count};
  update.init = from;
  update.keep = through;
  multiply(update);
}

// States in memory have no padding.
template <typename T>
void load_padded(const Problem& p, const BackwardSpace<T>& w, const void* states,
                 const Block& block, int64_t h, T* to) {
  const int64_t index = block.batch * p.heads + block.head + h;
  const T* from = static_cast<const T*>(states) + index * p.headdim * p.state;
  for (int64_t i = 0; i < p.headdim; ++i) {
    for (int64_t n = 0; n < p.state; ++n) to[i * w.n + n] = from[i * p.state + n];
    for (int64_t n = p.state; n < w.n; ++n) to[i * w.n + n] = T(0);
  }
}

// The states of side 0 that enter each chunk and the gradients of the states of side 1 that leave
// it, from the first chunk to the last.
template <typename S, typename T>
void go_ahead(const Problem& p, BackwardSpace<T>& w, const Gradients& gradients, const Block& block,
              int64_t axis) {
  const int64_t state = p.headdim * w.n;
  for (int64_t h = 0; p.initial != nullptr && w.chunks > 0 && h < block.heads; ++h) {
    load_padded(p, w, p.initial, block, h, w.kept[0] + h * w.chunks * state);
  }
  for (int64_t c = 0; c < w.chunks - 1; ++c) {
    const int64_t count = w.count(c);
    locate(w, axis_of(p, axis), c);
    pack_matrix<S>(p, w, p.B, block, 2 * axis, count, w.side[0].b);
    if (w.sides == 2) pack_matrix<S>(p, w, p.C, block, 2 * axis + 1, count, w.side[1].c);
    fetch_chunk<S>(p, w, gradients.y, block, axis, c + 1);
    for (int64_t h = 0; h < block.heads; ++h) {
      const int64_t at = h * w.padded_tokens + c * w.chunk;
      T* from = w.kept[0] + (h * w.chunks + c) * state;
      carry<false>(w, w.side[0], at);
      pack_head<S>(p, w, p.x, block.batch, block.head + h, count, w.x);
      pass_on(p, w, w.side[0].through, w.side[0].weight, w.x, w.side[0].b, count,
              c > 0 || p.initial != nullptr ? from : nullptr, from + state);
      if (w.sides == 1) continue;
      from = w.kept[1] + (h * w.chunks + c) * state;
      carry<true>(w, w.side[1], at);
      pack_y_gradient<S>(p, w, gradients, block.batch, block.head + h, count);
      pass_on(p, w, w.side[1].through, w.side[1].arrive, w.y_gradient, w.side[1].c, count,
              c > 0 ? from : nullptr, from + state);
    }
  }
}

// From dM: adds to dG, writes the gradients of the steps and of the decays' logarithms that come
// from pairs of tokens within the chunk.
template <bool BACKWARD, typename T>
void pair_gradients(const BackwardSpace<T>& w, const Side<T>& side, int64_t at, int64_t count,
                    const T* decays, T* gram_gradient, T* step_gradient) {
  const int64_t lanes = kLanes<T>;
  clear(w.row_lanes, w.chunk * lanes);
  for (int64_t j = 0; j < w.chunk; j += lanes) {
    const Vector<T> step = load(side.step + at + j);
    const Vector<T> column = lane_numbers<T>() + static_cast<T>(j);
    Vector<T> total = {};   // over the rows
    Vector<T> across = {};  // over the rows so far: pairs across the decay of row i
    const auto row = [&](int64_t i) {
      const int64_t place = i * w.chunk + j;
      const Vector<T> pair = load(w.mixing_gradient + place) * load(decays + place);
      store(gram_gradient + place, load(gram_gradient + place) + pair * step);
      const Vector<T> of_step = pair * load(side.gram + place);
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

// What side s of a chunk and head adds to all gradients, and its running state or gradient passed
// on. `entering`: the state, `leaving`: the gradient of the state that leaves; null: zero.
template <typename T>
void side_gradients(const Problem& p, BackwardSpace<T>& w, int64_t s, int64_t at, int64_t count,
                    const T* entering, const T* leaving) {
  Side<T>& side = w.side[s];
  T* step_gradient = w.step_gradient[s] + at;
  T* log_gradient = w.log_gradient[s] + at;
  if (s == 0) {
    pair_gradients<false>(w, side, at, count, w.decays[s], w.gram_gradient[s], step_gradient);
  } else {
    pair_gradients<true>(w, side, at, count, w.decays[s], w.gram_gradient[s], step_gradient);
  }
  carry(w, side, s, at);
  clear(w.arriving, w.chunk);
  clear(w.leaving, w.chunk);
  T passing = 0;
  if (entering != nullptr) {
    multiply(
        Product<T>{w.y_gradient, w.p, 1, entering, w.n, w.product, w.n, count, w.n, p.headdim});
    add_rows(w, side.arrive, count, side.c, w.c_gradient[s], w.arriving);
    for (int64_t i = 0; i < w.chunk; ++i) w.arriving[i] *= side.arrive[i];
  }
  if (leaving != nullptr) {
    multiply(Product<T>{w.x, w.p, 1, leaving, w.n, w.product, w.n, count, w.n, p.headdim});
    add_rows(w, side.weight, count, side.b, w.b_gradient[s], w.leaving);
    for (int64_t j = 0; j < w.chunk; ++j) {
      w.leaving[j] *= side.leave[j];
      step_gradient[j] += w.leaving[j];
      w.leaving[j] *= side.step[at + j];
    }
    for (int64_t n = 0; n < p.state; ++n) {
      for (int64_t j = 0; j < w.chunk; j += kLanes<T>) {
        const int64_t place = n * w.chunk + j;
        store(w.scaled + place, load(side.b_transposed + place) * load(side.weight + j));
      }
    }
    Product<T> of_x{leaving, w.n,       1,       w.scaled, w.chunk, w.x_gradient_transposed,
                    w.chunk, p.headdim, w.chunk, p.state};
    of_x.init = w.x_gradient_transposed;
    multiply(of_x);
  }
  if (entering != nullptr && leaving != nullptr) {
    passing = side.through * inner_product(entering, leaving, p.headdim * w.n);
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

template <typename T>
T* share_of(const Problem& p, const Shares& shares, const Block& block) {
  if (block.index == 0 || shares.first == nullptr) return static_cast<T*>(shares.first);
  return static_cast<T*>(shares.rest) + (block.index - 1) * p.matrix_elements();
}

// The gradient of B or C of a chunk goes to the block's share.
template <typename T>
void store_rows(const Problem& p, const BackwardSpace<T>& w, const Shares& shares, const T* from,
                const Block& block, int64_t direction, int64_t count) {
  T* share = share_of<T>(p, shares, block);
  if (share == nullptr) return;
  T* to = share + matrix_offset(p, block, direction);
  // Matrices of all directions get a part from each axis.
  const bool add = w.shared && direction >= 2;
  for (int64_t t = 0; t < count; ++t) {
    T* row = to + w.pixels[t] * p.matrices * p.groups * p.state;
    const T* in = from + t * w.n;
    if (add) {
      for (int64_t n = 0; n < p.state; ++n) row[n] += in[n];
    } else {
      copy_row(in, p.state, row);
    }
  }
}

// Completes the gradients of B and C of a chunk by the part that goes through G, and stores them.
template <typename T>
void matrix_gradients(const Problem& p, const BackwardSpace<T>& w, const Partials& partials,
                      const Block& block, int64_t axis, int64_t count) {
  for (int64_t s = 0; s < (w.shared ? 1 : w.sides); ++s) {
    const Side<T>& side = w.side[s];
    const bool both = w.shared && w.sides == 2;
    Product<T> of_c{w.gram_gradient[s], w.chunk, 1,     side.b, w.n,
                    w.c_gradient[s],    w.n,     count, w.n,    count};
    of_c.init = w.c_gradient[s];
    of_c.left = both ? Left::full : s == 0 ? Left::lower : Left::upper;
    multiply(of_c);
    Product<T> of_b{w.gram_gradient[s], 1,   w.chunk, side.c, w.n,
                    w.b_gradient[s],    w.n, count,   w.n,    count};
    of_b.init = w.b_gradient[s];
    of_b.left = both ? Left::full : s == 0 ? Left::upper : Left::lower;
    multiply(of_b);

    store_rows(p, w, partials.B, w.b_gradient[s], block, 2 * axis + s, count);
    store_rows(p, w, partials.C, w.c_gradient[s], block, 2 * axis + s, count);
  }
}

template <typename S, typename T>
void backward_axis(const Problem& p, BackwardSpace<T>& w, const Gradients& gradients,
                   const Partials& partials, const Block& block, int64_t axis) {
  const int64_t state = p.headdim * w.n;
  const int64_t last = w.chunks - 1;
  fill_all_steps(p, w, block, axis);
  go_ahead<S>(p, w, gradients, block, axis);
  for (int64_t c = last; c >= 0; --c) {
    const int64_t count = w.count(c);
    locate(w, axis_of(p, axis), c);
    load_matrices<S>(p, w, block, axis, count);
    fetch_chunk<S>(p, w, gradients.y, block, axis, c - 1);
    fetch_matrices<true>(p, w, share_of<T>(p, partials.B, block), block, axis, c);
    fetch_matrices<true>(p, w, share_of<T>(p, partials.C, block), block, axis, c);
    for (int64_t s = 0; s < w.sides; ++s) {
      clear(w.gram_gradient[s], w.chunk * w.chunk);
      clear(w.b_gradient[s], w.chunk * w.n);
      clear(w.c_gradient[s], w.chunk * w.n);
    }
    for (int64_t h = 0; h < block.heads; ++h) {
      const int64_t at = h * w.padded_tokens + c * w.chunk;
      pack_head<S>(p, w, p.x, block.batch, block.head + h, count, w.x);
      pack_y_gradient<S>(p, w, gradients, block.batch, block.head + h, count);
      transpose(w.x, w.p, w.chunk, w.p, w.x_transposed, w.chunk);
      multiply(Product<T>{w.y_gradient, w.p, 1, w.x_transposed, w.chunk, w.mixing_gradient, w.chunk,
                          count, w.chunk, p.headdim});
      mix_sides(w, at, count, w.decays);
      multiply(Product<T>{w.y_gradient, 1, w.p, w.mixing, w.chunk, w.x_gradient_transposed, w.chunk,
                          p.headdim, w.chunk, count});
      // Side 0: its state was kept, its gradient runs along.
      const T* entering =
          c > 0 || p.initial != nullptr ? w.kept[0] + (h * w.chunks + c) * state : nullptr;
      T* leaving = w.running[0] + h * state;
      const bool leaves = c < last || gradients.final_states != nullptr;
      side_gradients(p, w, 0, at, count, entering, leaves ? leaving : nullptr);
      if (c > 0 || gradients.initial != nullptr) {
        pass_on(p, w, w.side[0].through, w.side[0].arrive, w.y_gradient, w.side[0].c, count,
                leaves ? leaving : nullptr, leaving);
      }
      if (w.sides == 2) {
        // Side 1: its gradient was kept, its state runs along.
        T* running = w.running[1] + h * state;
        side_gradients(p, w, 1, at, count, c < last ? running : nullptr,
                       c > 0 ? w.kept[1] + (h * w.chunks + c) * state : nullptr);
        if (c > 0) {
          pass_on(p, w, w.side[1].through, w.side[1].weight, w.x, w.side[1].b, count,
                  c < last ? running : nullptr, running);
        }
      }
      transpose(w.x_gradient_transposed, w.chunk, w.p, w.chunk, w.x_gradient_part, w.p);
      for (int64_t t = 0; t < count; ++t) {
        T* to = w.x_gradient + (h * w.tokens + w.pixels[t]) * w.p;
        const T* from = w.x_gradient_part + t * w.p;
        for (int64_t i = 0; i < w.p; i += kLanes<T>) {
          store(to + i, axis == 0 ? load(from + i) : load(to + i) + load(from + i));
        }
      }
    }
    matrix_gradients(p, w, partials, block, axis, count);
  }
}

// From the gradients of steps and log-decays: those of dt, A and dt_bias.
template <typename T>
void step_gradients(const Problem& p, const BackwardSpace<T>& w, const Gradients& gradients,
                    const Partials& partials, const Block& block, int64_t axis, int64_t s,
                    int64_t h) {
  const int64_t direction = 2 * axis + s, head = block.head + h;
  const StepRule<T> rule = step_rule<T>(p, direction, head);
  T* of_step = w.step_gradient[s] + h * w.padded_tokens;
  T* of_log = w.log_gradient[s] + h * w.padded_tokens;
  const T* step = w.side[s].step + h * w.padded_tokens;
  // Its decays are no longer needed: their place takes dt.
  T* raw = w.side[s].decay + h * w.padded_tokens;
  gather_dt(p, axis_of(p, axis), block.batch, direction, head, rule.bias, raw);
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
  partials.A[at] = of_A;
  partials.dt_bias[at] = of_bias;
  if (gradients.dt == nullptr) return;
  const int64_t stride = p.directions * p.heads;
  T* to =
      static_cast<T*>(gradients.dt) + block.batch * w.tokens * stride + direction * p.heads + head;
  each_token(axis_of(p, axis), 0, w.tokens,
             [&](int64_t t, int64_t pixel) { to[pixel * stride] = of_step[t]; });
}

// The gradient of x through D, and that of D; stores the gradient of x.
template <typename S, typename T>
void skip_gradients(const Problem& p, const BackwardSpace<T>& w, const Gradients& gradients,
                    const Partials& partials, const Block& block, int64_t h) {
  const int64_t head = block.head + h;
  load_skip(p, head, w.p, w.skip);
  clear(w.skip_gradient, w.p);
  S* out = gradients.x == nullptr ? nullptr
                                  : head_of(p, static_cast<S*>(gradients.x), block.batch, head);
  for (int64_t c = 0; c < w.chunks; ++c) {
    const int64_t count = w.count(c);
    locate(w, axis_of(p, 0), c);
    if (p.D != nullptr) {
      pack_y_gradient<S>(p, w, gradients, block.batch, head, count);
      pack_head<S>(p, w, p.x, block.batch, head, count, w.x);
      clear(w.sums, w.p);
    }
    for (int64_t t = 0; t < count; ++t) {
      T* dx = w.x_gradient + (h * w.tokens + w.pixels[t]) * w.p;
      if (p.D != nullptr) {
        for (int64_t i = 0; i < w.p; i += kLanes<T>) {
          const Vector<T> dy = load(w.y_gradient + t * w.p + i);
          store(dx + i, load(dx + i) + dy * load(w.skip + i));
          store(w.sums + i, load(w.sums + i) + dy * load(w.x + t * w.p + i));
        }
      }
      if (out == nullptr) continue;
      S* to = out + w.pixels[t] * p.heads * p.headdim;
      for (int64_t i = 0; i < p.headdim; ++i) narrow(to[i], dx[i]);
    }
    for (int64_t i = 0; p.D != nullptr && i < p.headdim; ++i) w.skip_gradient[i] += w.sums[i];
  }
  double* to = partials.D + (block.batch * p.heads + head) * p.headdim;
  for (int64_t i = 0; i < p.headdim; ++i) to[i] = w.skip_gradient[i];
}

// The gradient of z needs y before the gate: the forward pass once more.
template <typename S, typename T>
void gate_gradients(const Problem& p, ForwardSpace<T>& w, const Gradients& gradients,
                    const Block& block, T* skip) {
  scan_block<S>(p, w, block, nullptr);
  const int64_t stride = p.heads * p.headdim;
  for (int64_t h = 0; h < block.heads; ++h) {
    const int64_t head = block.head + h;
    load_skip(p, head, w.p, skip);
    const S* dy = head_of(p, static_cast<const S*>(gradients.y), block.batch, head);
    const S* z = head_of(p, static_cast<const S*>(p.z), block.batch, head);
    S* dz = head_of(p, static_cast<S*>(gradients.z), block.batch, head);
    for (int64_t c = 0; c < w.chunks; ++c) {
      const int64_t count = w.count(c);
      locate(w, axis_of(p, 0), c);
      pack_head<S>(p, w, p.x, block.batch, head, count, w.x);
      for (int64_t t = 0; t < count; ++t) {
        const int64_t pixel = w.pixels[t];
        T* gate = w.scaled;
        T* gradient = w.part;
        pack(z, stride, p.headdim, &pixel, 1, 1, gate, w.p);
        pack(dy, stride, p.headdim, &pixel, 1, 1, gradient, w.p);
        for (int64_t i = 0; i < w.p; i += kLanes<T>) {
          const Vector<T> y = load(w.y + (h * w.tokens + pixel) * w.p + i) +
                              load(skip + i) * load(w.x + t * w.p + i);
          const Vector<T> open = sigmoid<T>(load(gate + i));
          const Vector<T> slope = open * (T(1) + load(gate + i) * (T(1) - open));
          store(gradient + i, load(gradient + i) * y * slope);
        }
        for (int64_t i = 0; i < p.headdim; ++i) narrow(dz[pixel * stride + i], gradient[i]);
      }
    }
  }
}

template <typename S, typename T>
void backward_block(const Problem& p, const Gradients& gradients, const Partials& partials,
                    const Block& block, void* scratch) {
  Arena arena{static_cast<char*>(scratch)};
  BackwardSpace<T> w = backward_space<T>(p, block.heads, arena);
  if (gradients.z != nullptr) {
    ForwardSpace<T> forward = forward_space<T>(p, block.heads, arena);
    gate_gradients<S>(p, forward, gradients, block, w.skip);
  }
  const int64_t state = p.headdim * w.n;
  for (int64_t h = 0; h < block.heads; ++h) {
    T* leaving = w.running[0] + h * state;
    if (gradients.final_states != nullptr) {
      load_padded(p, w, gradients.final_states, block, h, leaving);
    } else if (w.chunks == 0) {
      clear(leaving, state);
    }
  }
  for (int64_t axis = 0; axis < w.axes; ++axis) {
    backward_axis<S>(p, w, gradients, partials, block, axis);
    for (int64_t s = 0; s < w.sides; ++s) {
      for (int64_t h = 0; h < block.heads; ++h) {
        step_gradients(p, w, gradients, partials, block, axis, s, h);
      }
    }
  }
  for (int64_t h = 0; h < block.heads; ++h) {
    skip_gradients<S>(p, w, gradients, partials, block, h);
    if (gradients.initial == nullptr) continue;
    const int64_t index = block.batch * p.heads + block.head + h;
    T* to = static_cast<T*>(gradients.initial) + index * p.headdim * p.state;
    const T* from = w.running[0] + h * state;
    for (int64_t i = 0; i < p.headdim; ++i) {
      for (int64_t n = 0; n < p.state; ++n) to[i * p.state + n] = from[i * w.n + n];
    }
  }
}

// ---- sums over blocks and images ----------------------------------------------------------------

template <typename S, typename T>
void reduce_shares(const Problem& p, const Shares& shares, int64_t blocks, int64_t first,
                   int64_t last, void* gradient) {
  if (gradient == nullptr) return;
  T* sum = static_cast<T*>(shares.first);
  for (int64_t k = 0; k + 1 < blocks; ++k) {
    const T* share = static_cast<const T*>(shares.rest) + k * p.matrix_elements();
    for (int64_t i = first; i < last; ++i) sum[i] += share[i];
  }
  if (gradient == shares.first) return;
  for (int64_t i = first; i < last; ++i) narrow(static_cast<S*>(gradient)[i], sum[i]);
}

template <typename S, typename T>
void reduce_matrices(const Problem& p, const Gradients& gradients, const Partials& partials,
                     int64_t first, int64_t last) {
  reduce_shares<S, T>(p, partials.B, partials.blocks, first, last, gradients.B);
  reduce_shares<S, T>(p, partials.C, partials.blocks, first, last, gradients.C);
}

template <typename T>
void reduce_batch(const double* parts, int64_t batch, int64_t count, void* gradient) {
  if (gradient == nullptr) return;
  for (int64_t i = 0; i < count; ++i) {
    double sum = 0;
    for (int64_t n = 0; n < batch; ++n) sum += parts[n * count + i];
    static_cast<T*>(gradient)[i] = static_cast<T>(sum);
  }
}

template <typename T>
void reduce_parameters(const Problem& p, const Gradients& gradients, const Partials& partials) {
  reduce_batch<T>(partials.A, p.batch, p.directions * p.heads, gradients.A);
  reduce_batch<T>(partials.dt_bias, p.batch, p.directions * p.heads, gradients.dt_bias);
  reduce_batch<T>(partials.D, p.batch, p.heads * p.headdim, gradients.D);
}

// ---- by element type ----------------------------------------------------------------------------

// Results below the smallest normal number become 0 while this lives. Decays run through that range
// on their way to 0, x86 takes some 150 cycles for each such product, and the scan was 2 to 3 times
// slower than with decays that don't.
class FlushToZero {
 public:
#if defined(__SSE2__)
  FlushToZero() : before_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(before_ | 0x8000u); }
  ~FlushToZero() { __builtin_ia32_ldmxcsr(before_); }

 private:
  unsigned before_;
#else
  FlushToZero() {}
  ~FlushToZero() {}
#endif
};

size_t forward_scratch(const Problem& p, int64_t heads) {
  return by_dtype(p.dtype, [&](auto element) {
    using T = Compute<decltype(element)>;
    Arena counting;
    const int64_t width = forward_space<T>(p, heads, counting).p;
    counting.take<T>(width);
    counting.take<T>(width);
    return static_cast<size_t>(counting.used);
  });
}

size_t backward_scratch(const Problem& p, int64_t heads) {
  return by_dtype(p.dtype, [&](auto element) {
    using T = Compute<decltype(element)>;
    Arena counting;
    backward_space<T>(p, heads, counting);
    if (p.z != nullptr) forward_space<T>(p, heads, counting);
    return static_cast<size_t>(counting.used);
  });
}

void forward_block_any(const Problem& p, const Results& results, const Block& block,
                       void* scratch) {
  const FlushToZero guard;
  by_dtype(p.dtype, [&](auto element) {
    using S = decltype(element);
    forward_block<S, Compute<S>>(p, results, block, scratch);
  });
}

void backward_block_any(const Problem& p, const Gradients& gradients, const Partials& partials,
                        const Block& block, void* scratch) {
  const FlushToZero guard;
  by_dtype(p.dtype, [&](auto element) {
    using S = decltype(element);
    backward_block<S, Compute<S>>(p, gradients, partials, block, scratch);
  });
}

void reduce_matrices_any(const Problem& p, const Gradients& gradients, const Partials& partials,
                         int64_t first, int64_t last) {
  by_dtype(p.dtype, [&](auto element) {
    using S = decltype(element);
    reduce_matrices<S, Compute<S>>(p, gradients, partials, first, last);
  });
}

void reduce_parameters_any(const Problem& p, const Gradients& gradients, const Partials& partials) {
  by_dtype(p.dtype, [&](auto element) {
    reduce_parameters<Compute<decltype(element)>>(p, gradients, partials);
  });
}

}  // namespace

// `extern` because a const object is otherwise local to its file.
extern const ssd_scan::Kernels ssd_scan_kernels;
const ssd_scan::Kernels ssd_scan_kernels = {forward_scratch,     forward_block_any,
                                            backward_scratch,    backward_block_any,
                                            reduce_matrices_any, reduce_parameters_any};

}  // namespace famseg::FAMSEG_ISA
