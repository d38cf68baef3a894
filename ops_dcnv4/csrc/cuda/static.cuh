// Sizes that kernels are compiled for, and the choice among them.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <type_traits>

#include "cuda/units.cuh"
#include "tensor.h"

namespace ops_dcnv4 {

// The sizes known at compile time; 0 means unknown.
template <typename scalar, typename acc, int vec_, int group_channels_, int taps_>
struct Static {
  using scalar_t = scalar;
  using acc_t = acc;
  static constexpr int vec = vec_;  // channels per thread
  static constexpr int group_channels = group_channels_;
  static constexpr int taps = taps_;
  static constexpr int lanes = group_channels / vec;  // threads per unit
  // Type of offsets within an image. The host chooses the general kernels if 32 bits do not
  // suffice.
  using index_t = std::conditional_t<taps != 0, int, int64_t>;

  using General = Static<scalar, acc, 1, 0, 0>;
};

// Returns the number of threads that hold all channels of a unit, at most a warp.
inline int lanes_for(int64_t group_channels, int vec) {
  int lanes = 1;
  while (lanes < warp_size && lanes * vec < group_channels) lanes *= 2;
  return lanes;
}

template <typename Sampler>
Layout layout_of(const Sampler& sampler) {
  const int lanes = lanes_for(sampler.group_channels(), Sampler::Compiled::vec);
  return Layout(sampler.output(), lanes, Sampler::tile_width);
}

// The fewest threads per unit in kernels that are compiled for the taps but for any group width.
constexpr int least_lanes = 4;

// Sizes of a call that determine its kernels.
struct KernelSizes {
  int64_t group_channels;
  int taps;          // 0 for windows without a specialized kernel
  int64_t distance;  // largest offset within an image, in elements
};

// Calls body with the matching Static: constant sizes and `vec` channels per thread for the group
// widths of the published models with one of these numbers of taps. With `any_width`, groups of
// other widths have a constant number of taps too, and as many channels per thread as divide the
// width and leave enough threads. Otherwise `general_vec` channels per thread, or two or one if the
// width or the tensors are not aligned to that many.
template <typename scalar_t, typename acc_t, int vec, int general_vec, bool any_width, int... taps,
          typename Body>
void with_static(const KernelSizes& sizes, std::initializer_list<const Tensor*> tensors,
                 const Body& body) {
  const auto are_aligned = [&](int channels) {
    bool aligned = sizes.group_channels % channels == 0;
    for (const Tensor* tensor : tensors) {
      const auto address = reinterpret_cast<std::uintptr_t>(tensor->const_data_ptr());
      aligned &= address % (channels * sizeof(scalar_t)) == 0;
    }
    return aligned;
  };
  bool done = false;
  if constexpr (!std::is_same_v<scalar_t, double>) {
    const auto with = [&](auto channels, auto count) {
      constexpr int c = decltype(channels)::value, t = decltype(count)::value;
      if (done || sizes.group_channels != c || sizes.taps != t) return;
      body(Static<scalar_t, acc_t, vec, c, t>());
      done = true;
    };
    const bool are_small = sizes.distance <= std::numeric_limits<int>::max();
    if (are_small && are_aligned(vec)) {
      (with(std::integral_constant<int, 16>(), std::integral_constant<int, taps>()), ...);
      (with(std::integral_constant<int, 32>(), std::integral_constant<int, taps>()), ...);
      (with(std::integral_constant<int, 64>(), std::integral_constant<int, taps>()), ...);
    }
    if constexpr (any_width) {
      const auto with_vector = [&](auto channels, auto count) {
        constexpr int v = decltype(channels)::value, t = decltype(count)::value;
        const int64_t width = sizes.group_channels;
        const bool fills_lanes = lanes_for(width, v) >= least_lanes && width <= warp_size * v;
        if (done || sizes.taps != t || !fills_lanes || !are_aligned(v)) return;
        body(Static<scalar_t, acc_t, v, 0, t>());
        done = true;
      };
      if (are_small) {
        (with_vector(std::integral_constant<int, vec>(), std::integral_constant<int, taps>()), ...);
        (with_vector(std::integral_constant<int, 4>(), std::integral_constant<int, taps>()), ...);
        (with_vector(std::integral_constant<int, 2>(), std::integral_constant<int, taps>()), ...);
        (with_vector(std::integral_constant<int, 1>(), std::integral_constant<int, taps>()), ...);
      }
    }
  }
  if (done) return;
  if (are_aligned(general_vec)) {
    body(Static<scalar_t, acc_t, general_vec, 0, 0>());
  } else if (are_aligned(2)) {
    body(Static<scalar_t, acc_t, 2, 0, 0>());
  } else {
    body(Static<scalar_t, acc_t, 1, 0, 0>());
  }
}

}  // namespace ops_dcnv4
