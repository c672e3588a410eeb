// Launches the strip convolution kernels; pointers are to device memory, tensors contiguous. What
// the operation is: problem.h.
//
// All functions enqueue on `stream` (a cudaStream_t) of the current device and throw
// std::runtime_error naming the operation, the shapes and the CUDA error when a call fails.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtype.h"

namespace famseg::strip_conv {

struct CudaBranch {
  const void* row_weight;
  const void* row_bias;  // or null
  int row_size;
  const void* column_weight;
  const void* column_bias;  // or null
  int column_size;
};

struct CudaProblem {
  Dtype dtype;  // not float64
  int64_t n, c, h, w;
  const void* x;
  const void* square_weight;  // or null
  const void* square_bias;    // or null
  int square_size;            // 0: none
  std::vector<CudaBranch> branches;
};

// null where not wanted
struct CudaGradients {
  void* x;
  void* square_weight;
  void* square_bias;
  struct Side {
    void* row_weight;
    void* row_bias;
    void* column_weight;
    void* column_bias;
  };
  std::vector<Side> branches;
};

int max_branches();

void forward_cuda(const CudaProblem& problem, void* y, void* stream);

// Scratch memory of backward_cuda in floats: the gradient of the square's result (0 without weight
// gradients), and the partial sums.
struct CudaWorkspace {
  int64_t middle, partial;
};
CudaWorkspace backward_workspace_cuda(const CudaProblem& problem, bool weights);

// gradients.x must be there where `middle` is: the gradient of x passes through it. `partial` is
// null when no gradient of weights or biases is wanted.
void backward_cuda(const CudaProblem& problem, const void* y_gradient,
                   const CudaGradients& gradients, float* middle, float* partial, void* stream);

}  // namespace famseg::strip_conv
