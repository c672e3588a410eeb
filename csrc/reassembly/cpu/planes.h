// Images into planes in scratch memory (geometry.h) and back.
//
// For kernel files only: see common/simd.h.
#pragma once

#include "common/half.h"
#include "common/transpose.h"
#include "reassembly/cpu/image.h"

namespace famseg::FAMSEG_ISA {

// ---- vectors in and out -------------------------------------------------------------------------

// The first `count` elements, zeros behind them: there memory may end.
template <typename S>
[[gnu::always_inline]] inline Vector<Compute<S>> load_some(const S* p, int64_t count) {
  constexpr int64_t lanes = kLanes<Compute<S>>;
  if (count >= lanes) return load_wide(p);
  S some[lanes] = {};
  for (int64_t i = 0; i < count; ++i) some[i] = p[i];
  return load_wide(some);
}

template <typename S>
[[gnu::always_inline]] inline void store_some(S* p, Vector<Compute<S>> v, int64_t count) {
  constexpr int64_t lanes = kLanes<Compute<S>>;
  if (count >= lanes) return store_narrow(p, v);
  S some[lanes];
  store_narrow(some, v);
  for (int64_t i = 0; i < count; ++i) p[i] = some[i];
}

// ---- lines of NCHW images -----------------------------------------------------------------------

template <typename T, int... I>
[[gnu::always_inline]] inline void deinterleave(Vector<T>& a, Vector<T>& b, Indices<I...>) {
  const Vector<T> even = __builtin_shufflevector(a, b, (2 * I)...);
  b = __builtin_shufflevector(a, b, (2 * I + 1)...);
  a = even;
}

template <typename T, int... I>
[[gnu::always_inline]] inline void interleave(Vector<T>& a, Vector<T>& b, Indices<I...>) {
  constexpr int lanes = kLanes<T>;
  const Vector<T> low = __builtin_shufflevector(a, b, (I / 2 + I % 2 * lanes)...);
  b = __builtin_shufflevector(a, b, ((lanes + I) / 2 + I % 2 * lanes)...);
  a = low;
}

template <typename T>
using Lanes = typename CountTo<kLanes<T>>::type;

// Two vectors of elements of memory, the even ones and the odd ones.
template <typename S>
[[gnu::always_inline]] inline void load_split(const S* p, Vector<Compute<S>>& even,
                                              Vector<Compute<S>>& odd) {
  using T = Compute<S>;
  even = load_wide(p);
  odd = load_wide(p + kLanes<T>);
  deinterleave<T>(even, odd, Lanes<T>());
}

template <typename S>
[[gnu::always_inline]] inline void store_joined(S* p, Vector<Compute<S>> even,
                                                Vector<Compute<S>> odd) {
  using T = Compute<S>;
  interleave<T>(even, odd, Lanes<T>());
  store_narrow(p, even);
  store_narrow(p + kLanes<T>, odd);
}

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
// A pair of bfloat16 is the upper halves of two floats: no shuffles, no conversion of widths.
typedef uint32_t PairBits __attribute__((vector_size(kVectorBytes), aligned(2), may_alias));

[[gnu::always_inline]] inline void load_split(const Bfloat16* p, Vector<float>& even,
                                              Vector<float>& odd) {
  const Vector<uint32_t> pairs = *reinterpret_cast<const PairBits*>(p);
  even = reinterpret_cast<Vector<float>>(pairs << 16);
  odd = reinterpret_cast<Vector<float>>(pairs & 0xffff0000);
}

[[gnu::always_inline]] inline void store_joined(Bfloat16* p, Vector<float> even,
                                                Vector<float> odd) {
  *reinterpret_cast<PairBits*>(p) = bfloat16_bits(even) >> 16 | (bfloat16_bits(odd) & 0xffff0000);
}
#endif

// One line of an image in NCHW into the rows of `scale` phases, which lie `stride` apart. The last
// vector puts zeros into the gap behind the row or into the row behind that, which comes later.
// Lines are short, a few vectors: inlined, because a call would be a third of their time.
template <typename S, typename T>
[[gnu::always_inline]] inline void load_line(const S* line, int64_t scale, int64_t width, T* to,
                                             int64_t stride) {
  constexpr int64_t lanes = kLanes<T>;
  int64_t j = 0;
  if (scale == 1) {
    for (; j + lanes <= width; j += lanes) store(to + j, load_wide(line + j));
    if (j < width) store(to + j, load_some(line + j, width - j));
  } else if (scale == 2) {
    Vector<T> even, odd;
    for (; j + lanes <= width; j += lanes) {
      load_split(line + 2 * j, even, odd);
      store(to + j, even);
      store(to + stride + j, odd);
    }
    if (j < width) {
      S some[2 * lanes] = {};
      for (int64_t i = 0; i < 2 * (width - j); ++i) some[i] = line[2 * j + i];
      load_split(some, even, odd);
      store(to + j, even);
      store(to + stride + j, odd);
    }
  } else {
    for (int64_t dx = 0; dx < scale; ++dx) {
      for (j = 0; j < width; ++j) to[dx * stride + j] = widen(line[scale * j + dx]);
    }
  }
}

template <typename S, typename T>
[[gnu::always_inline]] inline void store_line(const T* from, int64_t stride, int64_t scale,
                                              int64_t width, S* line) {
  constexpr int64_t lanes = kLanes<T>;
  int64_t j = 0;
  if (scale == 1) {
    for (; j + lanes <= width; j += lanes) store_narrow(line + j, load(from + j));
    if (j < width) store_some(line + j, load(from + j), width - j);
  } else if (scale == 2) {
    for (; j + lanes <= width; j += lanes) {
      store_joined(line + 2 * j, load(from + j), load(from + stride + j));
    }
    if (j < width) {
      S some[2 * lanes];
      store_joined(some, load(from + j), load(from + stride + j));
      for (int64_t i = 0; i < 2 * (width - j); ++i) line[2 * j + i] = some[i];
    }
  } else {
    for (int64_t dx = 0; dx < scale; ++dx) {
      for (j = 0; j < width; ++j) narrow(line[scale * j + dx], from[dx * stride + j]);
    }
  }
}

// ---- regions ------------------------------------------------------------------------------------

// A region of some channels as planes (channel, phase), zeros outside the image.
template <typename S, typename T>
void load_planes(const Geometry& g, Image<const S> from, int64_t channels, const Region& region,
                 Planes<T> to) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t scale = from.scale, phases = scale * scale;
  const int64_t begin = max(0, -region.row), end = min(region.rows, g.height - region.row);
  const int64_t left = max(0, -region.column);
  const int64_t right = min(region.columns, g.width - region.column), width = right - left;
  const auto clear = [&](int64_t row, int64_t from_column, int64_t to_column) {
    if (from_column >= to_column) return;
    for (int64_t plane = 0; plane < channels * phases; ++plane) {
      for (int64_t j = from_column; j < to_column; ++j) to[plane][row * g.pitch + j] = T(0);
    }
  };
  for (int64_t i = 0; i < region.rows; ++i) {
    const bool inside = begin <= i && i < end;
    clear(i, 0, inside ? left : region.columns);
    clear(i, inside ? right : region.columns, region.columns);
  }
  const auto first_pixel = [&](int64_t row, int64_t dy, int64_t dx) {
    return from.pixel(region.row + row, dy, (region.column + left) * scale + dx);
  };
  if (!from.channels_last()) {
    for (int64_t c = 0; c < channels; ++c) {
      const S* line = first_pixel(begin, 0, 0) + c * from.channel;
      T* rows = to[c * phases] + begin * g.pitch + left;
      for (int64_t i = begin; i < end; ++i, rows += g.pitch) {
        T* row = rows;
        for (int64_t dy = 0; dy < scale; ++dy, line += from.line, row += scale * to.stride) {
          if (c + 1 < channels) prefetch(line + from.channel, width * scale);
          load_line(line, scale, width, row, to.stride);
        }
      }
    }
    return;
  }
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t phase = 0; phase < phases; ++phase) {
      const S* line = first_pixel(i, phase / scale, phase % scale);
      for (int64_t j = 0; j < width; j += lanes) {
        const S* at = line + j * scale * from.column;
        const int64_t pixels = min(lanes, width - j);
        for (int64_t c = 0; c < channels; c += lanes) {
          // The zeros of the last vector go where load_line's do.
          T* row = to[c * phases + phase] + i * g.pitch + left + j;
          Vector<T> v[lanes];
          if (pixels == lanes && c + lanes <= channels) {
#pragma GCC unroll 16
            for (int r = 0; r < lanes; ++r) v[r] = load_wide(at + r * scale * from.column + c);
            transpose_from<1, T>(v);
#pragma GCC unroll 16
            for (int r = 0; r < lanes; ++r) store(row + r * phases * to.stride, v[r]);
          } else {
            for (int r = 0; r < lanes; ++r) {
              v[r] = r < pixels ? load_some(at + r * scale * from.column + c, channels - c)
                                : Vector<T>{};
            }
            transpose_from<1, T>(v);
            for (int r = 0; r < lanes && c + r < channels; ++r) {
              store(row + r * phases * to.stride, v[r]);
            }
          }
        }
      }
    }
  }
}

template <typename S, typename T>
void store_planes(const Geometry& g, Planes<T> from, int64_t channels, const Region& region,
                  Image<S> to) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t scale = to.scale, phases = scale * scale;
  if (!to.channels_last()) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t i = 0; i < region.rows; ++i) {
        for (int64_t dy = 0; dy < scale; ++dy) {
          store_line(from[c * phases + dy * scale] + i * g.pitch, from.stride, scale,
                     region.columns,
                     to.pixel(region.row + i, dy, region.column * scale) + c * to.channel);
        }
      }
    }
    return;
  }
  for (int64_t i = 0; i < region.rows; ++i) {
    for (int64_t phase = 0; phase < phases; ++phase) {
      S* line = to.pixel(region.row + i, phase / scale, region.column * scale + phase % scale);
      for (int64_t j = 0; j < region.columns; j += lanes) {
        S* at = line + j * scale * to.column;
        const int64_t pixels = min(lanes, region.columns - j);
        for (int64_t c = 0; c < channels; c += lanes) {
          const T* row = from[c * phases + phase] + i * g.pitch + j;
          Vector<T> v[lanes];
          if (pixels == lanes && c + lanes <= channels) {
#pragma GCC unroll 16
            for (int r = 0; r < lanes; ++r) v[r] = load(row + r * phases * from.stride);
            transpose_from<1, T>(v);
#pragma GCC unroll 16
            for (int r = 0; r < lanes; ++r) store_narrow(at + r * scale * to.column + c, v[r]);
          } else {
            for (int r = 0; r < lanes; ++r) {
              v[r] = c + r < channels ? load(row + r * phases * from.stride) : Vector<T>{};
            }
            transpose_from<1, T>(v);
            for (int r = 0; r < pixels; ++r) {
              store_some(at + r * scale * to.column + c, v[r], channels - c);
            }
          }
        }
      }
    }
  }
}

}  // namespace famseg::FAMSEG_ISA
