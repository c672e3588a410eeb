// Launches the reassembly kernels; pointers are to device memory.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace famseg::reassembly {

// Enqueues on `stream` (a cudaStream_t). Throws std::runtime_error naming the operation, the shapes
// and the CUDA error when the launch fails; std::invalid_argument for float64.
void forward_cuda(Dtype dtype, const void* x, const void* logits, void* y, int64_t n, int64_t c,
                  int64_t h, int64_t w, int kernel_size, int scale, int groups, void* stream);

}  // namespace famseg::reassembly
