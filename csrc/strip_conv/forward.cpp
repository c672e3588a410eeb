// The forward direction of strip_conv2d for one instruction set (see common/simd.h: this file is
// compiled once for each). Lanes are channels.
//
// 103 FMAs for each pixel of a vector bind it, two a cycle. So that nothing else does:
//
//  * A vector holds one pixel of as many channels as it has lanes, its taps are vectors too: every
//    load is a whole cache line, rows and columns are the same code, no width leaves lanes idle,
//    and 16 x 16 images run as fast as large ones. (With pixels in the lanes a row's taps are loads
//    across cache lines, at two slots each, and planes narrower than a vector or two starve the FMA
//    units.) Channels-last images have this form; others are transposed in registers on their way
//    in and out, some 8 shuffles a vector.
//  * One tap goes to as many sums as half the registers hold: 17 loads for 16 FMAs, of two loads a
//    cycle. The sums lie along the direction of the kernel, so that what they load is nearly the
//    same lines for all taps: a column of 16 sums and 21 taps reads 36 lines, not 336.
//  * The chain of stages goes down the image in bands that fit into the L2 cache. What a later band
//    needs again moves to the front of its buffer: nothing is computed twice. Wide images are cut
//    into blocks of columns, which do compute their borders twice.
//
//    x    (rows, pixels), pixels beyond the block on either side as far as square and rows reach
//    a    (rows, pixels), beyond the block as far as rows reach
//    r_i  row results, (pixels, rows): a column of sums reads consecutive memory
//    y    (pixels, rows)
//
// Beyond the image all of these hold zeros. Strides are odd numbers of cache lines: even ones would
// crowd a column into few sets of the L1 cache.

#include "common/scratch.h"
#include "common/simd.h"
#include "strip_conv/channels.h"
#include "strip_conv/cpu.h"

namespace famseg::FAMSEG_ISA {
namespace {

using strip_conv::Branch;
using strip_conv::Problem;

constexpr int kSums = kVectorRegisters / 2;
// Columns of a block; the border that two blocks compute is a tenth of that.
constexpr int64_t kBlockWidth = 256;
constexpr int64_t kBandBytes = 1 << 20;

template <typename T>
struct Strip {
  Taps<T> row, column;
  T* row_bias;
  T* rows;           // r_i from row -reach of the band on
  int64_t capacity;  // rows
};

template <typename T>
struct Space {
  int64_t band;   // rows of output at a time
  int64_t width;  // of the widest block
  int64_t branch_count;
  int64_t reach_row, reach_column, reach_square;  // farthest
  Taps<T> square;
  T* square_bias;
  T* bias;  // of all columns together
  Strip<T>* strips;
  T* x;  // null without a square kernel
  T* a;
  T* y;
  int64_t x_stride, a_stride, y_capacity;
};

// Elements of `vectors` vectors, an odd number.
template <typename T>
int64_t odd_stride(int64_t vectors) {
  return (vectors | 1) * kLanes<T>;
}

template <typename T>
Space<T> lay_out(const Problem& p, Arena& arena) {
  constexpr int64_t lanes = kLanes<T>;
  Space<T> s{};
  s.width = smaller(p.w, kBlockWidth);
  s.branch_count = p.branch_count;
  s.strips = arena.take<Strip<T>>(p.branch_count);
  const auto take_taps = [&](int64_t height, int64_t width) {
    return Taps<T>{arena.take<T>(height * width * lanes), height, width};
  };
  if (p.square_weight != nullptr) {
    const int64_t height = cropped(p.square_size, p.h);
    s.square = take_taps(height, cropped(p.square_size, p.w));
    s.reach_square = larger(height, s.square.width) / 2;
  }
  int64_t columns = 0;
  for (int64_t i = 0; i < p.branch_count; ++i) {
    const Taps<T> row = take_taps(1, cropped(p.branches[i].row_size, p.w));
    const Taps<T> column = take_taps(cropped(p.branches[i].column_size, p.h), 1);
    T* bias = arena.take<T>(lanes);
    s.reach_row = larger(s.reach_row, row.width / 2);
    s.reach_column = larger(s.reach_column, column.height / 2);
    columns += column.height;
    if (arena.base != nullptr) s.strips[i] = {row, column, bias, nullptr, 0};
  }
  s.square_bias = arena.take<T>(lanes);
  s.bias = arena.take<T>(lanes);
  // As many rows as the budget allows, in whole columns of sums.
  const int64_t line = (s.width + 2 * s.reach_row) * kVectorBytes;
  const int64_t kept = columns + 2 * (s.reach_column + s.reach_square);
  const int64_t affordable = (kBandBytes / line - kept) / (3 + p.branch_count);
  s.band = smaller(larger(affordable / kSums, 1) * kSums, round_up(p.h, kSums));
  s.a_stride = odd_stride<T>(s.width + 2 * s.reach_row);
  s.a = arena.take<T>((s.band + s.reach_column) * s.a_stride);
  if (p.square_weight != nullptr) {
    s.x_stride = odd_stride<T>(s.width + 2 * (s.reach_row + s.reach_square));
    s.x = arena.take<T>((s.band + s.reach_column + 2 * s.reach_square) * s.x_stride);
  }
  for (int64_t i = 0; i < p.branch_count; ++i) {
    const int64_t column = cropped(p.branches[i].column_size, p.h);
    const int64_t capacity = (s.band + column - 1) | 1;
    T* rows = arena.take<T>(s.width * capacity * lanes);
    if (arena.base != nullptr) {
      s.strips[i].rows = rows;
      s.strips[i].capacity = capacity;
    }
  }
  s.y_capacity = s.band | 1;
  s.y = arena.take<T>(s.width * s.y_capacity * lanes);
  return s;
}

template <typename S, typename T>
void load_weights(const Problem& p, const Group& group, const Space<T>& s) {
  if (p.square_weight != nullptr) {
    load_taps<S>(p.square_weight, group, p.square_size, p.square_size, s.square);
  }
  store(s.square_bias, bias_of<S, T>(p.square_bias, group));
  Vector<T> bias{};
  for (int64_t i = 0; i < p.branch_count; ++i) {
    const Branch& branch = p.branches[i];
    const Strip<T>& strip = s.strips[i];
    load_taps<S>(branch.row_weight, group, 1, branch.row_size, strip.row);
    load_taps<S>(branch.column_weight, group, branch.column_size, 1, strip.column);
    store(strip.row_bias, bias_of<S, T>(branch.row_bias, group));
    bias += bias_of<S, T>(branch.column_bias, group);
  }
  store(s.bias, bias);
}

// ---- sums -----------------------------------------------------------------------------------

template <int N>
struct Count {
  static constexpr int value = N;
};

// Calls f(first, Count) for runs that cover [from, to): as many of N as there are, then shorter
// ones.
template <int N = kSums, typename F>
[[gnu::always_inline]] inline void for_runs(int64_t from, int64_t to, const F& f) {
  for (; from + N <= to; from += N) f(from, Count<N>());
  if constexpr (N > 1) for_runs<N / 2>(from, to, f);
}

// sum[q] += taps . in[q ...], consecutive vectors.
template <int N, typename T>
[[gnu::always_inline]] inline void add_taps(Vector<T> (&sum)[N], const T* in, const T* weight,
                                            int64_t taps) {
  for (int64_t t = 0; t < taps; ++t, in += kLanes<T>, weight += kLanes<T>) {
    const Vector<T> tap = load(weight);
#pragma GCC unroll 16
    for (int q = 0; q < N; ++q) sum[q] += tap * load(in + q * kLanes<T>);
  }
}

template <int N, typename T>
[[gnu::always_inline]] inline void fill(Vector<T> (&sum)[N], const T* value) {
#pragma GCC unroll 16
  for (int q = 0; q < N; ++q) sum[q] = load(value);
}

// ---- stages ---------------------------------------------------------------------------------

// Where a block of work lies in the image.
struct Place {
  Group channels;
  int64_t n, left, width;
};

// Rows [from, to) of the image, and zeros beyond it; `row` is where row `from` of the buffer
// begins, `reach` pixels left of the block.
template <typename S, typename T>
void load_image(const Problem& p, const Place& place, int64_t from, int64_t to, int64_t reach,
                int64_t stride, T* row) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t begin = place.left - reach, end = place.left + place.width + reach;
  const int64_t first = larger(begin, 0), last = smaller(end, p.w);
  const S* image = static_cast<const S*>(p.x);
  for (int64_t i = from; i < to; ++i, row += stride) {
    if (i < 0 || i >= p.h) {
      clear(row, row + (end - begin) * lanes);
      continue;
    }
    clear(row, row + (first - begin) * lanes);
    T* inside = row + (first - begin) * lanes;
    if (p.channels_last) {
      load_channels_last(image + ((place.n * p.h + i) * p.w + first) * p.c + place.channels.first,
                         p.c, place.channels.count, last - first, inside);
    } else {
      load_channels_first(image + ((place.n * p.c + place.channels.first) * p.h + i) * p.w + first,
                          p.h * p.w, place.channels.count, last - first, inside);
    }
    clear(row + (last - begin) * lanes, row + (end - begin) * lanes);
  }
}

// Rows [from, to) of a, of which `row` is the first; x's first row is `from` - reach.
template <typename T>
void square_stage(const Problem& p, const Space<T>& s, const Place& place, int64_t from, int64_t to,
                  T* row) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t begin = place.left - s.reach_row, end = place.left + place.width + s.reach_row;
  const int64_t first = larger(begin, 0), last = smaller(end, p.w);
  const T* x = s.x + ((s.reach_square - s.square.height / 2) * s.x_stride) +
               (s.reach_square - s.square.width / 2) * lanes;
  for (int64_t i = from; i < to; ++i, row += s.a_stride, x += s.x_stride) {
    if (i >= p.h) {
      clear(row, row + (end - begin) * lanes);
      continue;
    }
    clear(row, row + (first - begin) * lanes);
    for_runs(first - begin, last - begin, [&](int64_t j, auto count) {
      Vector<T> sum[count.value];
      fill(sum, s.square_bias);
      for (int64_t t = 0; t < s.square.height; ++t) {
        add_taps(sum, x + t * s.x_stride + j * lanes, s.square.weight + t * s.square.width * lanes,
                 s.square.width);
      }
#pragma GCC unroll 16
      for (int q = 0; q < count.value; ++q) store(row + (j + q) * lanes, sum[q]);
    });
    clear(row + (last - begin) * lanes, row + (end - begin) * lanes);
  }
}

// Rows [from, to) of r_i, of which `out` is the first; a's row `from` is `row`.
template <typename T>
void row_stage(const Problem& p, const Space<T>& s, const Strip<T>& strip, const Place& place,
               int64_t from, int64_t to, const T* row, T* out) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t inside = larger(smaller(to, p.h) - from, 0);
  row += (s.reach_row - strip.row.width / 2) * lanes;
  const int64_t pixel = strip.capacity * lanes;
  for_runs(0, place.width, [&](int64_t j, auto count) {
    for (int64_t i = 0; i < inside; ++i) {
      Vector<T> sum[count.value];
      fill(sum, strip.row_bias);
      add_taps(sum, row + i * s.a_stride + j * lanes, strip.row.weight, strip.row.width);
#pragma GCC unroll 16
      for (int q = 0; q < count.value; ++q) store(out + (j + q) * pixel + i * lanes, sum[q]);
    }
    for (int q = 0; q < count.value; ++q) {
      T* column = out + (j + q) * pixel;
      clear(column + inside * lanes, column + (to - from) * lanes);
    }
  });
}

// `rows` rows of y.
template <typename T>
void column_stage(const Space<T>& s, const Place& place, int64_t rows) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t j = 0; j < place.width; ++j) {
    const T* a = s.a + (s.reach_row + j) * lanes;
    T* y = s.y + j * s.y_capacity * lanes;
    for_runs(0, rows, [&](int64_t i, auto count) {
      Vector<T> sum[count.value];
      fill(sum, s.bias);
#pragma GCC unroll 16
      for (int q = 0; q < count.value; ++q) sum[q] += load(a + (i + q) * s.a_stride);
      for (int64_t k = 0; k < s.branch_count; ++k) {
        const Strip<T>& strip = s.strips[k];
        add_taps(sum, strip.rows + (j * strip.capacity + i) * lanes, strip.column.weight,
                 strip.column.height);
      }
#pragma GCC unroll 16
      for (int q = 0; q < count.value; ++q) store(y + (i + q) * lanes, sum[q]);
    });
  }
}

template <typename S, typename T>
void store_image(const Problem& p, const Space<T>& s, const Place& place, int64_t from,
                 int64_t rows, S* image) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t pixel = s.y_capacity * lanes;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = from + i;
    if (p.channels_last) {
      store_channels_last(
          s.y + i * lanes, pixel, p.c, place.channels.count, place.width,
          image + ((place.n * p.h + row) * p.w + place.left) * p.c + place.channels.first);
    } else {
      store_channels_first(
          s.y + i * lanes, pixel, p.h * p.w, place.channels.count, place.width,
          image + ((place.n * p.c + place.channels.first) * p.h + row) * p.w + place.left);
    }
  }
}

int64_t groups_of(const Problem& p, int64_t lanes) {
  return round_up(p.c, lanes) / lanes;
}

int64_t columns_of(const Problem& p) {
  return round_up(p.w, kBlockWidth) / kBlockWidth;
}

template <typename S, typename T>
void forward_block(const Problem& p, void* y, int64_t block, void* scratch) {
  constexpr int64_t lanes = kLanes<T>;
  Arena arena{static_cast<char*>(scratch)};
  const Space<T> s = lay_out<T>(p, arena);
  const int64_t left = block % columns_of(p) * kBlockWidth;
  block /= columns_of(p);
  const int64_t channel = block % groups_of(p, lanes) * lanes;
  const Place place = {{channel, smaller(lanes, p.c - channel)},
                       block / groups_of(p, lanes),
                       left,
                       smaller(kBlockWidth, p.w - left)};
  load_weights<S>(p, place.channels, s);
  for (int64_t k = 0; k < p.branch_count; ++k) {
    const Strip<T>& strip = s.strips[k];
    for (int64_t j = 0; j < place.width; ++j) {
      T* column = strip.rows + j * strip.capacity * lanes;
      clear(column, column + strip.column.height / 2 * lanes);
    }
  }
  // `ready`: rows of a that are there. The first band starts with what all later ones find ready.
  for (int64_t top = 0, ready = 0; top < p.h; top += s.band) {
    const int64_t needed = top + s.band + s.reach_column;
    T* a = s.a + (ready - top) * s.a_stride;
    if (p.square_weight == nullptr) {
      load_image<S>(p, place, ready, needed, s.reach_row, s.a_stride, a);
    } else {
      // The rows above the new ones are there already, but for the first band.
      const int64_t reach = s.reach_square;
      const int64_t first = top == 0 ? -reach : ready + reach;
      load_image<S>(p, place, first, needed + reach, s.reach_row + reach, s.x_stride,
                    s.x + (first - (ready - reach)) * s.x_stride);
      square_stage(p, s, place, ready, needed, a);
      move_down(s.x + (needed - ready) * s.x_stride, 2 * reach * s.x_stride, s.x);
    }
    for (int64_t k = 0; k < p.branch_count; ++k) {
      const Strip<T>& strip = s.strips[k];
      const int64_t reach = strip.column.height / 2;
      const int64_t from = top == 0 ? 0 : top + reach;
      row_stage(p, s, strip, place, from, top + s.band + reach, s.a + (from - top) * s.a_stride,
                strip.rows + (from - (top - reach)) * lanes);
    }
    const int64_t rows = smaller(s.band, p.h - top);
    column_stage(s, place, rows);
    store_image(p, s, place, top, rows, static_cast<S*>(y));
    ready = needed;
    if (top + s.band >= p.h) break;
    move_down(s.a + s.band * s.a_stride, s.reach_column * s.a_stride, s.a);
    for (int64_t k = 0; k < p.branch_count; ++k) {
      const Strip<T>& strip = s.strips[k];
      for (int64_t j = 0; j < place.width; ++j) {
        T* column = strip.rows + j * strip.capacity * lanes;
        move_down(column + s.band * lanes, (strip.column.height - 1) * lanes, column);
      }
    }
  }
}

// ---- by element type ------------------------------------------------------------------------

int64_t forward_blocks(const Problem& p) {
  return by_dtype(p.dtype, [&](auto element) {
    return p.n * groups_of(p, kLanes<Compute<decltype(element)>>) * columns_of(p);
  });
}

size_t forward_scratch(const Problem& p) {
  return by_dtype(p.dtype, [&](auto element) {
    Arena counting;
    lay_out<Compute<decltype(element)>>(p, counting);
    return static_cast<size_t>(counting.used);
  });
}

void forward_block_any(const Problem& p, void* y, int64_t block, void* scratch) {
  by_dtype(p.dtype, [&](auto element) {
    using S = decltype(element);
    forward_block<S, Compute<S>>(p, y, block, scratch);
  });
}

}  // namespace

// `extern` because a const object is otherwise local to its file.
extern const strip_conv::ForwardKernels strip_conv_forward_kernels;
const strip_conv::ForwardKernels strip_conv_forward_kernels = {forward_blocks, forward_scratch,
                                                               forward_block_any};

}  // namespace famseg::FAMSEG_ISA
