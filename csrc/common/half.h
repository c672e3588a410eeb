// bfloat16 and float16 in memory, float in arithmetic: conversions that round to nearest even,
// keep NaN a NaN, and handle subnormals.
//
// Bit arithmetic without branches, so that a loop over a row becomes vector code on every
// instruction set; the same bits everywhere. In the namespace of the instruction set: see simd.h.
#pragma once

#include <cstdint>

#include "common/simd.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace famseg::FAMSEG_ISA {

struct Bfloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

[[gnu::always_inline]] inline uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

[[gnu::always_inline]] inline float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

[[gnu::always_inline]] inline float to_float(Bfloat16 value) {
  return float_of(static_cast<uint32_t>(value.bits) << 16);
}

[[gnu::always_inline]] inline float to_float(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  // Exponent bias 15 to 127; infinity and NaN (exponent 31) go on to exponent 255.
  const uint32_t special = magnitude >= 0x7c00u ? 112u << 23 : 0u;
  const uint32_t normal = (magnitude << 13) + (112u << 23) + special;
  // A subnormal is an integer times 2^-24.
  const uint32_t subnormal =
      bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return float_of(sign | (magnitude < 0x0400u ? subnormal : normal));
}

[[gnu::always_inline]] inline Bfloat16 to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(is_nan ? quiet_nan : rounded)};
}

[[gnu::always_inline]] inline Float16 to_float16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Rebias, round the 13 bits that go away; a carry runs into the exponent and up to infinity.
  const uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 0.5 makes the FPU round at 2^-24, the subnormals' spacing.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  // 65520 and above rounds to infinity.
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  return {static_cast<uint16_t>(sign | result)};
}

// One name for all element types of memory.
[[gnu::always_inline]] inline float widen(float value) {
  return value;
}
[[gnu::always_inline]] inline double widen(double value) {
  return value;
}
[[gnu::always_inline]] inline float widen(Bfloat16 value) {
  return to_float(value);
}
[[gnu::always_inline]] inline float widen(Float16 value) {
  return to_float(value);
}

[[gnu::always_inline]] inline void narrow(float& to, float from) {
  to = from;
}
[[gnu::always_inline]] inline void narrow(double& to, double from) {
  to = from;
}
[[gnu::always_inline]] inline void narrow(Bfloat16& to, float from) {
  to = to_bfloat16(from);
}
[[gnu::always_inline]] inline void narrow(Float16& to, float from) {
  to = to_float16(from);
}

// ---- vectors --------------------------------------------------------------------------------

// One vector of the arithmetic from elements of memory.
[[gnu::always_inline]] inline Vector<float> load_wide(const float* p) {
  return load(p);
}
[[gnu::always_inline]] inline Vector<double> load_wide(const double* p) {
  return load(p);
}

[[gnu::always_inline]] inline Vector<float> load_wide(const Bfloat16* p) {
  typedef uint16_t Bits __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
  const auto bits = *reinterpret_cast<const Bits*>(p);
  return reinterpret_cast<Vector<float>>(__builtin_convertvector(bits, Vector<uint32_t>) << 16);
}

[[gnu::always_inline]] inline Vector<float> load_wide(const Float16* p) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vector<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

[[gnu::always_inline]] inline void store_narrow(float* p, Vector<float> v) {
  store(p, v);
}
[[gnu::always_inline]] inline void store_narrow(double* p, Vector<double> v) {
  store(p, v);
}

// The vector form of to_bfloat16, which the compiler does not find within larger loops; the result
// is in the upper halves.
[[gnu::always_inline]] inline Vector<uint32_t> bfloat16_bits(Vector<float> v) {
  const auto bits = reinterpret_cast<Vector<uint32_t>>(v);
  const Vector<uint32_t> rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return v == v ? rounded : bits | 0x400000;
}

[[gnu::always_inline]] inline void store_narrow(Bfloat16* p, Vector<float> v) {
  typedef uint16_t Bits __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
  *reinterpret_cast<Bits*>(p) = __builtin_convertvector(bfloat16_bits(v) >> 16, Bits);
}

[[gnu::always_inline]] inline void store_narrow(Float16* p, Vector<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; ++i) narrow(p[i], v[i]);
#endif
}

}  // namespace famseg::FAMSEG_ISA
