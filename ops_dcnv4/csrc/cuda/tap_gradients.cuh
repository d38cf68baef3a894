// Gradients of the location and the weight of a tap.
#pragma once

#include "bilinear.h"
#include "cuda/units.cuh"

namespace ops_dcnv4 {

// The data from which the gradients of a tap are computed.
template <typename acc_t>
struct TapSample {
  acc_t dx, dy, weight;
  unsigned inside;  // a bit per corner: top left, top right, bottom left, bottom right

  TapSample() = default;
  __device__ __forceinline__ TapSample(acc_t dx, acc_t dy, acc_t weight, unsigned inside)
      : dx(dx), dy(dy), weight(weight), inside(inside) {}
  template <typename Math>
  __device__ __forceinline__ TapSample(const Cell<Math>& cell, acc_t weight)
      : dx(cell.x.distance),
        dy(cell.y.distance),
        weight(weight),
        inside((cell.y.has_first && cell.x.has_first) |
               (cell.y.has_first && cell.x.has_second) << 1 |
               (cell.y.has_second && cell.x.has_first) << 2 |
               (cell.y.has_second && cell.x.has_second) << 3) {}

  __device__ __forceinline__ bool is_inside(int corner) const { return inside >> corner & 1; }

  __device__ __forceinline__ Corners<acc_t> weights() const {
    return corner_weights(1 - dx, dx, weight * (1 - dy), weight * dy);
  }
};

// Gradients of the location of a tap, in pixels, and of its weight.
template <typename acc_t>
struct TapGradients {
  acc_t x = 0, y = 0, weight = 0;

  TapGradients() = default;
  // `dots` are the dot products of grad_output with the corners.
  __device__ __forceinline__ TapGradients(const TapSample<acc_t>& tap, Corners<acc_t> dots) {
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      if (!tap.is_inside(corner)) dots.at[corner] = 0;
    }
    const auto sample = interpolate<acc_t>(tap.dx, tap.dy, dots);
    x = tap.weight * sample.slope_x;
    y = tap.weight * sample.slope_y;
    weight = sample.value;
  }

  // Sums the shares of a unit's lanes; each lane receives the sum.
  __device__ __forceinline__ void reduce(int lanes) {
    const auto sum = [lanes](acc_t share) {
      return over_lanes(share, lanes, [](acc_t a, acc_t b) { return a + b; });
    };
    x = sum(x);
    y = sum(y);
    weight = sum(weight);
  }
};

}  // namespace ops_dcnv4
