// CUDA for a .cu file: the real one, or its imitation where a test compiles the file with g++.
#pragma once

#ifdef FAMSEG_CUDA_ON_CPU
#include "common/cuda_on_cpu.h"
#else
#include "common/cuda_on_gpu.cuh"
#endif

#include <string>

namespace famseg {

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
