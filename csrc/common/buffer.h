// Aligned memory that frees itself, for the drivers around the kernels.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace famseg {

// A cache line, and the widest vector.
constexpr std::align_val_t kBufferAlignment{64};

struct AlignedDelete {
  void operator()(void* p) const { ::operator delete(p, kBufferAlignment); }
};
using Buffer = std::unique_ptr<void, AlignedDelete>;

inline Buffer allocate(size_t bytes) {
  return Buffer(::operator new(bytes, kBufferAlignment));
}

}  // namespace famseg
