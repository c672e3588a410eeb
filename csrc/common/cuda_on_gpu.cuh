// What kernel texts ask of the compiler, for nvcc. Its twin for g++ is cuda_on_cpu.h, which also
// imitates the runtime: a kernel text includes neither, its .cu file includes common/cuda.h first.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/dtype.h"

namespace famseg {

using Bfloat16 = __nv_bfloat16;
using Float16 = __half;

__device__ inline float widen(float value) {
  return value;
}
__device__ inline float widen(Float16 value) {
  return __half2float(value);
}
__device__ inline float widen(Bfloat16 value) {
  return __bfloat162float(value);
}
__device__ inline void narrow(float& to, float from) {
  to = from;
}
__device__ inline void narrow(Float16& to, float from) {
  to = __float2half_rn(from);
}
__device__ inline void narrow(Bfloat16& to, float from) {
  to = __float2bfloat16_rn(from);
}

// The block's dynamic shared memory, aligned for ldmatrix and 16-byte accesses.
__device__ inline void* shared_memory() {
  extern __shared__ __align__(128) char dynamic_shared[];
  return dynamic_shared;
}

// Two numbers in a register, the first in the lower half.
template <typename T>
__device__ unsigned pack(float first, float second);
template <>
__device__ inline unsigned pack<Float16>(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return *reinterpret_cast<const unsigned*>(&pair);
}
template <>
__device__ inline unsigned pack<Bfloat16>(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const unsigned*>(&pair);
}

// ldmatrix and mma.sync: what they do is written out in cuda_on_cpu.h.
template <bool TRANSPOSED>
__device__ inline void load_matrices(unsigned (&registers)[4], const void* row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
  }
}

template <typename T>
__device__ void multiply_add(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]);
template <>
__device__ inline void multiply_add<Float16>(float (&sum)[4], const unsigned (&a)[4],
                                             const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ inline void multiply_add<Bfloat16>(float (&sum)[4], const unsigned (&a)[4],
                                              const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace famseg
