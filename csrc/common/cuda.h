// CUDA for a .cu file: the real one, or its imitation where a test compiles the file with g++.
#pragma once

#ifdef FAMSEG_CUDA_ON_CPU
#include "common/cuda_on_cpu.h"
#else
#include "common/cuda_on_gpu.cuh"
#endif

#include <stdexcept>
#include <string>

namespace famseg {

// Every call of the runtime goes through here; the operation's launcher adds its name and shapes.
inline void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // takes it back, so that no later call of torch is blamed for it
  throw std::runtime_error(std::string(call) + " failed: " + cudaGetErrorString(status) + " (" +
                           cudaGetErrorName(status) + ")");
}

struct Limits {
  size_t shared_per_block, shared_per_processor;
};

// Of the current device.
inline Limits device_limits() {
  int device = 0, block = 0, processor = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
        "cudaDeviceGetAttribute");
  return {static_cast<size_t>(block), static_cast<size_t>(processor)};
}

// Lets the kernel's blocks have all the dynamic shared memory there is, on the current device.
//
// What was last asked for holds, whichever thread it was, and Python's lock is not held: were it
// what a thread's own launch needs, a smaller launch could take it away from a larger one before
// that is made. All ask for the same, so it does not matter who comes last.
inline void allow_all_shared_memory(const void* kernel) {
  cudaFuncAttributes attributes = {};
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  // The kernel's static shared memory comes out of the same.
  const size_t most = device_limits().shared_per_block - attributes.sharedSizeBytes;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(most)),
        "cudaFuncSetAttribute");
}

template <typename... Parameters, typename... Arguments>
void launch(dim3 grid, unsigned threads, size_t shared_bytes, void* stream,
            void (*kernel)(Parameters...), const Arguments&... arguments) {
  if (shared_bytes > 48 * 1024) {  // what a block has without asking
    allow_all_shared_memory(reinterpret_cast<const void*>(kernel));
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3{threads, 1, 1};
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  // Not <<< >>> with cudaGetLastError: that would also report what an earlier call left behind.
  check(cudaLaunchKernelEx(&config, kernel, arguments...), "launch");
}

// Calls body with a value of the element type in memory.
template <typename Body>
void for_type(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::float32:
      return body(float());
    case Dtype::float16:
      return body(Float16());
    case Dtype::bfloat16:
      return body(Bfloat16());
    case Dtype::float64:
      break;
  }
  throw std::runtime_error("no float64 kernel");
}

// Runs `body`, which launches kernels; what it throws gets the operation's name and shapes.
template <typename Body, typename Describe>
void explained(const char* operation, const Describe& describe, const Body& body) {
  try {
    body();
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(std::string(operation) + " on CUDA: " + error.what() + "; " +
                             describe());
  }
}

// As many blocks as asked for, in a grid that CUDA takes (x up to 2^31 - 1, y up to 65535); the
// kernel computes blockIdx.y * gridDim.x + blockIdx.x and returns when that is too large.
inline dim3 grid_of(long long blocks) {
  constexpr long long widest = 1LL << 30;
  const long long rows = (blocks + widest - 1) / widest;
  const dim3 grid = {static_cast<unsigned>(rows > 1 ? widest : blocks), static_cast<unsigned>(rows),
                     1};
  return grid;
}

}  // namespace famseg
