// Kernels with and without a fault: shows that the emulation finds it.

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
  cuda_on_cpu::reverse_order = reverse;
  cuda_on_cpu::launch({blocks}, {64}, 0, [&] {
    if (barrier) {
      reverse_block<true>(in, out);
    } else {
      reverse_block<false>(in, out);
    }
  });
}

// False: half of the threads wait for the block, the others for their warp.
extern "C" bool divergent_barriers_run() {
  try {
    cuda_on_cpu::launch({1}, {64}, 0, [] {
      if (threadIdx.x % 2 == 0) {
        __syncthreads();
      } else {
        __syncwarp();
      }
    });
  } catch (const std::logic_error&) {
    return false;
  }
  return true;
}

struct alignas(4 * sizeof(float)) Four {
  float value[4];
};

__global__ void copy_fours(const float* in, float* out) {
  const Four four = reinterpret_cast<const Four*>(in)[threadIdx.x];
  reinterpret_cast<Four*>(out)[threadIdx.x] = four;
}

// What the launch throws, or nothing.
extern "C" const char* copy_four_by_four(const float* in, float* out, unsigned threads) {
  static std::string thrown;
  thrown.clear();
  try {
    cuda_on_cpu::launch({1}, {threads}, 0, [&] { copy_fours(in, out); });
  } catch (const std::runtime_error& error) {
    thrown = error.what();
  }
  return thrown.c_str();
}
