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

// Whether this architecture computes on pairs of 16-bit numbers.
template <typename scalar_t>
constexpr bool computes_pairs =
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    std::is_same_v<scalar_t, c10::Half>;
#else
    true;
#endif

// Weights for 16-bit pixels, which are interpolated two at a time in 16 bits (the precision of the
// pixels), then modulated and accumulated over the taps in 32 bits. Up to rounding, samples are
// within the range of their pixels: pixels within 0.2 % of the largest half, or 1.6 % of the
// largest bfloat16, may overflow.
template <typename scalar_t>
struct PairedCornerWeights {
  unsigned upper, lower;  // pairs of numbers: left, right
  float modulation;

  PairedCornerWeights() = default;
  // Of a cell inside the level.
  __device__ __forceinline__ PairedCornerWeights(float dx, float dy, float modulation)
      : modulation(modulation) {
    const float top = 1 - dy, bottom = dy;
    upper = rounded_pair<scalar_t>(std::fma(-dx, top, top), dx * top);
    lower = rounded_pair<scalar_t>(std::fma(-dx, bottom, bottom), dx * bottom);
  }
  // From the weights of the columns and rows.
  __device__ __forceinline__ PairedCornerWeights(float left, float right, float top, float bottom,
                                                 float modulation)
      : modulation(modulation) {
    const auto weights = corner_weights(left, right, top, bottom);
    upper = rounded_pair<scalar_t>(weights.at[0], weights.at[1]);
    lower = rounded_pair<scalar_t>(weights.at[2], weights.at[3]);
  }
  template <typename Math>
  __device__ __forceinline__ PairedCornerWeights(const Cell<Math>& cell, float modulation)
      : PairedCornerWeights(cell.x.first_weight(), cell.x.second_weight(), cell.y.first_weight(),
                            cell.y.second_weight(), modulation) {}

  template <int n>
  __device__ __forceinline__ void add_sample(const Pack<scalar_t, n> (&pixels)[4], bool reaches,
                                             Pack<float, n>& sum) const {
    if constexpr (computes_pairs<scalar_t>) {
      using Pair = PairOf<scalar_t>;
      const Pair top = ops_dcnv4::bit_cast<Pair>(upper), bottom = ops_dcnv4::bit_cast<Pair>(lower);
      const Pair weights[4] = {twice_first(top), twice_second(top), twice_first(bottom),
                               twice_second(bottom)};
#pragma unroll
      for (int i = 0; i < n; i += 2) {
        const auto pair = [&](int corner) {
          return *reinterpret_cast<const Pair*>(&pixels[corner].at[i]);
        };
        Pair sample = __hmul2(weights[0], pair(0));
#pragma unroll
        for (int corner = 1; corner < 4; ++corner) {
          sample = __hfma2(weights[corner], pair(corner), sample);
        }
        // Arbitrary pixels were loaded for a tap that reaches none. A branch around the loads would
        // keep the pixels of several taps from being loaded at once.
        if (!reaches) continue;
        const auto wide = ops_dcnv4::bit_cast<Pack<scalar_t, 2>>(sample).template to<float>();
        sum.at[i] += modulation * wide.at[0];
        sum.at[i + 1] += modulation * wide.at[1];
      }
    } else {
      const auto wide =
          ops_dcnv4::bit_cast<Pack<scalar_t, 4>>(uint2{upper, lower}).template to<float>();
      CornerWeights<float> weights;
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        weights.corners.at[corner] = modulation * wide.at[corner];
      }
      weights.add_sample(pixels, reaches, sum);
    }
  }
};

template <typename S>
using CornerWeightsOf =
    std::conditional_t<sizeof(typename S::scalar_t) == 2 && S::vec % 2 == 0,
                       PairedCornerWeights<typename S::scalar_t>, CornerWeights<typename S::acc_t>>;

}  // namespace ops_dcnv4
