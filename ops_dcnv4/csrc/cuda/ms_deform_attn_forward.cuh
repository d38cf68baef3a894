// Forward kernel of attention for the sizes that kernels are compiled for.
#pragma once

#include <cstddef>

#include "cuda/corner_weights.cuh"
#include "cuda/forward_plans.cuh"
#include "cuda/memory.cuh"
#include "cuda/ms_deform_attn_sampler.cuh"
#include "cuda/units.cuh"

namespace ops_dcnv4 {

// Computes what `forward` does, with fewer instructions: a block reads the levels once, and lanes
// exchange their plans through shared memory.
template <typename Sampler, typename S = typename Sampler::Compiled,
          typename scalar_t = typename S::scalar_t, typename point_t = typename Sampler::point_t>
__global__ void __launch_bounds__(block_threads)
    attention_forward(const __grid_constant__ Sampler sampler,
                      const __grid_constant__ Layout layout, const scalar_t* __restrict__ value,
                      const point_t* __restrict__ locations, const point_t* __restrict__ weights,
                      scalar_t* __restrict__ output) {
  using Weights = CornerWeightsOf<S>;
  using UnitPlans = Plans<Weights, S::taps>;
  constexpr int lanes = S::lanes, units = block_threads / lanes;
  static_assert(S::taps % lanes == 0, "lanes plan equal numbers of taps");
  const UnitPlans plans(threadIdx.x / lanes, units);
  auto* levels = reinterpret_cast<Level<int, int>*>(static_cast<char*>(shared_memory()) +
                                                    UnitPlans::bytes(units));
  sampler.stage_levels(levels);
  const int channels = sampler.channels();

  for_units<Sampler::tile_width>(layout, lanes, [&](const ThreadUnit& unit) {
    const auto tap_of = sampler.taps_of(unit, layout.output, lanes, locations, weights,
                                        [&](int level) { return levels[level]; });
    __syncwarp();  // until all lanes have read the plans of the unit before
    bool all_reach = true;
#pragma unroll
    for (int i = 0; i < S::taps / lanes; ++i) {
      const int k = i * lanes + unit.lane;
      const auto tap = tap_of(k);
      const auto cell = locate<Scalar<float, int>>(tap.x, tap.y, tap.level);
      const int pixel = cell.counts ? cell.pixel(tap.level) : 0;  // a level may exceed value
      const int right = cell.x.step(1), below = cell.y.step(tap.level.row_pixels);
      const bool reaches = cell.counts || !unit.exists;  // or is not needed
      plans.store(
          k, TapPixels{{reaches ? pixel : -1, pixel + right, pixel + below, pixel + right + below}},
          Weights(cell, tap.weight));
      all_reach &= reaches;
    }
    __syncwarp();
    const int in_group = unit.lane * S::vec;
    const int channel = (unit.exists ? unit.group * S::group_channels : 0) + in_group;
    const scalar_t* image = computed(value + unit.image * sampler.pixels() * channels + channel);
    const int pixel_bytes = channels * static_cast<int>(sizeof(scalar_t));
    Pack<float, S::vec> sum = {};
    if (__all_sync(0xffffffff, all_reach)) {
      add_samples<true>(plans, image, pixel_bytes, sum);
    } else {
      add_samples<false>(plans, image, pixel_bytes, sum);
    }
    if (!unit.exists) return;
    sum.template to<scalar_t>().store(
        at_unit(output, layout.output, unit, channels, S::group_channels) + in_group);
  });
  sampler.check();
}

template <typename Sampler, typename scalar_t, typename point_t>
void launch_attention_forward(const Sampler& sampler, const scalar_t* value,
                              const point_t* locations, const point_t* weights, scalar_t* output) {
  using S = typename Sampler::Compiled;
  constexpr int units = block_threads / S::lanes;
  constexpr std::size_t bytes = Plans<CornerWeightsOf<S>, S::taps>::bytes(units);
  const Layout layout = layout_of(sampler);
  launch(attention_forward<Sampler>,
         {layout.grid(), block_threads, bytes + S::taps * sizeof(Level<int, int>)}, sampler, layout,
         value, locations, weights, output);
}

}  // namespace ops_dcnv4
