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
//  * Sums lie along the direction of the kernel (correlation.h): every vector of pixels is loaded
//    once for several taps.
//  * The chain of stages goes down the image in bands that fit into the L2 cache. Rows of x and a
//    that a later band needs again move to the front of their buffers; row results at a band's
//    edge are computed twice. Wide images are cut into blocks of columns, which compute their
//    borders twice.
//  * Within a band rows and columns take turns on strips of 16 pixels: all row results of a strip
//    are in the L2 cache when its columns read them, and y is a tile that never leaves the L1 cache
//    before it is transposed and stored.
//  * What is loaded of x next, and what y will be stored to, is prefetched during FMAs, a few lines
//    at a time: a burst of prefetches waits for itself.
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
#include "strip_conv/cpu/correlation.h"
#include "strip_conv/cpu/kernels.h"
#include "strip_conv/cpu/layout.h"

namespace famseg::FAMSEG_ISA {
namespace {

using strip_conv::Branch;
using strip_conv::Problem;

// Columns of a block; the border that a block computes beside it is a sixth of that.
constexpr int64_t kBlockWidth = 128;
constexpr int64_t kStripWidth = 16;
constexpr int64_t kPitch = kStripWidth + 1;  // vectors from row to row of r_i and y
constexpr int64_t kXRows = 8;                // of x at a time
constexpr int64_t kRows = 8;                 // of r_i at a time
constexpr int64_t kBandBytes = 1 << 20;      // of a and r_i: half of an L2 cache of 2 MB
constexpr int64_t kSmallSquare = 7;          // size of a square kernel that memory binds
constexpr int64_t kLeastPixels = 512;        // that share the loading of its weights

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
  // As many rows as the budget allows, in whole columns of sums; without columns, which would
  // compute a band's edge again, as few as possible.
  const int64_t row = (s.a_stride / lanes + p.branch_count * kPitch) * kVectorBytes;
  const int64_t affordable = p.branch_count == 0 ? 0 : kBandBytes / row - 2 * s.reach_column;
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

// `width` pixels of each line of an image, from (row, column) on.
template <typename S>
Fetch fetch_of(const Problem& p, const Place& place, int64_t row, int64_t column, int64_t width,
               const void* image) {
  const Group& channels = place.channels;
  const S* first = static_cast<const S*>(image);
  if (p.channels_last) {
    first += ((place.n * p.h + row) * p.w + column) * p.c + channels.first;
  } else {
    first += ((place.n * p.c + channels.first) * p.h + row) * p.w + column;
  }
  const int64_t step = p.channels_last ? p.c : p.h * p.w;
  const int64_t line = p.channels_last ? p.w * p.c : p.w;
  constexpr int64_t size = sizeof(S);
  return {reinterpret_cast<const char*>(first), step * size, line * size,
          p.channels_last ? width : channels.count};
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

// Rows [from, to) of a, of which `row` is the first; x's first row is `from` - reach. What of x the
// next rows will need is fetched meanwhile, and what of y these rows will be stored to, if they are
// the result.
template <typename S, typename T>
void square_stage(const Problem& p, const Space<T>& s, const Place& place, int64_t from, int64_t to,
                  T* row, const void* y) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t begin = place.left - s.reach_row, end = place.left + place.width + s.reach_row;
  const int64_t first = larger(begin, 0), last = smaller(end, p.w);
  for (int64_t i = 0; i < to - from; ++i) {
    clear_sides(p, row + i * s.a_stride, begin, first, last, end);
  }
  const T* x = s.x + (s.reach_square - s.square.height / 2) * s.x_stride +
               (s.reach_square - s.square.width / 2) * lanes;
  const int64_t next = to + s.reach_square;
  for (int64_t j = first; j < last; j += kSums) {
    const int64_t width = smaller(kSums, last - j);
    Correlation<T> c{};
    c.in = x + (j - begin) * lanes;
    c.in_line = s.x_stride;
    c.weight = s.square.weight;
    c.taps = s.square.width;
    c.kernel_lines = s.square.height;
    c.start = s.square_bias;
    c.out = row + (j - begin) * lanes;
    c.out_line = s.a_stride;
    c.lines = to - from;
    if (next + c.lines <= p.h) c.fetch[0] = fetch_of<S>(p, place, next, j, width, p.x);
    if (p.branch_count == 0) c.fetch[1] = fetch_of<S>(p, place, from, j, width, y);
    correlate<1, true>(c, width);
  }
}

// Rows [from, to) of all r_i for `width` pixels from pixel `column` of the image on, in a band that
// begins at row `band`; a's row `from` at the first of these pixels is `a`. What of y these pixels
// will be stored to is fetched meanwhile.
template <typename S, typename T>
void row_stage(const Problem& p, const Space<T>& s, const Place& place, int64_t band, int64_t from,
               int64_t to, int64_t column, int64_t width, const T* a, const void* y) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t i = from; i < to; i += kRows, a += kRows * s.a_stride) {
    const Fetch fetch = fetch_of<S>(p, place, i, column, width, y);
    const int64_t share = (fetch.count + s.branch_count - 1) / larger(s.branch_count, 1);
    for (int64_t k = 0; k < s.branch_count; ++k) {
      const Strip<T>& strip = s.strips[k];
      const int64_t reach = strip.column.height / 2;
      const int64_t first = larger(i, band - reach);
      Correlation<T> c{};
      c.in = a + (first - i) * s.a_stride + (s.reach_row - strip.row.width / 2) * lanes;
      c.in_line = s.a_stride;
      c.weight = strip.row.weight;
      c.taps = strip.row.width;
      c.start = strip.row_bias;
      c.out = strip.rows + (first - band + reach) * kPitch * lanes;
      c.out_line = kPitch * lanes;
      c.lines = smaller(smaller(i + kRows, to), band + s.band + reach) - first;
      c.fetch[0] = fetch;
      c.fetch[0].from += k * share * fetch.step;
      c.fetch[0].count = smaller(share, fetch.count - k * share);
      if (c.lines > 0) correlate<1>(c, width);
    }
  }
}

// y, biases of columns not included, of `rows` rows from row `row` of the band on and `width`
// pixels; a's is `a`.
template <typename T>
void column_stage(const Space<T>& s, int64_t row, int64_t rows, int64_t width, const T* a) {
  constexpr int64_t lanes = kLanes<T>;
  Correlation<T> c{};
  c.in_line = lanes;
  c.start = a;
  c.start_step = s.a_stride;
  c.start_line = lanes;
  c.out = s.y;
  c.out_line = lanes;
  c.lines = width;
  for (int64_t k = 0; k < s.branch_count; ++k) {
    const Strip<T>& strip = s.strips[k];
    c.in = strip.rows + row * kPitch * lanes;
    c.weight = strip.column.weight;
    c.taps = strip.column.height;
    correlate<kPitch>(c, rows);
    c.start = s.y;
    c.start_step = kPitch * lanes;
  }
}

// Stores `rows` rows of `width` pixels, `stride` elements apart, at (row, column) of the image, and
// adds the biases of columns.
template <typename S, typename T>
void store_image(const Problem& p, const Space<T>& s, const Place& place, int64_t row,
                 int64_t column, int64_t rows, int64_t width, const T* from, int64_t stride,
                 S* image) {
  constexpr int64_t lanes = kLanes<T>;
  const Group& channels = place.channels;
  const Vector<T> bias = load(s.bias);
  for (int64_t i = row; i < row + rows; ++i, from += stride) {
    if (p.channels_last) {
      store_channels_last(from, lanes, p.c, channels.count, width,
                          image + ((place.n * p.h + i) * p.w + column) * p.c + channels.first,
                          bias);
    } else {
      store_channels_first(from, lanes, p.h * p.w, channels.count, width,
                           image + ((place.n * p.c + channels.first) * p.h + i) * p.w + column,
                           bias);
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
        square_stage<S>(p, s, place, ready, next, a, y);
        move_down(s.x + (next - ready) * s.x_stride, 2 * reach * s.x_stride, s.x);
        ready = next;
      }
    }
    const int64_t bottom = smaller(row + s.band, p.h);
    if (s.band < p.h) clear_beyond(p, s, row);
    for (int64_t j = 0; j < place.width; j += kStripWidth) {
      const int64_t width = smaller(kStripWidth, place.width - j);
      const T* a = s.a + j * lanes;
      row_stage<S>(p, s, place, row, top, end, place.left + j, width, a, y);
      a += (row - top) * s.a_stride + s.reach_row * lanes;
      for (int64_t i = row; i < bottom; i += kSums, a += kSums * s.a_stride) {
        const int64_t rows = smaller(kSums, bottom - i);
        column_stage(s, i - row, rows, width, a);
        const bool any = p.branch_count > 0;
        store_image<S>(p, s, place, i, place.left + j, rows, width, any ? s.y : a,
                       any ? kPitch * lanes : s.a_stride, static_cast<S*>(y));
      }
    }
    if (bottom == p.h) break;
    const int64_t next = larger(bottom - s.reach_column, 0);
    move_down(s.a + (next - top) * s.a_stride, (ready - next) * s.a_stride, s.a);
  }
}

// ---- a small square kernel of a channels-last image ---------------------------------------------

// Memory binds it, so that it is read and written as it lies: row by row, some pixels of all
// channels after the other. Nothing is copied; a line of x is found in the caches by the rows
// after. Only the weights of all channels must fit there too.
bool is_small_square(const Problem& p) {
  if (!p.channels_last || p.branch_count > 0 || p.square_weight == nullptr) return false;
  const int64_t lanes =
      by_dtype(p.dtype, [](auto element) -> int64_t { return kLanes<Compute<decltype(element)>>; });
  const int64_t taps = p.square_size * p.square_size;
  return p.square_size % 2 == 1 && p.square_size <= kSmallSquare && p.c % lanes == 0 &&
         p.c / lanes * (taps + 1) * kVectorBytes <= kBandBytes;
}

// Rows of a block.
int64_t rows_of_small_square(const Problem& p) {
  return smaller(round_up(kLeastPixels, p.w) / p.w, p.h);
}

// For each vector of channels the taps (TAPS, TAPS), then the bias.
template <typename T>
T* small_square_weights(const Problem& p, Arena& arena) {
  return arena.take<T>(p.c * (p.square_size * p.square_size + 1));
}

// Sums of PIXELS neighbouring pixels over `lines` lines of the kernel and its taps [first, last).
// `x` is where the first of these taps meets the first pixel; `weight` its line of taps.
template <int PIXELS, int TAPS, typename S, typename T>
void sum_pixels(const S* x, int64_t line, int64_t channels, const T* weight, int64_t lines,
                int64_t first, int64_t last, const T* bias, S* y) {
  constexpr int64_t lanes = kLanes<T>, set = (TAPS * TAPS + 1) * lanes;
  for (int64_t c = 0; c < channels; c += lanes, weight += set, bias += set) {
    Vector<T> sum[PIXELS];
#pragma GCC unroll 8
    for (int q = 0; q < PIXELS; ++q) sum[q] = load(bias);
    const S* in = x + c;
    const T* taps = weight;
    for (int64_t i = 0; i < lines; ++i, in += line, taps += TAPS * lanes) {
      if constexpr (PIXELS == 1) {
        for (int64_t t = first; t < last; ++t) {
          sum[0] += load(taps + t * lanes) * load_wide(in + (t - first) * channels);
        }
      } else {
        Vector<T> tap[TAPS];
#pragma GCC unroll 8
        for (int t = 0; t < TAPS; ++t) tap[t] = load(taps + t * lanes);
#pragma GCC unroll 16
        for (int v = 0; v < PIXELS + TAPS - 1; ++v) {
          const Vector<T> value = load_wide(in + v * channels);
#pragma GCC unroll 8
          for (int t = 0; t < TAPS; ++t) {
            if (v - t >= 0 && v - t < PIXELS) sum[v - t] += tap[t] * value;
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int q = 0; q < PIXELS; ++q) store_narrow(y + q * channels + c, sum[q]);
  }
}

template <int TAPS, typename S, typename T>
void small_square_rows(const Problem& p, S* y, int64_t n, int64_t begin, int64_t end,
                       const T* weights) {
  constexpr int64_t lanes = kLanes<T>, reach = TAPS / 2;
  constexpr int pixels = 4;
  const int64_t line = p.w * p.c;
  const T* bias = weights + TAPS * TAPS * lanes;
  for (int64_t i = begin; i < end; ++i) {
    // Lines of the kernel that lie in the image.
    const int64_t first = larger(reach - i, 0), last = smaller(p.h + reach - i, TAPS);
    const S* x = static_cast<const S*>(p.x) + (n * p.h + i - reach + first) * line;
    S* out = y + (n * p.h + i) * line;
    const T* weight = weights + first * TAPS * lanes;
    int64_t j = 0;
    while (j < p.w) {
      if (j >= reach && j + pixels + reach <= p.w) {
        sum_pixels<pixels, TAPS>(x + (j - reach) * p.c, line, p.c, weight, last - first, 0, TAPS,
                                 bias, out + j * p.c);
        j += pixels;
      } else {
        const int64_t from = larger(reach - j, 0), to = smaller(p.w + reach - j, TAPS);
        sum_pixels<1, TAPS>(x + (j - reach + from) * p.c, line, p.c, weight, last - first, from, to,
                            bias, out + j * p.c);
        ++j;
      }
    }
  }
}

template <typename S, typename T>
void small_square_block(const Problem& p, void* y, int64_t block, void* scratch) {
  constexpr int64_t lanes = kLanes<T>;
  Arena arena{static_cast<char*>(scratch)};
  T* const weights = small_square_weights<T>(p, arena);
  const int64_t size = p.square_size, set = (size * size + 1) * lanes;
  for (int64_t c = 0; c < p.c; c += lanes) {
    T* to = weights + c / lanes * set;
    load_taps<S>(p.square_weight, {c, lanes}, size, size, Taps<T>{to, size, size});
    store(to + size * size * lanes, bias_of<S, T>(p.square_bias, {c, lanes}));
  }
  const int64_t rows = rows_of_small_square(p), pieces = round_up(p.h, rows) / rows;
  const int64_t begin = block % pieces * rows, end = smaller(begin + rows, p.h);
  const auto run = size == 1   ? small_square_rows<1, S, T>
                   : size == 3 ? small_square_rows<3, S, T>
                   : size == 5 ? small_square_rows<5, S, T>
                               : small_square_rows<7, S, T>;
  run(p, static_cast<S*>(y), block / pieces, begin, end, weights);
}

// ---- by element type ------------------------------------------------------------------------

int64_t forward_blocks(const Problem& p) {
  if (is_small_square(p)) {
    const int64_t rows = rows_of_small_square(p);
    return p.n * (round_up(p.h, rows) / rows);
  }
  return by_dtype(p.dtype, [&](auto element) {
    return p.n * groups_of(p, kLanes<Compute<decltype(element)>>) * columns_of(p);
  });
}

size_t forward_scratch(const Problem& p) {
  return by_dtype(p.dtype, [&](auto element) {
    using T = Compute<decltype(element)>;
    Arena counting;
    if (is_small_square(p)) {
      small_square_weights<T>(p, counting);
    } else {
      lay_out<T>(p, counting);
    }
    return static_cast<size_t>(counting.used);
  });
}

void forward_block_any(const Problem& p, void* y, int64_t block, void* scratch) {
  by_dtype(p.dtype, [&](auto element) {
    using S = decltype(element);
    if (is_small_square(p)) {
      small_square_block<S, Compute<S>>(p, y, block, scratch);
    } else {
      forward_block<S, Compute<S>>(p, y, block, scratch);
    }
  });
}

}  // namespace

// `extern` because a const object is otherwise local to its file.
extern const strip_conv::ForwardKernels strip_conv_forward_kernels;
const strip_conv::ForwardKernels strip_conv_forward_kernels = {forward_blocks, forward_scratch,
                                                               forward_block_any};

}  // namespace famseg::FAMSEG_ISA
