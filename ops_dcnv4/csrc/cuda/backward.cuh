// Backward kernels, parameterized by the sampler of the operator.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/memory.cuh"
#include "cuda/static.cuh"
#include "cuda/tap.cuh"
#include "cuda/tap_gradients.cuh"
#include "cuda/units.cuh"

namespace ops_dcnv4 {

// Computes the gradients of the tensors that the sampler reads. This needs no atomics, because the
// threads of a unit hold everything these gradients depend on. With `scatter`, also adds to
// grad_value, which must be zero at the start, in any order.
template <typename Sampler, bool scatter, typename S = typename Sampler::Compiled,
          typename scalar_t = typename S::scalar_t, typename acc_t = typename S::acc_t,
          typename point_t = typename Sampler::point_t,
          typename grad_point_t = typename Sampler::grad_point_t>
__global__ void __launch_bounds__(block_threads)
    backward(const Sampler sampler, const Layout layout, const scalar_t* __restrict__ grad_output,
             const scalar_t* __restrict__ value, const point_t* __restrict__ locations,
             const point_t* __restrict__ weights, acc_t* __restrict__ grad_value,
             grad_point_t* __restrict__ grad_locations, grad_point_t* __restrict__ grad_weights) {
  using index_t = typename S::index_t;
  using Pixels = Pack<scalar_t, S::vec>;
  const int lanes = layout.lanes(), taps = sampler.taps();
  const int group_channels = sampler.group_channels();
  const index_t channels = sampler.channels();

  for_units<Sampler::tile_width>(layout, lanes, [&](const ThreadUnit& unit) {
    const auto tap_of = sampler.taps_of(unit, layout.output, lanes, locations, weights);
    const auto tap_gradients =
        sampler.gradients_of(unit, layout.output, grad_locations, grad_weights);
    const scalar_t* grads = at_unit(grad_output, layout.output, unit, channels, group_channels);
    const int64_t first_value =
        unit.image * sampler.pixels() * channels + (unit.exists ? unit.group * group_channels : 0);
    const scalar_t* image = computed(value + first_value);
    acc_t* grad_image = grad_value + first_value;
#pragma unroll
    for (int first = 0; first < taps; first += lanes) {
      const int own = first + unit.lane;
      TapGradients<acc_t> own_gradients;
      TapSample<acc_t> own_sample;
      const auto own_offsets = locate_tap<index_t>(
          tap_of(std::min(own, taps - 1)), channels,
          [&](auto... arguments) { own_sample = TapSample<acc_t>(arguments...); });
#pragma unroll
      for (int lane = 0; lane < std::min(lanes, taps - first); ++lane) {
        const auto offsets = from_lane(own_offsets, lane, lanes);
        const auto tap = from_lane(own_sample, lane, lanes);
        TapGradients<acc_t> gradients;
        if (!offsets.is_none()) {
          const auto weights = tap.weights();
          Corners<acc_t> dots = {};
          for (int c = unit.lane * S::vec; c < group_channels; c += lanes * S::vec) {
            Pixels pixels[4];
            offsets.load(image + c, pixels);
            const auto grad = Pixels::load(grads + c).template to<acc_t>();
#pragma unroll
            for (int corner = 0; corner < 4; ++corner) {
              const auto wide = pixels[corner].template to<acc_t>();
              Pack<acc_t, S::vec> share;
#pragma unroll
              for (int i = 0; i < S::vec; ++i) {
                dots.at[corner] += grad.at[i] * wide.at[i];
                share.at[i] = weights.at[corner] * grad.at[i];
              }
              if (scatter && unit.exists && tap.is_inside(corner)) {
                atomic_add(grad_image + c + offsets.offset(corner), share);
              }
            }
          }
          gradients = TapGradients<acc_t>(tap, dots);
        }
        gradients.reduce(lanes);
        if (lane == unit.lane) own_gradients = gradients;
      }
      if (unit.exists && own < taps) {
        tap_gradients.store(own, own_gradients.x, own_gradients.y, own_gradients.weight);
      }
    }
    tap_gradients.finish(lanes, tap_of);
  });
  sampler.check();
}

// Computes only grad_value, in a fixed order: that of the taps of an image. A warp owns a group of
// `owned` consecutive pixels, and a thread some of its channels. Each of the 32 threads plans a
// tap; those that reach the warp's pixels are then processed one by one. The sums do not depend on
// `owned`.
template <typename Sampler, typename S = typename Sampler::Compiled,
          typename scalar_t = typename S::scalar_t, typename acc_t = typename S::acc_t,
          typename point_t = typename Sampler::point_t>
__global__ void __launch_bounds__(block_threads)
    scatter_in_order(const Sampler sampler, const Extents output, int64_t owned,
                     const scalar_t* __restrict__ grad_output,
                     const point_t* __restrict__ locations, const point_t* __restrict__ weights,
                     acc_t* __restrict__ grad_value) {
  const int lane = threadIdx.x % warp_size, warps = block_threads / warp_size;
  const int taps = sampler.taps(), group_channels = sampler.group_channels();
  const int64_t channels = sampler.channels();
  const int64_t first_owned = blockIdx.y * owned * channels;  // as an offset within the image
  ThreadUnit unit;
  unit.lane = 0;
  unit.group = blockIdx.x * warps + threadIdx.x / warp_size;
  if (unit.group >= output.groups) return;
  for (unit.image = blockIdx.z; unit.image < output.batch; unit.image += gridDim.z) {
    acc_t* image =
        grad_value + unit.image * sampler.pixels() * channels + unit.group * group_channels;
    const int64_t pixels = int64_t(output.height) * output.width;
    // A lane plans every 32nd tap. It finds the next without dividing numbers of 64 bits.
    int k = lane % taps;
    unsigned col = lane / taps;
    unit.row = 0;
    while (true) {
      unit.row += col / output.width;
      col %= output.width;
      unit.col = col;
      unit.exists = unit.row < output.height;
      if (!__any_sync(0xffffffff, unit.exists)) break;
      const int64_t own_pixel = int64_t(unit.row) * output.width + unit.col;
      const auto tap_of = sampler.taps_of(unit, output, 1, locations, weights);
      TapSample<acc_t> own_sample;
      const auto own_offsets = locate_tap<int64_t>(tap_of(k), channels, [&](auto... arguments) {
        own_sample = TapSample<acc_t>(arguments...);
      });
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        const int64_t distance = own_offsets.offset(corner) - first_owned;
        const bool is_owned = distance >= 0 && distance < owned * channels;
        if (!is_owned || !unit.exists) own_sample.inside &= ~(1u << corner);
      }
      const bool reaches = !own_offsets.is_none() && own_sample.inside != 0;
      for (unsigned left = __ballot_sync(0xffffffff, reaches); left != 0; left &= left - 1) {
        const int from = __ffs(left) - 1;
        const auto offsets = from_lane(own_offsets, from, warp_size);
        const auto tap = from_lane(own_sample, from, warp_size);
        const int64_t pixel = unit.image * pixels + from_lane(own_pixel, from, warp_size);
        const scalar_t* grads = grad_output + unit.group * group_channels + pixel * channels;
        const auto weights = tap.weights();
        for (int c = lane; c < group_channels; c += warp_size) {
          const acc_t grad = static_cast<acc_t>(grads[c]);
          acc_t sums[4];  // of different pixels, so all can be loaded before the first is stored
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            if (tap.is_inside(corner)) sums[corner] = image[offsets.offset(corner) + c];
          }
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            if (tap.is_inside(corner)) {
              image[offsets.offset(corner) + c] = sums[corner] + weights.at[corner] * grad;
            }
          }
        }
      }
      k += warp_size % taps;
      col += warp_size / taps + (k >= taps);
      if (k >= taps) k -= taps;
    }
  }
}

// Warps of scatter_in_order: enough for a large GPU, with at least so many pixels. More of them
// would repeat more plans.
constexpr int64_t ordered_warps = 2048, least_owned = 16;

template <typename Sampler, typename scalar_t, typename acc_t, typename point_t>
void launch_scatter_in_order(const Sampler& sampler, const scalar_t* grad_output,
                             const point_t* locations, const point_t* weights, acc_t* grad_value) {
  const Extents output = sampler.output();
  const auto general = sampler.general();
  const int64_t pixels = sampler.pixels();
  const int64_t parts = divide_up(ordered_warps, output.batch * output.groups);
  const int64_t owned = std::max(divide_up(pixels, parts), least_owned);
  const dim3 grid(divide_up(output.groups, block_threads / warp_size), divide_up(pixels, owned),
                  std::min<int64_t>(output.batch, 65535));
  launch(scatter_in_order<std::decay_t<decltype(general)>>, {grid, block_threads}, general, output,
         owned, grad_output, locations, weights, grad_value);
}

// Adds to grad_value, which must be zero at the start, and writes the other gradients.
template <typename Sampler, typename scalar_t, typename acc_t, typename point_t,
          typename grad_point_t>
void launch_backward(const Sampler& sampler, bool in_order, const scalar_t* grad_output,
                     const scalar_t* value, const point_t* locations, const point_t* weights,
                     acc_t* grad_value, grad_point_t* grad_locations, grad_point_t* grad_weights) {
  const Layout layout = layout_of(sampler);
  const auto kernel = in_order ? &backward<Sampler, false> : &backward<Sampler, true>;
  launch(kernel, {layout.grid(), block_threads}, sampler, layout, grad_output, value, locations,
         weights, grad_value, grad_locations, grad_weights);
  if (in_order) launch_scatter_in_order(sampler, grad_output, locations, weights, grad_value);
}

}  // namespace ops_dcnv4
