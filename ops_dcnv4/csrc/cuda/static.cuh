// The sizes that kernels are compiled for, and the choice among them.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <type_traits>

#include "cuda/units.cuh"
#include "geometry.h"

namespace ops_dcnv4 {

// What is known of a call when its kernels are compiled; 0 stands for "nothing".
template <typename scalar, typename acc, int vec_, int group_channels_, int taps_>
struct Static {
  using scalar_t = scalar;
  using acc_t = acc;
  static constexpr int vec = vec_;  // channels per thread
  static constexpr int group_channels = group_channels_;
  static constexpr int taps = taps_;
  static constexpr int window = taps ? 3 : 0;
  // The type of distances within an image. The host takes the general kernels where 32 bits are too few.
  using index_t = std::conditional_t<taps != 0, int, int64_t>;

  static __device__ __forceinline__ int lanes(const Layout& layout) {
    return taps ? group_channels / vec : layout.lanes;
  }
  static __device__ __forceinline__ bool remove_center(const Geometry& g) {
    return taps ? taps == 8 : g.remove_center;
  }
};

// Threads that hold all channels of a unit, or the whole warp.
inline int lanes_for(int64_t group_channels, int vec) {
  int lanes = 1;
  while (lanes < warp_size && lanes * vec < group_channels) lanes *= 2;
  return lanes;
}

// Calls body with the Static that fits: channels in loads of 16 bytes if all of them are aligned to
// it, and the sizes of the published models by name.
template <typename scalar_t, typename acc_t, typename Body>
void with_static(const Geometry& g, std::initializer_list<const at::Tensor*> tensors,
                 const Body& body) {
  constexpr int vec = 16 / sizeof(scalar_t);
  bool aligned = g.group_channels % vec == 0;
  for (const at::Tensor* tensor : tensors) {
    aligned &= reinterpret_cast<std::uintptr_t>(tensor->const_data_ptr()) % 16 == 0;
  }
  if (!aligned) return body(Static<scalar_t, acc_t, 1, 0, 0>());
  if constexpr (!std::is_same_v<scalar_t, double>) {
    const int64_t distance = std::max(int64_t(g.height) * g.width * g.channels(),
                                      int64_t(g.out_height) * g.out_width *
                                          std::max(g.channels(), g.offset_channels));
    if (g.y.kernel == 3 && g.x.kernel == 3 && distance <= std::numeric_limits<int>::max()) {
      const auto with_width = [&](auto width) {
        constexpr int channels = decltype(width)::value;
        if (g.remove_center) return body(Static<scalar_t, acc_t, vec, channels, 8>());
        return body(Static<scalar_t, acc_t, vec, channels, 9>());
      };
      if (g.group_channels == 16) return with_width(std::integral_constant<int, 16>());
      if (g.group_channels == 32) return with_width(std::integral_constant<int, 32>());
      if (g.group_channels == 64) return with_width(std::integral_constant<int, 64>());
    }
  }
  return body(Static<scalar_t, acc_t, vec, 0, 0>());
}

}  // namespace ops_dcnv4
