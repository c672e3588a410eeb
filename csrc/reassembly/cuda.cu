#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "reassembly/cuda.h"

namespace famseg::reassembly {
namespace {

__device__ inline float widen(float value) {
  return value;
}
__device__ inline float widen(__half value) {
  return __half2float(value);
}
__device__ inline float widen(__nv_bfloat16 value) {
  return __bfloat162float(value);
}
__device__ inline void narrow(float& to, float from) {
  to = from;
}
__device__ inline void narrow(__half& to, float from) {
  to = __float2half_rn(from);
}
__device__ inline void narrow(__nv_bfloat16& to, float from) {
  to = __float2bfloat16_rn(from);
}

}  // namespace
}  // namespace famseg::reassembly

// After the conversions above: the kernel finds them where its template is defined.
#include "reassembly/kernels.cuh"

namespace famseg::reassembly {
namespace {

std::string describe(const Shape& s) {
  return "x (" + std::to_string(s.n) + ", " + std::to_string(s.c) + ", " + std::to_string(s.h) +
         ", " + std::to_string(s.w) + "), kernel_size " + std::to_string(s.kernel_size) +
         ", scale " + std::to_string(s.scale) + ", groups " + std::to_string(s.groups);
}

void check(cudaError_t status, const Shape& shape) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // takes it back, so that no later call of torch is blamed for it
  throw std::runtime_error(
      "reassemble on CUDA: launch failed: " + std::string(cudaGetErrorString(status)) + " (" +
      cudaGetErrorName(status) + "); " + describe(shape));
}

template <typename T>
void launch(const void* x, const void* logits, void* y, const Shape& shape, cudaStream_t stream) {
  constexpr long long threads = 256;
  const long long chunks = (shape.c / shape.groups + kChannels - 1) / kChannels;
  const long long total =
      shape.n * shape.groups * chunks * shape.h * shape.w * shape.scale * shape.scale;
  if (total == 0) return;
  // The kernel strides over what a grid of 2^30 blocks leaves; the limit is 2^31 - 1.
  const long long blocks = (total + threads - 1) / threads;
  const unsigned grid = static_cast<unsigned>(blocks < (1LL << 30) ? blocks : (1LL << 30));
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(threads);
  config.stream = stream;
  // Not <<< >>> with cudaGetLastError: that would also report what an earlier call left behind.
  check(cudaLaunchKernelEx(&config, reassemble_forward<T>, static_cast<const T*>(x),
                           static_cast<const T*>(logits), static_cast<T*>(y), shape),
        shape);
}

}  // namespace

void forward_cuda(Dtype dtype, const void* x, const void* logits, void* y, int64_t n, int64_t c,
                  int64_t h, int64_t w, int kernel_size, int scale, int groups, void* stream) {
  const Shape shape{n, c, h, w, kernel_size, scale, groups};
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case Dtype::float32:
      return launch<float>(x, logits, y, shape, cuda_stream);
    case Dtype::float16:
      return launch<__half>(x, logits, y, shape, cuda_stream);
    case Dtype::bfloat16:
      return launch<__nv_bfloat16>(x, logits, y, shape, cuda_stream);
    case Dtype::float64:
      break;
  }
  throw std::invalid_argument("reassemble on CUDA: no float64 kernel");
}

}  // namespace famseg::reassembly
