// Forward kernel of DCNv4 for the windows and group widths of window.cuh.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/corner_weights.cuh"
#include "cuda/forward_plans.cuh"
#include "cuda/memory.cuh"
#include "cuda/window.cuh"

namespace ops_dcnv4 {

// Computes what `forward` does.
template <typename S, typename scalar_t = typename S::scalar_t>
__global__ void __launch_bounds__(block_threads)
    window_forward(const __grid_constant__ WindowCall call, const scalar_t* __restrict__ value,
                   const scalar_t* __restrict__ offset_mask, scalar_t* __restrict__ output) {
  using Weights = CornerWeightsOf<S>;
  using Pixels = Pack<scalar_t, S::vec>;
  using Unit = WindowUnit<S>;
  constexpr int taps = S::taps, own = Unit::own;

  const Unit unit(call, offset_mask);
  Plans<Weights, taps> plans(threadIdx.x / unit.lanes, Unit::units);
  const scalar_t* image = advance(value, blockIdx.z * call.value_image);
  const int channel = unit.channel(call);
  Pack<float, S::vec> sum = {};
  if (__all_sync(0xffffffff, unit.is_inside())) {
#pragma unroll
    for (int i = 0; i < own; ++i) {
      const WindowCell cell(unit.x[i], unit.y[i]);
      const Weights weights(cell.dx, cell.dy, unit.modulation[i]);
      if (unit.plans(i)) plans.store(unit.first + i, cell.y * call.width + cell.x, weights);
    }
    __syncwarp();
    const scalar_t* corners[4];  // of the cell at the window's center
    corners[0] =
        computed(advance(image, int64_t(unit.center_y) * call.value_row +
                                    (int64_t(unit.center_x) * call.value_pixel + channel)));
    corners[1] = computed(advance(corners[0], call.value_pixel));
    corners[2] = computed(advance(corners[0], call.value_row));
    corners[3] = computed(advance(corners[2], call.value_pixel));
#pragma unroll
    for (int k = 0; k < taps; ++k) {
      plans.template load<int>(k, [&](int place, const Weights& weights) {
        Pixels pixels[4];
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          pixels[corner] = Pixels::load(advance(corners[corner], place, call.value_pixel));
        }
        weights.add_sample(pixels, true, sum);
      });
    }
  } else {
    if (!__any_sync(0xffffffff, unit.exists)) return;
#pragma unroll
    for (int i = 0; i < own; ++i) {
      const RimCell cell(call, unit, i);
      const Weights weights(cell.has_left ? 1 - cell.dx : 0, cell.has_right ? cell.dx : 0,
                            cell.has_top ? 1 - cell.dy : 0, cell.has_bottom ? cell.dy : 0,
                            unit.modulation[i]);
      const int top = cell.top * call.width, bottom = cell.bottom * call.width;
      const TapPixels place{{cell.counts ? top + cell.left : -1, top + cell.right,
                             bottom + cell.left, bottom + cell.right}};
      if (unit.plans(i)) plans.store(unit.first + i, place, weights);
    }
    __syncwarp();
    add_samples<false>(plans, computed(advance(image, channel)), call.value_pixel, sum);
    if (!unit.exists) return;
  }
  sum.template to<scalar_t>().store(
      advance(output, blockIdx.z * call.output_image + (unit.pixel * call.value_pixel + channel)));
}

template <typename S, typename scalar_t>
void launch_window_forward(const Geometry& g, const scalar_t* value, const scalar_t* offset_mask,
                           scalar_t* output) {
  const Extents extents{g.batch, g.out_height, g.out_width, static_cast<int>(g.groups)};
  const Layout layout(extents, lanes_for(g.group_channels, S::vec), square_tiles);
  const int bytes = Plans<CornerWeightsOf<S>, S::taps>::bytes(WindowUnit<S>::units);
  launch(window_forward<S>, {layout.grid(), block_threads, static_cast<std::size_t>(bytes)},
         WindowCall(g, layout, sizeof(scalar_t)), value, offset_mask, output);
}

}  // namespace ops_dcnv4
