// The backward direction of strip_conv2d for one instruction set (see common/simd.h: this file is
// compiled once for each).
//
// One (n, c) plane at a time, in buffers that stay in the L2 cache: 2 x its bytes go through memory
// where the chain of convolutions moves 23 x. Every buffer has a margin of zeros as wide as the
// largest kernel reaches, so no inner loop asks where the image ends:
//
//    margin_x | row: width, rounded up to whole vectors | margin_x | next row ...
//   margin_y rows of zeros above and below
//
// The margin right of a row is also the margin left of the next one. Kernels write whole vectors
// and clear_tail() then restores the zeros right of the image.
//
// Each output tile stays in registers while all of its taps are added: an input vector is loaded
// once for several rows (correlate_tile), or for several branches (row_tile).

#include "common/half.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "strip_conv/cpu.h"

namespace famseg::FAMSEG_ISA {
namespace {

using strip_conv::Branch;
using strip_conv::BranchGradients;
using strip_conv::Gradients;
using strip_conv::Problem;

// A kernel cropped to the taps that can reach the image: on a 16 x 16 plane 21 taps are as 31, and
// on a single pixel as 1. Cropped taps only ever meet zeros, and their gradients are zero.
template <typename T>
struct Taps {
  T* weight = nullptr;  // (height, width)
  int64_t height = 0, width = 0;
};

int64_t cropped(int64_t size, int64_t extent) {
  return smaller(size, 2 * extent - 1);
}

template <typename T>
struct Strip {
  Taps<T> row, column;
  T row_bias, column_bias;
  T* rows;  // row_i(a), or null where it is not needed
};

// What both directions share: geometry, buffers and weights of the plane at hand.
template <typename T>
struct Workspace {
  int64_t height, width, padded_width;  // padded_width: whole vectors
  int64_t margin_x, margin_y, stride;
  int64_t branch_count;

  Taps<T> square;
  T square_bias;
  Strip<T>* strips;
  // Branches by falling row size, the order row_tile wants.
  int64_t* by_row_size;
  T* x;  // unused (null) without a square kernel
  T* a;

  int64_t plane_elements() const { return margin_x + stride * (height + 2 * margin_y); }
  T* take_plane(Arena& arena) const {
    T* first = arena.take<T>(plane_elements());
    return first == nullptr ? nullptr : first + margin_x + margin_y * stride;
  }
};

template <typename T>
Workspace<T> lay_out(const Problem& p, Arena& arena) {
  Workspace<T> w{};
  w.height = p.h;
  w.width = p.w;
  w.padded_width = round_up(p.w, kLanes<T>);
  w.branch_count = p.branch_count;
  w.strips = arena.take<Strip<T>>(p.branch_count);
  w.by_row_size = arena.take<int64_t>(p.branch_count);
  int64_t reach_x = 0, reach_y = 0;
  if (p.square_weight != nullptr) {
    w.square.height = cropped(p.square_size, p.h);
    w.square.width = cropped(p.square_size, p.w);
    w.square.weight = arena.take<T>(w.square.height * w.square.width);
    reach_x = w.square.width / 2;
    reach_y = w.square.height / 2;
  }
  for (int64_t i = 0; i < p.branch_count; ++i) {
    const int64_t row = cropped(p.branches[i].row_size, p.w);
    const int64_t column = cropped(p.branches[i].column_size, p.h);
    T* row_weight = arena.take<T>(row);
    T* column_weight = arena.take<T>(column);
    if (arena.base != nullptr) {
      w.strips[i] = {{row_weight, 1, row}, {column_weight, column, 1}, T(0), T(0), nullptr};
      // Insertion by falling row size.
      int64_t at = i;
      for (; at > 0 && w.strips[w.by_row_size[at - 1]].row.width < row; --at) {
        w.by_row_size[at] = w.by_row_size[at - 1];
      }
      w.by_row_size[at] = i;
    }
    reach_x = larger(reach_x, row / 2);
    reach_y = larger(reach_y, column / 2);
  }
  w.margin_x = round_up(reach_x, kLanes<T>);
  w.margin_y = reach_y;
  w.stride = w.padded_width + w.margin_x;
  w.x = p.square_weight != nullptr ? w.take_plane(arena) : nullptr;
  w.a = w.take_plane(arena);
  return w;
}

// ---- moving planes and weights in and out -----------------------------------------------------

template <typename S, typename T>
void load_plane(const Workspace<T>& w, const S* from, T* to) {
  for (int64_t i = 0; i < w.height; ++i) {
    for (int64_t j = 0; j < w.width; ++j) to[i * w.stride + j] = widen(from[i * w.width + j]);
    for (int64_t j = w.width; j < w.padded_width; ++j) to[i * w.stride + j] = T(0);
  }
}

template <typename S, typename T>
void store_plane(const Workspace<T>& w, const T* from, S* to) {
  for (int64_t i = 0; i < w.height; ++i) {
    for (int64_t j = 0; j < w.width; ++j) narrow(to[i * w.width + j], from[i * w.stride + j]);
  }
}

template <typename T>
void clear_tail(const Workspace<T>& w, T* plane) {
  for (int64_t i = 0; i < w.height; ++i) {
    for (int64_t j = w.width; j < w.padded_width; ++j) plane[i * w.stride + j] = T(0);
  }
}

// Channel c of a (C, height, width) weight, cropped to the middle.
template <typename S, typename T>
void load_taps(const void* weight, int64_t c, int64_t height, int64_t width, const Taps<T>& to) {
  const S* from = static_cast<const S*>(weight) + c * height * width +
                  (height - to.height) / 2 * width + (width - to.width) / 2;
  for (int64_t i = 0; i < to.height; ++i) {
    for (int64_t j = 0; j < to.width; ++j) {
      to.weight[i * to.width + j] = widen(from[i * width + j]);
    }
  }
}

template <typename S, typename T>
T load_bias(const void* bias, int64_t c) {
  return bias == nullptr ? T(0) : widen(static_cast<const S*>(bias)[c]);
}

template <typename S, typename T>
void load_weights(const Problem& p, int64_t c, Workspace<T>& w) {
  if (p.square_weight != nullptr) {
    load_taps<S>(p.square_weight, c, p.square_size, p.square_size, w.square);
  }
  w.square_bias = load_bias<S, T>(p.square_bias, c);
  for (int64_t i = 0; i < p.branch_count; ++i) {
    const Branch& branch = p.branches[i];
    Strip<T>& strip = w.strips[i];
    load_taps<S>(branch.row_weight, c, 1, branch.row_size, strip.row);
    load_taps<S>(branch.column_weight, c, branch.column_size, 1, strip.column);
    strip.row_bias = load_bias<S, T>(branch.row_bias, c);
    strip.column_bias = load_bias<S, T>(branch.column_bias, c);
  }
}

// The adjoint of a correlation is the correlation with the flipped kernel.
template <typename T>
void flip(const Taps<T>& taps) {
  for (int64_t i = 0, j = taps.height * taps.width - 1; i < j; ++i, --j) {
    const T swapped = taps.weight[i];
    taps.weight[i] = taps.weight[j];
    taps.weight[j] = swapped;
  }
}

// ---- correlation: several inputs, one output ----------------------------------------------------

template <typename T>
struct Term {
  const T* in;
  Taps<T> taps;
};

// Adds one input row, times its taps, to the output rows FIRST..LAST of a tile.
template <int FIRST, int LAST, typename T, int ROWS, int VECTORS>
[[gnu::always_inline]] inline void add_input_row(Vector<T> (&sum)[ROWS][VECTORS], const T* in,
                                                 const T* weight, int64_t width) {
  // `weight` is the tap row that meets output row 0; output row q meets the one q earlier.
  for (int64_t s = 0; s < width; ++s) {
    Vector<T> v[VECTORS];
#pragma GCC unroll 8
    for (int k = 0; k < VECTORS; ++k) v[k] = load(in + s + k * kLanes<T>);
#pragma GCC unroll 8
    for (int q = FIRST; q <= LAST; ++q) {
      const Vector<T> tap = broadcast(weight[s - q * width]);
#pragma GCC unroll 8
      for (int k = 0; k < VECTORS; ++k) sum[q][k] += tap * v[k];
    }
  }
}

// out[i.., j..] = init + constant + sum of the terms, ROWS x VECTORS vectors held in registers.
// Every input row is loaded once and goes to each output row it reaches: fewer than ROWS of them
// for the first and the last ROWS - 1 input rows. Needs taps.height >= ROWS - 1.
template <int ROWS, int VECTORS, typename T>
void correlate_tile(const Workspace<T>& w, const Term<T>* terms, int64_t count, const T* init,
                    T constant, T* out, int64_t i, int64_t j) {
  Vector<T> sum[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int q = 0; q < ROWS; ++q) {
#pragma GCC unroll 8
    for (int k = 0; k < VECTORS; ++k) {
      sum[q][k] = broadcast(constant);
      if (init != nullptr) sum[q][k] += load(init + (i + q) * w.stride + j + k * kLanes<T>);
    }
  }
  for (int64_t term = 0; term < count; ++term) {
    const int64_t height = terms[term].taps.height, width = terms[term].taps.width;
    const T* in = terms[term].in + (i - height / 2) * w.stride + j - width / 2;
    const T* weight = terms[term].taps.weight;
    if constexpr (ROWS == 4) {
      add_input_row<0, 0, T>(sum, in, weight, width);
      add_input_row<0, 1, T>(sum, in + w.stride, weight + width, width);
      add_input_row<0, 2, T>(sum, in + 2 * w.stride, weight + 2 * width, width);
    }
    for (int64_t p = ROWS - 1; p < height; ++p) {
      add_input_row<0, ROWS - 1, T>(sum, in + p * w.stride, weight + p * width, width);
    }
    if constexpr (ROWS == 4) {
      in += height * w.stride;
      weight += height * width;
      add_input_row<1, 3, T>(sum, in, weight, width);
      add_input_row<2, 3, T>(sum, in + w.stride, weight + width, width);
      add_input_row<3, 3, T>(sum, in + 2 * w.stride, weight + 2 * width, width);
    }
  }
#pragma GCC unroll 8
  for (int q = 0; q < ROWS; ++q) {
#pragma GCC unroll 8
    for (int k = 0; k < VECTORS; ++k) {
      store(out + (i + q) * w.stride + j + k * kLanes<T>, sum[q][k]);
    }
  }
}

template <int ROWS, typename T>
void correlate_rows(const Workspace<T>& w, const Term<T>* terms, int64_t count, const T* init,
                    T constant, T* out, int64_t i) {
  constexpr int64_t lanes = kLanes<T>;
  // 4 x 4 sums, 4 inputs and a tap fit into 32 registers; 4 x 2 sums into 16.
  constexpr int wide = kVectorRegisters >= 32 ? 4 : 2;
  int64_t j = 0;
  for (; j + wide * lanes <= w.padded_width; j += wide * lanes) {
    correlate_tile<ROWS, wide>(w, terms, count, init, constant, out, i, j);
  }
  if constexpr (wide == 4) {
    for (; j + 2 * lanes <= w.padded_width; j += 2 * lanes) {
      correlate_tile<ROWS, 2>(w, terms, count, init, constant, out, i, j);
    }
  }
  for (; j < w.padded_width; j += lanes) {
    correlate_tile<ROWS, 1>(w, terms, count, init, constant, out, i, j);
  }
}

// out = init (null: nothing) + constant + sum over terms of taps * in, zero right of the image.
// `out` is none of the inputs; it may be `init`.
template <typename T>
void correlate(const Workspace<T>& w, const Term<T>* terms, int64_t count, const T* init,
               T constant, T* out) {
  bool tall = w.height >= 4;
  for (int64_t term = 0; term < count; ++term) tall = tall && terms[term].taps.height >= 3;
  int64_t i = 0;
  if (tall) {
    for (; i + 4 <= w.height; i += 4) correlate_rows<4>(w, terms, count, init, constant, out, i);
  }
  for (; i < w.height; ++i) correlate_rows<1>(w, terms, count, init, constant, out, i);
  clear_tail(w, out);
}

// ---- rows: one input, several outputs -----------------------------------------------------------

template <typename T, int BRANCHES>
struct RowPass {
  const T* weight[BRANCHES];  // the middle tap
  int64_t reach[BRANCHES];    // taps on either side of it, falling
  T bias[BRANCHES];
  T* out[BRANCHES];
};

// The taps [from, to) of the first ACTIVE branches.
template <int ACTIVE, typename T, int BRANCHES, int ROWS, int VECTORS>
[[gnu::always_inline]] inline void add_shifts(Vector<T> (&sum)[BRANCHES][ROWS][VECTORS],
                                              const RowPass<T, BRANCHES>& pass, const T* in,
                                              int64_t stride, int64_t from, int64_t to) {
  for (int64_t s = from; s < to; ++s) {
    Vector<T> tap[ACTIVE];
#pragma GCC unroll 8
    for (int b = 0; b < ACTIVE; ++b) tap[b] = broadcast(pass.weight[b][s]);
#pragma GCC unroll 8
    for (int q = 0; q < ROWS; ++q) {
#pragma GCC unroll 8
      for (int k = 0; k < VECTORS; ++k) {
        const Vector<T> v = load(in + q * stride + s + k * kLanes<T>);
#pragma GCC unroll 8
        for (int b = 0; b < ACTIVE; ++b) sum[b][q][k] += tap[b] * v;
      }
    }
  }
}

// A shifted load crosses a cache line and costs two; here it serves every branch that reaches so
// far, 39 FMAs for 21 loads with 7, 11 and 21 taps.
template <int ROWS, int VECTORS, typename T, int BRANCHES>
void row_tile(const RowPass<T, BRANCHES>& pass, const T* in, int64_t stride, int64_t offset) {
  Vector<T> sum[BRANCHES][ROWS][VECTORS];
#pragma GCC unroll 8
  for (int b = 0; b < BRANCHES; ++b) {
#pragma GCC unroll 8
    for (int q = 0; q < ROWS; ++q) {
#pragma GCC unroll 8
      for (int k = 0; k < VECTORS; ++k) sum[b][q][k] = broadcast(pass.bias[b]);
    }
  }
  in += offset;
  const int64_t* reach = pass.reach;
  if constexpr (BRANCHES == 3) {
    add_shifts<1>(sum, pass, in, stride, -reach[0], -reach[1]);
    add_shifts<2>(sum, pass, in, stride, -reach[1], -reach[2]);
    add_shifts<3>(sum, pass, in, stride, -reach[2], reach[2] + 1);
    add_shifts<2>(sum, pass, in, stride, reach[2] + 1, reach[1] + 1);
    add_shifts<1>(sum, pass, in, stride, reach[1] + 1, reach[0] + 1);
  } else if constexpr (BRANCHES == 2) {
    add_shifts<1>(sum, pass, in, stride, -reach[0], -reach[1]);
    add_shifts<2>(sum, pass, in, stride, -reach[1], reach[1] + 1);
    add_shifts<1>(sum, pass, in, stride, reach[1] + 1, reach[0] + 1);
  } else {
    add_shifts<1>(sum, pass, in, stride, -reach[0], reach[0] + 1);
  }
#pragma GCC unroll 8
  for (int b = 0; b < BRANCHES; ++b) {
#pragma GCC unroll 8
    for (int q = 0; q < ROWS; ++q) {
#pragma GCC unroll 8
      for (int k = 0; k < VECTORS; ++k) {
        store(pass.out[b] + offset + q * stride + k * kLanes<T>, sum[b][q][k]);
      }
    }
  }
}

template <int ROWS, typename T, int BRANCHES>
void row_stripe(const Workspace<T>& w, const RowPass<T, BRANCHES>& pass, const T* in, int64_t i) {
  int64_t j = 0;
  for (; j + 2 * kLanes<T> <= w.padded_width; j += 2 * kLanes<T>) {
    row_tile<ROWS, 2>(pass, in, w.stride, i * w.stride + j);
  }
  for (; j < w.padded_width; j += kLanes<T>) {
    row_tile<ROWS, 1>(pass, in, w.stride, i * w.stride + j);
  }
}

template <int BRANCHES, typename T>
void row_pass(const Workspace<T>& w, Strip<T>* const* strips, const T* in) {
  RowPass<T, BRANCHES> pass;
  for (int b = 0; b < BRANCHES; ++b) {
    pass.reach[b] = strips[b]->row.width / 2;
    pass.weight[b] = strips[b]->row.weight + pass.reach[b];
    pass.bias[b] = strips[b]->row_bias;
    pass.out[b] = strips[b]->rows;
  }
  // 3 branches x 4 rows x 2 vectors are 24 sums, for 32 registers; half of that for 16.
  constexpr int rows = kVectorRegisters >= 32 ? 4 : 2;
  int64_t i = 0;
  for (; i + rows <= w.height; i += rows) row_stripe<rows>(w, pass, in, i);
  for (; i < w.height; ++i) row_stripe<1>(w, pass, in, i);
  for (int b = 0; b < BRANCHES; ++b) clear_tail(w, pass.out[b]);
}

// row_i(in) + bias_i into strips[i].rows, for all that have such a buffer.
template <typename T>
void all_rows(const Workspace<T>& w, const T* in) {
  Strip<T>* group[3];
  int filled = 0;
  for (int64_t i = 0; i < w.branch_count; ++i) {
    Strip<T>& strip = w.strips[w.by_row_size[i]];
    if (strip.rows == nullptr) continue;
    group[filled++] = &strip;
    if (filled == 3) {
      row_pass<3>(w, group, in);
      filled = 0;
    }
  }
  if (filled == 2) row_pass<2>(w, group, in);
  if (filled == 1) row_pass<1>(w, group, in);
}

// ---- weight gradients: dot products of a plane with a shifted plane -----------------------------

// Sums run in T over at most this many vectors and then move on in double.
constexpr int64_t kDotRun = 64;

template <int TAPS, typename T>
[[gnu::always_inline]] inline void move_to_double(const Vector<T> (&sum)[TAPS],
                                                  double (*lanes)[kLanes<T>]) {
#pragma GCC unroll 16
  for (int t = 0; t < TAPS; ++t) {
    T values[kLanes<T>];
    store(values, sum[t]);
    for (int l = 0; l < kLanes<T>; ++l) lanes[t][l] += static_cast<double>(values[l]);
  }
}

template <int TAPS, int LANES>
void add_lanes(const double (&lanes)[TAPS][LANES], double* out) {
  for (int t = 0; t < TAPS; ++t) {
    double total = 0;
    for (int l = 0; l < LANES; ++l) total += lanes[t][l];
    out[t] = total;
  }
}

// out[t] = sum over the image of g[i, j] * in[i + t, j], t < TAPS.
// Four rows of g are held while the rows of `in` that meet them go by: one load serves up to four
// products.
template <int TAPS, typename T>
void dot_columns(const Workspace<T>& w, const T* g, const T* in, double* out) {
  constexpr int rows = 4;
  double lanes[TAPS][kLanes<T>] = {};
  for (int64_t j = 0; j < w.padded_width; j += kLanes<T>) {
    for (int64_t start = 0; start < w.height; start += kDotRun) {
      const int64_t end = smaller(start + kDotRun, w.height);
      Vector<T> sum[TAPS] = {};
      int64_t i = start;
      for (; i + rows <= end; i += rows) {
        Vector<T> gradient[rows];
#pragma GCC unroll 4
        for (int q = 0; q < rows; ++q) gradient[q] = load(g + (i + q) * w.stride + j);
#pragma GCC unroll 16
        for (int p = 0; p < rows + TAPS - 1; ++p) {
          const Vector<T> v = load(in + (i + p) * w.stride + j);
#pragma GCC unroll 4
          for (int q = 0; q < rows; ++q) {
            if (p - q >= 0 && p - q < TAPS) sum[p - q] += gradient[q] * v;
          }
        }
      }
      for (; i < end; ++i) {
        const Vector<T> gradient = load(g + i * w.stride + j);
#pragma GCC unroll 16
        for (int t = 0; t < TAPS; ++t) sum[t] += gradient * load(in + (i + t) * w.stride + j);
      }
      move_to_double<TAPS, T>(sum, lanes);
    }
  }
  add_lanes(lanes, out);
}

// out[t] = sum over the image of g[i, j] * in[i, j + t], t < TAPS.
template <int TAPS, typename T>
void dot_rows(const Workspace<T>& w, const T* g, const T* in, double* out) {
  double lanes[TAPS][kLanes<T>] = {};
  const int64_t run = larger(1, kDotRun * kLanes<T> / w.padded_width);
  for (int64_t start = 0; start < w.height; start += run) {
    const int64_t end = smaller(start + run, w.height);
    Vector<T> sum[TAPS] = {};
    for (int64_t i = start; i < end; ++i) {
      for (int64_t j = 0; j < w.padded_width; j += kLanes<T>) {
        const Vector<T> gradient = load(g + i * w.stride + j);
#pragma GCC unroll 16
        for (int t = 0; t < TAPS; ++t) sum[t] += gradient * load(in + i * w.stride + j + t);
      }
    }
    move_to_double<TAPS, T>(sum, lanes);
  }
  add_lanes(lanes, out);
}

// As many sums as fit into the registers beside what they are made from.
constexpr int kMostTaps = kVectorRegisters >= 32 ? 12 : 8;

template <bool COLUMNS, int TAPS = kMostTaps, typename T>
void dot_block(const Workspace<T>& w, const T* g, const T* in, int64_t taps, double* out) {
  if (taps == TAPS) {
    if constexpr (COLUMNS) {
      dot_columns<TAPS>(w, g, in, out);
    } else {
      dot_rows<TAPS>(w, g, in, out);
    }
  } else if constexpr (TAPS > 1) {
    dot_block<COLUMNS, TAPS - 1>(w, g, in, taps, out);
  }
}

// The gradient of one row (or, with COLUMNS, column) of taps; `in` is already moved to the first.
template <bool COLUMNS, typename T>
void dot(const Workspace<T>& w, const T* g, const T* in, int64_t taps, double* out) {
  // In equal blocks: 21 taps are 11 + 10, not 12 + 9.
  int64_t blocks = (taps + kMostTaps - 1) / kMostTaps;
  for (int64_t done = 0; blocks > 0; --blocks) {
    const int64_t block = (taps - done + blocks - 1) / blocks;
    dot_block<COLUMNS>(w, g, in + done * (COLUMNS ? w.stride : 1), block, out + done);
    done += block;
  }
}

template <typename T>
double plane_sum(const Workspace<T>& w, const T* plane) {
  double lanes[1][kLanes<T>] = {};
  for (int64_t i = 0; i < w.height; ++i) {
    Vector<T> sum[1] = {};
    for (int64_t j = 0; j < w.padded_width; j += kLanes<T>) {
      sum[0] += load(plane + i * w.stride + j);
    }
    move_to_double<1, T>(sum, lanes);
  }
  double total;
  add_lanes(lanes, &total);
  return total;
}

// ---- the planes of one image ------------------------------------------------------------------

template <typename S, typename T>
void square_stage(const Problem& p, const S* x, Workspace<T>& w) {
  if (p.square_weight == nullptr) {
    load_plane(w, x, w.a);
    return;
  }
  load_plane(w, x, w.x);
  const Term<T> term{w.x, w.square};
  correlate(w, &term, 1, static_cast<const T*>(nullptr), w.square_bias, w.a);
}

// ---- backward -----------------------------------------------------------------------------------

// The stages in reverse, from dy: dR_i = column_i^T(dy); dA = dy + sum_i row_i^T(dR_i);
// dx = square^T(dA). Nothing was saved: a and the row results are computed again where a weight
// gradient asks for them.
template <typename T>
struct BackwardSpace : Workspace<T> {
  Term<T>* terms;
  T* gradient;        // dy
  T* a_gradient;      // dA
  T** rows_gradient;  // dR_i
};

template <typename T>
BackwardSpace<T> backward_space(const Problem& p, Arena& arena) {
  BackwardSpace<T> w{lay_out<T>(p, arena), nullptr, nullptr, nullptr, nullptr};
  w.terms = arena.take<Term<T>>(p.branch_count);
  w.rows_gradient = arena.take<T*>(p.branch_count);
  w.gradient = w.take_plane(arena);
  w.a_gradient = w.take_plane(arena);
  for (int64_t i = 0; i < p.branch_count; ++i) {
    T* rows = w.take_plane(arena);
    T* rows_gradient = w.take_plane(arena);
    if (arena.base != nullptr) {
      w.strips[i].rows = rows;
      w.rows_gradient[i] = rows_gradient;
    }
  }
  return w;
}

// Where each gradient's taps lie among the plane's partial sums.
struct PartialOffsets {
  int64_t next = 0;
  int64_t take(int64_t count) {
    const int64_t offset = next;
    next += count;
    return offset;
  }
};

int64_t partial_size(const Problem& p) {
  int64_t total = p.square_size * p.square_size + 1;
  for (int64_t i = 0; i < p.branch_count; ++i) {
    total += p.branches[i].row_size + p.branches[i].column_size + 2;
  }
  return total;
}

template <typename S, typename T>
void backward_plane(const Problem& p, const Gradients& gradients, int64_t plane, double* partial,
                    void* scratch) {
  Arena arena{static_cast<char*>(scratch)};
  BackwardSpace<T> w = backward_space<T>(p, arena);
  load_weights<S>(p, plane % p.c, w);
  const int64_t offset = plane * p.h * p.w;
  load_plane(w, static_cast<const S*>(gradients.y) + offset, w.gradient);

  bool needs_a = false, needs_rows = false;
  bool needs_a_gradient = gradients.x != nullptr || gradients.square_weight != nullptr ||
                          gradients.square_bias != nullptr;
  bool needs_rows_gradient = needs_a_gradient;
  for (int64_t i = 0; i < p.branch_count; ++i) {
    const BranchGradients& wanted = gradients.branches[i];
    needs_a = needs_a || wanted.row_weight != nullptr;
    needs_rows = needs_rows || wanted.column_weight != nullptr;
    needs_rows_gradient =
        needs_rows_gradient || wanted.row_weight != nullptr || wanted.row_bias != nullptr;
  }
  if (needs_a || needs_rows || gradients.square_weight != nullptr) {
    square_stage(p, static_cast<const S*>(p.x) + offset, w);
  }
  if (needs_rows) all_rows(w, w.a);

  const double gradient_sum = plane_sum(w, w.gradient);
  PartialOffsets offsets;
  double* square_partial = partial + offsets.take(p.square_size * p.square_size);
  double* square_bias_partial = partial + offsets.take(1);
  for (int64_t i = 0; i < p.branch_count; ++i) {
    const Branch& branch = p.branches[i];
    const BranchGradients& wanted = gradients.branches[i];
    Strip<T>& strip = w.strips[i];
    const int64_t row = strip.row.width, column = strip.column.height;
    // Partial sums of cropped taps stay at the zeros they were given.
    double* row_partial = partial + offsets.take(branch.row_size) + (branch.row_size - row) / 2;
    double* row_bias_partial = partial + offsets.take(1);
    double* column_partial =
        partial + offsets.take(branch.column_size) + (branch.column_size - column) / 2;
    double* column_bias_partial = partial + offsets.take(1);

    *column_bias_partial = gradient_sum;
    if (wanted.column_weight != nullptr) {
      dot<true>(w, w.gradient, strip.rows - column / 2 * w.stride, column, column_partial);
    }
    if (!needs_rows_gradient) continue;
    flip(strip.column);
    const Term<T> term{w.gradient, strip.column};
    correlate(w, &term, 1, static_cast<const T*>(nullptr), T(0), w.rows_gradient[i]);
    if (wanted.row_weight != nullptr) {
      dot<false>(w, w.rows_gradient[i], w.a - row / 2, row, row_partial);
    }
    if (wanted.row_bias != nullptr) *row_bias_partial = plane_sum(w, w.rows_gradient[i]);
  }
  if (!needs_a_gradient) return;

  for (int64_t i = 0; i < p.branch_count; ++i) {
    flip(w.strips[i].row);
    w.terms[i] = {w.rows_gradient[i], w.strips[i].row};
  }
  correlate(w, w.terms, p.branch_count, w.gradient, T(0), w.a_gradient);
  if (p.square_weight == nullptr) {
    if (gradients.x != nullptr) {
      store_plane(w, w.a_gradient, static_cast<S*>(gradients.x) + offset);
    }
    return;
  }
  if (gradients.square_bias != nullptr) *square_bias_partial = plane_sum(w, w.a_gradient);
  if (gradients.square_weight != nullptr) {
    const int64_t cut_y = (p.square_size - w.square.height) / 2;
    const int64_t cut_x = (p.square_size - w.square.width) / 2;
    for (int64_t t = 0; t < w.square.height; ++t) {
      dot<false>(w, w.a_gradient, w.x + (t - w.square.height / 2) * w.stride - w.square.width / 2,
                 w.square.width, square_partial + (cut_y + t) * p.square_size + cut_x);
    }
  }
  if (gradients.x != nullptr) {
    flip(w.square);
    const Term<T> term{w.a_gradient, w.square};
    // dy is no longer needed: its buffer takes dx.
    correlate(w, &term, 1, static_cast<const T*>(nullptr), T(0), w.gradient);
    store_plane(w, w.gradient, static_cast<S*>(gradients.x) + offset);
  }
}

// Sums `count` taps over the batch into channel c of a gradient.
template <typename S>
void reduce_taps(const Problem& p, int64_t c, const double* partials, int64_t stride, int64_t first,
                 int64_t count, void* gradient) {
  if (gradient == nullptr) return;
  for (int64_t t = 0; t < count; ++t) {
    double total = 0;
    for (int64_t n = 0; n < p.n; ++n) total += partials[(n * p.c + c) * stride + first + t];
    S& to = static_cast<S*>(gradient)[c * count + t];
    narrow(to, static_cast<decltype(widen(to))>(total));
  }
}

template <typename S>
void reduce_channel(const Problem& p, const Gradients& gradients, int64_t c,
                    const double* partials) {
  const int64_t stride = partial_size(p);
  PartialOffsets offsets;
  const auto reduce = [&](int64_t count, void* gradient) {
    reduce_taps<S>(p, c, partials, stride, offsets.take(count), count, gradient);
  };
  reduce(p.square_size * p.square_size, gradients.square_weight);
  reduce(1, gradients.square_bias);
  for (int64_t i = 0; i < p.branch_count; ++i) {
    reduce(p.branches[i].row_size, gradients.branches[i].row_weight);
    reduce(1, gradients.branches[i].row_bias);
    reduce(p.branches[i].column_size, gradients.branches[i].column_weight);
    reduce(1, gradients.branches[i].column_bias);
  }
}

// ---- by element type ----------------------------------------------------------------------------

size_t backward_scratch(const Problem& p) {
  return by_dtype(p.dtype, [&](auto element) {
    Arena counting;
    backward_space<Compute<decltype(element)>>(p, counting);
    return static_cast<size_t>(counting.used);
  });
}

void backward_plane_any(const Problem& p, const Gradients& gradients, int64_t plane,
                        double* partial, void* scratch) {
  by_dtype(p.dtype, [&](auto element) {
    using S = decltype(element);
    backward_plane<S, Compute<S>>(p, gradients, plane, partial, scratch);
  });
}

void reduce_channel_any(const Problem& p, const Gradients& gradients, int64_t c,
                        const double* partials) {
  by_dtype(p.dtype,
           [&](auto element) { reduce_channel<decltype(element)>(p, gradients, c, partials); });
}

}  // namespace

// `extern` because a const object is otherwise local to its file.
extern const strip_conv::BackwardKernels strip_conv_backward_kernels;
const strip_conv::BackwardKernels strip_conv_backward_kernels = {
    backward_scratch, partial_size, backward_plane_any, reduce_channel_any};

}  // namespace famseg::FAMSEG_ISA
