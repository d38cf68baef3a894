// Sampling points of DCNv4: the taps of a window around each output pixel.
#pragma once

#include <algorithm>

#include "cuda/static.cuh"
#include "cuda/tap.cuh"
#include "geometry.h"

namespace ops_dcnv4 {

// offset_mask contains locations and weights, and is passed to the kernels as both.
template <typename S>
struct Dcnv4Sampler {
  using Compiled = S;
  using acc_t = typename S::acc_t;
  using point_t = typename S::scalar_t;
  using grad_point_t = point_t;
  static constexpr int tile_width = square_tiles;

  Geometry g;
  acc_t offset_scale;

  Dcnv4Sampler<typename S::General> general() const { return {g, offset_scale}; }

  Extents output() const {
    return {g.batch, g.out_height, g.out_width, static_cast<int>(g.groups)};
  }

  __device__ __forceinline__ int taps() const { return g.taps(); }
  __device__ __forceinline__ int64_t channels() const { return g.channels(); }
  OPS_DCNV4_INLINE int group_channels() const { return g.group_channels; }
  OPS_DCNV4_INLINE int64_t pixels() const { return int64_t(g.height) * g.width; }

  __device__ __forceinline__ void check() const {}

  // Returns a unit's part of offset_mask: offset pairs, column by column of the window, and then
  // modulation scalars.
  template <typename T>
  __device__ __forceinline__ T* at(T* offset_mask, const Extents& output,
                                   const ThreadUnit& unit) const {
    using index_t = typename S::index_t;
    return at_unit<index_t>(offset_mask, output, unit, g.offset_channels, 3 * taps());
  }

  // Returns a function that maps k to tap k of a unit.
  __device__ __forceinline__ auto taps_of(const ThreadUnit& unit, const Extents& output, int,
                                          const point_t* offset_mask, const point_t*) const {
    return [this, &unit, offsets = at(offset_mask, output, unit)](int k) -> Tap<acc_t> {
      const int rows = g.y.kernel;
      const int center = g.x.kernel / 2 * rows + g.y.kernel / 2;
      const int in_window = g.remove_center && k >= center ? k + 1 : k;
      const int tap_x = in_window / rows, tap_y = in_window - tap_x * rows;
      const acc_t x = g.x.center_of(unit.col) +
                      offset_scale * (g.x.grid(tap_x) + static_cast<acc_t>(offsets[2 * k]));
      const acc_t y = g.y.center_of(unit.row) +
                      offset_scale * (g.y.grid(tap_y) + static_cast<acc_t>(offsets[2 * k + 1]));
      return {x, y, static_cast<acc_t>(offsets[2 * taps() + k]), {g.width, g.height, g.width, 0}};
    };
  }

  // Destination of a unit's gradients.
  struct GradientStore {
    const Dcnv4Sampler& sampler;
    const ThreadUnit& unit;
    point_t* offsets;

    // Stores the gradients of x and y, in pixels, and of the modulation of tap k.
    __device__ __forceinline__ void store(int k, acc_t x, acc_t y, acc_t modulation) const {
      offsets[2 * k] = static_cast<point_t>(sampler.offset_scale * x);
      offsets[2 * k + 1] = static_cast<point_t>(sampler.offset_scale * y);
      offsets[2 * sampler.taps() + k] = static_cast<point_t>(modulation);
    }

    // Clears the gradient of the padding channels.
    template <typename TapOf>
    __device__ __forceinline__ void finish(int lanes, const TapOf&) const {
      const Geometry& g = sampler.g;
      const int used = 3 * sampler.taps();
      if (!unit.exists || unit.group != g.groups - 1) return;
      const typename S::index_t end = g.offset_channels - unit.group * used;
      for (typename S::index_t c = used + unit.lane; c < end; c += lanes) {
        offsets[c] = point_t(0);
      }
    }
  };

  __device__ __forceinline__ GradientStore gradients_of(const ThreadUnit& unit,
                                                        const Extents& output,
                                                        point_t* grad_offset_mask, point_t*) const {
    return {*this, unit, at(grad_offset_mask, output, unit)};
  }
};

// Calls body with the sampler of the matching kernels; without `specialize`, of general ones.
template <typename scalar_t, typename acc_t, typename Body>
void with_sampler(const Geometry& g, std::initializer_list<const Tensor*> tensors, bool specialize,
                  const Body& body) {
  const KernelSizes sizes{
      g.group_channels, specialize && g.y.kernel == 3 && g.x.kernel == 3 ? g.taps() : 0,
      std::max(int64_t(g.height) * g.width * g.channels(),
               int64_t(g.out_height) * g.out_width * std::max(g.channels(), g.offset_channels))};
  constexpr int vec = 16 / sizeof(scalar_t);
  with_static<scalar_t, acc_t, vec, vec, true, 8, 9>(sizes, tensors, [&](auto compiled) {
    body(Dcnv4Sampler<decltype(compiled)>{g, static_cast<acc_t>(g.offset_scale)});
  });
}

}  // namespace ops_dcnv4
