// Forward kernel of DCNv4 for the windows and group widths of window.cuh.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/corner_weights.cuh"
#include "cuda/memory.cuh"
#include "cuda/window.cuh"

namespace ops_dcnv4 {

// The pixels of a tap at the rim; one outside the image is replaced by its neighbor inside, whose
// weight is zero. The first is -1 if the tap reaches no pixel.
struct RimPixels {
  int at[4];
};

// The plans of a block's taps, in shared memory. A plan consists of weights and the place of a
// cell, an int or RimPixels.
template <typename Weights, int taps>
class Plans {
  static constexpr bool together = sizeof(Weights) == 12;  // an int and weights are 16 bytes

 public:
  static constexpr int bytes(int units) { return units * taps * 2 * sizeof(uint4); }

  // Those of one of `units` units.
  __device__ __forceinline__ Plans(int unit, int units)
      : fours_(static_cast<uint4*>(shared_memory()) + unit * taps),
        places_(fours_ + units * taps) {}

  template <typename Place>
  __device__ __forceinline__ void store(int k, const Place& place, const Weights& weights) {
    if constexpr (together && sizeof(Place) == sizeof(int)) {
      fours_[k] = ops_dcnv4::bit_cast<uint4>(Plan{place, weights});
    } else {
      *reinterpret_cast<Weights*>(fours_ + k) = weights;
      *reinterpret_cast<Place*>(places_ + k) = place;
    }
  }

  // Calls use(place, weights) with the plan of tap k.
  template <typename Place, typename Use>
  __device__ __forceinline__ void load(int k, const Use& use) const {
    if constexpr (together && sizeof(Place) == sizeof(int)) {
      const auto plan = ops_dcnv4::bit_cast<Plan>(fours_[k]);
      use(plan.place, plan.weights);
    } else {
      use(*reinterpret_cast<const Place*>(places_ + k),
          *reinterpret_cast<const Weights*>(fours_ + k));
    }
  }

 private:
  struct Plan {
    int place;
    Weights weights;
  };
  uint4 *fours_, *places_;
};

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
  Plans<Weights, taps> plans(threadIdx.x / Unit::lanes, Unit::units);
  const scalar_t* image = advance(value, blockIdx.z * call.value_image);
  const int channel = unit.channel();
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
                            cell.counts ? unit.modulation[i] : 0);
      const int top = cell.top * call.width, bottom = cell.bottom * call.width;
      const RimPixels place{{cell.counts ? top + cell.left : -1, top + cell.right,
                             bottom + cell.left, bottom + cell.right}};
      if (unit.plans(i)) plans.store(unit.first + i, place, weights);
    }
    __syncwarp();
    const scalar_t* origin = computed(advance(image, channel));
#pragma unroll
    for (int k = 0; k < taps; ++k) {
      plans.template load<RimPixels>(k, [&](const RimPixels& place, const Weights& weights) {
        Pixels pixels[4];
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          const int pixel = corner == 0 ? std::max(place.at[0], 0) : place.at[corner];
          pixels[corner] = Pixels::load(advance(origin, pixel, call.value_pixel));
        }
        weights.add_sample(pixels, place.at[0] >= 0, sum);
      });
    }
    if (!unit.exists) return;
  }
  sum.template to<scalar_t>().store(
      advance(output, blockIdx.z * call.output_image + (unit.pixel * call.value_pixel + channel)));
}

template <typename S, typename scalar_t>
void launch_window_forward(const Geometry& g, const scalar_t* value, const scalar_t* offset_mask,
                           scalar_t* output) {
  constexpr int lanes = S::group_channels / S::vec;
  const Extents extents{g.batch, g.out_height, g.out_width, static_cast<int>(g.groups)};
  const Layout layout(extents, lanes, square_tiles);
  const int bytes = Plans<CornerWeightsOf<S>, S::taps>::bytes(block_threads / lanes);
  launch(window_forward<S>, {layout.grid(), block_threads, static_cast<std::size_t>(bytes)},
         WindowCall(g, layout, sizeof(scalar_t)), value, offset_mask, output);
}

}  // namespace ops_dcnv4
