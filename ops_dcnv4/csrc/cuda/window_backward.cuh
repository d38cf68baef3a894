// Backward kernel of DCNv4 for the windows and group widths of window.cuh.
#pragma once

#include <cstddef>

#include "cuda/backward.cuh"
#include "cuda/backward_taps.cuh"
#include "cuda/memory.cuh"
#include "cuda/window.cuh"

namespace ops_dcnv4 {

// The pixel at a cell's top left, counted from the window's center.
struct InnerPlace {
  int pixel;
};

// Computes what `backward` does.
template <typename S, bool scatter, typename scalar_t = typename S::scalar_t>
__global__ void __launch_bounds__(block_threads, blocks_at_once)
    window_backward(const __grid_constant__ WindowCall call,
                    const scalar_t* __restrict__ grad_output, const scalar_t* __restrict__ value,
                    const scalar_t* __restrict__ offset_mask, float* __restrict__ grad_value,
                    scalar_t* __restrict__ grad_offset_mask) {
  using Unit = WindowUnit<S>;
  constexpr int taps = S::taps, own = Unit::own;
  constexpr int wider = sizeof(float) / sizeof(scalar_t);  // grad_value than value

  const Unit unit(call, offset_mask);
  const int channel = unit.channel(call), first_read = unit.first_channel(call);
  const scalar_t* grads =
      advance(grad_output, blockIdx.z * call.output_image + unit.pixel * call.value_pixel);
  const int group_channels = unit.group_channels(call);
  const int first_channel = unit.group * group_channels;
  const UnitGradient<S> grad(grads + first_channel, group_channels, first_read,
                             unit.has_channels(call));
  const BackwardTaps<S> shared(unit.lanes, S::lanes ? S::lanes : group_channels / S::vec);
  const scalar_t* image = advance(value, blockIdx.z * call.value_image + channel);
  float* grad_image = advance(grad_value, blockIdx.z * call.value_image * wider) + first_channel +
                      grad.first_added(first_read);

  // Stores the gradients of the thread's taps.
  const auto finish = [&](const TapSample<float>(&samples)[own]) {
    scalar_t* gradients = unit.at(call, grad_offset_mask);
#pragma unroll
    for (int i = 0; i < own; ++i) {
      const int k = unit.first + i;
      const TapGradients<float> of_tap(samples[i], shared.dots(k));
      if (!unit.plans(i)) continue;
      gradients[2 * k] = static_cast<scalar_t>(call.offset_scale * of_tap.x);
      gradients[2 * k + 1] = static_cast<scalar_t>(call.offset_scale * of_tap.y);
      gradients[2 * taps + k] = static_cast<scalar_t>(of_tap.weight);
    }
    if (unit.group != call.layout.output.groups - 1) return;
    const int end = call.points_pixel / static_cast<int>(sizeof(scalar_t)) - 3 * taps * unit.group;
#pragma unroll 1
    for (int c = 3 * taps + unit.lane; c < end; c += unit.lanes)
      gradients[c] = scalar_t(0);  // padding
  };

  TapSample<float> samples[own];
  const int grad_pixel = call.value_pixel * wider, grad_row = call.value_row * wider;
  if (__all_sync(0xffffffff, unit.is_inside())) {
#pragma unroll
    for (int i = 0; i < own; ++i) {
      const WindowCell cell(unit.x[i], unit.y[i]);
      samples[i] = {cell.dx, cell.dy, unit.modulation[i], 15};  // all corners
      if (!unit.plans(i)) continue;
      shared.store_plan(unit.first + i, samples[i].weights(),
                        InnerPlace{cell.y * call.width + cell.x});
    }
    __syncwarp();
    const scalar_t* corners[4];  // of the cell at the window's center
    corners[0] = computed(advance(image, int64_t(unit.center_y) * call.value_row +
                                             int64_t(unit.center_x) * call.value_pixel));
    corners[1] = computed(advance(corners[0], call.value_pixel));
    corners[2] = computed(advance(corners[0], call.value_row));
    corners[3] = computed(advance(corners[2], call.value_pixel));
    float* grad_corners[4];
    grad_corners[0] = computed(advance(
        grad_image, int64_t(unit.center_y) * grad_row + int64_t(unit.center_x) * grad_pixel));
    grad_corners[1] = computed(advance(grad_corners[0], grad_pixel));
    grad_corners[2] = computed(advance(grad_corners[0], grad_row));
    grad_corners[3] = computed(advance(grad_corners[2], grad_pixel));
    process_taps<InnerPlace, scatter>(
        shared, grad,
        [&](const InnerPlace& place, int corner) {
          return advance(corners[corner], place.pixel, call.value_pixel);
        },
        [&](const InnerPlace& place, int corner) {
          return advance(grad_corners[corner], place.pixel, grad_pixel);
        },
        [](int) { return std::true_type(); });
    finish(samples);
  } else {
    if (!__any_sync(0xffffffff, unit.exists)) return;
    unsigned whole[own];  // a bit per lane of the warp: whether its tap only samples inside
#pragma unroll
    for (int i = 0; i < own; ++i) {
      const RimCell cell(call, unit, i);
      const int top = cell.top * call.width, bottom = cell.bottom * call.width;
      const CellPixels place{
          {top + cell.left, top + cell.right, bottom + cell.left, bottom + cell.right}};
      const unsigned inside = computed(cell.inside());
      samples[i] = {cell.dx, cell.dy, cell.counts ? unit.modulation[i] : 0, inside};
      whole[i] = __ballot_sync(0xffffffff, inside == 15);
      if (unit.plans(i)) shared.store_plan(unit.first + i, samples[i], place);
    }
    __syncwarp();
    const scalar_t* origin = computed(image);
    float* grad_origin = computed(grad_image);
    process_taps<CellPixels, scatter>(
        shared, grad,
        [&](const CellPixels& place, int corner) {
          return advance(origin, place.corners[corner], call.value_pixel);
        },
        [&](const CellPixels& place, int corner) {
          return advance(grad_origin, place.corners[corner], grad_pixel);
        },
        [&](int k) {
          if constexpr (S::lanes == 0) {
            return false;
          } else {
            const auto [lane, i] = Unit::planner_of(k);
            return (~whole[i] & lanes_with_index<S>(lane)) == 0;
          }
        });
    if (unit.exists) finish(samples);
  }
}

// Adds to grad_value, which must be zero at the start, and writes the other gradient.
template <typename S, typename scalar_t>
void launch_window_backward(const Geometry& g, bool scatter, const scalar_t* grad_output,
                            const scalar_t* value, const scalar_t* offset_mask, float* grad_value,
                            scalar_t* grad_offset_mask) {
  const Extents extents{g.batch, g.out_height, g.out_width, static_cast<int>(g.groups)};
  const Layout layout(extents, lanes_for(g.group_channels, S::vec), square_tiles);
  const auto kernel = scatter ? &window_backward<S, true> : &window_backward<S, false>;
  launch(kernel, {layout.grid(), block_threads, static_cast<std::size_t>(BackwardTaps<S>::bytes)},
         WindowCall(g, layout, sizeof(scalar_t)), grad_output, value, offset_mask, grad_value,
         grad_offset_mask);
}

}  // namespace ops_dcnv4
