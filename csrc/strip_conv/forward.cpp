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
//  * A few taps stay in registers beside as many sums as half the registers hold, and every vector
//    of pixels is loaded once for all of them: 16 sums and 7 taps make 112 FMAs of 29 loads. The
//    sums lie along the direction of the kernel.
//  * The chain of stages goes down the image in bands that fit into the L2 cache. Rows of x and a
//    that a later band needs again move to the front of their buffers; row results at a band's
//    edge are computed twice. Wide images are cut into blocks of columns, which compute their
//    borders twice.
//  * Within a band rows and columns take turns on strips of 16 pixels: all row results of a strip
//    are in the L2 cache when its columns read them, and y is a tile that never leaves the L1 cache
//    before it is transposed and stored.
//  * What the next tiles of y will be stored to is prefetched during FMAs.
//
//    x    (rows, pixels), pixels beyond the block on either side as far as square and rows reach
//    a    (rows, pixels), beyond the block as far as rows reach
//    r_i  (rows, pixels) of a strip, from as far above the band as columns reach
//    y    (rows, pixels) of a tile
//
// Beyond the image x, a and r_i hold zeros. Strides are odd numbers of cache lines: even ones would
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
constexpr int kTaps = kVectorRegisters == 32 ? 7 : 5;  // with one vector of pixels the rest fits
// Columns of a block; the border that a block computes beside it is a sixth of that.
constexpr int64_t kBlockWidth = 128;
constexpr int64_t kStripWidth = 16;
constexpr int64_t kPitch = kStripWidth + 1;  // vectors from row to row of r_i and y
constexpr int64_t kXRows = 16;               // of x at a time
constexpr int64_t kBandBytes = 1 << 20;      // of a and r_i: half of an L2 cache of 2 MB

template <typename T>
struct Strip {
  Taps<T> row, column;
  T* row_bias;
  T* rows;  // r_i of a strip from row -reach of the band on
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
  int64_t x_stride, a_stride;
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
    if (arena.base != nullptr) s.strips[i] = {row, column, bias, nullptr};
  }
  s.square_bias = arena.take<T>(lanes);
  s.bias = arena.take<T>(lanes);
  s.a_stride = odd_stride<T>(s.width + 2 * s.reach_row);
  // As many rows as the budget allows, in whole columns of sums.
  const int64_t row = (s.a_stride / lanes + p.branch_count * kPitch) * kVectorBytes;
  const int64_t affordable = kBandBytes / row - 2 * s.reach_column;
  s.band = smaller(larger(affordable / kSums, 1) * kSums, p.h);
  s.a = arena.take<T>(smaller(s.band + 2 * s.reach_column, p.h) * s.a_stride);
  if (p.square_weight != nullptr) {
    s.x_stride = odd_stride<T>(s.width + 2 * (s.reach_row + s.reach_square));
    s.x = arena.take<T>((kXRows + 2 * s.reach_square) * s.x_stride);
  }
  for (int64_t i = 0; i < p.branch_count; ++i) {
    const int64_t column = cropped(p.branches[i].column_size, p.h);
    T* rows = arena.take<T>((s.band + column - 1) * kPitch * lanes);
    if (arena.base != nullptr) s.strips[i].rows = rows;
  }
  s.y = arena.take<T>(kSums * kPitch * lanes);
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

// sum[q] += taps . in[q ...], STRIDE vectors apart. Each vector is loaded once.
template <int TAPS, int STRIDE, int N, typename T>
[[gnu::always_inline]] inline void add_products(Vector<T> (&sum)[N], const T* in, const T* weight) {
  // Hides that the next call loads some of the same vectors: GCC would keep those in registers
  // that it does not have.
  asm("" : "+r"(in), "+r"(weight));
  Vector<T> tap[TAPS];
#pragma GCC unroll 16
  for (int t = 0; t < TAPS; ++t) tap[t] = load(weight + t * kLanes<T>);
#pragma GCC unroll 32
  for (int i = 0; i < N + TAPS - 1; ++i) {
    const Vector<T> value = load(in + i * STRIDE * kLanes<T>);
#pragma GCC unroll 16
    for (int t = 0; t < TAPS; ++t) {
      if (i - t >= 0 && i - t < N) sum[i - t] += tap[t] * value;
    }
  }
}

// The same for a number of taps below MORE.
template <int STRIDE, int MORE, int N, typename T>
[[gnu::always_inline]] inline void add_rest(Vector<T> (&sum)[N], const T* in, const T* weight,
                                            int64_t taps) {
  if constexpr (MORE > 1) {
    if (taps == MORE - 1) {
      add_products<MORE - 1, STRIDE>(sum, in, weight);
    } else {
      add_rest<STRIDE, MORE - 1>(sum, in, weight, taps);
    }
  }
}

template <int STRIDE, int N, typename T>
[[gnu::always_inline]] inline void add_taps(Vector<T> (&sum)[N], const T* in, const T* weight,
                                            int64_t taps) {
  for (; taps >= kTaps; taps -= kTaps) {
    add_products<kTaps, STRIDE>(sum, in, weight);
    in += kTaps * STRIDE * kLanes<T>;
    weight += kTaps * kLanes<T>;
  }
  add_rest<STRIDE, kTaps>(sum, in, weight, taps);
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

// Pixels [begin, first) and [last, end) of a row, which lie outside the image. In an image that is
// one block nothing else is ever written there.
template <typename T>
void clear_sides(const Problem& p, T* row, int64_t begin, int64_t first, int64_t last,
                 int64_t end) {
  if (p.w <= kBlockWidth) return;
  clear(row, row + (first - begin) * kLanes<T>);
  clear(row + (last - begin) * kLanes<T>, row + (end - begin) * kLanes<T>);
}

// Brings `count` pixels of a row of the result to the L2 cache.
template <typename S>
[[gnu::always_inline]] inline void prefetch(const Problem& p, const Place& place, int64_t row,
                                            int64_t column, int64_t count, const void* image) {
  if (row >= p.h) return;
  const Group& channels = place.channels;
  const int64_t n = place.n;
  const S* from = static_cast<const S*>(image);
  if (p.channels_last) {
    from += ((n * p.h + row) * p.w + column) * p.c + channels.first;
    for (int64_t q = 0; q < count; ++q) __builtin_prefetch(from + q * p.c, 0, 2);
  } else {
    from += ((n * p.c + channels.first) * p.h + row) * p.w + column;
    for (int64_t l = 0; l < channels.count; ++l) __builtin_prefetch(from + l * p.h * p.w, 0, 2);
  }
}

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
    clear_sides(p, row, begin, first, last, end);
    T* inside = row + (first - begin) * lanes;
    if (p.channels_last) {
      load_channels_last(image + ((place.n * p.h + i) * p.w + first) * p.c + place.channels.first,
                         p.c, place.channels.count, last - first, inside);
    } else {
      load_channels_first(image + ((place.n * p.c + place.channels.first) * p.h + i) * p.w + first,
                          p.h * p.w, place.channels.count, last - first, inside);
    }
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
  for (int64_t i = 0; i < to - from; ++i) {
    clear_sides(p, row + i * s.a_stride, begin, first, last, end);
  }
  for_runs(first - begin, last - begin, [&](int64_t j, auto count) {
    for (int64_t i = 0; i < to - from; ++i) {
      Vector<T> sum[count.value];
      fill(sum, s.square_bias);
      for (int64_t t = 0; t < s.square.height; ++t) {
        add_taps<1>(sum, x + (i + t) * s.x_stride + j * lanes,
                    s.square.weight + t * s.square.width * lanes, s.square.width);
      }
#pragma GCC unroll 16
      for (int q = 0; q < count.value; ++q) store(row + i * s.a_stride + (j + q) * lanes, sum[q]);
    }
  });
}

// Rows [from, to) of all r_i for `width` pixels, in a band that begins at row `band`; a's row
// `from` at the first of these pixels is `a`. Calls before_row(i) before each row.
template <typename T, typename BeforeRow>
void row_stage(const Space<T>& s, int64_t band, int64_t from, int64_t to, int64_t width, const T* a,
               const BeforeRow& before_row) {
  constexpr int64_t lanes = kLanes<T>;
  for_runs(0, width, [&](int64_t j, auto count) {
    const T* row = a + (s.reach_row + j) * lanes;
    for (int64_t i = from; i < to; ++i, row += s.a_stride) {
      before_row(i);
      for (int64_t k = 0; k < s.branch_count; ++k) {
        const Strip<T>& strip = s.strips[k];
        const int64_t at = i - band + strip.column.height / 2;
        if (at < 0 || at >= s.band + strip.column.height - 1) continue;
        Vector<T> sum[count.value];
        fill(sum, strip.row_bias);
        add_taps<1>(sum, row - strip.row.width / 2 * lanes, strip.row.weight, strip.row.width);
        T* out = strip.rows + (at * kPitch + j) * lanes;
#pragma GCC unroll 16
        for (int q = 0; q < count.value; ++q) store(out + q * lanes, sum[q]);
      }
    }
  });
}

// N rows of y for `width` pixels, from row `row` of the band on; a's is `a`.
template <int N, typename T>
void column_stage(const Space<T>& s, int64_t row, int64_t width, const T* a) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t j = 0; j < width; ++j) {
    Vector<T> sum[N];
    fill(sum, s.bias);
#pragma GCC unroll 16
    for (int q = 0; q < N; ++q) sum[q] += load(a + q * s.a_stride + j * lanes);
    for (int64_t k = 0; k < s.branch_count; ++k) {
      const Strip<T>& strip = s.strips[k];
      add_taps<kPitch>(sum, strip.rows + (row * kPitch + j) * lanes, strip.column.weight,
                       strip.column.height);
    }
#pragma GCC unroll 16
    for (int q = 0; q < N; ++q) store(s.y + (q * kPitch + j) * lanes, sum[q]);
  }
}

// Stores `rows` rows of y for `width` pixels at (row, column) of the image.
template <typename S, typename T>
void store_image(const Problem& p, const Space<T>& s, const Place& place, int64_t row,
                 int64_t column, int64_t rows, int64_t width, S* image) {
  constexpr int64_t lanes = kLanes<T>;
  const Group& channels = place.channels;
  const T* y = s.y;
  for (int64_t i = row; i < row + rows; ++i, y += kPitch * lanes) {
    if (p.channels_last) {
      store_channels_last(y, lanes, p.c, channels.count, width,
                          image + ((place.n * p.h + i) * p.w + column) * p.c + channels.first);
    } else {
      store_channels_first(y, lanes, p.h * p.w, channels.count, width,
                           image + ((place.n * p.c + channels.first) * p.h + i) * p.w + column);
    }
  }
}

int64_t groups_of(const Problem& p, int64_t lanes) {
  return round_up(p.c, lanes) / lanes;
}

int64_t columns_of(const Problem& p) {
  return round_up(p.w, kBlockWidth) / kBlockWidth;
}

// Clears what the strips' r_i hold of rows outside the image, in the band that begins at `row`. In
// an image that is one band nothing else is ever written there.
template <typename T>
void clear_beyond(const Problem& p, const Space<T>& s, int64_t row) {
  constexpr int64_t line = kPitch * kLanes<T>;
  for (int64_t k = 0; k < s.branch_count; ++k) {
    const Strip<T>& strip = s.strips[k];
    const int64_t reach = strip.column.height / 2, rows = s.band + 2 * reach;
    clear(strip.rows, strip.rows + larger(reach - row, 0) * line);
    clear(strip.rows + smaller(p.h - row + reach, rows) * line, strip.rows + rows * line);
  }
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
  // a holds the rows [top, ready) of the image.
  int64_t ready = 0;
  for (int64_t row = 0; row < p.h; row += s.band) {
    const int64_t top = larger(row - s.reach_column, 0);
    const int64_t end = smaller(row + s.band + s.reach_column, p.h);
    while (ready < end) {
      T* a = s.a + (ready - top) * s.a_stride;
      if (p.square_weight == nullptr) {
        load_image<S>(p, place, ready, end, s.reach_row, s.a_stride, a);
        ready = end;
      } else {
        const int64_t reach = s.reach_square;
        const int64_t next = smaller(ready + kXRows, end);
        const int64_t first = ready == 0 ? -reach : ready + reach;
        load_image<S>(p, place, first, next + reach, s.reach_row + reach, s.x_stride,
                      s.x + (first - (ready - reach)) * s.x_stride);
        square_stage(p, s, place, ready, next, a);
        move_down(s.x + (next - ready) * s.x_stride, 2 * reach * s.x_stride, s.x);
        ready = next;
      }
    }
    const int64_t bottom = smaller(row + s.band, p.h);
    if (s.band < p.h) clear_beyond(p, s, row);
    for (int64_t j = 0; j < place.width; j += kStripWidth) {
      const int64_t width = smaller(kStripWidth, place.width - j);
      const T* a = s.a + j * lanes;
      // All of a strip's prefetches at once would wait for each other: one row of y at a time.
      row_stage(s, row, top, end, width, a,
                [&](int64_t i) { prefetch<S>(p, place, i, place.left + j, width, y); });
      a += (row - top) * s.a_stride + s.reach_row * lanes;
      for_runs(0, bottom - row, [&](int64_t i, auto count) {
        column_stage<count.value>(s, i, width, a + i * s.a_stride);
        store_image<S>(p, s, place, row + i, place.left + j, count.value, width,
                       static_cast<S*>(y));
      });
    }
    if (bottom == p.h) break;
    const int64_t next = larger(bottom - s.reach_column, 0);
    move_down(s.a + (next - top) * s.a_stride, (ready - next) * s.a_stride, s.a);
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
