// Launches the strip convolution kernels; pointers are to device memory, tensors contiguous. What
// the operation is: problem.h.
//
// All functions enqueue on `stream` (a cudaStream_t) of the current device and throw
// std::runtime_error naming the operation, the shapes and the CUDA error when a call fails.
#pragma once

#include <cstdint>

#include "strip_conv/problem.h"

namespace famseg::strip_conv {

int max_branches();

// Not in float64, and not channels_last.
void forward_cuda(const Problem& problem, void* y, void* stream);

// Scratch memory of backward_cuda in floats: da (0 without weight gradients or without a square),
// and the partial sums.
struct Workspace {
  int64_t da, partials;
};
Workspace backward_workspace_cuda(const Problem& problem, bool weights);

// gradients.dx must be there where `da` is: the gradient of x passes through it. `partials` is null
// when no gradient of weights or biases is wanted.
void backward_cuda(const Problem& problem, const Gradients& gradients, float* da, float* partials,
                   void* stream);

}  // namespace famseg::strip_conv
