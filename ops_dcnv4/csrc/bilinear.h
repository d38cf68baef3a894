// Where DCNv4 samples and with which bilinear weights. Shared by every compiled backend.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define OPS_DCNV4_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define OPS_DCNV4_INLINE inline __attribute__((always_inline))
#define OPS_DCNV4_INLINE_LAMBDA __attribute__((always_inline))
#else
#define OPS_DCNV4_INLINE inline
#define OPS_DCNV4_INLINE_LAMBDA
#endif

namespace ops_dcnv4 {

// Geometry of one axis of the kernel window.
struct Axis {
  int kernel;
  int stride;
  int padding;
  int dilation;

  // Distance from the first kernel tap to the window's centre, in pixels.
  OPS_DCNV4_INLINE int center() const { return dilation * (kernel - 1) / 2; }

  // Input coordinate that kernel tap `tap` of output position `out` reads:
  // offset_scale stretches the regular grid around the window's centre and the learned offset alike.
  template <typename T>
  OPS_DCNV4_INLINE T sample(int out, int tap, T offset, T offset_scale) const {
    const int window_center = out * stride - padding + center();
    return T(window_center) + offset_scale * (T(tap * dilation - center()) + offset);
  }
};

// The cell of four pixels around a point (y, x) of an image.
template <typename T>
struct Cell {
  int row, col;  // of the top-left pixel; may be -1
  T dy, dx;      // position of the point within the cell, in [0, 1)
  bool top, bottom, left, right;  // which rows and columns of the cell lie inside the image

  OPS_DCNV4_INLINE bool any() const { return (top || bottom) && (left || right); }
  OPS_DCNV4_INLINE bool all() const { return top && bottom && left && right; }
};

// Points that do not satisfy -1 < y < height and -1 < x < width (NaN among them) get a cell without
// pixels; the test comes before the conversion to int, so huge coordinates are safe.
template <typename T>
OPS_DCNV4_INLINE Cell<T> locate(T y, T x, int height, int width) {
  if (!(y > T(-1) && y < T(height) && x > T(-1) && x < T(width))) {
    return {0, 0, T(0), T(0), false, false, false, false};
  }
  const T floor_y = std::floor(y), floor_x = std::floor(x);
  const int row = static_cast<int>(floor_y), col = static_cast<int>(floor_x);
  return {row,      col,              y - floor_y, x - floor_x,
          row >= 0, row + 1 < height, col >= 0,    col + 1 < width};
}

}  // namespace ops_dcnv4
