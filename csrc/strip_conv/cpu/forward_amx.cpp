// strip_conv2d forward on bfloat16, as products of matrices on AMX tiles.
//
// A convolution along rows is X T, one along columns is T X, with T the banded Toeplitz matrix of
// the taps: T[k][n] = w[k - n + d]. An output tile of 16 x 16 pixels takes one product with a
// window of 32 pixels if the kernel reaches at most 8 pixels to either side, two up to 24, three up
// to 40. The 5 x 5 kernel is five products (one for each of its rows), the strips of 7, 11 and 21
// taps take 1 + 1 + 2 for their rows and as many for their columns: 13 products of 16 cycles for
// 256 pixels, where FMAs of 16 floats take 103 * 16 / 2 cycles. The products are not the whole
// story: a tile is stored (16 cycles), rounded and packed after each of the three stages.
//
// What shapes the layout: a tile load takes 8 cycles if its rows are whole cache lines and 46 if
// they cross them (measured on Sapphire Rapids). So every window starts at a multiple of 64 bytes:
//
//    plane   one row of x or a, twice: copy 0 holds the windows of even output tiles side by side,
//            copy 1 those of odd ones. Window v = 16 v - 8 ... 16 v + 24 (pixels, v counts tiles).
//    pairs   one row result, its rows interleaved two by two as the second factor of a product
//    wants
//            them; a window may start at any even row.
//    T       built once a channel, for the whole batch, in memory: a load of T beside one of a
//            window still fits under a product.
//
// Sums are fp32; a and r_i are rounded to bfloat16 in between, as torch's own chain of
// bfloat16 convolutions does. Outside the image they are zero: buffers have margins, and what a
// tile computes beyond the image's edge is masked.
//
// A product with T multiplies a whole window, by zeros for the most part, and zero times infinity
// is NaN. Planes that are not finite are left to the kernels of forward.cpp, where such values
// spread no farther than the taps reach.

#include "common/amx.h"
#include "common/scratch.h"
#include "strip_conv/cpu/kernels.h"

namespace famseg::FAMSEG_ISA {
namespace {

using strip_conv::Branch;
using strip_conv::Problem;

constexpr int64_t kPixels = 16;  // of an output tile, either way
constexpr int64_t kWindow = kTileDepth;
constexpr int64_t kTileSize = kTileRows * kTileBytes;

// Elements are moved as bits.
using Bits = uint16_t;

// Windows that cover an output tile and `reach` pixels on either side, centred on the tile.
int64_t windows_for(int64_t taps) {
  return (taps / 2 + kPixels / 2 + kPixels - 1) / kPixels;
}

// The Toeplitz matrices of `rows` kernel rows: one tile for each row and window.
struct Toeplitz {
  char* tiles = nullptr;
  int64_t rows = 0, windows = 0;

  static Toeplitz take(Arena& arena, int64_t rows, int64_t taps) {
    const int64_t windows = windows_for(taps);
    return {arena.take<char>(rows * windows * kTileSize), rows, windows};
  }
};

struct MatrixStrip {
  Toeplitz row, col;
  float row_bias;
  Bits* r;  // r_i in pairs of rows, moved to image row 0
};

struct MatrixSpace {
  int64_t height, width;
  int64_t tiles_y, tiles_x;
  int64_t shift;   // windows left of window 0, even
  int64_t copy;    // elements of one copy of a plane's row
  int64_t stride;  // of a plane
  int64_t r_stride;
  int64_t branch_count;

  Toeplitz square;
  float square_bias, col_bias;  // col_bias: of all branches together
  MatrixStrip* strips;
  Bits* x;  // moved to image row 0; null without a square kernel
  Bits* a;
  float* sums;
  Bits* taps;  // one kernel row between zeros
};

// Enough zeros on either side of a kernel row for any window: they reach 55 taps out.
constexpr int64_t kTapMargin = 64;
constexpr int64_t kMostTaps = 63;

MatrixSpace lay_out(const Problem& p, Arena& arena) {
  MatrixSpace s{};
  s.height = p.h;
  s.width = p.w;
  s.tiles_y = round_up(p.h, kPixels) / kPixels;
  s.tiles_x = round_up(p.w, kPixels) / kPixels;
  s.branch_count = p.branch_count;
  s.strips = arena.take<MatrixStrip>(p.branch_count);
  s.taps = arena.take<Bits>(2 * kTapMargin + kMostTaps);
  s.sums = arena.take<float>(2 * kPixels * kPixels);
  int64_t windows_x = 1, windows_y = 1;
  if (p.square.weight != nullptr) {
    s.square = Toeplitz::take(arena, p.square.size, p.square.size);
    windows_x = s.square.windows;
  }
  for (int64_t i = 0; i < p.branch_count; ++i) {
    const Toeplitz row = Toeplitz::take(arena, 1, p.branches[i].row.size);
    const Toeplitz col = Toeplitz::take(arena, 1, p.branches[i].col.size);
    windows_x = max(windows_x, row.windows);
    windows_y = max(windows_y, col.windows);
    if (arena.base != nullptr) s.strips[i] = {row, col, 0, nullptr};
  }
  // At least 2: a copy also takes the pixels beside its windows, which must not land in the other.
  s.shift = round_up(windows_x, 2);
  s.copy = round_up(s.tiles_x + 2 * s.shift, 2) / 2 * kWindow;
  s.stride = 2 * s.copy;
  const int64_t rows = s.tiles_y * kPixels;
  if (p.square.weight != nullptr) {
    const int64_t reach = p.square.size / 2;
    Bits* x = arena.take<Bits>((rows + 2 * reach) * s.stride);
    s.x = x == nullptr ? nullptr : x + reach * s.stride;
  }
  s.a = arena.take<Bits>(rows * s.stride);
  s.r_stride = s.tiles_x * kWindow;
  const int64_t margin = kPixels / 2 + (windows_y - 1) * kPixels;
  for (int64_t i = 0; i < p.branch_count; ++i) {
    Bits* r = arena.take<Bits>((rows / 2 + margin) * s.r_stride);
    if (arena.base != nullptr) s.strips[i].r = r + margin / 2 * s.r_stride;
  }
  return s;
}

// ---- weights --------------------------------------------------------------------------------

// `windows` tiles of T for one kernel row. As a first factor, T's transpose, a tile's row n is the
// taps moved by n. As a second factor its row p holds T[2p][n], T[2p + 1][n] for all n: two
// reversed runs of taps, for which `taps` holds the kernel row backwards.
template <bool FIRST>
void build(const Bits* weight, int64_t count, int64_t windows, Bits* taps, char* tiles) {
  for (int64_t t = 0; t < count; ++t) {
    taps[kTapMargin + t] = weight[FIRST ? t : count - 1 - t];
  }
  for (int64_t window = 0; window < windows; ++window, tiles += kTileSize) {
    // Tap that meets pixel 0 of the window and of the output tile.
    const int64_t d = kWindow * window - kPixels * windows + kPixels / 2 + count / 2;
    for (int64_t r = 0; r < kTileRows; ++r) {
      char* to = tiles + r * kTileBytes;
      if constexpr (FIRST) {
        __builtin_memcpy(to, taps + kTapMargin + d - r, kTileBytes);
      } else {
        const Bits* from = taps + kTapMargin + count - 1 - d - 2 * r;
        const Vector<uint32_t> even = zero_extend(load_bfloat16(from));
        const Vector<uint32_t> odd = zero_extend(load_bfloat16(from - 1));
        store(reinterpret_cast<uint32_t*>(to), even | odd << 16);
      }
    }
  }
  for (int64_t t = 0; t < count; ++t) taps[kTapMargin + t] = 0;
}

float bias_of(const void* bias, int64_t c) {
  return bias == nullptr ? 0.0f : to_float(static_cast<const Bfloat16*>(bias)[c]);
}

void load_weights(const Problem& p, int64_t c, MatrixSpace& s) {
  const auto row = [&](const void* weight, int64_t index, int64_t taps) {
    return static_cast<const Bits*>(weight) + index * taps;
  };
  for (int64_t i = 0; i < s.square.rows; ++i) {
    build<false>(row(p.square.weight, c * p.square.size + i, p.square.size), p.square.size,
                 s.square.windows, s.taps, s.square.tiles + i * s.square.windows * kTileSize);
  }
  s.square_bias = bias_of(p.square.bias, c);
  s.col_bias = 0;
  for (int64_t i = 0; i < p.branch_count; ++i) {
    const Branch& b = p.branches[i];
    MatrixStrip& strip = s.strips[i];
    build<false>(row(b.row.weight, c, b.row.size), b.row.size, strip.row.windows, s.taps,
                 strip.row.tiles);
    build<true>(row(b.col.weight, c, b.col.size), b.col.size, strip.col.windows, s.taps,
                strip.col.tiles);
    strip.row_bias = bias_of(b.row.bias, c);
    s.col_bias += bias_of(b.col.bias, c);
  }
}

// ---- planes ---------------------------------------------------------------------------------

// Pixel 0 of copy 0 or 1 in a row of a plane.
int64_t pixel_offset(const MatrixSpace& s, int64_t copy) {
  return copy * s.copy + kPixels / 2 + (s.shift - copy) * kPixels;
}

// Window v of a row of a plane.
int64_t window_offset(const MatrixSpace& s, int64_t v) {
  v += s.shift;
  return (v & 1) * s.copy + (v >> 1) * kWindow;
}

// Copies the image's rows of output tiles y into a plane. Returns the largest magnitude in each
// lane.
Bfloat16x16 load_rows(const MatrixSpace& s, const Bits* from, int64_t y, Bits* to) {
  const int64_t whole = s.width / kPixels * kPixels, rest = s.width - whole;
  const int64_t rows = min(kPixels, s.height - y * kPixels);
  const int64_t width = s.width, stride = s.stride, other = pixel_offset(s, 1) - pixel_offset(s, 0);
  from += y * kPixels * width;
  to += y * kPixels * stride + pixel_offset(s, 0);
  Bfloat16x16 largest{};
  const auto put = [&](Bits* pixel, Bfloat16x16 value) {
    const Bfloat16x16 magnitude = value & Bits(0x7fff);
    largest = magnitude > largest ? magnitude : largest;
    store_bfloat16(pixel, value);
    store_bfloat16(pixel + other, value);
  };
  for (int64_t i = 0; i < rows; ++i, from += width, to += stride) {
    for (int64_t j = 0; j < whole; j += kPixels) put(to + j, load_bfloat16(from + j));
    if (rest > 0) {
      Bfloat16x16 value{};
      __builtin_memcpy(&value, from + whole, rest * sizeof(Bits));
      put(to + whole, value);
    }
  }
  return largest;
}

// ---- products -------------------------------------------------------------------------------

// Adds to tile 0 the products of T with windows that start at `data`; `row` is from one row of the
// kernel to the next, `window` from one window to the next, `stride` from one row of a window to
// the next, in elements.
template <bool DATA_FIRST>
[[gnu::always_inline]] inline void add_products(const Toeplitz& t, const Bits* data, int64_t row,
                                                int64_t window, int64_t stride) {
  const char* matrix = t.tiles;
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(Bits));
  for (int64_t i = 0; i < t.rows; ++i, data += row) {
    for (int64_t k = 0; k < t.windows; ++k, matrix += kTileSize) {
      tile_load<1>(data + k * window, bytes);
      tile_load<2>(matrix, kTileBytes);
      tile_multiply<0, DATA_FIRST ? 1 : 2, DATA_FIRST ? 2 : 1>();
    }
  }
}

// All ones in the lanes of a tile that lie in the image.
Vector<int32_t> lanes_inside(const MatrixSpace& s, int64_t tile) {
  const Vector<int32_t> lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return lane < static_cast<int32_t>(min(s.width - tile * kPixels, kPixels));
}

[[gnu::always_inline]] inline Vector<float> select(Vector<int32_t> mask, Vector<float> value) {
  return reinterpret_cast<Vector<float>>(reinterpret_cast<Vector<int32_t>>(value) & mask);
}

// ---- stages -----------------------------------------------------------------------------------

// Each stage of an output tile at (16 y, 16 x) is a part that issues products and a part that takes
// the sums.

// a = square(x) + bias
void square_products(const MatrixSpace& s, int64_t y, int64_t x) {
  const int64_t top = y * kPixels - s.square.rows / 2;
  add_products<true>(s.square, s.x + top * s.stride + window_offset(s, x - (s.square.windows - 1)),
                     s.stride, kWindow, s.stride);
}

void take_square(const MatrixSpace& s, int64_t y, int64_t x, const float* sums) {
  const int64_t stride = s.stride, other = pixel_offset(s, 1) - pixel_offset(s, 0);
  const Vector<float> bias = broadcast(s.square_bias);
  const Vector<int32_t> inside = lanes_inside(s, x);
  Bits* to = s.a + y * kPixels * stride + pixel_offset(s, 0) + x * kPixels;
#pragma GCC unroll 1  // GCC unrolls it completely and then runs out of registers for addresses
  for (int64_t i = 0; i < kPixels; ++i, to += stride, sums += kPixels) {
    const Bfloat16x16 value = round_to_bfloat16(select(inside, load(sums) + bias));
    store_bfloat16(to, value);
    store_bfloat16(to + other, value);
  }
}

// r_i = row_i(a) + bias
void row_products(const MatrixSpace& s, const MatrixStrip& strip, int64_t y, int64_t x) {
  add_products<true>(strip.row,
                     s.a + y * kPixels * s.stride + window_offset(s, x - (strip.row.windows - 1)),
                     0, kWindow, s.stride);
}

void take_row(const MatrixSpace& s, const MatrixStrip& strip, int64_t y, int64_t x,
              const float* sums) {
  const int64_t rows = min(s.height - y * kPixels, kPixels), stride = s.r_stride;
  const Vector<float> bias = broadcast(strip.row_bias);
  const Vector<int32_t> inside = lanes_inside(s, x);
  Bits* to = strip.r + y * (kPixels / 2) * stride + x * kWindow;
#pragma GCC unroll 1
  for (int64_t i = 0; i + 2 <= rows; i += 2, to += stride, sums += 2 * kPixels) {
    store(to, round_to_bfloat16_pairs(select(inside, load(sums) + bias),
                                      select(inside, load(sums + kPixels) + bias)));
  }
  if (rows % 2 != 0) {
    store(to, round_to_bfloat16_pairs(select(inside, load(sums) + bias), Vector<float>{}));
  }
}

// y = a + sum_i (col_i(r_i) + bias)
void col_products(const MatrixSpace& s, int64_t y, int64_t x) {
  for (int64_t i = 0; i < s.branch_count; ++i) {
    const MatrixStrip& strip = s.strips[i];
    const int64_t above = kPixels / 2 + (strip.col.windows - 1) * kPixels;
    add_products<false>(strip.col, strip.r + (y * kPixels - above) / 2 * s.r_stride + x * kWindow,
                        0, kWindow / 2 * s.r_stride, s.r_stride);
  }
}

void take_col(const MatrixSpace& s, int64_t y, int64_t x, const float* sums, Bits* out) {
  const int64_t rows = min(s.height - y * kPixels, kPixels);
  const int64_t stride = s.stride, width = s.width, pixel = x * kPixels;
  const Vector<float> bias = broadcast(s.col_bias);
  const Bits* a = s.a + y * kPixels * stride + pixel_offset(s, 0) + pixel;
  Bits* to = out + y * kPixels * width + pixel;
  const auto value = [&] {
    return round_to_bfloat16(load(sums) + to_float(load_bfloat16(a)) + bias);
  };
  if (pixel + kPixels <= width) {
#pragma GCC unroll 1
    for (int64_t i = 0; i < rows; ++i, a += stride, to += width, sums += kPixels) {
      store_bfloat16(to, value());
    }
  } else {
    for (int64_t i = 0; i < rows; ++i, a += stride, to += width, sums += kPixels) {
      const Bfloat16x16 last = value();
      __builtin_memcpy(to, &last, (width - pixel) * sizeof(Bits));
    }
  }
}

// Runs products(i) and take(i, sums) for all i < count, the products of each tile ahead of the sums
// of the one before: instructions that wait for a tile fill the scheduler, and the matrix unit
// would idle while they are worked off.
template <typename Products, typename Take>
[[gnu::always_inline]] inline void for_tiles(const MatrixSpace& s, int64_t count,
                                             const Products& products, const Take& take) {
  for (int64_t i = 0; i <= count; ++i) {
    if (i < count) {
      tile_zero<0>();
      products(i);
      tile_store<0>(s.sums + i % 2 * kPixels * kPixels, kTileBytes);
    }
    if (i > 0) take(i - 1, s.sums + (i - 1) % 2 * kPixels * kPixels);
  }
}

// One image, row by row of output tiles; the columns follow as far behind as they reach. What a
// stage writes is still in the L1 cache when the next one reads it. Returns whether the image is
// finite.
bool forward_plane(const MatrixSpace& s, const Bits* from, Bits* out) {
  int64_t lag = 0;  // windows of 1, 2, 3 tiles reach less than 1, 2, 3 tiles down
  for (int64_t i = 0; i < s.branch_count; ++i) lag = max(lag, s.strips[i].col.windows);
  const int64_t ahead = s.x != nullptr ? (s.square.rows / 2 + kPixels - 1) / kPixels : 0;
  Bfloat16x16 largest{};
  for (int64_t step = 0; step < ahead + s.tiles_y + lag; ++step) {
    if (step < s.tiles_y) {
      const Bfloat16x16 rows = load_rows(s, from, step, s.x != nullptr ? s.x : s.a);
      largest = rows > largest ? rows : largest;
    }
    const int64_t y = step - ahead;
    if (y >= 0 && y < s.tiles_y) {
      if (s.x != nullptr) {
        for_tiles(
            s, s.tiles_x, [&](int64_t x) { square_products(s, y, x); },
            [&](int64_t x, const float* sums) { take_square(s, y, x, sums); });
      }
      for_tiles(
          s, s.branch_count * s.tiles_x,
          [&](int64_t i) { row_products(s, s.strips[i / s.tiles_x], y, i % s.tiles_x); },
          [&](int64_t i, const float* sums) {
            take_row(s, s.strips[i / s.tiles_x], y, i % s.tiles_x, sums);
          });
    }
    if (y >= lag) {
      for_tiles(
          s, s.tiles_x, [&](int64_t x) { col_products(s, y - lag, x); },
          [&](int64_t x, const float* sums) { take_col(s, y - lag, x, sums, out); });
    }
  }
  constexpr Bits infinity = 0x7f80;
  bool finite = true;
  for (int64_t l = 0; l < kPixels; ++l) finite = finite && largest[l] < infinity;
  return finite;
}

bool reaches_neighbours(const Problem& p) {
  bool any = p.square.size > 1;
  for (int64_t i = 0; i < p.branch_count; ++i) {
    any = any || p.branches[i].row.size > 1 || p.branches[i].col.size > 1;
  }
  return any;
}

bool forward_suits(const Problem& p) {
  return p.dtype == Dtype::bfloat16 && !p.channels_last && reaches_neighbours(p);
}

size_t forward_scratch(const Problem& p) {
  Arena counting;
  lay_out(p, counting);
  return static_cast<size_t>(counting.used);
}

bool forward_channel(const Problem& p, void* y, int64_t channel, void* scratch) {
  Arena arena{static_cast<char*>(scratch)};
  MatrixSpace s = lay_out(p, arena);
  load_weights(p, channel, s);
  const TileScope tiles;
  for (int64_t n = 0; n < p.n; ++n) {
    const int64_t offset = (n * p.c + channel) * p.h * p.w;
    const Bits* x = static_cast<const Bits*>(p.x) + offset;
    if (!forward_plane(s, x, static_cast<Bits*>(y) + offset)) return false;
  }
  return true;
}

}  // namespace

extern const strip_conv::MatrixKernels strip_conv_matrix_kernels;
const strip_conv::MatrixKernels strip_conv_matrix_kernels = {forward_suits, forward_scratch,
                                                             forward_channel};

}  // namespace famseg::FAMSEG_ISA
