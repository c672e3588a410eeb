// Launches the reassembly kernels; pointers are to device memory, tensors contiguous, y and its
// gradient at a multiple of two elements.
//
// All functions enqueue on `stream` (a cudaStream_t) of the current device and throw
// std::runtime_error naming the operation, the shapes and the CUDA error when a call fails.
#pragma once

#include "reassembly/problem.h"

namespace famseg::reassembly {

// Not for float64, nor for channels_last.
void forward_cuda(const Problem& problem, void* y, void* stream);

// With `softmax`, log_sums has room for N groups s^2 H W floats: see tile.cuh.
void backward_cuda(const Problem& problem, const Gradients& gradients, float* log_sums,
                   void* stream);

}  // namespace famseg::reassembly
