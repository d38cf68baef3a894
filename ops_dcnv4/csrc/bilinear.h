// Window geometry and bilinear cells. The CPU kernels vectorise `locate` in cpu/plan.h.
#pragma once

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

  // Distance of a tap from the window's centre, in pixels.
  OPS_DCNV4_INLINE int grid(int tap) const { return tap * dilation - center(); }

  // Input coordinate of the window's centre for output coordinate `out`.
  OPS_DCNV4_INLINE int center_of(int out) const { return out * stride - padding + center(); }
};

// Row and column of a cell without pixels: neither -2 nor the next coordinate, -1, is inside an
// image.
constexpr int outside = -2;

// The cell of four pixels around a point (y, x).
template <typename T>
struct Cell {
  int row, col;  // of the top-left pixel; -1 if only the other half of the cell is inside
  T dy, dx;      // position of the point within the cell, in [0, 1]
};

// Rounds down, with one instruction on a GPU and without a library call elsewhere.
template <typename T>
OPS_DCNV4_INLINE int floor_to_int(T a) {
#if defined(__CUDA_ARCH__)
  return static_cast<int>(floor(a));
#else
  const int towards_zero = static_cast<int>(a);
  return towards_zero - (T(towards_zero) > a);
#endif
}

// Returns the cell of a point, which contributes if -1 < y < height and -1 < x < width. The test is
// false for NaN and precedes the conversion to int, so that huge coordinates are safe.
template <typename T>
OPS_DCNV4_INLINE Cell<T> locate(T y, T x, int height, int width) {
  const bool counts = (y > T(-1)) & (y < T(height)) & (x > T(-1)) & (x < T(width));
  y = counts ? y : T(outside);
  x = counts ? x : T(outside);
  const int row = floor_to_int(y), col = floor_to_int(x);
  return {row, col, y - T(row), x - T(col)};
}

}  // namespace ops_dcnv4
