// The sizes that kernels are compiled for, and the choice among them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <type_traits>

#include "cuda/units.cuh"

namespace ops_dcnv4 {

// What is known of a call when its kernels are compiled; 0 stands for "nothing".
template <typename scalar, typename acc, int vec_, int group_channels_, int taps_>
struct Static {
  using scalar_t = scalar;
  using acc_t = acc;
  static constexpr int vec = vec_;  // channels per thread
  static constexpr int group_channels = group_channels_;
  static constexpr int taps = taps_;
  // The type of distances within an image. The host takes the general kernels where 32 bits are
  // too few.
  using index_t = std::conditional_t<taps != 0, int, int64_t>;

  using General = Static<scalar, acc, 1, 0, 0>;

  static __device__ __forceinline__ int lanes(const Layout& layout) {
    return taps ? group_channels / vec : layout.lanes;
  }
};

// Threads that hold all channels of a unit, or the whole warp.
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

// A call's sizes that decide on its kernels.
struct Sizes {
  int64_t group_channels;
  int taps;          // 0 for windows that no kernel is compiled for
  int64_t distance;  // the largest within an image, in elements
};

// Calls body with the Static that fits: `vec` channels at once if all tensors are aligned to that,
// and the sizes of the published models, with one of these numbers of taps, by name.
template <typename scalar_t, typename acc_t, int vec, int... taps, typename Body>
void with_static(const Sizes& sizes, std::initializer_list<const at::Tensor*> tensors,
                 const Body& body) {
  bool aligned = sizes.group_channels % vec == 0;
  for (const at::Tensor* tensor : tensors) {
    const auto address = reinterpret_cast<std::uintptr_t>(tensor->const_data_ptr());
    aligned &= address % (vec * sizeof(scalar_t)) == 0;
  }
  if (!aligned) return body(Static<scalar_t, acc_t, 1, 0, 0>());
  bool done = false;
  if constexpr (!std::is_same_v<scalar_t, double>) {
    const auto with = [&](auto channels, auto count) {
      constexpr int c = decltype(channels)::value, t = decltype(count)::value;
      if (done || sizes.group_channels != c || sizes.taps != t) return;
      body(Static<scalar_t, acc_t, vec, c, t>());
      done = true;
    };
    if (sizes.distance <= std::numeric_limits<int>::max()) {
      (with(std::integral_constant<int, 16>(), std::integral_constant<int, taps>()), ...);
      (with(std::integral_constant<int, 32>(), std::integral_constant<int, taps>()), ...);
      (with(std::integral_constant<int, 64>(), std::integral_constant<int, taps>()), ...);
    }
  }
  if (!done) body(Static<scalar_t, acc_t, vec, 0, 0>());
}

}  // namespace ops_dcnv4
