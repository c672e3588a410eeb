// What a piece of the backward direction keeps in its scratch memory, and the ways in and out: the
// buffers that backward.cpp describes, weights and partial sums.
//
// For kernel files only: see common/simd.h for why everything lives in famseg::FAMSEG_ISA.
#pragma once

#include "common/scratch.h"
#include "common/simd.h"
#include "strip_conv/cpu/layout.h"

namespace famseg::FAMSEG_ISA {

constexpr int64_t kBand = 16;      // rows
constexpr int64_t kTile = 16;      // pixels
constexpr int kPitch = kBand | 1;  // vectors from pixel to pixel where only the band is kept
// What the buffers of a block may have, of an L2 cache of 2 MB.
constexpr int64_t kBlockBytes = 7 << 18;

// (pixels, rows) of vectors.
template <typename T>
struct Buffer {
  T* first;       // the block's first pixel
  int64_t pixel;  // elements from pixel to pixel
  T* at(int64_t column, int64_t row) const { return first + column * pixel + row * kLanes<T>; }
};

// Weights as Correlation wants them: (width, height) vectors. The adjoint of a correlation is that
// with the reversed kernel.
template <typename T>
struct ReversibleTaps {
  T *weight, *reversed;
  int64_t height, width;
};

template <typename T>
struct BackwardStrip {
  ReversibleTaps<T> row, col;
  T* row_bias;
  Buffer<T> dr;
  // Where the gradients begin among the partial sums, in vectors.
  int64_t row_sums, row_bias_sums, col_sums;
};

template <typename T>
struct BackwardSpace {
  int64_t blocks, width;  // blocks of columns and the width of all but the last
  int64_t branch_count;
  int64_t reach_row, reach_col;  // of the largest kernels
  int64_t reach_square_y, reach_square_x;
  // Pixels beyond the block that it computes of a, dr and da, where the image goes on.
  int64_t border_a, border_r, border_da;
  ReversibleTaps<T> square;
  T* square_bias;
  T* zero;
  BackwardStrip<T>* strips;
  Buffer<T> x, a, dy, da, r;
  int64_t da_rows;
  // Partial sums, in vectors.
  int64_t square_sums, square_bias_sums, dy_sums, sums;
  double* sum;
};

template <typename T>
BackwardSpace<T> lay_out(const Problem& p, Arena& arena) {
  constexpr int64_t lanes = kLanes<T>;
  BackwardSpace<T> s{};
  s.branch_count = p.branch_count;
  s.strips = arena.take<BackwardStrip<T>>(p.branch_count);
  // An empty image has gradients of weights too: zeros.
  const int64_t h = max(p.h, 1), w = max(p.w, 1);
  const auto take_taps = [&](int64_t height, int64_t width) {
    T* weight = arena.take<T>(height * width * lanes);
    return ReversibleTaps<T>{weight, arena.take<T>(height * width * lanes), height, width};
  };
  const auto take_sums = [&](int64_t count) {
    s.sums += count;
    return s.sums - count;
  };
  if (p.square.weight != nullptr) {
    s.square = take_taps(cropped(p.square.size, h), cropped(p.square.size, w));
    s.reach_square_y = s.square.height / 2;
    s.reach_square_x = s.square.width / 2;
  }
  s.square_sums = take_sums(s.square.height * s.square.width);
  s.square_bias_sums = take_sums(1);
  s.dy_sums = take_sums(1);
  for (int64_t i = 0; i < p.branch_count; ++i) {
    const ReversibleTaps<T> row = take_taps(1, cropped(p.branches[i].row.size, w));
    const ReversibleTaps<T> col = take_taps(cropped(p.branches[i].col.size, h), 1);
    T* bias = arena.take<T>(lanes);
    s.reach_row = max(s.reach_row, row.width / 2);
    s.reach_col = max(s.reach_col, col.height / 2);
    const int64_t row_sums = take_sums(row.width), row_bias_sums = take_sums(1);
    const int64_t col_sums = take_sums(col.height);
    if (arena.base != nullptr) {
      s.strips[i] = {row, col, bias, {}, row_sums, row_bias_sums, col_sums};
    }
  }
  s.square_bias = arena.take<T>(lanes);
  s.zero = arena.take<T>(lanes);
  s.sum = arena.take<double>(s.sums * lanes);

  const auto odd = [](int64_t rows) { return rows | 1; };
  const int64_t x_rows = odd(kBand + 2 * s.reach_square_y), dy_rows = odd(kBand + 2 * s.reach_col);
  // The last band makes the rows of dx that are late as well.
  s.da_rows = kBand + 3 * s.reach_square_y;
  const int64_t column = x_rows + kPitch * (1 + p.branch_count) + dy_rows + odd(s.da_rows);
  const int64_t around = 2 * (s.reach_row + s.reach_square_x) + kTile;
  const int64_t widest = max(kBlockBytes / (column * kVectorBytes) - around, 2 * kTile);
  s.blocks = (w + widest - 1) / widest;
  s.width = (w + s.blocks - 1) / s.blocks;
  if (s.blocks > 1) {
    s.border_a = s.reach_row;
    s.border_da = s.reach_square_x;
    s.border_r = s.reach_row + s.reach_square_x;
  }
  const auto take = [&](int64_t margin, int64_t rows) {
    T* first = arena.take<T>((s.width + 2 * margin) * rows * lanes);
    return Buffer<T>{first == nullptr ? nullptr : first + margin * rows * lanes, rows * lanes};
  };
  if (p.square.weight != nullptr) s.x = take(s.border_a + s.reach_square_x, x_rows);
  s.a = take(s.reach_row, kPitch);
  s.dy = take(s.border_r, dy_rows);
  s.da = take(s.reach_square_x, odd(s.da_rows));
  for (int64_t i = 0; i < p.branch_count; ++i) {
    const Buffer<T> dr = take(s.border_da + s.reach_row, kPitch);
    if (arena.base != nullptr) s.strips[i].dr = dr;
  }
  s.r = {arena.take<T>(kTile * kPitch * lanes), kPitch * lanes};
  return s;
}

template <typename S, typename T>
void load_both_ways(const void* weight, const Group& group, int64_t height, int64_t width,
                    const ReversibleTaps<T>& to) {
  const int64_t count = to.height * to.width;
  load_taps<S>(weight, group, height, width, Taps<T>{to.reversed, to.height, to.width});
  T* out = to.weight;
  for (int64_t j = 0; j < to.width; ++j) {
    for (int64_t i = 0; i < to.height; ++i, out += kLanes<T>) {
      store(out, load(to.reversed + (i * to.width + j) * kLanes<T>));
    }
  }
  for (int64_t k = 0; k < count; ++k) {
    store(to.reversed + (count - 1 - k) * kLanes<T>, load(to.weight + k * kLanes<T>));
  }
}

template <typename S, typename T>
void load_weights(const Problem& p, const Group& group, const BackwardSpace<T>& s) {
  if (p.square.weight != nullptr) {
    load_both_ways<S>(p.square.weight, group, p.square.size, p.square.size, s.square);
  }
  store(s.square_bias, bias_of<S, T>(p.square.bias, group));
  for (int64_t i = 0; i < p.branch_count; ++i) {
    const Branch& branch = p.branches[i];
    const BackwardStrip<T>& strip = s.strips[i];
    load_both_ways<S>(branch.row.weight, group, 1, branch.row.size, strip.row);
    load_both_ways<S>(branch.col.weight, group, branch.col.size, 1, strip.col);
    store(strip.row_bias, bias_of<S, T>(branch.row.bias, group));
  }
}

// Rows [from, to) of the image, zeros beyond it, and pixels as far as `border` beyond the block.
template <typename S, typename T>
void load_image(const Problem& p, const void* image, bool channels_last, const Block& block,
                int64_t border, int64_t from, int64_t to, const Buffer<T>& buffer, int64_t row) {
  const int64_t begin = block.begin(border), count = block.end(border) - begin;
  for (int64_t i = from; i < to; ++i, ++row) {
    T* out = buffer.at(begin, row);
    if (i < 0 || i >= p.h) {
      for (int64_t j = 0; j < count; ++j) store(out + j * buffer.pixel, Vector<T>{});
      continue;
    }
    const S* in = static_cast<const S*>(image) + block.offset(p, channels_last, i, begin);
    if (channels_last) {
      load_channels_last(in, p.c, block.channels.count, count, out, buffer.pixel);
    } else {
      load_channels_first(in, p.h * p.w, block.channels.count, count, out, buffer.pixel);
    }
  }
}

// `rows` rows of the block, from row `row` of the image on.
template <typename S, typename T>
void store_image(const Problem& p, const Block& block, int64_t row, int64_t rows, const T* from,
                 int64_t pixel, S* image) {
  for (int64_t i = row; i < row + rows; ++i, from += kLanes<T>) {
    S* out = image + block.offset(p, p.channels_last, i, 0);
    if (p.channels_last) {
      store_channels_last(from, pixel, p.c, block.channels.count, block.width, out);
    } else {
      store_channels_first(from, pixel, p.h * p.w, block.channels.count, block.width, out);
    }
  }
}

template <typename T>
void clear_rows(const Buffer<T>& buffer, int64_t begin, int64_t end, int64_t from, int64_t to) {
  for (int64_t j = begin; j < end; ++j) clear(buffer.at(j, from), buffer.at(j, to));
}

// The last `kept` rows of a band of `kBand` more become its first ones.
template <typename T>
void move_rows(const Buffer<T>& buffer, int64_t begin, int64_t end, int64_t kept) {
  for (int64_t j = begin; j < end; ++j) {
    move_down(buffer.at(j, kBand), kept * kLanes<T>, buffer.at(j, 0));
  }
}

}  // namespace famseg::FAMSEG_ISA
