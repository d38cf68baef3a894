// Backward kernel of attention for the sizes that kernels are compiled for.
#pragma once

#include <cstddef>

#include "cuda/backward_taps.cuh"
#include "cuda/memory.cuh"
#include "cuda/ms_deform_attn_sampler.cuh"
#include "cuda/tap_gradients.cuh"
#include "cuda/units.cuh"

namespace ops_dcnv4 {

// Computes what `backward` does, with fewer instructions: a block reads the levels once, and lanes
// exchange their taps through shared memory.
template <typename Sampler, bool scatter, typename S = typename Sampler::Compiled,
          typename scalar_t = typename S::scalar_t, typename point_t = typename Sampler::point_t>
__global__ void __launch_bounds__(block_threads, blocks_at_once)
    attention_backward(const __grid_constant__ Sampler sampler,
                       const __grid_constant__ Layout layout,
                       const scalar_t* __restrict__ grad_output, const scalar_t* __restrict__ value,
                       const point_t* __restrict__ locations, const point_t* __restrict__ weights,
                       float* __restrict__ grad_value, float* __restrict__ grad_locations,
                       float* __restrict__ grad_weights) {
  constexpr int lanes = S::lanes, own = S::taps / lanes;
  static_assert(S::taps % lanes == 0, "lanes plan equal numbers of taps");
  const BackwardTaps<S> shared(lanes, lanes);
  auto* levels = reinterpret_cast<Level<int, int>*>(static_cast<char*>(shared_memory()) +
                                                    BackwardTaps<S>::bytes);
  sampler.stage_levels(levels);
  const int channels = sampler.channels();

  for_units<Sampler::tile_width>(layout, lanes, [&](const ThreadUnit& unit) {
    const auto tap_of = sampler.taps_of(unit, layout.output, lanes, locations, weights,
                                        [&](int level) { return levels[level]; });
    TapSample<float> samples[own];
    unsigned whole[own];  // a bit per lane of the warp: whether its tap only samples inside
    __syncwarp();         // until all lanes have read the dot products of the unit before
#pragma unroll
    for (int i = 0; i < own; ++i) {
      const auto tap = tap_of(i * lanes + unit.lane);
      const auto cell = locate<Scalar<float, int>>(tap.x, tap.y, tap.level);
      const bool counts = cell.counts && unit.exists;
      samples[i] = TapSample<float>(cell, counts ? tap.weight : 0);
      if (!counts) samples[i].inside = 0;
      whole[i] = __ballot_sync(0xffffffff, samples[i].inside == 15);
      const int pixel = cell.counts ? cell.pixel(tap.level) : 0;  // a level may exceed value
      const int right = cell.x.step(1), below = cell.y.step(tap.level.row_pixels);
      shared.store_plan(i * lanes + unit.lane, samples[i],
                        CellPixels{{pixel, pixel + right, pixel + below, pixel + right + below}});
    }
    __syncwarp();
    const UnitGradient<S> grad(
        at_unit(grad_output, layout.output, unit, channels, S::group_channels), S::group_channels,
        unit.lane * S::vec);
    const int64_t first_value = unit.image * sampler.pixels() * channels +
                                (unit.exists ? unit.group * S::group_channels : 0);
    const scalar_t* image = computed(value + first_value + unit.lane * S::vec);
    float* grad_image = computed(grad_value + first_value + grad.first_added(unit.lane * S::vec));
    const int pixel_bytes = channels * static_cast<int>(sizeof(scalar_t));
    const int grad_bytes = channels * static_cast<int>(sizeof(float));
    process_taps<CellPixels, scatter>(
        shared, grad,
        [&](const CellPixels& place, int corner) {
          return advance(image, place.corners[corner], pixel_bytes);
        },
        [&](const CellPixels& place, int corner) {
          return advance(grad_image, place.corners[corner], grad_bytes);
        },
        [&](int k) { return (~whole[k / lanes] & lanes_with_index<S>(k % lanes)) == 0; });
    const auto tap_gradients =
        sampler.gradients_of(unit, layout.output, grad_locations, grad_weights);
#pragma unroll
    for (int i = 0; i < own; ++i) {
      const int k = i * lanes + unit.lane;
      const TapGradients<float> of_tap(samples[i], shared.dots(k));
      if (unit.exists) tap_gradients.store(k, of_tap.x, of_tap.y, of_tap.weight);
    }
    tap_gradients.finish(lanes, tap_of);
  });
  sampler.check();
}

// Adds to grad_value, which must be zero at the start, and writes the other gradients.
template <typename Sampler, typename scalar_t, typename point_t>
void launch_attention_backward(const Sampler& sampler, bool scatter, const scalar_t* grad_output,
                               const scalar_t* value, const point_t* locations,
                               const point_t* weights, float* grad_value, float* grad_locations,
                               float* grad_weights) {
  using S = typename Sampler::Compiled;
  const auto kernel =
      scatter ? &attention_backward<Sampler, true> : &attention_backward<Sampler, false>;
  constexpr std::size_t bytes = BackwardTaps<S>::bytes + S::taps * sizeof(Level<int, int>);
  const Layout layout = layout_of(sampler);
  launch(kernel, {layout.grid(), block_threads, bytes}, sampler, layout, grad_output, value,
         locations, weights, grad_value, grad_locations, grad_weights);
}

}  // namespace ops_dcnv4
