// What one side of a chunk and head adds to all gradients. For kernel files only, like simd.h.
//
// A decay's logarithm has as its gradient the sum over all pairs of tokens it lies between. Those
// sums are built up term by term: a difference of running sums would lose small ones beside large.
#pragma once

#include "ssd_scan/cpu/workspace.h"

namespace famseg::FAMSEG_ISA {

// What the stages of the backward pass hand on, for one part.
template <typename T>
struct Tape {
  Steps<T> steps[2];
  T* step_gradient[2];   // (heads, padded tokens)
  T* log_gradient[2];    // (heads, padded tokens) of step * A
  T* state[2];           // (chunks, heads, headdim, d_state) that enters
  T* state_gradient[2];  // (chunks, heads, headdim, d_state) of the one that leaves
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
struct BackwardWorkspace : Workspace<T> {
  T* y_gradient;             // (chunk, headdim)
  T* x_transposed;           // (headdim, chunk)
  T* mixing_gradient;        // (chunk, chunk)
  T* x_gradient_transposed;  // (headdim, chunk)
  T* x_gradient;             // (chunk, headdim)
  T* decays[2];              // (chunk, chunk) L of either side
  T* gram_gradient[2];       // (chunk, chunk), the sum over heads
  T* b_gradient[2];          // (chunk, d_state), the sum over heads
  T* c_gradient[2];          // (chunk, d_state), the sum over heads
  T* product;                // (chunk, d_state)
  T* scaled;                 // (chunk, d_state) or (d_state, chunk)
  T* row_lanes;              // (chunk, one vector) sums of rows, a lane each
  T* between;                // (chunk) gradients of log-decays from pairs within the chunk
  T* arriving;               // (chunk) of arrive's logarithm
  T* leaving;                // (chunk) of leave's
  T* gate;                   // (headdim)
  T* skip;                   // (headdim)
  T* final_state;            // (headdim, d_state)
};

template <typename T>
BackwardWorkspace<T> backward_workspace(const Problem& p, Arena& arena) {
  BackwardWorkspace<T> w{};
  static_cast<Workspace<T>&>(w) = lay_out<T>(p, arena);
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

// From dM: adds to dG, writes the gradients of the steps and of the decays' logarithms that come
// from pairs of tokens within the chunk.
template <bool REVERSE, typename T>
void pair_gradients(const BackwardWorkspace<T>& w, const T* gram, const T* steps, int64_t count,
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
      const Vector<T> share = pair * load(gram + place);
      total += share;
      across += share * step;
      const Vector<T> number = broadcast(static_cast<T>(i));
      T* sum = w.row_lanes + i * lanes;
      store(sum,
            load(sum) + ((REVERSE ? column > number : column < number) ? across : Vector<T>{}));
    };
    if (REVERSE) {
      for (int64_t i = 0; i < min(count, j + lanes); ++i) row(i);
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
void add_rows(const BackwardWorkspace<T>& w, const T* factors, int64_t count, const T* other,
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
void side_gradients(const Problem& p, BackwardWorkspace<T>& w, const Tape<T>& tape, int64_t s,
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
    multiply(Product<T>{
        {w.y_gradient, w.p, 1}, {entering, w.n}, {w.product, w.n}, count, w.n, p.headdim});
    add_rows(w, arrive, count, side.c, w.c_gradient[s], w.arriving);
    for (int64_t i = 0; i < w.chunk; ++i) w.arriving[i] *= arrive[i];
  }
  if (leaving != nullptr) {
    multiply(Product<T>{{w.x, w.p, 1}, {leaving, w.n}, {w.product, w.n}, count, w.n, p.headdim});
    add_rows(w, weight, count, side.b, w.b_gradient[s], w.leaving);
    for (int64_t j = 0; j < w.chunk; ++j) {
      w.leaving[j] *= leave[j];
      step_gradient[j] += w.leaving[j];
      w.leaving[j] *= step[j];
    }
    for (int64_t n = 0; n < p.d_state; ++n) {
      for (int64_t j = 0; j < w.chunk; j += kLanes<T>) {
        const int64_t place = n * w.chunk + j;
        store(w.scaled + place, load(side.b_transposed + place) * load(weight + j));
      }
    }
    Product<T> of_x{{leaving, w.n, 1},
                    {w.scaled, w.chunk},
                    {w.x_gradient_transposed, w.chunk},
                    p.headdim,
                    w.chunk,
                    p.d_state};
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

}  // namespace famseg::FAMSEG_ISA
