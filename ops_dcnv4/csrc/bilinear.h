// Bilinear sampling. The CPU and CUDA kernels share the location of a point's cell, the test
// whether it counts, the addresses of its pixels, the products that weight its corners, and
// interpolation.
//
// Row and column weights are not shared: those in CellAxis are for CUDA's forward pass. The CPU
// computes its own in cpu/plan.h, where cells may extend beyond the image, and in
// cpu/dcnv4_sampler.h for windows inside the image, whose cells are located there without checks.
//
// `Math` is Scalar in CUDA, where a thread samples one point, and Lanes (cpu/simd.h) on the CPU,
// which samples a vector of points at a time. There, include this after choosing the instruction
// set (see cpu/kernels_*.cpp).
#pragma once

#include <cmath>

#include "inline.h"

namespace ops_dcnv4 {

// The pixels that points sample: an image of value or, for attention, one of its levels.
template <typename Size, typename Index>
struct Level {
  Size width, height;
  Index row_pixels, first_pixel;
};

// Arithmetic on single numbers. Offsets within a level have the type index_t.
template <typename T, typename index_t>
struct Scalar {
  using type = T;
  using Element = T;
  using Pixel = int;  // a row or column
  using PixelElement = int;
  using Mask = bool;

  template <typename V>
  static OPS_DCNV4_INLINE V select(bool mask, V a, V b) {
    return mask ? a : b;
  }
  static OPS_DCNV4_INLINE bool both(bool a, bool b) { return a && b; }  // nvcc computes & in bytes
  static OPS_DCNV4_INLINE T fill(T number) { return number; }
  static OPS_DCNV4_INLINE T number(int pixel) { return static_cast<T>(pixel); }
  static OPS_DCNV4_INLINE index_t index(int pixel) { return pixel; }
  static OPS_DCNV4_INLINE int floor(T a) { return static_cast<int>(std::floor(a)); }
};

// The two pixels around a coordinate along one axis of a level, whose last pixel is `last`.
template <typename Math>
struct CellAxis {
  typename Math::Pixel first;                 // -1 if only the second pixel is inside the level
  typename Math::type distance;               // of the point from the first pixel, in [0, 1]
  typename Math::Mask has_first, has_second;  // whether the pixels are inside

  template <typename Last>
  OPS_DCNV4_INLINE CellAxis(typename Math::type coordinate, Last last)
      : first(Math::floor(coordinate)),
        distance(coordinate - Math::number(first)),
        has_first(first >= typename Math::PixelElement(0)),
        has_second(first < last) {}

  // Weights of the pixels; one outside has none.
  OPS_DCNV4_INLINE auto first_weight() const {
    return Math::select(has_first, 1 - distance, typename Math::type{});
  }
  OPS_DCNV4_INLINE auto second_weight() const {
    return Math::select(has_second, distance, typename Math::type{});
  }

  // The first pixel to read, and the step to the second: zero unless both are inside, so that the
  // pixel inside is read twice.
  OPS_DCNV4_INLINE auto readable() const {
    return Math::select(has_first, first, typename Math::Pixel{});
  }
  template <typename Step>
  OPS_DCNV4_INLINE Step step(Step between) const {
    return Math::select(Math::both(has_first, has_second), between, Step{});
  }
};

// Row and column of a cell without pixels: neither -2 nor the next coordinate, -1, is inside a
// level.
constexpr int outside = -2;

// The four pixels around a point.
template <typename Math>
struct Cell {
  typename Math::Mask counts;  // whether any pixel is inside the level
  CellAxis<Math> x, y;

  // Returns the pixel to read at the top left, which is arbitrary if the cell does not count.
  template <typename Size, typename Index>
  OPS_DCNV4_INLINE auto pixel(const Level<Size, Index>& level) const {
    return level.first_pixel + Math::index(y.readable()) * level.row_pixels +
           Math::index(x.readable());
  }
};

// Returns the cell of a point, which counts if -1 < y < height and -1 < x < width. The test is
// false for NaN and precedes the conversion to int, so that huge coordinates are safe.
template <typename Math, typename Size, typename Index>
OPS_DCNV4_INLINE Cell<Math> locate(typename Math::type x, typename Math::type y,
                                   const Level<Size, Index>& level) {
  using T = typename Math::Element;
  using P = typename Math::PixelElement;
  const typename Math::Mask counts = (y > T(-1)) & (y < Math::number(level.height)) & (x > T(-1)) &
                                     (x < Math::number(level.width));
  const auto nowhere = Math::fill(T(outside));
  return {counts,
          {Math::select(counts, x, nowhere), level.width - P(1)},
          {Math::select(counts, y, nowhere), level.height - P(1)}};
}

// One number per corner of a cell: top left, top right, bottom left, bottom right.
template <typename V>
struct Corners {
  V at[4];
};

// Returns the weights of the corners, given those of the columns and rows.
template <typename V>
OPS_DCNV4_INLINE Corners<V> corner_weights(V left, V right, V top, V bottom) {
  return {{top * left, top * right, bottom * left, bottom * right}};
}

// The value of a sample, and its derivatives.
template <typename V>
struct Sample {
  V value, slope_x, slope_y;
};

// Interpolates between the corners at a distance from the top left corner.
template <typename T, typename V>
OPS_DCNV4_INLINE Sample<V> interpolate(V dx, V dy, const Corners<V>& corners) {
  const auto& [top_left, top_right, bottom_left, bottom_right] = corners.at;
  const V top = (T(1) - dx) * top_left + dx * top_right;
  const V bottom = (T(1) - dx) * bottom_left + dx * bottom_right;
  const V slope_x = (T(1) - dy) * (top_right - top_left) + dy * (bottom_right - bottom_left);
  return {(T(1) - dy) * top + dy * bottom, slope_x, bottom - top};
}

}  // namespace ops_dcnv4
