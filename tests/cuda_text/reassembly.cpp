// The CUDA kernel text of csrc/reassembly, run by fibers; see tests/test_cuda_text.py.

#include "common/cuda_on_cpu.h"

namespace famseg::reassembly {
inline float widen(float value) {
  return value;
}
inline void narrow(float& to, float from) {
  to = from;
}
}  // namespace famseg::reassembly

#include "reassembly/kernels.cuh"

extern "C" void reassemble_forward(const float* x, const float* logits, float* y, long long n,
                                   long long c, long long h, long long w, int kernel_size,
                                   int scale, int groups, unsigned blocks, unsigned threads,
                                   bool reverse) {
  const famseg::reassembly::Shape shape{n, c, h, w, kernel_size, scale, groups};
  cuda_on_cpu::launch({blocks}, {threads}, reverse,
                      [&] { famseg::reassembly::reassemble_forward<float>(x, logits, y, shape); });
}
