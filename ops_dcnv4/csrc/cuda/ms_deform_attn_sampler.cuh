// Sampling points of multi-scale deformable attention: those of each query in each level of value.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "attention.h"
#include "cuda/static.cuh"
#include "cuda/tap.cuh"

namespace ops_dcnv4 {

// The contents of spatial_shapes and level_start_index, in GPU memory.
struct LevelTensors {
  const int64_t* shapes;
  const int64_t* starts;
};

// The height of a level without pixels, which contains no point.
constexpr int empty_height = -1;

// In the fused form, locations and weights share a tensor, and the weights are logits to be
// normalized by a softmax.
template <typename S, typename point>
struct MsDeformAttnSampler {
  using Compiled = S;
  using acc_t = typename S::acc_t;
  using point_t = point;
  using grad_point_t = acc_t;  // not 16 bits, since the softmax's gradient is computed in place
  using index_t = typename S::index_t;
  static constexpr int tile_width = queries_in_a_row;

  Attention a;
  LevelTensors levels;
  Divisor points;

  MsDeformAttnSampler(const Attention& a, const LevelTensors& levels)
      : a(a), levels(levels), points(a.points) {}

  MsDeformAttnSampler<typename S::General, point> general() const { return {a, levels}; }

  Extents output() const { return {a.batch, 1, a.queries, static_cast<int>(a.heads)}; }

  __device__ __forceinline__ int taps() const { return S::taps ? S::taps : a.taps(); }
  __device__ __forceinline__ int64_t channels() const { return a.channels(); }
  OPS_DCNV4_INLINE int group_channels() const {
    return S::group_channels ? S::group_channels : a.head_channels;
  }
  OPS_DCNV4_INLINE int64_t pixels() const { return a.pixels; }

  // Locations (x, y) and weights or logits of a unit.
  template <typename T>
  struct Points {
    T* locations;
    T* weights;
  };

  template <typename T>
  __device__ __forceinline__ Points<T> at(T* locations, T* weights, const Extents& output,
                                          const ThreadUnit& unit) const {
    const int location_stride = a.location_stride(taps());
    const int weight_stride = a.weight_stride(taps());
    const index_t heads = a.heads;
    return {at_unit<index_t>(locations, output, unit, heads * location_stride, location_stride),
            at_unit<index_t>(weights, output, unit, heads * weight_stride, weight_stride)};
  }

  // Returns a function that maps k to tap k of a unit.
  __device__ __forceinline__ auto taps_of(const ThreadUnit& unit, const Extents& output, int lanes,
                                          const point_t* locations, const point_t* weights) const {
    return taps_of(unit, output, lanes, locations, weights,
                   [this](int level) { return level_of(level); });
  }
  // The same with levels from another function.
  template <typename LevelOf>
  __device__ __forceinline__ auto taps_of(const ThreadUnit& unit, const Extents& output, int lanes,
                                          const point_t* locations, const point_t* weights,
                                          const LevelOf& level_of) const {
    const Points<const point_t> at_k = at(locations, weights, output, unit);
    acc_t largest = 0, factor = 1;
    if (a.fused) {
      largest = -std::numeric_limits<acc_t>::infinity();
      for (int k = unit.lane; k < taps(); k += lanes) {
        largest = std::max(largest, static_cast<acc_t>(at_k.weights[k]));
      }
      largest = over_lanes(largest, lanes, [](acc_t a, acc_t b) { return std::max(a, b); });
      acc_t sum = 0;
      for (int k = unit.lane; k < taps(); k += lanes) {
        sum += std::exp(static_cast<acc_t>(at_k.weights[k]) - largest);
      }
      factor = 1 / over_lanes(sum, lanes, [](acc_t a, acc_t b) { return a + b; });
    }
    return [this, at_k, largest, factor, level_of](int k) -> Tap<acc_t> {
      acc_t weight = static_cast<acc_t>(at_k.weights[k]);
      if (a.fused) weight = factor * std::exp(weight - largest);
      const auto level = level_of(points.divide(k));
      const acc_t x = static_cast<acc_t>(at_k.locations[2 * k]) * level.width - acc_t(0.5);
      const acc_t y = static_cast<acc_t>(at_k.locations[2 * k + 1]) * level.height - acc_t(0.5);
      return {x, y, weight, level};
    };
  }

  // Returns a level, which has no pixels if it exceeds value. The host does not check the sizes,
  // because it would have to synchronize.
  __device__ __forceinline__ Level<int, int> level_of(int level) const {
    const int64_t height = levels.shapes[2 * level], width = levels.shapes[2 * level + 1];
    const int64_t start = levels.starts[level];
    const bool is_small = (height | width | start) >> 32 == 0;  // and not negative
    const uint64_t end = uint64_t(unsigned(height)) * unsigned(width) + unsigned(start);
    const bool fits = is_small && end > uint64_t(start) && end <= uint64_t(a.pixels);
    return {static_cast<int>(width), fits ? static_cast<int>(height) : empty_height,
            static_cast<int>(width), static_cast<int>(start)};
  }

  // Copies the levels, at most one per tap, to shared memory. All threads of a block must call it.
  __device__ __forceinline__ void stage_levels(Level<int, int>* staged) const {
    for (int level = threadIdx.x; level < a.levels; level += block_threads) {
      staged[level] = level_of(level);
    }
    __syncthreads();
  }

  // Fails an assertion if a level exceeds value. Only the first block checks this, and only at the
  // end, because an assertion before a shuffle would make all threads reconverge there.
  __device__ __forceinline__ void check() const {
    if (blockIdx.x + blockIdx.y + blockIdx.z != 0) return;
    for (int level = threadIdx.x; level < a.levels; level += block_threads) {
      CUDA_KERNEL_ASSERT_MSG(
          level_of(level).height != empty_height,
          "the levels of spatial_shapes and level_start_index must lie within value");
    }
  }

  // Destination of a unit's gradients.
  struct GradientStore {
    const MsDeformAttnSampler& sampler;
    const ThreadUnit& unit;
    Points<acc_t> at;

    // Stores the gradients of x and y, in pixels, and of the weight of tap k.
    __device__ __forceinline__ void store(int k, acc_t x, acc_t y, acc_t weight) const {
      const int64_t* shape = sampler.levels.shapes + 2 * sampler.points.divide(k);
      at.locations[2 * k] = static_cast<int>(shape[1]) * x;
      at.locations[2 * k + 1] = static_cast<int>(shape[0]) * y;
      at.weights[k] = weight;
    }

    // In the fused form, replaces the gradients of the weights by those of the logits. Each thread
    // only reads what it stored itself.
    template <typename TapOf>
    __device__ __forceinline__ void finish(int lanes, const TapOf& tap_of) const {
      if (!sampler.a.fused) return;
      const int taps = unit.exists ? sampler.taps() : 0;
      acc_t mean = 0;
      for (int k = unit.lane; k < taps; k += lanes) mean += tap_of(k).weight * at.weights[k];
      mean = over_lanes(mean, lanes, [](acc_t a, acc_t b) { return a + b; });
      for (int k = unit.lane; k < taps; k += lanes) {
        at.weights[k] = tap_of(k).weight * (at.weights[k] - mean);
      }
    }
  };

  __device__ __forceinline__ GradientStore gradients_of(const ThreadUnit& unit,
                                                        const Extents& output,
                                                        acc_t* grad_locations,
                                                        acc_t* grad_weights) const {
    return {*this, unit, at(grad_locations, grad_weights, output, unit)};
  }
};

// Calls body with the sampler of the matching kernels. A thread of the general ones holds up to
// `bytes` of channels.
template <typename scalar_t, typename acc_t, typename point_t, int bytes, typename Body>
void with_sampler(const Attention& a, const LevelTensors& levels,
                  std::initializer_list<const Tensor*> tensors, const Body& body) {
  const int64_t of_query = a.heads * std::max<int64_t>(a.head_channels, 3 * a.taps());
  // The kernels for constant sizes count bytes of value or its gradient.
  const int64_t of_value = a.pixels * a.channels() * static_cast<int64_t>(sizeof(acc_t));
  const KernelSizes sizes{a.head_channels, a.taps(), std::max(of_value, a.queries * of_query)};
  constexpr int vec = 16 / sizeof(scalar_t), general_vec = bytes / sizeof(scalar_t);
  with_static<scalar_t, acc_t, vec, general_vec, false, 16>(sizes, tensors, [&](auto compiled) {
    body(MsDeformAttnSampler<decltype(compiled), point_t>(a, levels));
  });
}

}  // namespace ops_dcnv4
