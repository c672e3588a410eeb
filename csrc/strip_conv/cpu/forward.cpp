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
#include "strip_conv/cpu/small_square.h"

namespace famseg::FAMSEG_ISA {
namespace {

// Columns of a block; the border that a block computes beside it is a sixth of that.
constexpr int64_t kBlockWidth = 128;
constexpr int64_t kStripWidth = 16;
constexpr int64_t kPitch = kStripWidth + 1;  // vectors from row to row of r_i and y
constexpr int64_t kXRows = 8;                // of x at a time
constexpr int64_t kRows = 8;                 // of r_i at a time
constexpr int64_t kBandBytes = 1 << 20;      // of a and r_i: half of an L2 cache of 2 MB

template <typename T>
struct ForwardStrip {
  Taps<T> row, col;
  T* row_bias;
  T* r;  // r_i of 16 pixels' columns, from row -reach of the band on
};

template <typename T>
struct ForwardSpace {
  int64_t band;   // rows of output at a time
  int64_t width;  // of the widest block
  int64_t branch_count;
  int64_t reach_row, reach_col, reach_square;  // of the largest kernels
  Taps<T> square;
  T* square_bias;
  T* col_bias;  // of all branches together
  ForwardStrip<T>* strips;
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
ForwardSpace<T> lay_out(const Problem& p, Arena& arena) {
  constexpr int64_t lanes = kLanes<T>;
  ForwardSpace<T> s{};
  s.width = min(p.w, kBlockWidth);
  s.branch_count = p.branch_count;
  s.strips = arena.take<ForwardStrip<T>>(p.branch_count);
  const auto take_taps = [&](int64_t height, int64_t width) {
    return Taps<T>{arena.take<T>(height * width * lanes), height, width};
  };
  if (p.square.weight != nullptr) {
    const int64_t height = cropped(p.square.size, p.h);
    s.square = take_taps(height, cropped(p.square.size, p.w));
    s.reach_square = max(height, s.square.width) / 2;
  }
  for (int64_t i = 0; i < p.branch_count; ++i) {
    const Taps<T> row = take_taps(1, cropped(p.branches[i].row.size, p.w));
    const Taps<T> col = take_taps(cropped(p.branches[i].col.size, p.h), 1);
    T* bias = arena.take<T>(lanes);
    s.reach_row = max(s.reach_row, row.width / 2);
    s.reach_col = max(s.reach_col, col.height / 2);
    if (arena.base != nullptr) s.strips[i] = {row, col, bias, nullptr};
  }
  s.square_bias = arena.take<T>(lanes);
  s.col_bias = arena.take<T>(lanes);
  s.a_stride = odd_stride<T>(s.width + 2 * s.reach_row);
  // As many rows as the budget allows, in whole columns of sums; without columns, which would
  // compute a band's edge again, as few as possible.
  const int64_t row = (s.a_stride / lanes + p.branch_count * kPitch) * kVectorBytes;
  const int64_t affordable = p.branch_count == 0 ? 0 : kBandBytes / row - 2 * s.reach_col;
  s.band = min(max(affordable / kSums, 1) * kSums, p.h);
  s.a = arena.take<T>(min(s.band + 2 * s.reach_col, p.h) * s.a_stride);
  if (p.square.weight != nullptr) {
    s.x_stride = odd_stride<T>(s.width + 2 * (s.reach_row + s.reach_square));
    s.x = arena.take<T>((kXRows + 2 * s.reach_square) * s.x_stride);
  }
  for (int64_t i = 0; i < p.branch_count; ++i) {
    const int64_t size = cropped(p.branches[i].col.size, p.h);
    T* r = arena.take<T>((s.band + size - 1) * kPitch * lanes);
    if (arena.base != nullptr) s.strips[i].r = r;
  }
  s.y = arena.take<T>(kSums * kPitch * lanes);
  return s;
}

template <typename S, typename T>
void load_weights(const Problem& p, const Group& group, const ForwardSpace<T>& s) {
  if (p.square.weight != nullptr) {
    load_taps<S>(p.square.weight, group, p.square.size, p.square.size, s.square);
  }
  store(s.square_bias, bias_of<S, T>(p.square.bias, group));
  Vector<T> bias{};
  for (int64_t i = 0; i < p.branch_count; ++i) {
    const Branch& branch = p.branches[i];
    const ForwardStrip<T>& strip = s.strips[i];
    load_taps<S>(branch.row.weight, group, 1, branch.row.size, strip.row);
    load_taps<S>(branch.col.weight, group, branch.col.size, 1, strip.col);
    store(strip.row_bias, bias_of<S, T>(branch.row.bias, group));
    bias += bias_of<S, T>(branch.col.bias, group);
  }
  store(s.col_bias, bias);
}

// ---- stages ---------------------------------------------------------------------------------

// Clears those pixels of a row that lie outside the image; it reaches `reach` pixels beyond the
// block. In an image that is one block nothing else is ever written there.
template <typename T>
void clear_sides(const Problem& p, const Block& block, int64_t reach, T* row) {
  if (p.w <= kBlockWidth) return;
  clear(row, row + (block.begin(reach) + reach) * kLanes<T>);
  clear(row + (block.end(reach) + reach) * kLanes<T>, row + (block.width + 2 * reach) * kLanes<T>);
}

// `width` pixels of each line of an image, from (row, column) on.
template <typename S>
Fetch fetch_of(const Problem& p, const Block& block, int64_t row, int64_t column, int64_t width,
               const void* image) {
  const S* first = static_cast<const S*>(image) + block.offset(p, p.channels_last, row, column);
  const int64_t step = p.channels_last ? p.c : p.h * p.w;
  const int64_t line = p.channels_last ? p.w * p.c : p.w;
  constexpr int64_t size = sizeof(S);
  return {reinterpret_cast<const char*>(first), step * size, line * size,
          p.channels_last ? width : block.channels.count};
}

// Rows [from, to) of the image, and zeros beyond it; `row` is where row `from` of the buffer
// begins, `reach` pixels left of the block.
template <typename S, typename T>
void load_image(const Problem& p, const Block& block, int64_t from, int64_t to, int64_t reach,
                int64_t stride, T* row) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t begin = block.begin(reach), count = block.end(reach) - begin;
  for (int64_t i = from; i < to; ++i, row += stride) {
    if (i < 0 || i >= p.h) {
      clear(row, row + (block.width + 2 * reach) * lanes);
      continue;
    }
    clear_sides(p, block, reach, row);
    const S* image = static_cast<const S*>(p.x) + block.offset(p, p.channels_last, i, begin);
    T* inside = row + (begin + reach) * lanes;
    if (p.channels_last) {
      load_channels_last(image, p.c, block.channels.count, count, inside);
    } else {
      load_channels_first(image, p.h * p.w, block.channels.count, count, inside);
    }
  }
}

// Rows [from, to) of a, of which `row` is the first; x's first row is `from` - reach. What of x the
// next rows will need is fetched meanwhile, and what of y these rows will be stored to, if they are
// the result.
template <typename S, typename T>
void square_stage(const Problem& p, const ForwardSpace<T>& s, const Block& block, int64_t from,
                  int64_t to, T* row, const void* y) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t reach = s.reach_row, end = block.end(reach);
  for (int64_t i = 0; i < to - from; ++i) clear_sides(p, block, reach, row + i * s.a_stride);
  const T* x = s.x + (s.reach_square - s.square.height / 2) * s.x_stride +
               (s.reach_square - s.square.width / 2) * lanes;
  const int64_t next = to + s.reach_square;
  for (int64_t j = block.begin(reach); j < end; j += kSums) {
    const int64_t width = min(kSums, end - j);
    Correlation<T> c{};
    c.in = x + (j + reach) * lanes;
    c.in_line = s.x_stride;
    c.weight = s.square.weight;
    c.taps = s.square.width;
    c.kernel_lines = s.square.height;
    c.start = s.square_bias;
    c.out = row + (j + reach) * lanes;
    c.out_line = s.a_stride;
    c.lines = to - from;
    if (next + c.lines <= p.h) c.fetch[0] = fetch_of<S>(p, block, next, j, width, p.x);
    if (p.branch_count == 0) c.fetch[1] = fetch_of<S>(p, block, from, j, width, y);
    correlate<1, true>(c, width);
  }
}

// Rows [from, to) of all r_i for `width` pixels from pixel `column` of the block on, in a band that
// begins at row `band`; a's row `from` at the first of these pixels is `a`. What of y these pixels
// will be stored to is fetched meanwhile.
template <typename S, typename T>
void row_stage(const Problem& p, const ForwardSpace<T>& s, const Block& block, int64_t band,
               int64_t from, int64_t to, int64_t column, int64_t width, const T* a, const void* y) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t i = from; i < to; i += kRows, a += kRows * s.a_stride) {
    const Fetch fetch = fetch_of<S>(p, block, i, column, width, y);
    const int64_t share = (fetch.count + s.branch_count - 1) / max(s.branch_count, 1);
    for (int64_t k = 0; k < s.branch_count; ++k) {
      const ForwardStrip<T>& strip = s.strips[k];
      const int64_t reach = strip.col.height / 2;
      const int64_t first = max(i, band - reach);
      Correlation<T> c{};
      c.in = a + (first - i) * s.a_stride + (s.reach_row - strip.row.width / 2) * lanes;
      c.in_line = s.a_stride;
      c.weight = strip.row.weight;
      c.taps = strip.row.width;
      c.start = strip.row_bias;
      c.out = strip.r + (first - band + reach) * kPitch * lanes;
      c.out_line = kPitch * lanes;
      c.lines = min(min(i + kRows, to), band + s.band + reach) - first;
      c.fetch[0] = fetch;
      c.fetch[0].from += k * share * fetch.step;
      c.fetch[0].count = min(share, fetch.count - k * share);
      if (c.lines > 0) correlate<1>(c, width);
    }
  }
}

// y, biases of col_i not included, of `rows` rows from row `row` of the band on and `width`
// pixels; a's is `a`.
template <typename T>
void col_stage(const ForwardSpace<T>& s, int64_t row, int64_t rows, int64_t width, const T* a) {
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
    const ForwardStrip<T>& strip = s.strips[k];
    c.in = strip.r + row * kPitch * lanes;
    c.weight = strip.col.weight;
    c.taps = strip.col.height;
    correlate<kPitch>(c, rows);
    c.start = s.y;
    c.start_step = kPitch * lanes;
  }
}

// Stores `rows` rows of `width` pixels, `stride` elements apart, at (row, column) of the image, and
// adds the biases of all col_i.
template <typename S, typename T>
void store_image(const Problem& p, const ForwardSpace<T>& s, const Block& block, int64_t row,
                 int64_t column, int64_t rows, int64_t width, const T* from, int64_t stride,
                 S* image) {
  const Vector<T> bias = load(s.col_bias);
  for (int64_t i = row; i < row + rows; ++i, from += stride) {
    S* to = image + block.offset(p, p.channels_last, i, column);
    if (p.channels_last) {
      store_channels_last(from, kLanes<T>, p.c, block.channels.count, width, to, bias);
    } else {
      store_channels_first(from, kLanes<T>, p.h * p.w, block.channels.count, width, to, bias);
    }
  }
}

int64_t columns_of(const Problem& p) {
  return round_up(p.w, kBlockWidth) / kBlockWidth;
}

// Clears what the strips' r_i hold of rows outside the image, in the band that begins at `row`. In
// an image that is one band nothing else is ever written there.
template <typename T>
void clear_beyond(const Problem& p, const ForwardSpace<T>& s, int64_t row) {
  constexpr int64_t line = kPitch * kLanes<T>;
  for (int64_t k = 0; k < s.branch_count; ++k) {
    const ForwardStrip<T>& strip = s.strips[k];
    const int64_t reach = strip.col.height / 2, rows = s.band + 2 * reach;
    clear(strip.r, strip.r + max(reach - row, 0) * line);
    clear(strip.r + min(p.h - row + reach, rows) * line, strip.r + rows * line);
  }
}

template <typename S, typename T>
void forward_block(const Problem& p, void* y, int64_t index, void* scratch) {
  constexpr int64_t lanes = kLanes<T>;
  Arena arena{static_cast<char*>(scratch)};
  const ForwardSpace<T> s = lay_out<T>(p, arena);
  const int64_t left = index % columns_of(p) * kBlockWidth;
  index /= columns_of(p);
  const Block block = {group_at<S>(p, index % groups_of(p, lanes)), index / groups_of(p, lanes),
                       left, min(kBlockWidth, p.w - left), p.w};
  load_weights<S>(p, block.channels, s);
  // a holds the rows [top, ready) of the image.
  int64_t ready = 0;
  for (int64_t row = 0; row < p.h; row += s.band) {
    const int64_t top = max(row - s.reach_col, 0);
    const int64_t end = min(row + s.band + s.reach_col, p.h);
    while (ready < end) {
      T* a = s.a + (ready - top) * s.a_stride;
      if (p.square.weight == nullptr) {
        load_image<S>(p, block, ready, end, s.reach_row, s.a_stride, a);
        ready = end;
      } else {
        const int64_t reach = s.reach_square;
        const int64_t next = min(ready + kXRows, end);
        const int64_t first = ready == 0 ? -reach : ready + reach;
        load_image<S>(p, block, first, next + reach, s.reach_row + reach, s.x_stride,
                      s.x + (first - (ready - reach)) * s.x_stride);
        square_stage<S>(p, s, block, ready, next, a, y);
        move_down(s.x + (next - ready) * s.x_stride, 2 * reach * s.x_stride, s.x);
        ready = next;
      }
    }
    const int64_t bottom = min(row + s.band, p.h);
    if (s.band < p.h) clear_beyond(p, s, row);
    for (int64_t j = 0; j < block.width; j += kStripWidth) {
      const int64_t width = min(kStripWidth, block.width - j);
      const T* a = s.a + j * lanes;
      row_stage<S>(p, s, block, row, top, end, j, width, a, y);
      a += (row - top) * s.a_stride + s.reach_row * lanes;
      for (int64_t i = row; i < bottom; i += kSums, a += kSums * s.a_stride) {
        const int64_t rows = min(kSums, bottom - i);
        col_stage(s, i - row, rows, width, a);
        const bool any = p.branch_count > 0;
        store_image<S>(p, s, block, i, j, rows, width, any ? s.y : a,
                       any ? kPitch * lanes : s.a_stride, static_cast<S*>(y));
      }
    }
    if (bottom == p.h) break;
    const int64_t next = max(bottom - s.reach_col, 0);
    move_down(s.a + (next - top) * s.a_stride, (ready - next) * s.a_stride, s.a);
  }
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
