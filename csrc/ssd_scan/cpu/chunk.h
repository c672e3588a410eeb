// One chunk of tokens, as forward and backward of every element type see it: where its pixels are,
// its rows of x, B and C as small matrices, the steps and decays, and M. For kernel files only,
// like simd.h.
#pragma once

#include "common/half.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "ssd_scan/cpu/kernels.h"
#include "ssd_scan/cpu/matrix.h"

namespace famseg::FAMSEG_ISA {

using ssd_scan::Block;
using ssd_scan::Problem;

// exp(-110) is 0 in float. The gradient of a step's decay is 0 below, as that of torch.clamp.
constexpr double kLowestLogDecay = -110.0;

// ---- geometry -----------------------------------------------------------------------------------

// A token order: token t is pixel t / inner * outer_step + t % inner * inner_step.
struct Axis {
  int64_t inner, outer_step, inner_step;
};

inline Axis axis_of(const Problem& p, int64_t index) {
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

// Sizes, with the innermost one of every matrix rounded up to whole vectors.
template <typename T>
struct Sizes {
  int64_t tokens, chunk, chunks, padded_tokens;
  int64_t p, n;  // padded headdim and state
  int64_t axes, sides;
  bool shared;  // both sides read the same B and C

  int64_t count(int64_t c) const { return smaller(chunk, tokens - c * chunk); }
};

template <typename T>
Sizes<T> sizes_of(const Problem& p, int64_t chunk) {
  Sizes<T> w{};
  w.tokens = p.tokens();
  w.chunk = chunk;
  w.chunks = (w.tokens + w.chunk - 1) / w.chunk;
  w.padded_tokens = w.chunks * w.chunk;
  w.p = round_up(p.headdim, kLanes<T>);
  w.n = round_up(p.state, kLanes<T>);
  w.axes = p.directions == 4 ? 2 : 1;
  w.sides = p.directions == 1 ? 1 : 2;
  w.shared = p.matrices == 1;
  return w;
}

// How many chunks share a piece of memory that takes `bytes` for each: all of them where that fits
// into half an L2 cache, else as many as there are such pieces.
inline int64_t segment_chunks(int64_t chunks, int64_t bytes) {
  constexpr int64_t most = 1 << 20;
  int64_t segment = larger(chunks, 1);
  if (chunks * bytes <= most) return segment;
  while ((segment - 1) * (segment - 1) >= chunks) --segment;
  return segment;
}

// Of all tokens, for one direction: (heads, padded tokens) each.
template <typename T>
struct Steps {
  T* step;
  T* decay;
  T* arrive;  // what is left of the state that enters the chunk when a token reads it
  T* leave;   // what is left of a token's share when the state leaves the chunk
  T* weight;  // leave * step
};

template <typename T>
Steps<T> take_steps(int64_t count, Arena& arena) {
  Steps<T> steps;
  steps.step = arena.take<T>(count);
  steps.decay = arena.take<T>(count);
  steps.arrive = arena.take<T>(count);
  steps.leave = arena.take<T>(count);
  steps.weight = arena.take<T>(count);
  return steps;
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

template <typename T>
[[gnu::always_inline]] inline void add_row(const T* from, int64_t width, T* to) {
  int64_t i = 0;
  for (; i + kLanes<T> <= width; i += kLanes<T>) store(to + i, load(to + i) + load(from + i));
  for (; i < width; ++i) to[i] += from[i];
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

// The element of B and C where this image, direction and group start.
inline int64_t matrix_offset(const Problem& p, const Block& block, int64_t direction) {
  const int64_t which = p.matrices == 1 ? 0 : direction;
  return ((block.batch * p.tokens() * p.matrices + which) * p.groups + block.group) * p.state;
}

// Puts a chunk's rows into, or adds them to, a tensor. The first part of a sum of several is put,
// the next ones are added. Where a sum of several would be rounded in between, the last part rounds
// it to `out` and the ones before leave it in `sum`.
struct Turn {
  bool first, last;
};

template <typename S, typename T>
void put_rows(const T* from, int64_t stride, int64_t width, const int64_t* pixels, int64_t count,
              Turn turn, S* out, int64_t out_stride, T* sum, int64_t sum_stride) {
  for (int64_t t = 0; t < count; ++t) {
    const T* row = from + t * stride;
    S* to = out + pixels[t] * out_stride;
    if constexpr (sizeof(S) == sizeof(T)) {
      turn.first ? copy_row(row, width, to) : add_row(row, width, to);
    } else if (turn.first && turn.last) {
      for (int64_t i = 0; i < width; ++i) narrow(to[i], row[i]);
    } else if (turn.first) {
      copy_row(row, width, sum + pixels[t] * sum_stride);
    } else if (!turn.last) {
      add_row(row, width, sum + pixels[t] * sum_stride);
    } else {
      const T* before = sum + pixels[t] * sum_stride;
      for (int64_t i = 0; i < width; ++i) narrow(to[i], before[i] + row[i]);
    }
  }
}

template <typename T>
void locate(const Sizes<T>& w, const Axis& axis, int64_t c, int64_t* pixels) {
  each_token(axis, c * w.chunk, w.count(c), [&](int64_t t, int64_t pixel) { pixels[t] = pixel; });
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
void fetch_heads(const Problem& p, const Sizes<T>& w, const void* x, const Block& block,
                 int64_t axis, int64_t c) {
  if (x == nullptr) return;
  fetch<false>(axis_of(p, axis), c * w.chunk, w.count(c),
               head_of(p, static_cast<const S*>(x), block.batch, block.head), p.heads * p.headdim,
               block.heads * p.headdim);
}

template <bool WRITE, typename S, typename T>
void fetch_matrices(const Problem& p, const Sizes<T>& w, const S* matrix, const Block& block,
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
void fetch_chunk(const Problem& p, const Sizes<T>& w, const void* y_gradient, const Block& block,
                 int64_t axis, int64_t c) {
  if (c < 0 || c >= w.chunks) return;
  fetch_heads<S>(p, w, p.x, block, axis, c);
  fetch_heads<S>(p, w, y_gradient, block, axis, c);
  fetch_matrices<false>(p, w, static_cast<const S*>(p.B), block, axis, c);
  fetch_matrices<false>(p, w, static_cast<const S*>(p.C), block, axis, c);
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

// What is left of the entering state at each token, and of each token's share at the end.
template <bool BACKWARD, typename T>
void carry(const Sizes<T>& w, const Steps<T>& steps, int64_t at) {
  for (int64_t first = at; first < at + w.padded_tokens; first += w.chunk) {
    const auto token = [&](int64_t i) { return first + (BACKWARD ? w.chunk - 1 - i : i); };
    T in = 1, out = 1;
    for (int64_t i = 0; i < w.chunk; ++i) {
      in *= steps.decay[token(i)];
      steps.arrive[token(i)] = in;
      const int64_t j = token(w.chunk - 1 - i);
      steps.leave[j] = out;
      steps.weight[j] = out * steps.step[j];
      out *= steps.decay[j];
    }
  }
}

// Tokens beyond the last have step 0 and decay 1: they keep the state and add nothing. `at`: where
// the head's begin.
template <typename T>
void fill_steps(const Problem& p, const Sizes<T>& w, int64_t batch, int64_t axis, int64_t s,
                int64_t head, const Steps<T>& steps, int64_t at) {
  const int64_t direction = 2 * axis + s;
  const StepRule<T> rule = step_rule<T>(p, direction, head);
  T* step = steps.step + at;
  T* decay = steps.decay + at;
  gather_dt(p, axis_of(p, axis), batch, direction, head, rule.bias, step);
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
  if (p.initial == nullptr && w.tokens > 0) {
    // No state enters here, and none is read. The definition has a zero there, and a decay that is
    // not finite makes NaN of it: so does the step now.
    const int64_t first = s == 0 ? 0 : w.tokens - 1;
    step[first] += T(0) * decay[first];
  }
  s == 0 ? carry<false>(w, steps, at) : carry<true>(w, steps, at);
}

// What is left of the entering state when it leaves. `at`: the chunk's first token.
template <typename T>
T through(const Sizes<T>& w, const Steps<T>& steps, int64_t s, int64_t at) {
  return steps.arrive[s == 0 ? at + w.chunk - 1 : at];
}

template <typename T>
[[gnu::always_inline]] inline Vector<T> lane_numbers() {
  Vector<T> numbers;
  for (int i = 0; i < kLanes<T>; ++i) numbers[i] = static_cast<T>(i);
  return numbers;
}

// This side's part of M: mixing = or += gram * L * step. Stores L, where it is not zero by being on
// the other side of the diagonal, unless `decays` is null. `at`: the chunk's first token.
template <bool BACKWARD, typename T>
void mix(const Sizes<T>& w, const T* gram, const Steps<T>& steps, int64_t at, int64_t count,
         T* decays, T* mixing) {
  const T* decay = steps.decay + at;
  const int64_t lanes = kLanes<T>;
  // By columns of one vector: the running products then stay in a register.
  for (int64_t j = 0; j < w.chunk; j += lanes) {
    const Vector<T> step = load(steps.step + at + j);
    const Vector<T> column = lane_numbers<T>() + static_cast<T>(j);
    Vector<T> product = {};
    const auto row = [&](int64_t i) {
      const int64_t place = i * w.chunk + j;
      product = column == static_cast<T>(i) ? broadcast(T(1)) : product * decay[i];
      if (decays != nullptr) store(decays + place, product);
      Vector<T> value = load(gram + place) * product * step;
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

// D's row of a head, in whole vectors; zeros without D.
template <typename T>
void load_skip(const Problem& p, int64_t head, int64_t width, T* to) {
  clear(to, width);
  if (p.D == nullptr) return;
  for (int64_t i = 0; i < p.headdim; ++i) {
    to[i] = static_cast<const T*>(p.D)[head * p.headdim + i];
  }
}

// ---- results ------------------------------------------------------------------------------------

// Where the rows of y go; with `dz` they go to the gradient of z instead, which is y's times them.
template <typename S>
struct Destination {
  S* y;
  const S* dy;
  S* dz;
};

// One axis' part of y of a chunk and head, on its way out.
template <typename T>
struct Output {
  T* part;  // (chunk, headdim)
  T* sum;   // (heads, pixels, headdim) over the axes, where y itself would round it, else null
  T* skip;  // (heads, headdim) D
  T* gate;  // (headdim)
  T* dy;    // (headdim)
};

template <typename S, typename T>
Output<T> take_output(const Sizes<T>& w, int64_t heads, Arena& arena) {
  Output<T> out{};
  out.part = arena.take<T>(w.chunk * w.p);
  if (sizeof(S) != sizeof(T) && w.axes == 2) out.sum = arena.take<T>(heads * w.tokens * w.p);
  out.skip = arena.take<T>(heads * w.p);
  out.gate = arena.take<T>(w.p);
  out.dy = arena.take<T>(w.p);
  return out;
}

// To where it belongs, with D x and the gate. `x`: the chunk's, (chunk, headdim).
template <typename S, typename T>
void finish_rows(const Problem& p, const Sizes<T>& w, const Output<T>& out, const Block& block,
                 int64_t h, int64_t axis, const int64_t* pixels, int64_t count, const T* x,
                 const Destination<S>& to) {
  const int64_t head = block.head + h, stride = p.heads * p.headdim;
  for (int64_t t = 0; p.D != nullptr && axis == 0 && t < count; ++t) {
    for (int64_t i = 0; i < w.p; i += kLanes<T>) {
      T* y = out.part + t * w.p + i;
      store(y, load(y) + load(out.skip + h * w.p + i) * load(x + t * w.p + i));
    }
  }
  if (p.z != nullptr) {
    const S* z = head_of(p, static_cast<const S*>(p.z), block.batch, head);
    const S* dy = to.dz == nullptr ? nullptr : head_of(p, to.dy, block.batch, head);
    for (int64_t t = 0; t < count; ++t) {
      T* row = out.part + t * w.p;
      pack(z, stride, p.headdim, pixels + t, 1, 1, out.gate, w.p);
      if (dy != nullptr) pack(dy, stride, p.headdim, pixels + t, 1, 1, out.dy, w.p);
      for (int64_t i = 0; i < w.p; i += kLanes<T>) {
        const Vector<T> gate = load(out.gate + i), open = sigmoid<T>(gate);
        const Vector<T> slope = open * (T(1) + gate * (T(1) - open));
        store(row + i, load(row + i) * (dy == nullptr ? gate * open : load(out.dy + i) * slope));
      }
    }
  }
  put_rows(out.part, w.p, p.headdim, pixels, count, Turn{axis == 0, axis == w.axes - 1},
           head_of(p, to.dz == nullptr ? to.y : to.dz, block.batch, head), stride,
           out.sum == nullptr ? nullptr : out.sum + h * w.tokens * w.p, w.p);
}

// States are (headdim, state) in memory and (state, headdim) here.
template <typename T>
void load_state(const Problem& p, const Sizes<T>& w, int64_t batch, int64_t head, T* to) {
  const T* from = static_cast<const T*>(p.initial) + (batch * p.heads + head) * p.headdim * p.state;
  for (int64_t n = 0; n < p.state; ++n) {
    for (int64_t i = 0; i < p.headdim; ++i) to[n * w.p + i] = from[i * p.state + n];
    for (int64_t i = p.headdim; i < w.p; ++i) to[n * w.p + i] = T(0);
  }
}

template <typename T>
void store_state(const Problem& p, const Sizes<T>& w, const T* from, int64_t batch, int64_t head,
                 void* states) {
  T* to = static_cast<T*>(states) + (batch * p.heads + head) * p.headdim * p.state;
  for (int64_t i = 0; i < p.headdim; ++i) {
    for (int64_t n = 0; n < p.state; ++n) to[i * p.state + n] = from[n * w.p + i];
  }
}

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

}  // namespace famseg::FAMSEG_ISA
