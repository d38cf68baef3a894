// Forward kernel, parameterized by the sampler of the operator.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/memory.cuh"
#include "cuda/static.cuh"
#include "cuda/tap.cuh"
#include "cuda/units.cuh"

namespace ops_dcnv4 {

// Weights of the four pixels of a tap's cell.
template <typename acc_t>
struct CornerWeights {
  Corners<acc_t> corners;

  CornerWeights() = default;
  template <typename Math>
  __device__ __forceinline__ CornerWeights(const Cell<Math>& cell, acc_t modulation)
      : corners(corner_weights(cell.x.first_weight(), cell.x.second_weight(),
                               modulation * cell.y.first_weight(),
                               modulation * cell.y.second_weight())) {}

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
  unsigned top, bottom;  // pairs of halves: left, right
  float modulation;

  HalfCornerWeights() = default;
  template <typename Math>
  __device__ __forceinline__ HalfCornerWeights(const Cell<Math>& cell, float modulation)
      : modulation(cell.counts ? modulation : 0) {
    const auto weights = corner_weights(cell.x.first_weight(), cell.x.second_weight(),
                                        cell.y.first_weight(), cell.y.second_weight());
    top = ops_dcnv4::bit_cast<unsigned>(__floats2half2_rn(weights.at[0], weights.at[1]));
    bottom = ops_dcnv4::bit_cast<unsigned>(__floats2half2_rn(weights.at[2], weights.at[3]));
  }

  template <int n>
  __device__ __forceinline__ void add_sample(const Pack<c10::Half, n> (&pixels)[4], bool reaches,
                                             Pack<float, n>& sum) const {
    const __half2 upper = ops_dcnv4::bit_cast<__half2>(top);
    const __half2 lower = ops_dcnv4::bit_cast<__half2>(bottom);
    const __half2 weights[4] = {__low2half2(upper), __high2half2(upper), __low2half2(lower),
                                __high2half2(lower)};
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
      // Arbitrary pixels were loaded for such a tap, and the sample may be infinite. A branch
      // around the loads would keep the pixels of several taps from being loaded at once.
      if (!reaches) sample = __floats2half2_rn(0, 0);
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

// Computes output (N, ..., C) from value and the tensors that the sampler reads, which may be the
// same tensor twice.
template <typename Sampler, typename S = typename Sampler::Compiled,
          typename scalar_t = typename S::scalar_t, typename point_t = typename Sampler::point_t>
__global__ void __launch_bounds__(block_threads)
    forward(const Sampler sampler, const Layout layout, const scalar_t* __restrict__ value,
            const point_t* __restrict__ locations, const point_t* __restrict__ weights,
            scalar_t* __restrict__ output) {
  using acc_t = typename S::acc_t;
  using index_t = typename S::index_t;
  using Pixels = Pack<scalar_t, S::vec>;
  const int lanes = S::lanes(layout), taps = sampler.taps();
  const int group_channels = sampler.group_channels();
  const index_t channels = sampler.channels();

  for_units<Sampler::tile_width>(layout, lanes, [&](const ThreadUnit& unit) {
    const auto tap_of = sampler.taps_of(unit, layout.output, lanes, locations, weights);
    for (int start = 0; start < group_channels; start += lanes * S::vec) {
      const int in_group = start + unit.lane * S::vec;
      const bool has_channels = unit.exists && in_group < group_channels;
      const int channel = has_channels ? unit.group * group_channels + in_group : 0;
      const scalar_t* image = computed(value + unit.image * sampler.pixels() * channels + channel);
      Pack<acc_t, S::vec> sum = {};
#pragma unroll
      for (int first = 0; first < taps; first += lanes) {
        CornerWeightsOf<S> own_weights;
        const auto own_offsets = locate_tap<index_t>(
            tap_of(std::min(first + unit.lane, taps - 1)), channels,
            [&](auto... arguments) { own_weights = CornerWeightsOf<S>(arguments...); });
#pragma unroll
        for (int lane = 0; lane < std::min(lanes, taps - first); ++lane) {
          const auto offsets = from_lane(own_offsets, lane, lanes);
          const auto weights = from_lane(own_weights, lane, lanes);
          Pixels pixels[4];
          offsets.load(image, pixels);
          weights.add_sample(pixels, !offsets.is_none(), sum);
        }
      }
      if (!has_channels) continue;
      sum.template to<scalar_t>().store(
          at_unit(output, layout.output, unit, channels, group_channels) + in_group);
    }
  });
  sampler.check();
}

template <typename Sampler, typename scalar_t, typename point_t>
void launch_forward(const Sampler& sampler, const scalar_t* value, const point_t* locations,
                    const point_t* weights, scalar_t* output) {
  const Layout layout = layout_of(sampler);
  launch(forward<Sampler>, layout.grid(), block_threads, sampler, layout, value, locations, weights,
         output);
}

}  // namespace ops_dcnv4
