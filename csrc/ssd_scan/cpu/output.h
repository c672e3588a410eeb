// y on its way out of a chunk. For kernel files only, like simd.h.
#pragma once

#include "ssd_scan/cpu/chunk.h"
#include "ssd_scan/cpu/steps.h"

namespace famseg::FAMSEG_ISA {

using ssd_scan::Destination;

template <typename T>
struct Output {
  T* y;     // (chunk, headdim) of one axis
  T* sum;   // (heads, pixels, headdim) over the axes, where y itself would round it, else null
  T* skip;  // (heads, headdim) D
  T* gate;  // (headdim)
  T* y_gradient;  // (headdim)
};

template <typename S, typename T>
Output<T> take_output(const Sizes<T>& w, int64_t heads, Arena& arena) {
  Output<T> out{};
  out.y = arena.take<T>(w.chunk * w.p);
  if (sizeof(S) != sizeof(T) && w.axes == 2) out.sum = arena.take<T>(heads * w.tokens * w.p);
  out.skip = arena.take<T>(heads * w.p);
  out.gate = arena.take<T>(w.p);
  out.y_gradient = arena.take<T>(w.p);
  return out;
}

// To where it belongs, with D x and the gate. `x`: the chunk's, (chunk, headdim).
template <typename S, typename T>
void finish_rows(const Problem& p, const Sizes<T>& w, const Output<T>& out, const Block& block,
                 int64_t h, int64_t axis, const int64_t* pixels, int64_t count, const T* x,
                 const Destination& to) {
  const int64_t head = block.head + h, stride = p.heads * p.headdim;
  for (int64_t t = 0; p.D != nullptr && axis == 0 && t < count; ++t) {
    for (int64_t i = 0; i < w.p; i += kLanes<T>) {
      T* y = out.y + t * w.p + i;
      store(y, load(y) + load(out.skip + h * w.p + i) * load(x + t * w.p + i));
    }
  }
  if (p.z != nullptr) {
    const S* z = head_of(p, static_cast<const S*>(p.z), block.batch, head);
    const S* y_gradient = to.z_gradient == nullptr
                              ? nullptr
                              : head_of(p, static_cast<const S*>(to.y_gradient), block.batch, head);
    for (int64_t t = 0; t < count; ++t) {
      T* row = out.y + t * w.p;
      pack(z, stride, p.headdim, pixels + t, 1, 1, out.gate, w.p);
      if (y_gradient != nullptr) {
        pack(y_gradient, stride, p.headdim, pixels + t, 1, 1, out.y_gradient, w.p);
      }
      for (int64_t i = 0; i < w.p; i += kLanes<T>) {
        const Vector<T> gate = load(out.gate + i), open = sigmoid<T>(gate);
        const Vector<T> slope = open * (T(1) + gate * (T(1) - open));
        const Vector<T> factor =
            y_gradient == nullptr ? gate * open : load(out.y_gradient + i) * slope;
        store(row + i, load(row + i) * factor);
      }
    }
  }
  S* rows = static_cast<S*>(to.z_gradient == nullptr ? to.y : to.z_gradient);
  put_rows(out.y, w.p, p.headdim, pixels, count, Turn{axis == 0, axis == w.axes - 1},
           head_of(p, rows, block.batch, head), stride,
           out.sum == nullptr ? nullptr : out.sum + h * w.tokens * w.p, w.p);
}

}  // namespace famseg::FAMSEG_ISA
