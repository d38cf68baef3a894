// Weights of the four pixels of a tap, and the sums that they weight.
#pragma once

#include <cmath>
#include <type_traits>

#include "bilinear.h"
#include "cuda/launch.h"
#include "cuda/memory.cuh"

namespace ops_dcnv4 {

// Weights of the four pixels of a tap's cell.
template <typename acc_t>
struct CornerWeights {
  Corners<acc_t> corners;

  CornerWeights() = default;
  // Of a cell inside the level.
  __device__ __forceinline__ CornerWeights(acc_t dx, acc_t dy, acc_t modulation)
      : CornerWeights(1 - dx, dx, 1 - dy, dy, modulation) {}
  // From the weights of the columns and rows.
  __device__ __forceinline__ CornerWeights(acc_t left, acc_t right, acc_t top, acc_t bottom,
                                           acc_t modulation)
      : corners(corner_weights(left, right, modulation * top, modulation * bottom)) {}
  template <typename Math>
  __device__ __forceinline__ CornerWeights(const Cell<Math>& cell, acc_t modulation)
      : CornerWeights(cell.x.first_weight(), cell.x.second_weight(), cell.y.first_weight(),
                      cell.y.second_weight(), modulation) {}

  // Adds the weighted pixels to sum, if the tap reaches any.
  template <typename scalar_t, int n>
  __device__ __forceinline__ void add_sample(const Pack<scalar_t, n> (&pixels)[4], bool reaches,
                                             Pack<acc_t, n>& sum) const {
    if (!reaches) return;
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      const auto wide = pixels[corner].template to<acc_t>();
#pragma unroll
      for (int i = 0; i < n; ++i) sum.at[i] += corners.at[corner] * wide.at[i];
    }
  }
};

// Weights for halves, which are interpolated two at a time in 16 bits (the precision of the
// pixels), then modulated and accumulated over the taps in 32 bits. Up to rounding, samples are
// within the range of their pixels: pixels within 0.2 % of the largest half may overflow.
struct HalfCornerWeights {
  unsigned upper, lower;  // pairs of halves: left, right
  float modulation;

  HalfCornerWeights() = default;
  // Of a cell inside the level.
  __device__ __forceinline__ HalfCornerWeights(float dx, float dy, float modulation)
      : modulation(modulation) {
    const float top = 1 - dy, bottom = dy;
    upper = ops_dcnv4::bit_cast<unsigned>(__floats2half2_rn(std::fma(-dx, top, top), dx * top));
    lower = ops_dcnv4::bit_cast<unsigned>(
        __floats2half2_rn(std::fma(-dx, bottom, bottom), dx * bottom));
  }
  // From the weights of the columns and rows.
  __device__ __forceinline__ HalfCornerWeights(float left, float right, float top, float bottom,
                                               float modulation)
      : modulation(modulation) {
    const auto weights = corner_weights(left, right, top, bottom);
    upper = ops_dcnv4::bit_cast<unsigned>(__floats2half2_rn(weights.at[0], weights.at[1]));
    lower = ops_dcnv4::bit_cast<unsigned>(__floats2half2_rn(weights.at[2], weights.at[3]));
  }
  template <typename Math>
  __device__ __forceinline__ HalfCornerWeights(const Cell<Math>& cell, float modulation)
      : HalfCornerWeights(cell.x.first_weight(), cell.x.second_weight(), cell.y.first_weight(),
                          cell.y.second_weight(), modulation) {}

  template <int n>
  __device__ __forceinline__ void add_sample(const Pack<c10::Half, n> (&pixels)[4], bool reaches,
                                             Pack<float, n>& sum) const {
    const __half2 top = ops_dcnv4::bit_cast<__half2>(upper);
    const __half2 bottom = ops_dcnv4::bit_cast<__half2>(lower);
    const __half2 weights[4] = {__low2half2(top), __high2half2(top), __low2half2(bottom),
                                __high2half2(bottom)};
#pragma unroll
    for (int i = 0; i < n; i += 2) {
      const auto pair = [&](int corner) {
        return *reinterpret_cast<const __half2*>(&pixels[corner].at[i]);
      };
      __half2 sample = __hmul2(weights[0], pair(0));
#pragma unroll
      for (int corner = 1; corner < 4; ++corner) {
        sample = __hfma2(weights[corner], pair(corner), sample);
      }
      // Arbitrary pixels were loaded for a tap that reaches none. A branch around the loads would
      // keep the pixels of several taps from being loaded at once.
      if (!reaches) continue;
      const float2 wide = __half22float2(sample);
      sum.at[i] += modulation * wide.x;
      sum.at[i + 1] += modulation * wide.y;
    }
  }
};

template <typename S>
using CornerWeightsOf =
    std::conditional_t<std::is_same_v<typename S::scalar_t, c10::Half> && S::vec % 2 == 0,
                       HalfCornerWeights, CornerWeights<typename S::acc_t>>;

}  // namespace ops_dcnv4
