// Settings of the emulation that tests/test_cuda_text.py builds the CUDA module with.

#include "common/cuda_on_cpu.h"

extern "C" void emulate(bool reverse_order, size_t shared_per_block, size_t shared_per_processor) {
  cuda_on_cpu::reverse_order = reverse_order;
  famseg::simulated_limits = {shared_per_block, shared_per_processor};
}
