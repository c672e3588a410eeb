// Products of bfloat16 matrices on AMX tiles: C (16 x 16 float) += A (16 x 32) B (32 x 16).
//
// A tile is 16 rows of 64 bytes, read from memory at any stride, negative and overlapping ones
// included. A has rows of 32 consecutive elements. B has its rows in pairs ("VNNI"): row p of the
// tile is B[2p][0], B[2p + 1][0], B[2p][1], B[2p + 1][1] ... A product takes 16 cycles a core and
// its result 52: keep four sums going. Subnormal elements count as zero.
//
// For kernel files of the instruction set `amx` only. Inline assembly, because the compilers'
// intrinsics want tile numbers as literals, and because it is the same text for all compilers.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "common/half.h"
#include "common/simd.h"

namespace famseg::FAMSEG_ISA {

constexpr int kTiles = 8;
constexpr int kTileRows = 16;
constexpr int kTileBytes = 64;  // of a row
constexpr int kTileDepth = 32;  // columns of A, rows of B

// AddressSanitizer does not see what assembly reads, and not every machine that debugs has tiles.
#if defined(__AMX_BF16__) && !defined(__SANITIZE_ADDRESS__)

// Configures this thread's tiles; without one of these alive, tile instructions are illegal.
// Released at the end: a thread with tiles in use costs 8 KB more at every context switch.
class TileScope {
 public:
  TileScope() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } configuration;
    for (int tile = 0; tile < kTiles; ++tile) {
      configuration.row_bytes[tile] = kTileBytes;
      configuration.rows[tile] = kTileRows;
    }
    asm volatile("ldtilecfg %0" ::"m"(configuration));
  }
  ~TileScope() { asm volatile("tilerelease"); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

template <int TILE>
[[gnu::always_inline]] inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(TILE));
}

template <int TILE>
[[gnu::always_inline]] inline void tile_load(const void* first, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(first), "r"(stride_bytes), "i"(TILE)
               : "memory");
}

template <int TILE>
[[gnu::always_inline]] inline void tile_store(void* first, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(first), "r"(stride_bytes), "i"(TILE)
               : "memory");
}

// SUM += A B
template <int SUM, int A, int B>
[[gnu::always_inline]] inline void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(A), "i"(B));
}

#else

struct Tile {
  char row[kTileRows][kTileBytes];
};

struct TileScope {
  TileScope() {}  // so that an unused one is no warning
  static Tile& tile(int index) {
    static thread_local Tile tiles[kTiles];
    return tiles[index];
  }
};

template <int TILE>
void tile_zero() {
  TileScope::tile(TILE) = {};
}

template <int TILE>
void tile_load(const void* first, int64_t stride_bytes) {
  const char* row = static_cast<const char*>(first);
  for (int i = 0; i < kTileRows; ++i, row += stride_bytes) {
    __builtin_memcpy(TileScope::tile(TILE).row[i], row, kTileBytes);
  }
}

template <int TILE>
void tile_store(void* first, int64_t stride_bytes) {
  char* row = static_cast<char*>(first);
  for (int i = 0; i < kTileRows; ++i, row += stride_bytes) {
    __builtin_memcpy(row, TileScope::tile(TILE).row[i], kTileBytes);
  }
}

template <int SUM, int A, int B>
void tile_multiply() {
  float sum[16][16];
  Bfloat16 a[16][16][2], b[16][16][2];
  __builtin_memcpy(sum, TileScope::tile(SUM).row, sizeof sum);
  __builtin_memcpy(a, TileScope::tile(A).row, sizeof a);
  __builtin_memcpy(b, TileScope::tile(B).row, sizeof b);
  for (int i = 0; i < 16; ++i) {
    for (int p = 0; p < 16; ++p) {
      for (int j = 0; j < 16; ++j) {
        sum[i][j] += to_float(a[i][p][0]) * to_float(b[p][j][0]) +
                     to_float(a[i][p][1]) * to_float(b[p][j][1]);
      }
    }
  }
  __builtin_memcpy(TileScope::tile(SUM).row, sum, sizeof sum);
}

#endif

// 32 consecutive bfloat16 from two vectors of floats, rounded to nearest even.
[[gnu::always_inline]] inline Vector<uint16_t> round_to_bfloat16(Vector<float> first,
                                                                 Vector<float> second) {
  return reinterpret_cast<Vector<uint16_t>>(
      _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first)));
}

// The same as pairs (even[i], odd[i]): two rows of a matrix become one row of B.
[[gnu::always_inline]] inline Vector<uint16_t> round_to_bfloat16_pairs(Vector<float> even,
                                                                       Vector<float> odd) {
  const Vector<uint16_t> order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                  8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return reinterpret_cast<Vector<uint16_t>>(_mm512_permutexvar_epi16(
      reinterpret_cast<__m512i>(order), reinterpret_cast<__m512i>(round_to_bfloat16(even, odd))));
}

}  // namespace famseg::FAMSEG_ISA
