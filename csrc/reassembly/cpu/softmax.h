// The weights: into planes, logits through the softmax over the taps, and its gradient.
//
// For kernel files only: see common/simd.h.
#pragma once

#include "reassembly/cpu/planes.h"

namespace famseg::FAMSEG_ISA {

// e^x for x <= 0 to about an ulp: without exponential()'s care for large results, and with e^-86.5
// for all below that, which beside a softmax's largest term 1 is nothing.
template <typename T>
[[gnu::always_inline]] inline Vector<T> exponential_of_negative(Vector<T> x) {
  const Vector<T> bottom = broadcast(ExponentialOf<T>::low);
  const Exponential<T> parts = exponential_parts<T>(x < bottom ? bottom : x);
  return parts.mantissa * power_of_two<T>(parts.exponent, ExponentialOf<T>::bias);
}

// Softmax over the taps of one vector of some phases, in place: a few independent chains of maxima
// and sums hide each other's latency.
template <int PHASES, typename T>
void normalise_tile(const Geometry& g, Planes<T> weights) {
  const int64_t tap_stride = g.phases * weights.stride;
  Vector<T> most[PHASES], sum[PHASES] = {};
#pragma GCC unroll 4
  for (int phase = 0; phase < PHASES; ++phase) most[phase] = load(weights[phase]);
  for (int64_t tap = 1; tap < g.taps; ++tap) {
#pragma GCC unroll 4
    for (int phase = 0; phase < PHASES; ++phase) {
      const Vector<T> logit = load(weights[phase] + tap * tap_stride);
      most[phase] = logit > most[phase] ? logit : most[phase];
    }
  }
  for (int64_t tap = 0; tap < g.taps; ++tap) {
#pragma GCC unroll 4
    for (int phase = 0; phase < PHASES; ++phase) {
      T* at = weights[phase] + tap * tap_stride;
      const Vector<T> e = exponential_of_negative<T>(load(at) - most[phase]);
      sum[phase] += e;
      store(at, e);
    }
  }
#pragma GCC unroll 4
  for (int phase = 0; phase < PHASES; ++phase) sum[phase] = T(1) / sum[phase];
  for (int64_t tap = 0; tap < g.taps; ++tap) {
#pragma GCC unroll 4
    for (int phase = 0; phase < PHASES; ++phase) {
      T* at = weights[phase] + tap * tap_stride;
      store(at, load(at) * sum[phase]);
    }
  }
}

// The weights of a region of group `index` as planes (tap, phase). Gaps between rows are normalised
// along: they hold finite numbers and meet zeros. Calls during(1) for each vector of pixels that it
// normalises.
template <typename S, typename T, typename During>
void load_weights(const Problem& p, const Geometry& g, int64_t index, const Region& region,
                  Planes<T> to, const During& during) {
  const auto image = weights_image(p, g, static_cast<const S*>(p.weights), index);
  if (!p.softmax) {
    load_planes(g, image, g.taps, region, to);
    return;
  }
  const int64_t planes = g.taps * g.phases;
  // Two rows at a time, whole runs: the next ones come from memory while these are normalised.
  const int64_t most = g.run_rows > 1 ? region.rows : 2;
  for (int64_t row = 0; row < region.rows; row += most) {
    const auto part = [&](int64_t first) {
      return Region{region.row + first, min(most, region.rows - first), region.column,
                    region.columns};
    };
    const Planes<T> rows = shifted(to, row * g.pitch);
    load_planes(g, image, planes, part(row), rows);
    Ahead next(g, image, row + most < region.rows ? planes : 0, part(row + most),
               vectors_of<T>(g, part(row)));
    for_each_run<T>(g, part(row), 0, [&](const Region&, int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; at += kLanes<T>) {
        for_each_piece<kMostPhases>(g.phases, [&](auto piece, int64_t phase) {
          normalise_tile<decltype(piece)::value, T>(g, shifted(rows, phase * rows.stride + at));
        });
        next.ask(1);
        during(1);
      }
    });
  }
}

// From the gradient of the weights to that of the logits, in place: w (dw - sum_tap w dw).
template <typename T>
void normalise_backward(const Geometry& g, const Region& region, Planes<T> weights,
                        Planes<T> gradient) {
  for_each_run<T>(g, region, 0, [&](const Region&, int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; at += kLanes<T>) {
      for (int64_t phase = 0; phase < g.phases; ++phase) {
        Vector<T> dot{};
        for (int64_t plane = phase; plane < g.taps * g.phases; plane += g.phases) {
          dot += load(weights[plane] + at) * load(gradient[plane] + at);
        }
        for (int64_t plane = phase; plane < g.taps * g.phases; plane += g.phases) {
          T* to = gradient[plane] + at;
          store(to, load(weights[plane] + at) * (load(to) - dot));
        }
      }
    }
  });
}

}  // namespace famseg::FAMSEG_ISA
