// Backward kernel of DCNv4 for the windows and group widths of window.cuh.
#pragma once

#include <cstddef>

#include "cuda/backward.cuh"
#include "cuda/memory.cuh"
#include "cuda/window.cuh"

namespace ops_dcnv4 {

// Shared memory of a unit, by tap: first what its lanes need to know of the tap, then their dot
// products of grad_output with the corners.
template <typename S>
class BackwardTaps {
  static constexpr int lanes = S::group_channels / S::vec;
  static_assert(lanes >= 2, "the plan of a tap takes two slots");

 public:
  static constexpr int bytes = S::taps * block_threads * sizeof(uint4);

  __device__ __forceinline__ BackwardTaps()
      : unit_(static_cast<uint4*>(shared_memory()) + threadIdx.x / lanes * lanes),
        own_(unit_ + threadIdx.x % lanes) {}

  // `Place` is the place of the corners.
  template <typename Place>
  __device__ __forceinline__ void store_plan(int k, const Corners<float>& weights,
                                             const Place& place) {
    unit_[k * block_threads] = ops_dcnv4::bit_cast<uint4>(weights);
    *reinterpret_cast<Place*>(unit_ + k * block_threads + 1) = place;
  }
  __device__ __forceinline__ Corners<float> weights(int k) const {
    return ops_dcnv4::bit_cast<Corners<float>>(unit_[k * block_threads]);
  }
  template <typename Place>
  __device__ __forceinline__ Place place(int k) const {
    return *reinterpret_cast<const Place*>(unit_ + k * block_threads + 1);
  }

  // Replaces the plan of a tap, which all lanes must have read.
  __device__ __forceinline__ void store_dots(int k, const Corners<float>& dots) {
    own_[k * block_threads] = ops_dcnv4::bit_cast<uint4>(dots);
  }
  // Returns the sums over the lanes.
  __device__ __forceinline__ Corners<float> dots(int k) const {
    const int lane = threadIdx.x % lanes;
    Corners<float> sums = {};
#pragma unroll
    for (int step = 0; step < lanes; ++step) {
      // The lanes of a unit begin with different slots, which lie in different memory banks.
      const auto share =
          ops_dcnv4::bit_cast<Corners<float>>(unit_[k * block_threads + (lane ^ step)]);
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) sums.at[corner] += share.at[corner];
    }
    return sums;
  }

 private:
  uint4 *unit_, *own_;
};

// The pixel at a cell's top left, counted from the window's center.
struct InnerPlace {
  static constexpr bool is_inner = true;
  int pixel;
};

// The pixels of a cell at the rim; one outside the image is replaced by its neighbor inside, and
// has the weight `none`, bits that no computation results in.
struct alignas(16) RimPlace {
  static constexpr bool is_inner = false;
  static constexpr unsigned none = ~0u;
  int corners[4];
};

// Computes what `backward` does.
template <typename S, bool scatter, typename scalar_t = typename S::scalar_t>
__global__ void __launch_bounds__(block_threads)
    window_backward(const __grid_constant__ WindowCall call,
                    const scalar_t* __restrict__ grad_output, const scalar_t* __restrict__ value,
                    const scalar_t* __restrict__ offset_mask, float* __restrict__ grad_value,
                    scalar_t* __restrict__ grad_offset_mask) {
  using Unit = WindowUnit<S>;
  using Pixels = Pack<scalar_t, S::vec>;
  constexpr int taps = S::taps, lanes = Unit::lanes, own = Unit::own;
  constexpr int wider = sizeof(float) / sizeof(scalar_t);  // grad_value than value
  // A reduction adds four numbers. Those of the lanes of a unit are adjacent, so that they fill
  // whole sectors of memory.
  constexpr int at_once = 4, reductions = S::vec / at_once;

  const Unit unit(call, offset_mask);
  const int channel = unit.channel();
  const scalar_t* grads =
      advance(grad_output, blockIdx.z * call.output_image + unit.pixel * call.value_pixel);
  const auto grad = Pixels::load(advance(grads, channel)).template to<float>();
  const int group_channel = unit.group * S::group_channels + unit.lane * at_once;
  Pack<float, at_once> added[reductions];
  if constexpr (scatter) {
#pragma unroll
    for (int j = 0; j < reductions; ++j) {
      added[j] = Pack<scalar_t, at_once>::load(grads + group_channel + j * lanes * at_once)
                     .template to<float>();
#pragma unroll
      for (float& number : added[j].at) number = computed(number);  // not in every branch
    }
  }

  BackwardTaps<S> shared;
  const scalar_t* image = advance(value, blockIdx.z * call.value_image + channel);
  float* grad_image = advance(grad_value, blockIdx.z * call.value_image * wider) + group_channel;

  // Computes the dot products of all taps and adds to grad_value.
  const auto run = [&](auto kind, const auto& pixel_of, const auto& grad_of, const auto& is_whole) {
    using Place = decltype(kind);
    Place place = shared.template place<Place>(0);
    Corners<float> weights = shared.weights(0);
    Pixels pixels[4];
#pragma unroll
    for (int corner = 0; corner < 4; ++corner)
      pixels[corner] = Pixels::load(pixel_of(place, corner));
#pragma unroll
    for (int k = 0; k < taps; ++k) {
      Corners<float> dots = {};
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        const auto wide = pixels[corner].template to<float>();
#pragma unroll
        for (int i = 0; i < S::vec; ++i) dots.at[corner] += grad.at[i] * wide.at[i];
      }
      const Place this_place = place;
      const Corners<float> this_weights = weights;
      if (k + 1 < taps) {  // loads before the reductions, behind which nvcc does not move them
        place = shared.template place<Place>(k + 1);
        weights = shared.weights(k + 1);
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          pixels[corner] = Pixels::load(pixel_of(place, corner));
        }
      }
      const auto add = [&](auto all_inside) {
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          const float weight = this_weights.at[corner];
          if (!all_inside && ops_dcnv4::bit_cast<unsigned>(weight) == RimPlace::none) continue;
          float* to = grad_of(this_place, corner);
#pragma unroll
          for (int j = 0; j < reductions; ++j) {
            Pack<float, at_once> share;
#pragma unroll
            for (int i = 0; i < at_once; ++i) share.at[i] = weight * added[j].at[i];
            atomic_add(to + j * lanes * at_once, share);
          }
        }
      };
      if constexpr (scatter) {
        if (is_whole(k)) {
          add(std::true_type());
        } else {
          add(std::false_type());
        }
      }
      __syncwarp();
      shared.store_dots(k, dots);
    }
    __syncwarp();
  };

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
    for (int c = 3 * taps + unit.lane; c < end; c += lanes) gradients[c] = scalar_t(0);  // padding
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
    run(
        InnerPlace(),
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
      const RimPlace place{
          {top + cell.left, top + cell.right, bottom + cell.left, bottom + cell.right}};
      const unsigned inside = computed(cell.inside());
      samples[i] = {cell.dx, cell.dy, cell.counts ? unit.modulation[i] : 0, inside};
      whole[i] = __ballot_sync(0xffffffff, inside == 15);
      Corners<float> weights = samples[i].weights();
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        if (!samples[i].is_inside(corner))
          weights.at[corner] = ops_dcnv4::bit_cast<float>(RimPlace::none);
      }
      if (unit.plans(i)) shared.store_plan(unit.first + i, weights, place);
    }
    __syncwarp();
    const scalar_t* origin = computed(image);
    float* grad_origin = computed(grad_image);
    run(
        RimPlace(),
        [&](const RimPlace& place, int corner) {
          return advance(origin, place.corners[corner], call.value_pixel);
        },
        [&](const RimPlace& place, int corner) {
          return advance(grad_origin, place.corners[corner], grad_pixel);
        },
        [&](int k) {
          const auto [lane, i] = Unit::planner_of(k);
          const unsigned lanes_of_warp = ~0u / ((1u << lanes) - 1) << lane;
          return (~whole[i] & lanes_of_warp) == 0;
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
  const Layout layout(extents, S::group_channels / S::vec, square_tiles);
  const auto kernel = scatter ? &window_backward<S, true> : &window_backward<S, false>;
  launch(kernel, {layout.grid(), block_threads, static_cast<std::size_t>(BackwardTaps<S>::bytes)},
         WindowCall(g, layout, sizeof(scalar_t)), grad_output, value, offset_mask, grad_value,
         grad_offset_mask);
}

}  // namespace ops_dcnv4
