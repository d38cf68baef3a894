// Forward kernel, parameterized by the sampler of the operator.
#pragma once

#include <algorithm>

#include "cuda/corner_weights.cuh"
#include "cuda/memory.cuh"
#include "cuda/static.cuh"
#include "cuda/tap.cuh"
#include "cuda/units.cuh"

namespace ops_dcnv4 {

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
  const int lanes = layout.lanes(), taps = sampler.taps();
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
  launch(forward<Sampler>, {layout.grid(), block_threads}, sampler, layout, value, locations,
         weights, output);
}

}  // namespace ops_dcnv4
