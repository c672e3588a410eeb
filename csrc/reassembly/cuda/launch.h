// Launches the reassembly kernels; pointers are to device memory, tensors contiguous, y and its
// gradient at a multiple of two elements.
//
// All functions enqueue on `stream` (a cudaStream_t) of the current device and throw
// std::runtime_error naming the operation, the shapes and the CUDA error when a call fails.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace famseg::reassembly {

struct CudaProblem {
  Dtype dtype;   // not float64
  bool softmax;  // weights are logits, else finished masks
  int64_t n, c, h, w;
  const void* x;
  const void* weights;
  int kernel_size, scale, groups;
};

void forward_cuda(const CudaProblem& problem, void* y, void* stream);

// Gradients that are null are not computed. With `softmax`, `sums` has room for N groups s^2 H W
// floats, the softmaxes' sums.
void backward_cuda(const CudaProblem& problem, const void* y_gradient, void* x_gradient,
                   void* weights_gradient, float* sums, void* stream);

}  // namespace famseg::reassembly
