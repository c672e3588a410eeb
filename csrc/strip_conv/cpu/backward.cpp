// The backward direction of strip_conv2d for one instruction set (see common/simd.h: this file is
// compiled once for each). Lanes are channels, as in the forward direction: every load is a whole
// cache line, and the gradient of a weight is a vector that sums itself up, lane by lane.
//
// 270 FMAs for each pixel of a vector bind it, two a cycle: 64 make a and r_i again, 39 each make
// dr_i and da, 25 dx, 103 the gradients of weights. So that nothing else does:
//
//  * A pass holds as many sums in registers as fit beside the taps that they share, so that a
//    loaded vector serves some five FMAs (Correlation, Products): the L1 cache could feed one FMA a
//    load, but not while it is being filled.
//  * Only dy, x and da are needed beyond the rows at hand. So the chain of stages goes down the
//    image in bands of few rows, whose 150 vectors a column of pixels stay in the L2 cache:
//
//      x    rows and pixels beyond the band as far as the square kernel reaches
//      a    pixels beyond the block as far as rows reach
//      dy   rows beyond the band as far as columns reach
//      dr_i pixels beyond the block as far as rows reach
//      da   rows and pixels beyond as far as the square kernel reaches; rows of the band before
//      stay,
//           because dx comes that much later
//
//  * Of 16 pixels' columns, r_i is made, used for the gradient of column weights, and forgotten;
//    dr_i is made from the same rows of dy and used for the gradient of row weights with the same
//    pixels of a: four passes over what is in the L1 cache.
//
// All of these are (pixels, rows), an odd number of vectors from pixel to pixel: even ones would
// crowd a row of pixels into few sets of the L1 cache. Beyond the image they hold zeros.
//
// Wide images are cut into blocks of columns, which compute each other's borders. Blocks leave
// partial sums of weights' gradients, and a second pass adds them in order: the cut and the order
// depend on the shape alone, so results do not depend on the number of threads.

#include "common/scratch.h"
#include "common/simd.h"
#include "strip_conv/cpu/correlation.h"
#include "strip_conv/cpu/kernels.h"
#include "strip_conv/cpu/layout.h"

namespace famseg::FAMSEG_ISA {
namespace {

using strip_conv::Branch;
using strip_conv::BranchGradients;
using strip_conv::Gradients;
using strip_conv::Problem;

constexpr int64_t kBand = 16;      // rows
constexpr int64_t kTile = 16;      // pixels
constexpr int kPitch = kBand | 1;  // vectors from pixel to pixel where only the band is kept
// What the buffers of a block may have, of an L2 cache of 2 MB.
constexpr int64_t kBlockBytes = 7 << 18;
// As many pieces of work, if there are images enough: plenty for all threads, and few partial sums.
constexpr int64_t kPieces = 256;
// Sums of a weight's gradient in registers beside what they are made from.
constexpr int kMostSums = kVectorRegisters >= 32 ? 11 : 6;

// ---- gradients of weights -------------------------------------------------------------------

// Keeps loads behind it. Left to itself, the compiler holds what two pieces of a kernel both read
// in more registers than there are.
[[gnu::always_inline]] inline void hold_loads() {
  asm volatile("" ::: "memory");
}

// out[t] += sum over all lines and q < length of gradient[q] in[q + t]; for a square kernel with
// further lines of `in`, each into sums of its own. All steps in elements.
template <typename T>
struct Products {
  const T* gradient;
  int64_t gradient_line;
  const T* in;
  int64_t in_line;
  double* out;
  int64_t out_step, out_line;
  int64_t taps, length, lines;
};

template <typename T>
[[gnu::always_inline]] inline void add_to_double(Vector<T> sum, double* out) {
  T lanes[kLanes<T>];
  store(lanes, sum);
  for (int l = 0; l < kLanes<T>; ++l) out[l] += static_cast<double>(lanes[l]);
}

// Sums run in T over one call, some hundred products, and then move on in double.
template <int STEP, int LINES, int TAPS, typename T>
[[gnu::noinline]] void multiply_lines(const Products<T>& p) {
  constexpr int held = kVectorRegisters - 2 - LINES * TAPS >= 8 ? 8 : 4;
  constexpr int64_t step = STEP * kLanes<T>;
  Vector<T> sum[LINES][TAPS] = {};
  const T *gradient_line = p.gradient, *in_line = p.in;
  for (int64_t line = 0; line < p.lines; ++line) {
    const T *from = gradient_line, *in = in_line;
    int64_t q = 0;
    for (; q + held <= p.length; q += held) {
      Vector<T> gradient[held];
#pragma GCC unroll 8
      for (int h = 0; h < held; ++h) gradient[h] = load(from + h * step);
#pragma GCC unroll 8
      for (int k = 0; k < LINES; ++k) {
        const T* at = in + k * p.in_line;
#pragma GCC unroll 32
        for (int i = 0; i < held + TAPS - 1; ++i) {
          hold_loads();
          const Vector<T> value = load(at + i * step);
#pragma GCC unroll 8
          for (int h = 0; h < held; ++h) {
            if (i - h >= 0 && i - h < TAPS) sum[k][i - h] += gradient[h] * value;
          }
        }
      }
      from += held * step;
      in += held * step;
    }
    for (; q < p.length; ++q) {
      const Vector<T> gradient = load(from);
#pragma GCC unroll 8
      for (int k = 0; k < LINES; ++k) {
#pragma GCC unroll 16
        for (int t = 0; t < TAPS; ++t) {
          sum[k][t] += gradient * load(in + k * p.in_line + t * step);
        }
      }
      from += step;
      in += step;
    }
    gradient_line += p.gradient_line;
    in_line += p.in_line;
  }
#pragma GCC unroll 8
  for (int k = 0; k < LINES; ++k) {
#pragma GCC unroll 16
    for (int t = 0; t < TAPS; ++t) {
      add_to_double<T>(sum[k][t], p.out + k * p.out_line + t * p.out_step);
    }
  }
}

template <int STEP, int TAPS = kMostSums, typename T>
void multiply_piece(const Products<T>& p, int64_t taps) {
  if constexpr (TAPS > 1) {
    if (taps < TAPS) return multiply_piece<STEP, TAPS - 1>(p, taps);
  }
  multiply_lines<STEP, 1, TAPS>(p);
}

template <int STEP, typename T>
void multiply(Products<T> p) {
  const int64_t pieces = (p.taps + kMostSums - 1) / kMostSums;
  int64_t done = 0;
  for (int64_t left = pieces; left > 0; --left) {
    const int64_t taps = (p.taps - done + left - 1) / left;
    multiply_piece<STEP>(p, taps);
    p.in += taps * STEP * kLanes<T>;
    p.out += taps * p.out_step;
    done += taps;
  }
}

// Of a square kernel of TAPS x TAPS, as many lines at once as there are registers for: fewer sums
// than 8 wait for themselves.
template <int TAPS, typename T>
int64_t multiply_squares(Products<T>& p, int64_t kernel_lines) {
  constexpr int room = kVectorRegisters >= 32 ? 25 : 10;
  constexpr int lines = room / TAPS < TAPS ? room / TAPS : TAPS;
  for (; kernel_lines >= lines; kernel_lines -= lines) {
    multiply_lines<1, lines, TAPS>(p);
    p.in += lines * p.in_line;
    p.out += lines * p.out_line;
  }
  return kernel_lines;
}

template <typename T>
void multiply_square(Products<T> p, int64_t kernel_lines) {
  if (p.taps == 3) kernel_lines = multiply_squares<3>(p, kernel_lines);
  if (p.taps == 5) kernel_lines = multiply_squares<5>(p, kernel_lines);
  if (p.taps == 7) kernel_lines = multiply_squares<7>(p, kernel_lines);
  for (; kernel_lines > 0; --kernel_lines) {
    multiply<1>(p);
    p.in += p.in_line;
    p.out += p.out_line;
  }
}

// out += sum over all lines and q < length of in[q].
template <typename T>
void add_up(const T* in, int64_t step, int64_t line, int64_t length, int64_t lines, double* out) {
  Vector<T> sum[4] = {};
  for (int64_t i = 0; i < lines; ++i, in += line) {
    int64_t q = 0;
    for (; q + 4 <= length; q += 4) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) sum[k] += load(in + (q + k) * step);
    }
    for (; q < length; ++q) sum[0] += load(in + q * step);
  }
  add_to_double<T>((sum[0] + sum[1]) + (sum[2] + sum[3]), out);
}

// ---- a block of work ------------------------------------------------------------------------

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
struct Kernel {
  T *weight, *reversed;
  int64_t height, width;
};

template <typename T>
struct Strip {
  Kernel<T> row, column;
  T* row_bias;
  Buffer<T> gradient;  // dr_i
  // Where the gradients begin among the partial sums, in vectors.
  int64_t row_sums, row_bias_sums, column_sums;
};

template <typename T>
struct Space {
  int64_t blocks, width;  // blocks of columns and the width of all but the last
  int64_t branch_count;
  int64_t reach_row, reach_column;  // farthest
  int64_t reach_square_y, reach_square_x;
  // Pixels beyond the block that it computes of a, dr and da, where the image goes on.
  int64_t border_a, border_r, border_da;
  Kernel<T> square;
  T* square_bias;
  T* zero;
  Strip<T>* strips;
  Buffer<T> x, a, dy, da, r;
  int64_t da_rows;
  // Partial sums, in vectors.
  int64_t square_sums, square_bias_sums, dy_sums, sums;
  double* sum;
};

template <typename T>
Space<T> lay_out(const Problem& p, Arena& arena) {
  constexpr int64_t lanes = kLanes<T>;
  Space<T> s{};
  s.branch_count = p.branch_count;
  s.strips = arena.take<Strip<T>>(p.branch_count);
  // An empty image has gradients of weights too: zeros.
  const int64_t h = larger(p.h, 1), w = larger(p.w, 1);
  const auto take_kernel = [&](int64_t height, int64_t width) {
    T* weight = arena.take<T>(height * width * lanes);
    return Kernel<T>{weight, arena.take<T>(height * width * lanes), height, width};
  };
  const auto take_sums = [&](int64_t count) {
    s.sums += count;
    return s.sums - count;
  };
  if (p.square_weight != nullptr) {
    s.square = take_kernel(cropped(p.square_size, h), cropped(p.square_size, w));
    s.reach_square_y = s.square.height / 2;
    s.reach_square_x = s.square.width / 2;
  }
  s.square_sums = take_sums(s.square.height * s.square.width);
  s.square_bias_sums = take_sums(1);
  s.dy_sums = take_sums(1);
  for (int64_t i = 0; i < p.branch_count; ++i) {
    const Kernel<T> row = take_kernel(1, cropped(p.branches[i].row_size, w));
    const Kernel<T> column = take_kernel(cropped(p.branches[i].column_size, h), 1);
    T* bias = arena.take<T>(lanes);
    s.reach_row = larger(s.reach_row, row.width / 2);
    s.reach_column = larger(s.reach_column, column.height / 2);
    const int64_t row_sums = take_sums(row.width), row_bias_sums = take_sums(1);
    const int64_t column_sums = take_sums(column.height);
    if (arena.base != nullptr) {
      s.strips[i] = {row, column, bias, {}, row_sums, row_bias_sums, column_sums};
    }
  }
  s.square_bias = arena.take<T>(lanes);
  s.zero = arena.take<T>(lanes);
  s.sum = arena.take<double>(s.sums * lanes);

  const auto odd = [](int64_t rows) { return rows | 1; };
  const int64_t x_rows = odd(kBand + 2 * s.reach_square_y),
                dy_rows = odd(kBand + 2 * s.reach_column);
  // The last band makes the rows of dx that are late as well.
  s.da_rows = kBand + 3 * s.reach_square_y;
  const int64_t column = x_rows + kPitch * (1 + p.branch_count) + dy_rows + odd(s.da_rows);
  const int64_t around = 2 * (s.reach_row + s.reach_square_x) + kTile;
  const int64_t widest = larger(kBlockBytes / (column * kVectorBytes) - around, 2 * kTile);
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
  if (p.square_weight != nullptr) s.x = take(s.border_a + s.reach_square_x, x_rows);
  s.a = take(s.reach_row, kPitch);
  s.dy = take(s.border_r, dy_rows);
  s.da = take(s.reach_square_x, odd(s.da_rows));
  for (int64_t i = 0; i < p.branch_count; ++i) {
    const Buffer<T> gradient = take(s.border_da + s.reach_row, kPitch);
    if (arena.base != nullptr) s.strips[i].gradient = gradient;
  }
  s.r = {arena.take<T>(kTile * kPitch * lanes), kPitch * lanes};
  return s;
}

// What is to be computed.
struct Needs {
  bool x, square_weight, square_bias;
  bool a, dr, da, dy_sum;
};

Needs needs_of(const Problem& p, const Gradients& gradients) {
  Needs needs{};
  needs.square_weight = gradients.square_weight != nullptr;
  needs.square_bias = gradients.square_bias != nullptr;
  needs.da = gradients.x != nullptr || needs.square_weight || needs.square_bias;
  needs.dr = needs.da;
  for (int64_t i = 0; i < p.branch_count; ++i) {
    const BranchGradients& wanted = gradients.branches[i];
    needs.a = needs.a || wanted.row_weight != nullptr || wanted.column_weight != nullptr;
    needs.dr = needs.dr || wanted.row_weight != nullptr || wanted.row_bias != nullptr;
    needs.dy_sum = needs.dy_sum || wanted.column_bias != nullptr;
  }
  needs.x = needs.a || needs.square_weight;
  return needs;
}

template <typename S, typename T>
void load_kernel(const void* weight, const Group& group, int64_t height, int64_t width,
                 const Kernel<T>& to) {
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
void load_weights(const Problem& p, const Group& group, const Space<T>& s) {
  if (p.square_weight != nullptr) {
    load_kernel<S>(p.square_weight, group, p.square_size, p.square_size, s.square);
  }
  store(s.square_bias, bias_of<S, T>(p.square_bias, group));
  for (int64_t i = 0; i < p.branch_count; ++i) {
    const Branch& branch = p.branches[i];
    const Strip<T>& strip = s.strips[i];
    load_kernel<S>(branch.row_weight, group, 1, branch.row_size, strip.row);
    load_kernel<S>(branch.column_weight, group, branch.column_size, 1, strip.column);
    store(strip.row_bias, bias_of<S, T>(branch.row_bias, group));
  }
}

// Where a block of work lies in the image at hand.
struct Place {
  Group channels;
  int64_t n, left, width;
  int64_t columns;  // of the image
  // The first and the last pixel, counted from the block's first, of what reaches `border` beyond.
  int64_t begin(int64_t border) const { return larger(-border, -left); }
  int64_t end(int64_t border) const { return smaller(width + border, columns - left); }
};

// Rows [from, to) of the image, zeros beyond it, and pixels as far as `border` beyond the block.
template <typename S, typename T>
void load_image(const Problem& p, const void* image, bool channels_last, const Place& place,
                int64_t border, int64_t from, int64_t to, const Buffer<T>& buffer, int64_t row) {
  const int64_t begin = place.begin(border), count = place.end(border) - begin;
  for (int64_t i = from; i < to; ++i, ++row) {
    T* out = buffer.at(begin, row);
    if (i < 0 || i >= p.h) {
      for (int64_t j = 0; j < count; ++j) store(out + j * buffer.pixel, Vector<T>{});
    } else if (channels_last) {
      const int64_t pixel = (place.n * p.h + i) * p.w + place.left + begin;
      load_channels_last(static_cast<const S*>(image) + pixel * p.c + place.channels.first, p.c,
                         place.channels.count, count, out, buffer.pixel);
    } else {
      const int64_t line = (place.n * p.c + place.channels.first) * p.h + i;
      load_channels_first(static_cast<const S*>(image) + line * p.w + place.left + begin, p.h * p.w,
                          place.channels.count, count, out, buffer.pixel);
    }
  }
}

// `rows` rows of the block, from row `row` of the image on.
template <typename S, typename T>
void store_image(const Problem& p, const Place& place, int64_t row, int64_t rows, const T* from,
                 int64_t pixel, S* image) {
  for (int64_t i = row; i < row + rows; ++i, from += kLanes<T>) {
    if (p.channels_last) {
      const int64_t first = (place.n * p.h + i) * p.w + place.left;
      store_channels_last(from, pixel, p.c, place.channels.count, place.width,
                          image + first * p.c + place.channels.first);
    } else {
      const int64_t line = (place.n * p.c + place.channels.first) * p.h + i;
      store_channels_first(from, pixel, p.h * p.w, place.channels.count, place.width,
                           image + line * p.w + place.left);
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

// a, from x.
template <typename T>
void square_stage(const Space<T>& s, const Place& place, int64_t rows) {
  const int64_t begin = place.begin(s.border_a);
  Correlation<T> c{};
  c.in = s.x.at(begin - s.reach_square_x, 0);
  c.in_line = s.x.pixel;
  c.weight = s.square.weight;
  c.taps = s.square.height;
  c.kernel_lines = s.square.width;
  c.start = s.square_bias;
  c.out = s.a.at(begin, 0);
  c.out_line = s.a.pixel;
  c.lines = place.end(s.border_a) - begin;
  correlate<1, true>(c, rows);
}

// dr_i of the pixels [begin, end).
template <typename T>
void column_stage(const Space<T>& s, const Strip<T>& strip, int64_t begin, int64_t end,
                  int64_t rows) {
  Correlation<T> c{};
  c.in = s.dy.at(begin, s.reach_column - strip.column.height / 2);
  c.in_line = s.dy.pixel;
  c.weight = strip.column.reversed;
  c.taps = strip.column.height;
  c.start = s.zero;
  c.out = strip.gradient.at(begin, 0);
  c.out_line = strip.gradient.pixel;
  c.lines = end - begin;
  correlate<1>(c, rows);
}

// dr_i of the pixels [begin, end), at most kTile, and their share of the branch's gradients.
template <typename T>
void strip_stage(const Space<T>& s, const Strip<T>& strip, const BranchGradients& wanted,
                 bool gradient, int64_t begin, int64_t end, int64_t rows) {
  constexpr int64_t lanes = kLanes<T>;
  if (wanted.column_weight != nullptr) {
    Correlation<T> c{};
    c.in = s.a.at(begin - strip.row.width / 2, 0);
    c.in_line = lanes;
    c.weight = strip.row.weight;
    c.taps = strip.row.width;
    c.start = strip.row_bias;
    c.out = s.r.first;
    c.out_line = lanes;
    c.lines = rows;
    correlate<kPitch>(c, end - begin);

    // Tap t of a column meets dy t rows further up: from the last tap to the first.
    Products<T> p{};
    p.gradient = s.r.first;
    p.gradient_line = s.r.pixel;
    p.in = s.dy.at(begin, s.reach_column - strip.column.height / 2);
    p.in_line = s.dy.pixel;
    p.out = s.sum + (strip.column_sums + strip.column.height - 1) * lanes;
    p.out_step = -lanes;
    p.taps = strip.column.height;
    p.length = rows;
    p.lines = end - begin;
    multiply<1>(p);
  }
  if (!gradient) return;
  column_stage(s, strip, begin, end, rows);
  if (wanted.row_weight != nullptr) {
    Products<T> p{};
    p.gradient = strip.gradient.at(begin, 0);
    p.gradient_line = lanes;
    p.in = s.a.at(begin - strip.row.width / 2, 0);
    p.in_line = lanes;
    p.out = s.sum + strip.row_sums * lanes;
    p.out_step = lanes;
    p.taps = strip.row.width;
    p.length = end - begin;
    p.lines = rows;
    multiply<kPitch>(p);
  }
  if (wanted.row_bias != nullptr) {
    add_up(strip.gradient.at(begin, 0), lanes, strip.gradient.pixel, rows, end - begin,
           s.sum + strip.row_bias_sums * lanes);
  }
}

// da, from dy and all dr_i.
template <typename T>
void row_stage(const Space<T>& s, const Place& place, int64_t rows) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t begin = place.begin(s.border_da), end = place.end(s.border_da);
  const int64_t before = 2 * s.reach_square_y;
  // Half the rows at a time: then what two neighbouring runs read is still in the L1 cache.
  constexpr int64_t half = kBand / 2;
  for (int64_t row = 0; row < rows; row += half) {
    for (int64_t j = begin; j < end; j += kTile) {
      const int64_t width = smaller(kTile, end - j);
      Correlation<T> c{};
      c.in_line = lanes;
      c.start = s.dy.at(j, s.reach_column + row);
      c.start_step = s.dy.pixel;
      c.start_line = lanes;
      c.out = s.r.first;
      c.out_line = lanes;
      c.lines = smaller(half, rows - row);
      for (int64_t i = 0; i < s.branch_count; ++i) {
        const Strip<T>& strip = s.strips[i];
        c.in = strip.gradient.at(j - strip.row.width / 2, row);
        c.weight = strip.row.reversed;
        c.taps = strip.row.width;
        correlate<kPitch>(c, width);
        c.start = c.out;
        c.start_step = s.r.pixel;
      }
      for (int64_t k = 0; k < width; ++k) {
        move_down(c.start + k * c.start_step, c.lines * lanes, s.da.at(j + k, before + row));
      }
    }
  }
}

// The square kernel's gradient, from da and x.
template <typename T>
void square_products(const Space<T>& s, const Place& place, int64_t rows) {
  constexpr int64_t lanes = kLanes<T>;
  Products<T> p{};
  p.gradient = s.da.at(0, 2 * s.reach_square_y);
  p.gradient_line = s.da.pixel;
  p.in = s.x.at(-s.reach_square_x, 0);
  p.in_line = s.x.pixel;
  p.out = s.sum + s.square_sums * lanes;
  p.out_step = s.square.width * lanes;
  p.out_line = lanes;
  p.taps = s.square.height;
  p.length = rows;
  p.lines = place.width;
  multiply_square(p, s.square.width);
}

// dx, `rows` rows of the image from row `row` on, from da, whose row `at` is the first they need.
template <typename S, typename T>
void store_x_gradient(const Problem& p, const Space<T>& s, const Place& place, int64_t row,
                      int64_t rows, int64_t at, S* image) {
  if (p.square_weight == nullptr) {
    store_image(p, place, row, rows, s.da.at(0, at), s.da.pixel, image);
    return;
  }
  for (int64_t done = 0; done < rows; done += kBand) {
    const int64_t some = smaller(kBand, rows - done);
    Correlation<T> c{};
    c.in = s.da.at(-s.reach_square_x, at + done);
    c.in_line = s.da.pixel;
    c.weight = s.square.reversed;
    c.taps = s.square.height;
    c.kernel_lines = s.square.width;
    c.start = s.zero;
    c.out = s.a.first;  // which is no longer needed
    c.out_line = s.a.pixel;
    c.lines = place.width;
    correlate<1, true>(c, some);
    store_image(p, place, row + done, some, s.a.first, s.a.pixel, image);
  }
}

template <typename S, typename T>
void backward_image(const Problem& p, const Gradients& gradients, const Needs& needs,
                    const Space<T>& s, const Place& place) {
  const int64_t reach = s.reach_square_y, column = s.reach_column;
  const int64_t border_x = s.border_a + s.reach_square_x;
  clear_rows(s.da, place.begin(s.border_da), place.end(s.border_da), 0, 2 * reach);
  for (int64_t top = 0, stored = 0; top < p.h; top += kBand) {
    const int64_t rows = smaller(kBand, p.h - top);
    const bool first = top == 0, last = top + rows == p.h;
    if (needs.x && p.square_weight != nullptr) {
      if (!first) move_rows(s.x, place.begin(border_x), place.end(border_x), 2 * reach);
      const int64_t there = first ? 0 : 2 * reach;
      load_image<S>(p, p.x, p.channels_last, place, border_x, top - reach + there,
                    top + kBand + reach, s.x, there);
      if (needs.a) square_stage(s, place, rows);
    } else if (needs.x) {
      load_image<S>(p, p.x, p.channels_last, place, s.border_a, top, top + rows, s.a, 0);
    }
    if (!first) move_rows(s.dy, place.begin(s.border_r), place.end(s.border_r), 2 * column);
    const int64_t there = first ? 0 : 2 * column;
    load_image<S>(p, gradients.y, gradients.y_channels_last, place, s.border_r,
                  top - column + there, top + kBand + column, s.dy, there);
    if (needs.dy_sum) {
      add_up(s.dy.at(0, column), kLanes<T>, s.dy.pixel, rows, place.width,
             s.sum + s.dy_sums * kLanes<T>);
    }
    for (int64_t j = 0; j < place.width; j += kTile) {
      for (int64_t i = 0; i < s.branch_count; ++i) {
        strip_stage(s, s.strips[i], gradients.branches[i], needs.dr, j,
                    smaller(j + kTile, place.width), rows);
      }
    }
    if (!needs.da) continue;
    for (int64_t i = 0; i < s.branch_count; ++i) {
      column_stage(s, s.strips[i], place.begin(s.border_r), 0, rows);
      column_stage(s, s.strips[i], place.width, place.end(s.border_r), rows);
    }
    if (!first) move_rows(s.da, place.begin(s.border_da), place.end(s.border_da), 2 * reach);
    row_stage(s, place, rows);
    if (last) {
      clear_rows(s.da, place.begin(s.border_da), place.end(s.border_da), 2 * reach + rows,
                 s.da_rows);
    }
    if (needs.square_bias) {
      add_up(s.da.at(0, 2 * reach), kLanes<T>, s.da.pixel, rows, place.width,
             s.sum + s.square_bias_sums * kLanes<T>);
    }
    if (needs.square_weight) square_products(s, place, rows);
    if (gradients.x == nullptr) continue;
    const int64_t ready = last ? p.h : larger(top + kBand - reach, 0);
    store_x_gradient(p, s, place, stored, ready - stored, stored - top + reach,
                     static_cast<S*>(gradients.x));
    stored = ready;
  }
}

// How the work is cut: pieces are (runs of images, groups of channels, blocks of columns).
struct Cut {
  int64_t groups, blocks, images, runs;  // images of a run
  int64_t pieces() const { return runs * groups * blocks; }
};

template <typename T>
Cut cut_of(const Problem& p, const Space<T>& s) {
  Cut cut{};
  cut.groups = round_up(p.c, kLanes<T>) / kLanes<T>;
  if (p.n * p.c * p.h * p.w == 0) return cut;
  cut.blocks = s.blocks;
  const int64_t runs = smaller(p.n, larger(kPieces / (cut.groups * cut.blocks), 1));
  cut.images = (p.n + runs - 1) / runs;
  cut.runs = (p.n + cut.images - 1) / cut.images;
  return cut;
}

template <typename S, typename T>
void backward_piece(const Problem& p, const Gradients& gradients, int64_t piece, void* partial,
                    void* scratch) {
  constexpr int64_t lanes = kLanes<T>;
  Arena arena{static_cast<char*>(scratch)};
  const Space<T> s = lay_out<T>(p, arena);
  const Cut cut = cut_of(p, s);
  const int64_t left = piece % cut.blocks * s.width;
  const int64_t channel = piece / cut.blocks % cut.groups * lanes;
  const int64_t first = piece / cut.blocks / cut.groups * cut.images;
  Place place{{channel, smaller(lanes, p.c - channel)}, 0, left, smaller(s.width, p.w - left), p.w};
  load_weights<S>(p, place.channels, s);
  for (int64_t k = 0; k < s.sums * lanes; ++k) s.sum[k] = 0;
  if (cut.blocks > 1) {
    // Another block may have had pixels where this one is beyond the image.
    const auto clear_outside = [&](const Buffer<T>& buffer, int64_t margin, int64_t rows) {
      clear_rows(buffer, -margin, place.begin(margin), 0, rows);
      clear_rows(buffer, place.end(margin), place.width + margin, 0, rows);
    };
    if (p.square_weight != nullptr) {
      clear_outside(s.x, s.border_a + s.reach_square_x, kBand + 2 * s.reach_square_y);
    }
    clear_outside(s.a, s.reach_row, kBand);
    clear_outside(s.da, s.reach_square_x, s.da_rows);
    for (int64_t i = 0; i < s.branch_count; ++i) {
      clear_outside(s.strips[i].gradient, s.border_da + s.reach_row, kBand);
    }
  }
  const Needs needs = needs_of(p, gradients);
  for (place.n = first; place.n < smaller(first + cut.images, p.n); ++place.n) {
    backward_image<S>(p, gradients, needs, s, place);
  }
  T* to = static_cast<T*>(partial);
  for (int64_t k = 0; k < s.sums * lanes; ++k) to[k] = static_cast<T>(s.sum[k]);
}

// ---- sums of all pieces ---------------------------------------------------------------------

template <typename S, typename T>
struct Reduction {
  const Problem& p;
  const Cut& cut;
  const T* partials;
  int64_t sums, group;

  // The gradient (C, height, width), of which the taps `first` ... of the partial sums are the
  // middle; the others meet only zeros.
  void reduce(int64_t first, const Kernel<T>& taps, int64_t height, int64_t width,
              void* gradient) const {
    constexpr int64_t lanes = kLanes<T>;
    if (gradient == nullptr) return;
    const Group channels{group * lanes, smaller(lanes, p.c - group * lanes)};
    const int64_t top = (height - taps.height) / 2, left = (width - taps.width) / 2;
    const int64_t count = height * width;
    constexpr int64_t some = 64;
    for (int64_t from = 0; from < count; from += some) {
      const int64_t to = smaller(from + some, count);
      T block[some * lanes] = {};
      for (int64_t t = from; t < to; ++t) {
        const int64_t i = t / width - top, j = t % width - left;
        if (i < 0 || i >= taps.height || j < 0 || j >= taps.width) continue;
        double total[lanes] = {};
        for (int64_t run = 0; run < cut.runs; ++run) {
          for (int64_t k = 0; k < cut.blocks; ++k) {
            const int64_t piece = (run * cut.groups + group) * cut.blocks + k;
            const T* partial = partials + (piece * sums + first + i * taps.width + j) * lanes;
            for (int l = 0; l < lanes; ++l) total[l] += static_cast<double>(partial[l]);
          }
        }
        for (int l = 0; l < lanes; ++l) block[(t - from) * lanes + l] = static_cast<T>(total[l]);
      }
      store_channels_first(block, lanes, count, channels.count, to - from,
                           static_cast<S*>(gradient) + channels.first * count + from);
    }
  }
};

template <typename S, typename T>
void reduce_group(const Problem& p, const Gradients& gradients, int64_t group, const void* partials,
                  void* scratch) {
  Arena arena{static_cast<char*>(scratch)};
  const Space<T> s = lay_out<T>(p, arena);
  const Cut cut = cut_of(p, s);
  const Reduction<S, T> sums{p, cut, static_cast<const T*>(partials), s.sums, group};
  const Kernel<T> one{nullptr, nullptr, 1, 1};
  sums.reduce(s.square_sums, s.square, p.square_size, p.square_size, gradients.square_weight);
  sums.reduce(s.square_bias_sums, one, 1, 1, gradients.square_bias);
  for (int64_t i = 0; i < p.branch_count; ++i) {
    const Branch& branch = p.branches[i];
    const BranchGradients& wanted = gradients.branches[i];
    const Strip<T>& strip = s.strips[i];
    sums.reduce(strip.row_sums, strip.row, 1, branch.row_size, wanted.row_weight);
    sums.reduce(strip.row_bias_sums, one, 1, 1, wanted.row_bias);
    sums.reduce(strip.column_sums, strip.column, branch.column_size, 1, wanted.column_weight);
    sums.reduce(s.dy_sums, one, 1, 1, wanted.column_bias);
  }
}

// ---- by element type ------------------------------------------------------------------------

strip_conv::BackwardPlan backward_plan(const Problem& p) {
  return by_dtype(p.dtype, [&](auto element) {
    using T = Compute<decltype(element)>;
    Arena counting;
    const Space<T> s = lay_out<T>(p, counting);
    const Cut cut = cut_of(p, s);
    return strip_conv::BackwardPlan{cut.pieces(), cut.groups, static_cast<size_t>(counting.used),
                                    static_cast<size_t>(s.sums * kVectorBytes)};
  });
}

void backward_piece_any(const Problem& p, const Gradients& gradients, int64_t piece, void* partial,
                        void* scratch) {
  by_dtype(p.dtype, [&](auto element) {
    using S = decltype(element);
    backward_piece<S, Compute<S>>(p, gradients, piece, partial, scratch);
  });
}

void reduce_group_any(const Problem& p, const Gradients& gradients, int64_t group,
                      const void* partials, void* scratch) {
  by_dtype(p.dtype, [&](auto element) {
    using S = decltype(element);
    reduce_group<S, Compute<S>>(p, gradients, group, partials, scratch);
  });
}

}  // namespace

// `extern` because a const object is otherwise local to its file.
extern const strip_conv::BackwardKernels strip_conv_backward_kernels;
const strip_conv::BackwardKernels strip_conv_backward_kernels = {backward_plan, backward_piece_any,
                                                                 reduce_group_any};

}  // namespace famseg::FAMSEG_ISA
