// The subset of CUDA's half2 arithmetic that the kernels use.
#pragma once

#include <torch/headeronly/util/Half.h>

#include <cmath>

#include "model.h"

struct alignas(4) __half2 {
  c10::Half x, y;
};

inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline float2 __half22float2(__half2 a) { return {a.x, a.y}; }
inline __half2 __low2half2(__half2 a) { return {a.x, a.x}; }
inline __half2 __high2half2(__half2 a) { return {a.y, a.y}; }
inline __half2 __hmul2(__half2 a, __half2 b) {
  return {float(a.x) * float(b.x), float(a.y) * float(b.y)};
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return {std::fma(float(a.x), float(b.x), float(c.x)),
          std::fma(float(a.y), float(b.y), float(c.y))};
}
