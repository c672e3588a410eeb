// Element types in memory. Arithmetic is in float, or in double for float64.
#pragma once

#include <cstdint>

namespace famseg {

enum class Dtype { float32, float64, bfloat16, float16 };

}  // namespace famseg
