// The subset of CUDA's bfloat162 arithmetic that the kernels use.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cmath>

#include "model.h"

struct alignas(4) __nv_bfloat162 {
  c10::BFloat16 x, y;
};

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline __nv_bfloat162 __low2bfloat162(__nv_bfloat162 a) { return {a.x, a.x}; }
inline __nv_bfloat162 __high2bfloat162(__nv_bfloat162 a) { return {a.y, a.y}; }
inline __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return {float(a.x) * float(b.x), float(a.y) * float(b.y)};
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  return {std::fma(float(a.x), float(b.x), float(c.x)),
          std::fma(float(a.y), float(b.y), float(c.y))};
}
