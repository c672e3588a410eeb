// A kernel with and without its barrier: shows that running fibers in both orders finds the fault.

#include "common/cuda_on_cpu.h"

template <bool BARRIER>
__global__ void reverse_block(const float* in, float* out) {
  __shared__ float staged[64];
  staged[threadIdx.x] = in[blockIdx.x * blockDim.x + threadIdx.x];
  if (BARRIER) __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = staged[blockDim.x - 1 - threadIdx.x];
}

extern "C" void reverse_blocks(const float* in, float* out, unsigned blocks, bool barrier,
                               bool reverse) {
  cuda_on_cpu::launch({blocks}, {64}, reverse, [&] {
    if (barrier) {
      reverse_block<true>(in, out);
    } else {
      reverse_block<false>(in, out);
    }
  });
}
