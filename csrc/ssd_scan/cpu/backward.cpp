// The backward pass of ssd_scan and ssd_scan_2d for one instruction set (see common/simd.h: this
// file is compiled once for each), with the names of forward.cpp.
//
// From dY, with dS the gradient of the state that leaves a chunk and everything of the forward pass
// computed again:
//
//   dM = dY X^T             dG = dM * L * step       dC = dG B + arrive * (dY S^T)
//                                                    dB = dG^T C + weight * (X dS^T)
//   dX = M^T dY + weight * (B dS)                    dS = through * dS + dY^T (arrive * C)
//
// The states lie as (headdim, d_state) here, and dX is made as its transpose: so every right factor
// has whole vectors as rows but two, X in dM and B in G and dX, which are transposed.
//
// In three stages, each of them parallel. First every head and side takes S and dS through all
// chunks, one after the other, and leaves both at each chunk (scan_states). Then every chunk by
// itself does everything else for all heads (chunk_gradients): so the sums over heads in dB and dC
// need neither shares nor an order of threads. Then the gradients of steps and decays become those
// of dt, A and dt_bias (step_gradients).

#include "ssd_scan/cpu/gradients.h"
#include "ssd_scan/cpu/workspace.h"

namespace famseg::FAMSEG_ISA {
namespace {

using ssd_scan::Gradients;
using ssd_scan::Part;
using ssd_scan::Sums;

// The gradient of y before the gate.
template <typename S, typename T>
void pack_y_gradient(const Problem& p, const BackwardWorkspace<T>& w, const Gradients& gradients,
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

// to = keep * from (null: 0) + a^T (factors * b), a state (headdim, d_state).
template <typename T>
void pass_on(const Problem& p, const BackwardWorkspace<T>& w, T keep, const T* factors, const T* a,
             const T* b, int64_t count, const T* from, T* to) {
  scale_rows(b, factors, count, w.n, w.scaled);
  Product<T> update{{a, 1, w.p}, {w.scaled, w.n}, {to, w.n}, p.headdim, w.n, count};
  update.init = from;
  update.keep = keep;
  multiply(update);
}

// States in memory have no padding.
template <typename T>
void load_padded(const Problem& p, const Sizes<T>& w, const void* states, int64_t batch,
                 int64_t head, T* to) {
  const T* from = static_cast<const T*>(states) + (batch * p.heads + head) * p.headdim * p.d_state;
  for (int64_t i = 0; i < p.headdim; ++i) {
    for (int64_t n = 0; n < p.d_state; ++n) to[i * w.n + n] = from[i * p.d_state + n];
    for (int64_t n = p.d_state; n < w.n; ++n) to[i * w.n + n] = T(0);
  }
}

// Whether a state enters a chunk at all, and a gradient comes to the state that leaves it.
template <typename T>
bool enters(const Problem& p, const Sizes<T>& w, int64_t s, int64_t c) {
  return s == 0 ? c > 0 || p.initial_states != nullptr : c < w.chunks - 1;
}

template <typename T>
bool leaves(const Gradients& gradients, const Sizes<T>& w, int64_t s, int64_t c) {
  return s == 0 ? c < w.chunks - 1 || gradients.final_states != nullptr : c > 0;
}

// One head's states and their gradients at all chunks, for side s.
template <typename S, typename T>
void scan_states(const Problem& p, const Gradients& gradients, const Part& part, int64_t s,
                 int64_t h, void* scratch) {
  Arena arena{static_cast<char*>(scratch)}, shared{static_cast<char*>(part.tape)};
  const BackwardWorkspace<T> w = backward_workspace<T>(p, arena);
  const Block& block = part.block;
  const Tape<T> tape = lay_out_tape<T>(p, w, block.heads, shared);
  const int64_t state_size = p.headdim * w.n, head = block.head + h, last = w.chunks - 1;
  const Steps<T>& steps = tape.steps[s];
  fill_steps(p, w, block.batch, part.axis, s, head, steps, h * w.padded_tokens);
  const auto place = [&](T* states, int64_t c) {
    return states + (c * block.heads + h) * state_size;
  };
  // The states go with the direction, their gradients against it.
  T* states = tape.state[s];
  T* state_gradients = tape.state_gradient[s];
  const int64_t ahead = s == 0 ? 1 : -1;
  if (s == 0 && p.initial_states != nullptr && w.chunks > 0) {
    load_padded(p, w, p.initial_states, block.batch, head, place(states, 0));
  }
  for (int64_t c = s == 0 ? 0 : last; 0 <= c + ahead && c + ahead <= last; c += ahead) {
    const int64_t count = w.count(c), at = h * w.padded_tokens + c * w.chunk;
    locate(w, axis_of(p, part.axis), c, w.pixels);
    pack_matrix<S>(p, w, p.B, block, 2 * part.axis + s, count, w.side[s].b);
    pack_head<S>(p, w, p.x, block.batch, head, count, w.x);
    pass_on(p, w, through(w, steps, s, at), steps.weight + at, w.x, w.side[s].b, count,
            enters(p, w, s, c) ? place(states, c) : nullptr, place(states, c + ahead));
  }
  // With a gradient of the initial state the last step goes one further, to there.
  T* beyond = nullptr;
  if (s == 0 && gradients.final_states != nullptr) {
    beyond = w.chunks > 0 ? place(state_gradients, last) : w.final_state;
    load_padded(p, w, gradients.final_states, block.batch, head, beyond);
  }
  for (int64_t c = s == 0 ? last : 0; 0 <= c && c <= last; c -= ahead) {
    const bool inside = 0 <= c - ahead && c - ahead <= last;
    if (!inside && gradients.initial_states == nullptr) break;
    const int64_t count = w.count(c), at = h * w.padded_tokens + c * w.chunk;
    beyond = inside ? place(state_gradients, c - ahead) : w.final_state;
    locate(w, axis_of(p, part.axis), c, w.pixels);
    pack_matrix<S>(p, w, p.C, block, 2 * part.axis + s, count, w.side[s].c);
    pack_y_gradient<S>(p, w, gradients, block.batch, head, count);
    pass_on(p, w, through(w, steps, s, at), steps.arrive + at, w.y_gradient, w.side[s].c, count,
            leaves(gradients, w, s, c) ? place(state_gradients, c) : nullptr, beyond);
  }
  if (s != 0 || gradients.initial_states == nullptr) return;
  T* to = static_cast<T*>(gradients.initial_states) +
          (block.batch * p.heads + head) * p.headdim * p.d_state;
  for (int64_t i = 0; i < p.headdim; ++i) {
    for (int64_t n = 0; n < p.d_state; ++n) {
      to[i * p.d_state + n] = beyond == nullptr ? T(0) : beyond[i * w.n + n];
    }
  }
}

// Completes the gradients of B and C of a chunk by the part that goes through G, and puts them.
template <typename S, typename T>
void matrix_gradients(const Problem& p, const BackwardWorkspace<T>& w, const Gradients& gradients,
                      const Sums& sums, const Part& part, int64_t count) {
  for (int64_t s = 0; s < (w.shared ? 1 : w.sides); ++s) {
    const Side<T>& side = w.side[s];
    const bool both = w.shared && w.sides == 2;
    const int64_t offset = matrix_offset(p, part.block, 2 * part.axis + s);
    const int64_t stride = p.matrices * p.groups * p.d_state;
    const auto put = [&](const T* from, void* gradient, void* sum) {
      put_rows(from, w.n, p.d_state, w.pixels, count, Turn{part.first, part.last},
               static_cast<S*>(gradient) + offset, stride,
               sum == nullptr ? nullptr : static_cast<T*>(sum) + offset, stride);
    };
    if (gradients.C != nullptr) {
      Product<T> of_c{{w.gram_gradient[s], w.chunk, 1},
                      {side.b, w.n},
                      {w.c_gradient[s], w.n},
                      count,
                      w.n,
                      count};
      of_c.init = w.c_gradient[s];
      of_c.left = both ? Left::full : s == 0 ? Left::lower : Left::upper;
      multiply(of_c);
      put(w.c_gradient[s], gradients.C, sums.C);
    }
    if (gradients.B != nullptr) {
      Product<T> of_b{{w.gram_gradient[s], 1, w.chunk},
                      {side.c, w.n},
                      {w.b_gradient[s], w.n},
                      count,
                      w.n,
                      count};
      of_b.init = w.b_gradient[s];
      of_b.left = both ? Left::full : s == 0 ? Left::upper : Left::lower;
      multiply(of_b);
      put(w.b_gradient[s], gradients.B, sums.B);
    }
  }
}

// The gradient of x of a chunk and head, with its part through D, and D's own.
template <typename S, typename T>
void put_x_gradient(const Problem& p, const BackwardWorkspace<T>& w, const Gradients& gradients,
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
        const Vector<T> y_gradient = load(w.y_gradient + place);
        store(w.x_gradient + place, load(w.x_gradient + place) + y_gradient * load(w.skip + i));
        sum += y_gradient * load(w.x + place);
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
void chunk_gradients(const Problem& p, const Gradients& gradients, const Sums& sums,
                     const Part& part, int64_t c, void* scratch) {
  Arena arena{static_cast<char*>(scratch)}, shared{static_cast<char*>(part.tape)};
  BackwardWorkspace<T> w = backward_workspace<T>(p, arena);
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
    multiply(Product<T>{{w.y_gradient, w.p, 1},
                        {w.x_transposed, w.chunk},
                        {w.mixing_gradient, w.chunk},
                        count,
                        w.chunk,
                        p.headdim});
    mix_sides(w, tape.steps, at, count, w.decays);
    multiply(Product<T>{{w.y_gradient, 1, w.p},
                        {w.mixing, w.chunk},
                        {w.x_gradient_transposed, w.chunk},
                        p.headdim,
                        w.chunk,
                        count});
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
void step_gradients(const Problem& p, const Gradients& gradients, const Sums& sums,
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

// The sum over images.
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

size_t tape_any(const Problem& p, int64_t heads) {
  return by_types(p, [&](auto, auto t) {
    using T = decltype(t);
    Arena counting;
    lay_out_tape<T>(p, sizes_of<T>(p, chunk_tokens<T>(p)), heads, counting);
    return static_cast<size_t>(counting.used);
  });
}

size_t scratch_any(const Problem& p) {
  return by_types(p, [&](auto, auto t) {
    Arena counting;
    backward_workspace<decltype(t)>(p, counting);
    return static_cast<size_t>(counting.used);
  });
}

void scan_states_any(const Problem& p, const Gradients& gradients, const Part& part, int64_t side,
                     int64_t head, void* scratch) {
  const FlushToZero guard;
  by_types(p, [&](auto s, auto t) {
    scan_states<decltype(s), decltype(t)>(p, gradients, part, side, head, scratch);
  });
}

void chunk_gradients_any(const Problem& p, const Gradients& gradients, const Sums& sums,
                         const Part& part, int64_t chunk, void* scratch) {
  const FlushToZero guard;
  by_types(p, [&](auto s, auto t) {
    chunk_gradients<decltype(s), decltype(t)>(p, gradients, sums, part, chunk, scratch);
  });
}

void step_gradients_any(const Problem& p, const Gradients& gradients, const Sums& sums,
                        const Part& part, int64_t side, int64_t head) {
  const FlushToZero guard;
  by_types(
      p, [&](auto, auto t) { step_gradients<decltype(t)>(p, gradients, sums, part, side, head); });
}

void parameter_gradients_any(const Problem& p, const Gradients& gradients, const Sums& sums) {
  by_types(p, [&](auto, auto t) {
    using T = decltype(t);
    reduce_batch<T>(sums.A, p.batch, p.directions * p.heads, gradients.A);
    reduce_batch<T>(sums.dt_bias, p.batch, p.directions * p.heads, gradients.dt_bias);
    reduce_batch<T>(sums.D, p.batch, p.heads * p.headdim, gradients.D);
  });
}

}  // namespace

// `extern` because a const object is otherwise local to its file.
extern const ssd_scan::BackwardKernels ssd_scan_backward_kernels;
const ssd_scan::BackwardKernels ssd_scan_backward_kernels = {
    tape_any,           scratch_any,
    scan_states_any,    chunk_gradients_any,
    step_gradients_any, parameter_gradients_any};

}  // namespace famseg::FAMSEG_ISA
