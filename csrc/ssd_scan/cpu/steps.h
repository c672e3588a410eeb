// Steps, their decays, and M. For kernel files only, like simd.h.
//
// Decays are products of the steps' own decays, multiplied up token by token: one exponential for
// each token. A sum of their logarithms would lose its digits to one huge step, and would need as
// many exponentials as M has entries. Where a sequence is to start anew the step's decay is 0, and
// nothing else has to know.
#pragma once

#include "common/scratch.h"
#include "common/simd.h"
#include "ssd_scan/cpu/chunk.h"

namespace famseg::FAMSEG_ISA {

// exp(-110) is 0 in float. The gradient of a step's decay is 0 below, as that of torch.clamp.
constexpr double kLowestLogDecay = -110.0;

// Of all tokens, for one direction: (heads, padded tokens) each.
template <typename T>
struct Steps {
  T* step;
  T* decay;
  T* arrive;
  T* leave;
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
  return {p.dt_softplus, static_cast<T>(p.dt_min), static_cast<T>(p.dt_max),
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

// arrive, leave and weight of all tokens.
template <bool REVERSE, typename T>
void carry(const Sizes<T>& w, const Steps<T>& steps, int64_t at) {
  for (int64_t first = at; first < at + w.padded_tokens; first += w.chunk) {
    const auto token = [&](int64_t i) { return first + (REVERSE ? w.chunk - 1 - i : i); };
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
  if (p.initial_states == nullptr && w.tokens > 0) {
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
template <bool REVERSE, typename T>
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
      if (REVERSE) value += load(mixing + place);
      store(mixing + place, value);
    };
    if (REVERSE) {
      for (int64_t i = min(count, j + lanes) - 1; i >= 0; --i) row(i);
    } else {
      for (int64_t i = 0; i < min(count, j); ++i) store(mixing + i * w.chunk + j, Vector<T>{});
      for (int64_t i = j; i < count; ++i) row(i);
    }
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
