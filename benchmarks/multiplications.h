// Included before everything else when the CPU kernels are compiled for counting (multiplications.py):
// from here on `double` is a number of 128 bits. No CPU computes with those, so GCC makes every
// product and every sum of the fp64 kernels a call, of __multf3 or __addtf3, also those of each
// lane of a vector. multiplications.cpp defines these calls. The kernels' text stays as it is.
#pragma once

// Of the standard library, whose headers mean what they say by `double`.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

using Double = double;
#define double __float128
// Drivers shall know one instruction set, with vectors of 32 bytes: two numbers.
#undef __x86_64__
#undef __AVX2__
#define __AVX2__ 1

#include "common/simd.h"

// The kernels' own puts the exponent's bits together, of 64; and no multiplication counts for one.
template <>
inline famseg::FAMSEG_ISA::Vector<double> famseg::FAMSEG_ISA::exponential<double>(
    Vector<double> x) {
  for (int l = 0; l < kLanes<double>; ++l) x[l] = std::exp(static_cast<Double>(x[l]));
  return x;
}
