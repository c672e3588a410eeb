// Products and transposes of the small matrices of one chunk of tokens, all in the L1 or L2 cache.
//
// One kernel does every product: the left factor is read as scalars at any two strides, so its
// transpose costs nothing; the right factor and the result are read and written as whole vectors,
// so their rows are padded. For kernel files only, like simd.h.
#pragma once

#include "common/simd.h"
#include "common/transpose.h"

namespace famseg::FAMSEG_ISA {

enum class Left { full, lower, upper };

// out = row_scale * (a b) + keep * init, with a (rows, depth) and b (depth, columns).
template <typename T>
struct Product {
  struct {
    const T* at;
    int64_t row, column;  // from one to the next
  } a;
  struct {
    const T* at;
    int64_t row;
  } b;
  struct {
    T* at;
    int64_t row;
  } out;
  int64_t rows, columns, depth;  // columns: whole vectors
  const T* row_scale = nullptr;  // one for each row; null: 1
  const T* init = nullptr;       // laid out as `out`, which it may be; null: 0
  T keep = 1;
  Left left = Left::full;  // which half of a is not zero
};

// ROWS x VECTORS vectors of the result stay in registers over the whole depth.
template <int ROWS, int VECTORS, typename T>
void product_tile(const Product<T>& m, int64_t row, int64_t column) {
  constexpr int64_t lanes = kLanes<T>;
  Vector<T> sum[ROWS][VECTORS] = {};
  int64_t first = 0, last = m.depth;
  if (m.left == Left::lower && row + ROWS < last) last = row + ROWS;
  if (m.left == Left::upper) first = row;
  // Three rows to a pointer: x86 addresses reach +1 and +2 strides, and nine would need too many
  // registers.
  const T* a[(ROWS + 2) / 3];
#pragma GCC unroll 4
  for (int g = 0; g < (ROWS + 2) / 3; ++g) {
    a[g] = m.a.at + (row + 3 * g) * m.a.row + first * m.a.column;
  }
  const T* b = m.b.at + first * m.b.row + column;
  for (int64_t k = first; k < last; ++k) {
    Vector<T> v[VECTORS];
#pragma GCC unroll 8
    for (int c = 0; c < VECTORS; ++c) v[c] = load(b + c * lanes);
#pragma GCC unroll 16
    for (int q = 0; q < ROWS; ++q) {
      const Vector<T> factor = broadcast(a[q / 3][q % 3 * m.a.row]);
#pragma GCC unroll 8
      for (int c = 0; c < VECTORS; ++c) sum[q][c] += factor * v[c];
    }
#pragma GCC unroll 4
    for (int g = 0; g < (ROWS + 2) / 3; ++g) a[g] += m.a.column;
    b += m.b.row;
  }
#pragma GCC unroll 16
  for (int q = 0; q < ROWS; ++q) {
    const Vector<T> scale = broadcast(m.row_scale == nullptr ? T(1) : m.row_scale[row + q]);
    const int64_t at = (row + q) * m.out.row + column;
#pragma GCC unroll 8
    for (int c = 0; c < VECTORS; ++c) {
      Vector<T> value = sum[q][c] * scale;
      if (m.init != nullptr) value += load(m.init + at + c * lanes) * m.keep;
      store(m.out.at + at + c * lanes, value);
    }
  }
}

template <int ROWS, int VECTORS, typename T>
[[gnu::always_inline]] inline void product_rows(const Product<T>& m, int64_t rows, int64_t row,
                                                int64_t column) {
  if (rows == ROWS) {
    product_tile<ROWS, VECTORS>(m, row, column);
  } else if constexpr (ROWS > 1) {
    product_rows<ROWS - 1, VECTORS>(m, rows, row, column);
  }
}

template <int MOST, int VECTORS, typename T>
void product_column(const Product<T>& m, int64_t column) {
  // In equal tiles: 32 rows are 6 + 6 + 5 + 5 + 5 + 5, not 5 x 6 + 2.
  int64_t tiles = (m.rows + MOST - 1) / MOST;
  for (int64_t row = 0; tiles > 0; --tiles) {
    const int64_t rows = (m.rows - row + tiles - 1) / tiles;
    product_rows<MOST, VECTORS>(m, rows, row, column);
    row += rows;
  }
}

template <typename T>
void multiply(const Product<T>& m) {
  constexpr int64_t lanes = kLanes<T>;
  int64_t column = 0;
  if constexpr (kVectorRegisters >= 32) {
    for (; column + 4 * lanes <= m.columns; column += 4 * lanes) product_column<6, 4>(m, column);
    for (; column + 2 * lanes <= m.columns; column += 2 * lanes) product_column<9, 2>(m, column);
  } else {
    for (; column + 2 * lanes <= m.columns; column += 2 * lanes) product_column<6, 2>(m, column);
  }
  for (; column < m.columns; column += lanes) product_column<9, 1>(m, column);
}

// ---- transposes ---------------------------------------------------------------------------------

// out (columns, rows) = the transpose of in (rows, columns); both counts are whole vectors.
template <typename T>
void transpose(const T* in, int64_t in_stride, int64_t rows, int64_t columns, T* out,
               int64_t out_stride) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t i = 0; i < rows; i += lanes) {
    for (int64_t j = 0; j < columns; j += lanes) {
      Vector<T> v[lanes];
#pragma GCC unroll 16
      for (int r = 0; r < lanes; ++r) v[r] = load(in + (i + r) * in_stride + j);
      transpose_from<1, T>(v);
#pragma GCC unroll 16
      for (int r = 0; r < lanes; ++r) store(out + (j + r) * out_stride + i, v[r]);
    }
  }
}

// out[i] = the sum of row i of in (rows, one vector); rows: whole vectors.
template <typename T>
void add_lanes(const T* in, int64_t rows, T* out) {
  constexpr int lanes = kLanes<T>;
  for (int64_t i = 0; i < rows; i += lanes) {
    Vector<T> v[lanes];
#pragma GCC unroll 16
    for (int r = 0; r < lanes; ++r) v[r] = load(in + (i + r) * lanes);
    transpose_from<1, T>(v);
    Vector<T> sum = v[0];
#pragma GCC unroll 16
    for (int r = 1; r < lanes; ++r) sum += v[r];
    store(out + i, sum);
  }
}

}  // namespace famseg::FAMSEG_ISA
