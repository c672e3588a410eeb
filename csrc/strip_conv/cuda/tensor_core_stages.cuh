// Strip convolution 5 + (7, 11, 21) of 16-bit numbers on tensor cores: tiles in shared memory, and
// the products that a block's warps make of them; tensor_core_strips.cuh is made of these. Kernel
// text only, like fma_stages.cuh. docs/design/toeplitz.md has the figure.
//
// A convolution along a line is a product with a banded Toeplitz matrix: eight neighbouring outputs
// are 16 or 32 inputs times a 16 x 8 or 32 x 8 matrix that holds the kernel, shifted down by one
// from column to column. The matrix is the same everywhere along the line: a channel has 15 of
// them, 4 KB in shared memory, built once and used for several images; a stage keeps its five in
// registers.
//
//   stage    inputs of 8 outputs from      m16n8k16 for 16 x 8    multiply-adds an element
//   square   -4, for each of 5 rows        5                      80
//   row_i    21, 11: -12; 7: -4            2 + 2 + 1              80
//   col_i    the same                      2 + 2 + 1              80
//
// 240 against 103 on FMA units that are 15 times slower: 0.5 ps an element at an H200's full rate,
// where FMAs need 3.1 and memory 0.8. Shared memory needs more: inputs are read once for each of
// the five rows (10 bytes an element), once along v (2), once for each branch along u (6); with
// what is staged and written some 32 bytes, 1.0 ps. That is the bound.
//
// Neighbouring outputs share inputs: eight new columns (or rows) come with every eight outputs, the
// others stay in registers. col_i runs along u with r_i transposed on its way into registers
// (ldmatrix.trans), so that it has the same form, and the same matrices, as row_i. The gradient of x
// has its stages in reverse order (fma_strips.cuh): there the stage before reads transposed.
//
// Rows of shared memory are odd multiples of 16 bytes: ldmatrix and the stores of results hit all
// banks once. a and r_i are rounded to 16 bits on the way, sums are FP32. A product with a zero of
// the band is not skipped, and 0 times a NaN or an infinity is NaN: a tile that holds one is staged
// again without it, and it is put in its places at the end.
#pragma once

#include <type_traits>

#include "strip_conv/cuda/fma_stages.cuh"

namespace famseg::strip_conv {

// A thread's part of a 16 x 8 matrix: element (k, n) is the tap that takes the input at
// `start` + k to the output at n.
template <typename T>
__device__ void toeplitz(unsigned* part, const T* taps, int size, int start, bool mirrored) {
  const int lane = static_cast<int>(threadIdx.x) % 32, n = lane / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float pair[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int tap = start + 8 * half + 2 * (lane % 4) + i - n + size / 2;
      const bool inside = tap >= 0 && tap < size;
      pair[i] = inside ? widen(taps[mirrored ? size - 1 - tap : tap]) : 0.0f;
    }
    part[half] = pack<T>(pair[0], pair[1]);
  }
}

// A channel's matrices in shared memory, each as its 32 lanes' parts: five of the square's rows,
// then for row_i and for col_i one of 7 and two each of 11 and 21.
template <typename T>
__device__ void build_matrices(unsigned* matrices, const Arguments& args, int channel,
                               bool mirrored) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32, warps = static_cast<int>(blockDim.x) / 32;
  for (int f = warp; f < kMatrices; f += warps) {
    unsigned* part = matrices + (f * 32 + lane) * 2;
    if (f < kSquare) {
      const T* taps = static_cast<const T*>(args.square.weight) +
                      static_cast<long long>(channel) * kSquare * kSquare;
      toeplitz(part, taps + (mirrored ? kSquare - 1 - f : f) * kSquare, kSquare, -4, mirrored);
    } else {
      const int which = (f - kSquare) % 5;
      const Branch& branch = args.branches[(which + 1) / 2];
      const Convolution& side = f < kSquare + 5 ? branch.row : branch.col;
      const T* taps =
          static_cast<const T*>(side.weight) + static_cast<long long>(channel) * side.size;
      const int start = which == 0 ? -4 : (which - 1) % 2 * 16 - kBandLead;
      toeplitz(part, taps, side.size, start, mirrored);
    }
  }
}

// This thread's parts of five matrices.
__device__ inline void load_matrices_from(unsigned (&part)[5][2], const unsigned* matrices,
                                          int first) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int f = 0; f < 5; ++f) {
#pragma unroll
    for (int i = 0; i < 2; ++i) part[f][i] = matrices[((first + f) * 32 + lane) * 2 + i];
  }
}

// 16 x 16 elements from (m, k) on of a matrix in shared memory, stored by rows of m or, TRANSPOSED,
// by rows of k. Registers 0, 1 hold k = 0..7, registers 2, 3 hold k = 8..15.
template <bool TRANSPOSED, typename T>
__device__ void load_fragment(unsigned (&fragment)[4], const T* matrix, int pitch, int m, int k) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row = lane % 8, m_half = lane / 8 % 2 * 8, k_half = lane / 16 * 8;
  const T* from = TRANSPOSED ? matrix + (k + k_half + row) * pitch + m + m_half
                             : matrix + (m + m_half + row) * pitch + k + k_half;
  load_matrices<TRANSPOSED>(fragment, from);
}

// The fragment between two neighbours.
__device__ inline void between(unsigned (&middle)[4], const unsigned (&left)[4],
                               const unsigned (&right)[4]) {
  middle[0] = left[2];
  middle[1] = left[3];
  middle[2] = right[0];
  middle[3] = right[1];
}

// A strip of 16 lines (m) along k: 16 outputs a step, from 16 COUNT inputs of which 16 are new. The
// kernels of 11 and 21 need three fragments, that of 7 two.
template <bool TRANSPOSED, int COUNT, typename T>
struct Sliding {
  unsigned fragment[COUNT][4];

  __device__ void start(const T* matrix, int pitch, int m, int k) {
#pragma unroll
    for (int f = 1; f < COUNT; ++f) {
      load_fragment<TRANSPOSED>(fragment[f], matrix, pitch, m, k + 16 * (f - 1));
    }
  }

  // `k` is the place of the first output's first input.
  __device__ void step(const T* matrix, int pitch, int m, int k) {
#pragma unroll
    for (int f = 1; f < COUNT; ++f) {
#pragma unroll
      for (int i = 0; i < 4; ++i) fragment[f - 1][i] = fragment[f][i];
    }
    load_fragment<TRANSPOSED>(fragment[COUNT - 1], matrix, pitch, m, k + 16 * (COUNT - 1));
  }

  // Outputs 0..7 (half 0) or 8..15 of a kernel of 11 or 21.
  __device__ void wide(float (&sum)[4], const unsigned (&left)[2], const unsigned (&right)[2],
                       int half) const {
    if (half == 0) {
      multiply_add<T>(sum, fragment[0], left);
      multiply_add<T>(sum, fragment[1], right);
    } else {
      unsigned first[4], second[4];
      between(first, fragment[0], fragment[1]);
      between(second, fragment[1], fragment[2]);
      multiply_add<T>(sum, first, left);
      multiply_add<T>(sum, second, right);
    }
  }

  // Of the kernel of 7.
  __device__ void narrow(float (&sum)[4], const unsigned (&band)[2], int half) const {
    if (half == 0) {
      unsigned first[4];
      between(first, fragment[0], fragment[1]);
      multiply_add<T>(sum, first, band);
    } else {
      multiply_add<T>(sum, fragment[1], band);
    }
  }
};

// Zero in rows [from, until) of a matrix of 16-bit numbers whose pitch is a multiple of 4.
template <typename T>
__device__ void zero_rows(T* matrix, int pitch, int from, int until) {
  const int count = (until - from) * pitch;
  for (int i = 4 * static_cast<int>(threadIdx.x); i < count;
       i += 4 * static_cast<int>(blockDim.x)) {
    Four<T> zero;
#pragma unroll
    for (int e = 0; e < 4; ++e) narrow(zero.value[e], 0.0f);
    *reinterpret_cast<Four<T>*>(matrix + from * pitch + i) = zero;
  }
}

// Whether one of the four is not finite: its exponent is all ones, and one more carries.
template <typename T>
__device__ bool not_finite(const Four<T>& four) {
  constexpr bool bfloat16 = std::is_same_v<T, Bfloat16>;
  constexpr unsigned exponents = bfloat16 ? 0x7f807f80u : 0x7c007c00u;
  constexpr unsigned ones = bfloat16 ? 0x00800080u : 0x04000400u;
  const unsigned* pairs = reinterpret_cast<const unsigned*>(four.value);
  const unsigned carried = ((pairs[0] & exponents) + ones) | ((pairs[1] & exponents) + ones);
  return (carried & 0x80008000u) != 0;
}

// to[row * pitch + column] for rows, columns of a region that may reach beyond the image (zero
// there); its first column and width are multiples of 4. `apart`: zero for what is not finite.
// Returns whether this thread has staged something that is not finite.
template <typename T>
__device__ bool stage_image(T* to, int pitch, const T* plane, int row0, int rows, int column0,
                            int columns, bool apart, const Arguments& args) {
  bool found = false;
  const bool vector = args.w % 4 == 0 && reinterpret_cast<size_t>(plane) % (4 * sizeof(T)) == 0;
  for (Walk at(threadIdx.x, blockDim.x, columns / 4); at.slow < rows; at.next()) {
    const int row = row0 + at.slow, column = column0 + 4 * at.fast;
    const T* from = plane + static_cast<long long>(row) * args.w + column;
    Four<T> four;
    if (vector && row >= 0 && row < args.h && column >= 0 && column < args.w) {
      four = *reinterpret_cast<const Four<T>*>(from);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        narrow(four.value[i], 0.0f);
        if (row >= 0 && row < args.h && column + i >= 0 && column + i < args.w) {
          four.value[i] = from[i];
        }
      }
    }
    if (apart) {
      for (int i = 0; i < 4; ++i) {
        if (widen(four.value[i]) * 0.0f != 0.0f) narrow(four.value[i], 0.0f);
      }
    }
    found |= not_finite(four);
    *reinterpret_cast<Four<T>*>(to + at.slow * pitch + 4 * at.fast) = four;
  }
  return found;
}

// NaN into a plane's pixels of a region, where something in `from` is not finite at most `reach`
// rows and columns away. The strips' reaches lie in one another, and where the zeros around the
// image cut one way from pixel to pixel off, there is another one inside.
template <typename To, typename T>
__device__ void spoil(To* plane, const T* from, int reach, int row0, int row1, int column0,
                      int column1, const Arguments& args) {
  for (Walk at(threadIdx.x, blockDim.x, column1 - column0); at.slow < row1 - row0; at.next()) {
    const int row = row0 + at.slow, column = column0 + at.fast;
    const int last_row = min(args.h - 1, row + reach);
    const int last_column = min(args.w - 1, column + reach);
    float sum = 0.0f;
    for (int r = max(0, row - reach); r <= last_row; ++r) {
      const T* line = from + static_cast<long long>(r) * args.w;
      for (int c = max(0, column - reach); c <= last_column; ++c) {
        sum += widen(line[c]) * 0.0f;
      }
    }
    if (sum != 0.0f) narrow(plane[static_cast<long long>(row) * args.w + column], sum);
  }
}

template <typename T>
__device__ void unstage_image(T* plane, const T* from, int pitch, int row0, int row1, int column0,
                              int column1, const Arguments& args) {
  const bool vector = args.w % 4 == 0 && reinterpret_cast<size_t>(plane) % (4 * sizeof(T)) == 0;
  for (Walk at(threadIdx.x, blockDim.x, (column1 - column0 + 3) / 4); at.slow < row1 - row0;
       at.next()) {
    const int column = column0 + 4 * at.fast;
    T* to = plane + static_cast<long long>(row0 + at.slow) * args.w + column;
    const Four<T> four = *reinterpret_cast<const Four<T>*>(from + at.slow * pitch + 4 * at.fast);
    if (vector && column + 4 <= column1) {
      *reinterpret_cast<Four<T>*>(to) = four;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (column + i < column1) to[i] = four.value[i];
      }
    }
  }
}

// The square convolution of `steps` times 16 columns, 16 rows a warp: five products, one for each
// row of the kernel, with the image moved up by a row each. x's row 0 is two rows above the first
// output row, its column 0 four columns left of the first output column. Calls
// store(row, column, value, value of the next column) for every output.
template <typename T, typename Store>
__device__ void square_toeplitz(const T* x, int pitch, int row_tiles, int steps,
                                const unsigned* matrices, float bias, const Store& store) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32, warps = static_cast<int>(blockDim.x) / 32;
  const int segments = (steps + kSegment - 1) / kSegment;
  unsigned band[kSquare][2];
  load_matrices_from(band, matrices, 0);
  for (int task = warp; task < row_tiles * segments; task += warps) {
    const int row = task % row_tiles * 16, first = task / row_tiles * kSegment;
    const int last = min(steps, first + kSegment);
    unsigned right[kSquare][4];
#pragma unroll
    for (int ky = 0; ky < kSquare; ++ky) {
      load_fragment<false>(right[ky], x, pitch, row + ky, 16 * first);
    }
    for (int step = first; step < last; ++step) {
      float sum[2][4] = {{bias, bias, bias, bias}, {bias, bias, bias, bias}};
#pragma unroll
      for (int ky = 0; ky < kSquare; ++ky) {
        multiply_add<T>(sum[0], right[ky], band[ky]);
        unsigned middle[4], left[4] = {right[ky][0], right[ky][1], right[ky][2], right[ky][3]};
        load_fragment<false>(right[ky], x, pitch, row + ky, 16 * step + 16);
        between(middle, left, right[ky]);
        multiply_add<T>(sum[1], middle, band[ky]);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = row + lane / 4, c = 16 * step + 8 * half + 2 * (lane % 4);
        store(r, c, sum[half][0], sum[half][1]);
        store(r + 8, c, sum[half][2], sum[half][3]);
      }
    }
  }
}

}  // namespace famseg::strip_conv
