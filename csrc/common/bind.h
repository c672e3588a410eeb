// What the bindings of all operations share: addresses, sizes and names in; the checks were made in
// Python.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common/dtype.h"

namespace famseg {

namespace py = pybind11;

using Address = uintptr_t;                                     // 0: absent
using Shape = std::tuple<int64_t, int64_t, int64_t, int64_t>;  // (n, c, h, w)

inline void* pointer(Address address) {
  return reinterpret_cast<void*>(address);
}

inline Dtype dtype_named(const std::string& name) {
  if (name == "float32") return Dtype::float32;
  if (name == "float64") return Dtype::float64;
  if (name == "bfloat16") return Dtype::bfloat16;
  if (name == "float16") return Dtype::float16;
  throw std::invalid_argument("dtype " + name + " is none of float32, float64, bfloat16, float16");
}

}  // namespace famseg
