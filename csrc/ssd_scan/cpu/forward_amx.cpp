// The forward pass of ssd_scan and ssd_scan_2d for bfloat16 on AMX tiles. It is forward.cpp's,
// product for product; this file says how the factors get into tiles.
//
// Steps, decays, L, the sums in tiles and the running states are floats; what enters a product is
// rounded to bfloat16: M, arrive * C, weight * X, and the copy of a state that is read. As that puts
// the decays into the factors, all three products of Y go into one sum, which stays in tiles.
//
//   product                    left (rows of tokens or states)     right (pairs of rows, see amx.h)
//   G = C B^T                  C                                   B^T
//   Y = M X + C' S (+ C' S)    M, C' = arrive * C                  X, S
//   S = through * S + B^T X'   B^T                                 X' = weight * X
//
// So B is transposed twice, by pairs of elements and by elements, once a chunk for all heads; and a
// state is rounded into pairs of rows by the same loop that multiplies it by `through`.
//
// Final states are floats, and rounded factors would cost them their digits: calls that want them
// go to forward.cpp.

#include "common/amx.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "ssd_scan/cpu/chunk.h"
#include "ssd_scan/cpu/matrix.h"
#include "ssd_scan/cpu/output.h"
#include "ssd_scan/cpu/steps.h"

namespace famseg::FAMSEG_ISA {
namespace {

// Tokens of a chunk: whole tiles of depth. Products are cheap in tiles and states dear around them,
// so chunks are longer than in forward.cpp.
int64_t chunk_tokens(const Problem& p) {
  return p.tokens() > kTileDepth ? 2 * kTileDepth : kTileDepth;
}

// ---- products -----------------------------------------------------------------------------------

// A product a b with `depth` tiles of depth; strides in elements. Rows of b are pairs of rows.
struct Term {
  const uint16_t* a;
  int64_t a_stride;
  const uint16_t* b;
  int64_t b_stride;
  int64_t depth;
};

// Sums are tiles 0 to 3, left factors 4 and 5, right factors 6 and 7.
template <int COLUMNS>
void multiply_tiles(const Term* terms, int count, int64_t row, int64_t column, float* out,
                    int64_t out_stride) {
  float* at = out + row * out_stride + column;
  const int64_t bytes = out_stride * 4;
  float* below = at + kTileRows * out_stride;
  tile_zero<0>();
  if constexpr (COLUMNS == 2) tile_zero<1>();
  tile_zero<2>();
  if constexpr (COLUMNS == 2) tile_zero<3>();
  for (int i = 0; i < count; ++i) {
    const Term& term = terms[i];
    for (int64_t k = 0; k < term.depth; ++k) {
      const uint16_t* a = term.a + row * term.a_stride + k * kTileDepth;
      const uint16_t* b = term.b + k * kTileRows * term.b_stride + 2 * column;
      tile_load<4>(a, term.a_stride * 2);
      tile_load<6>(b, term.b_stride * 2);
      tile_multiply<0, 4, 6>();
      if constexpr (COLUMNS == 2) {
        tile_load<7>(b + 32, term.b_stride * 2);
        tile_multiply<1, 4, 7>();
      }
      tile_load<5>(a + kTileRows * term.a_stride, term.a_stride * 2);
      tile_multiply<2, 5, 6>();
      if constexpr (COLUMNS == 2) tile_multiply<3, 5, 7>();
    }
  }
  tile_store<0>(at, bytes);
  if constexpr (COLUMNS == 2) tile_store<1>(at + 16, bytes);
  tile_store<2>(below, bytes);
  if constexpr (COLUMNS == 2) tile_store<3>(below + 16, bytes);
}

// out (rows, columns) = the sum of the terms; rows in 32s, columns in 16s.
void multiply(const Term* terms, int count, int64_t rows, int64_t columns, float* out,
              int64_t out_stride) {
  for (int64_t row = 0; row < rows; row += 2 * kTileRows) {
    int64_t column = 0;
    for (; column + 32 <= columns; column += 32) {
      multiply_tiles<2>(terms, count, row, column, out, out_stride);
    }
    if (column < columns) {
      multiply_tiles<1>(terms, count, row, column, out, out_stride);
    }
  }
}

// ---- buffers ------------------------------------------------------------------------------------

struct Side {
  uint16_t* b;             // (chunk, d_state)
  uint16_t* c;             // (chunk, d_state)
  uint16_t* b_pairs;       // (d_state / 2, chunk) pairs: the right factor of G
  uint16_t* b_transposed;  // (d_state, chunk): the left factor of S
  float* gram;             // (chunk, chunk)
};

struct Workspace : Sizes<float> {
  int64_t segment, segments;  // as in forward.cpp
  int64_t* pixels;            // (chunk)
  Steps<float> steps[2];
  Side side[2];
  Output<float> out;
  uint16_t* x_rows;   // (chunk, headdim)
  float* x;           // (chunk, headdim)
  uint16_t* x_pairs;  // (chunk / 2, headdim) pairs
  uint16_t* x_weighted;
  uint16_t* c_arriving[2];  // (chunk, d_state)
  float* mixing;            // (chunk, chunk)
  uint16_t* mixing_rounded;
  float* added;           // (d_state, headdim) what a chunk adds to a state
  float* state[2];        // (heads, d_state, headdim) at the chunk at hand
  uint16_t* state_pairs;  // (heads, d_state / 2, headdim) pairs, side 0's
  uint16_t* entering;     // (heads, chunks of a segment, d_state / 2, headdim) pairs, side 1's
  float* handed;          // (heads, segments, d_state, headdim) side 1's at each segment's end

  int64_t state_size() const { return n * p; }
};

Workspace lay_out(const Problem& p, int64_t heads, Arena& arena) {
  Workspace w{};
  static_cast<Sizes<float>&>(w) = sizes_of<float>(p, chunk_tokens(p));
  w.n = round_up(p.d_state, kTileDepth);
  w.pixels = arena.take<int64_t>(w.chunk);
  for (int64_t s = 0; s < w.sides; ++s) {
    w.steps[s] = take_steps<float>(heads * w.padded_tokens, arena);
    w.c_arriving[s] = arena.take<uint16_t>(w.chunk * w.n);
    w.state[s] = arena.take<float>(heads * w.state_size());
    Side& side = w.side[s];
    if (s == 1 && w.shared) {
      side = w.side[0];
      continue;
    }
    side.b = arena.take<uint16_t>(w.chunk * w.n);
    side.c = arena.take<uint16_t>(w.chunk * w.n);
    side.b_pairs = arena.take<uint16_t>(w.chunk * w.n);
    side.b_transposed = arena.take<uint16_t>(w.chunk * w.n);
    side.gram = arena.take<float>(w.chunk * w.chunk);
  }
  w.out = take_output<Bfloat16>(w, heads, arena);
  w.x_rows = arena.take<uint16_t>(w.chunk * w.p);
  w.x = arena.take<float>(w.chunk * w.p);
  w.x_pairs = arena.take<uint16_t>(w.chunk * w.p);
  w.x_weighted = arena.take<uint16_t>(w.chunk * w.p);
  w.mixing = arena.take<float>(w.chunk * w.chunk);
  w.mixing_rounded = arena.take<uint16_t>(w.chunk * w.chunk);
  w.added = arena.take<float>(w.state_size());
  w.state_pairs = arena.take<uint16_t>(heads * w.state_size());
  w.segment = segment_chunks(w.chunks, heads * w.state_size() * 2);
  w.segments = (w.chunks + w.segment - 1) / w.segment;
  if (w.sides == 2) {
    w.entering = arena.take<uint16_t>(heads * w.segment * w.state_size());
    if (w.segments > 1) w.handed = arena.take<float>(heads * w.segments * w.state_size());
  }
  return w;
}

// ---- factors ------------------------------------------------------------------------------------

// 16 consecutive elements as floats.
[[gnu::always_inline]] inline Vector<float> widen_row(const uint16_t* from) {
  return reinterpret_cast<Vector<float>>(_mm512_slli_epi32(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), 16));
}

// What the tokens of a chunk hold of a tensor, zeros up to the stride and down to `rows` rows. Rows
// are short: masks instead of loops for what is no whole vector.
void pack_rows(const void* tensor, int64_t offset, int64_t pixel_stride, int64_t width,
               const int64_t* pixels, int64_t count, int64_t rows, uint16_t* to, int64_t stride) {
  const uint16_t* from = static_cast<const uint16_t*>(tensor) + offset;
  for (int64_t i = 0; i < stride; i += 16) {
    const int64_t rest = max(width - i, 0);
    const __mmask16 mask = static_cast<__mmask16>(rest >= 16 ? 0xffff : (1 << rest) - 1);
    for (int64_t t = 0; t < count; ++t) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + t * stride + i),
                          _mm256_maskz_loadu_epi16(mask, from + pixels[t] * pixel_stride + i));
    }
  }
  clear(to + count * stride, (rows - count) * stride);
}

void pack_matrix(const Problem& p, const Workspace& w, const void* matrix, const Block& block,
                 int64_t direction, int64_t count, uint16_t* to) {
  pack_rows(matrix, matrix_offset(p, block, direction), p.matrices * p.groups * p.d_state,
            p.d_state, w.pixels, count, w.chunk, to, w.n);
}

// B^T of a chunk, as pairs and as rows.
void transpose_b(const Workspace& w, const Side& side) {
  transpose(reinterpret_cast<const float*>(side.b), w.n / 2, w.chunk, w.n / 2,
            reinterpret_cast<float*>(side.b_pairs), w.chunk);
  // Element 2k of all tokens is the lower half of pair k, element 2k + 1 the upper one.
  Vector<uint16_t> lower, upper;
  for (int i = 0; i < 32; ++i) {
    lower[i] = static_cast<uint16_t>(2 * i);
    upper[i] = static_cast<uint16_t>(2 * i + 1);
  }
  for (int64_t k = 0; k < w.n / 2; ++k) {
    for (int64_t t = 0; t < w.chunk; t += 32) {
      const uint16_t* pairs = side.b_pairs + 2 * (k * w.chunk + t);
      const __m512i first = _mm512_loadu_si512(pairs), second = _mm512_loadu_si512(pairs + 32);
      uint16_t* row = side.b_transposed + 2 * k * w.chunk + t;
      _mm512_storeu_si512(
          row, _mm512_permutex2var_epi16(first, reinterpret_cast<__m512i>(lower), second));
      _mm512_storeu_si512(row + w.chunk, _mm512_permutex2var_epi16(
                                             first, reinterpret_cast<__m512i>(upper), second));
    }
  }
}

void load_matrices(const Problem& p, const Workspace& w, const Block& block, int64_t axis,
                   int64_t count) {
  for (int64_t s = 0; s < (w.shared ? 1 : w.sides); ++s) {
    const Side& side = w.side[s];
    pack_matrix(p, w, p.B, block, 2 * axis + s, count, side.b);
    pack_matrix(p, w, p.C, block, 2 * axis + s, count, side.c);
    transpose_b(w, side);
    const Term term{side.c, w.n, side.b_pairs, 2 * w.chunk, w.n / kTileDepth};
    multiply(&term, 1, w.chunk, w.chunk, side.gram, w.chunk);
  }
}

void load_x(const Problem& p, const Workspace& w, const Block& block, int64_t h, int64_t count) {
  pack_rows(p.x, (block.batch * p.tokens() * p.heads + block.head + h) * p.headdim,
            p.heads * p.headdim, p.headdim, w.pixels, count, w.chunk, w.x_rows, w.p);
}

// Pairs of rows of X; `floats`: also as floats.
void pair_x(const Workspace& w, bool floats) {
  for (int64_t t = 0; t < w.chunk; t += 2) {
    for (int64_t i = 0; i < w.p; i += 16) {
      const Vector<float> even = widen_row(w.x_rows + t * w.p + i);
      const Vector<float> odd = widen_row(w.x_rows + (t + 1) * w.p + i);
      store(w.x_pairs + t * w.p + 2 * i, round_to_bfloat16_pairs(even, odd));
      if (!floats) continue;
      store(w.x + t * w.p + i, even);
      store(w.x + (t + 1) * w.p + i, odd);
    }
  }
}

// Pairs of rows of weight * X.
void weight_x(const Workspace& w, const float* weight) {
  for (int64_t t = 0; t < w.chunk; t += 2) {
    for (int64_t i = 0; i < w.p; i += 16) {
      store(w.x_weighted + t * w.p + 2 * i,
            round_to_bfloat16_pairs(widen_row(w.x_rows + t * w.p + i) * weight[t],
                                    widen_row(w.x_rows + (t + 1) * w.p + i) * weight[t + 1]));
    }
  }
}

// arrive * C.
void arrive_c(const Workspace& w, const uint16_t* c, const float* arrive, uint16_t* to) {
  for (int64_t t = 0; t < w.chunk; ++t) {
    for (int64_t n = 0; n < w.n; n += 32) {
      const __m512i both = _mm512_loadu_si512(c + t * w.n + n);
      const Vector<float> even = reinterpret_cast<Vector<float>>(_mm512_slli_epi32(both, 16));
      const Vector<float> odd = reinterpret_cast<Vector<float>>(
          _mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
      store(to + t * w.n + n, round_to_bfloat16_pairs(even * arrive[t], odd * arrive[t]));
    }
  }
}

// M, rounded.
void mix_rounded(const Workspace& w, int64_t at, int64_t count) {
  float* const no_decays = nullptr;
  mix<false>(w, w.side[0].gram, w.steps[0], at, count, no_decays, w.mixing);
  if (w.sides == 2) mix<true>(w, w.side[1].gram, w.steps[1], at, count, no_decays, w.mixing);
  for (int64_t i = 0; i < count * w.chunk; i += 32) {
    store(w.mixing_rounded + i, round_to_bfloat16(load(w.mixing + i), load(w.mixing + i + 16)));
  }
}

// added = (weight * B)^T X: what a chunk adds to a state.
void add_tokens(const Workspace& w, int64_t s, int64_t at) {
  weight_x(w, w.steps[s].weight + at);
  const Term update{w.side[s].b_transposed, w.chunk, w.x_weighted, 2 * w.p, w.chunk / kTileDepth};
  multiply(&update, 1, w.n, w.p, w.added, w.p);
}

// state = keep * state + added, and the same rounded as pairs of rows.
void pass_state(const Workspace& w, float keep, float* state, uint16_t* pairs) {
  for (int64_t n = 0; n < w.n; n += 2) {
    for (int64_t i = n * w.p; i < (n + 1) * w.p; i += 16) {
      const Vector<float> even = load(state + i) * keep + load(w.added + i);
      const Vector<float> odd = load(state + i + w.p) * keep + load(w.added + i + w.p);
      store(state + i, even);
      store(state + i + w.p, odd);
      store(pairs + 2 * i - n * w.p, round_to_bfloat16_pairs(even, odd));
    }
  }
}

void round_state(const Workspace& w, const float* state, uint16_t* pairs) {
  for (int64_t n = 0; n < w.n; n += 2) {
    for (int64_t i = n * w.p; i < (n + 1) * w.p; i += 16) {
      store(pairs + 2 * i - n * w.p,
            round_to_bfloat16_pairs(load(state + i), load(state + i + w.p)));
    }
  }
}

// ---- the pass -----------------------------------------------------------------------------------

// Side 1 through segment g, as in forward.cpp.
void scan_reverse(const Problem& p, Workspace& w, const Block& block, int64_t axis, int64_t g,
                  bool hand_on) {
  const int64_t size = w.state_size(), first = g * w.segment;
  const int64_t last = min(first + w.segment, w.chunks) - 1;
  const auto entering = [&](int64_t h, int64_t c) {
    return w.entering + (h * w.segment + c - first) * size;
  };
  for (int64_t h = 0; h < block.heads; ++h) {
    float* state = w.state[1] + h * size;
    if (g == w.segments - 1) {
      clear(state, size);
    } else {
      copy_row(w.handed + (h * w.segments + g) * size, size, state);
      round_state(w, state, entering(h, last));
    }
  }
  for (int64_t c = last; c >= (hand_on ? first : first + 1); --c) {
    const int64_t count = w.count(c);
    locate(w, axis_of(p, axis), c, w.pixels);
    pack_matrix(p, w, p.B, block, 2 * axis + 1, count, w.side[1].b);
    transpose_b(w, w.side[1]);
    fetch_chunk<Bfloat16>(p, w, nullptr, block, axis, c - 1);
    for (int64_t h = 0; h < block.heads; ++h) {
      const int64_t at = h * w.padded_tokens + c * w.chunk;
      load_x(p, w, block, h, count);
      add_tokens(w, 1, at);
      pass_state(w, through(w, w.steps[1], 1, at), w.state[1] + h * size,
                 entering(h, max(c - 1, first)));
    }
  }
  for (int64_t h = 0; hand_on && h < block.heads; ++h) {
    copy_row(w.state[1] + h * size, size, w.handed + (h * w.segments + g - 1) * size);
  }
}

void scan_chunk(const Problem& p, Workspace& w, const Block& block, int64_t axis, int64_t c,
                const Destination& to) {
  const int64_t count = w.count(c), last = w.chunks - 1, size = w.state_size();
  locate(w, axis_of(p, axis), c, w.pixels);
  load_matrices(p, w, block, axis, count);
  fetch_chunk<Bfloat16>(p, w, nullptr, block, axis, c + 1);
  for (int64_t h = 0; h < block.heads; ++h) {
    const int64_t at = h * w.padded_tokens + c * w.chunk;
    uint16_t* pairs = w.state_pairs + h * size;
    load_x(p, w, block, h, count);
    pair_x(w, axis == 0 && p.D != nullptr);
    mix_rounded(w, at, count);
    Term terms[3] = {{w.mixing_rounded, w.chunk, w.x_pairs, 2 * w.p, w.chunk / kTileDepth}};
    int used = 1;
    const auto read = [&](int64_t s, const uint16_t* state) {
      arrive_c(w, w.side[s].c, w.steps[s].arrive + at, w.c_arriving[s]);
      terms[used++] = {w.c_arriving[s], w.n, state, 2 * w.p, w.n / kTileDepth};
    };
    if (c > 0 || p.initial_states != nullptr) read(0, pairs);
    if (w.sides == 2 && c < last) read(1, w.entering + (h * w.segment + c % w.segment) * size);
    multiply(terms, used, w.chunk, w.p, w.out.y, w.p);
    finish_rows<Bfloat16>(p, w, w.out, block, h, axis, w.pixels, count, w.x, to);
    if (c == last) continue;
    add_tokens(w, 0, at);
    pass_state(w, through(w, w.steps[0], 0, at), w.state[0] + h * size, pairs);
  }
}

size_t scratch(const Problem& p, int64_t heads) {
  Arena counting;
  lay_out(p, heads, counting);
  return static_cast<size_t>(counting.used);
}

void run(const Problem& p, const Destination& to, const Block& block, void* scratch) {
  const FlushToZero guard;
  const TileScope tiles;
  Arena arena{static_cast<char*>(scratch)};
  Workspace w = lay_out(p, block.heads, arena);
  const int64_t size = w.state_size();
  for (int64_t h = 0; h < block.heads; ++h) load_skip(p, block.head + h, w.p, w.out.skip + h * w.p);
  for (int64_t axis = 0; axis < w.axes; ++axis) {
    for (int64_t h = 0; h < block.heads; ++h) {
      clear(w.state[0] + h * size, size);
      if (p.initial_states != nullptr) {
        load_state(p, w, block.batch, block.head + h, w.state[0] + h * size);
        round_state(w, w.state[0] + h * size, w.state_pairs + h * size);
      }
      for (int64_t s = 0; s < w.sides; ++s) {
        fill_steps(p, w, block.batch, axis, s, block.head + h, w.steps[s], h * w.padded_tokens);
      }
    }
    for (int64_t g = w.segments - 1; w.sides == 2 && g > 0; --g) {
      scan_reverse(p, w, block, axis, g, true);
    }
    for (int64_t c = 0; c < w.chunks; ++c) {
      if (w.sides == 2 && c % w.segment == 0) {
        scan_reverse(p, w, block, axis, c / w.segment, false);
      }
      scan_chunk(p, w, block, axis, c, to);
    }
  }
}

}  // namespace

// `extern` because a const object is otherwise local to its file.
extern const ssd_scan::BlockKernel ssd_scan_bf16_block;
const ssd_scan::BlockKernel ssd_scan_bf16_block = {scratch, run};

}  // namespace famseg::FAMSEG_ISA
