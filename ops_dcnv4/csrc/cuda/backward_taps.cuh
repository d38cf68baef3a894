// The taps of a unit in backward kernels whose lanes exchange them through shared memory.
#pragma once

#include <algorithm>
#include <type_traits>

#include "bilinear.h"
#include "cuda/launch.h"
#include "cuda/memory.cuh"
#include "cuda/static.cuh"
#include "cuda/tap_gradients.cuh"
#include "cuda/units.cuh"

namespace ops_dcnv4 {

// Blocks of a multiprocessor for which a thread's registers suffice.
constexpr int blocks_at_once = 4;

// The pixels of a cell; one outside the image is replaced by its neighbor inside, and has the
// weight `none`, bits that no computation results in.
struct alignas(16) CellPixels {
  static constexpr unsigned none = ~0u;
  int corners[4];
};

// Shared memory of a unit, by tap: first what its lanes need to know of the tap, then their dot
// products of grad_output with the corners.
template <typename S>
class BackwardTaps {
  static_assert(S::lanes == 0 || S::lanes >= 2, "the plan of a tap takes two slots");

 public:
  static constexpr int bytes = S::taps * block_threads * sizeof(uint4);

  // `lanes` threads share a unit. The first `with_channels` of them have dot products: all if their
  // number is a constant.
  __device__ __forceinline__ BackwardTaps(int lanes, int with_channels)
      : lanes_(lanes),
        with_channels_(with_channels),
        unit_(static_cast<uint4*>(shared_memory()) + threadIdx.x / lanes * lanes),
        own_(unit_ + threadIdx.x % lanes) {}

  // `Place` is the place of the corners, a struct.
  template <typename Place>
  __device__ __forceinline__ void store_plan(int k, const Corners<float>& weights,
                                             const Place& place) const {
    unit_[k * block_threads] = ops_dcnv4::bit_cast<uint4>(weights);
    *reinterpret_cast<Place*>(unit_ + k * block_threads + 1) = place;
  }
  // The same for a tap of which some corners may be outside the image.
  __device__ __forceinline__ void store_plan(int k, const TapSample<float>& tap,
                                             const CellPixels& place) const {
    Corners<float> weights = tap.weights();
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      if (!tap.is_inside(corner)) {
        weights.at[corner] = ops_dcnv4::bit_cast<float>(CellPixels::none);
      }
    }
    store_plan(k, weights, place);
  }
  __device__ __forceinline__ Corners<float> weights(int k) const {
    return ops_dcnv4::bit_cast<Corners<float>>(unit_[k * block_threads]);
  }
  template <typename Place>
  __device__ __forceinline__ Place place(int k) const {
    return *reinterpret_cast<const Place*>(unit_ + k * block_threads + 1);
  }

  // Replaces the plan of a tap, which all lanes must have read.
  __device__ __forceinline__ void store_dots(int k, const Corners<float>& dots) const {
    own_[k * block_threads] = ops_dcnv4::bit_cast<uint4>(dots);
  }
  // Returns the sums over the lanes.
  __device__ __forceinline__ Corners<float> dots(int k) const {
    const int lanes = S::lanes ? S::lanes : lanes_, lane = threadIdx.x % lanes;
    Corners<float> sums = {};
#pragma unroll
    for (int step = 0; step < lanes; ++step) {
      // The lanes of a unit begin with different slots, which lie in different memory banks.
      const int slot = lane ^ step;
      if (S::lanes == 0 && slot >= with_channels_) continue;
      const auto share = ops_dcnv4::bit_cast<Corners<float>>(unit_[k * block_threads + slot]);
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) sums.at[corner] += share.at[corner];
    }
    return sums;
  }

 private:
  int lanes_, with_channels_;
  uint4 *unit_, *own_;
};

// The gradient of a unit's output.
template <typename S>
struct UnitGradient {
  // A reduction adds up to four numbers. Those of the lanes of a unit are adjacent, so that they
  // fill whole sectors of memory.
  static constexpr int at_once = std::min(S::vec, 4), reductions = S::vec / at_once;

  int apart;                               // channels from a reduction to the next
  bool exists;                             // whether the lane has channels
  Pack<float, S::vec> read;                // for the channels that the lane reads
  Pack<float, at_once> added[reductions];  // for the channels that it adds to

  // Returns the first channel of the group that a lane adds to, which reads from `first_read` on.
  static __device__ __forceinline__ int first_added(int first_read) {
    return first_read / reductions;
  }

  template <typename scalar_t>
  __device__ __forceinline__ UnitGradient(const scalar_t* grads, int group_channels, int first_read,
                                          bool exists = true)
      : apart(group_channels / reductions),
        exists(exists),
        read(Pack<scalar_t, S::vec>::load(grads + first_read).template to<float>()) {
#pragma unroll
    for (int j = 0; j < reductions; ++j) {
      added[j] = Pack<scalar_t, at_once>::load(grads + first_added(first_read) + j * apart)
                     .template to<float>();
#pragma unroll
      for (float& number : added[j].at) number = computed(number);  // not in every branch
    }
  }

  // Adds the gradient to a pixel, at the lane's first channel.
  __device__ __forceinline__ void add(float* to, float weight) const {
#pragma unroll
    for (int j = 0; j < reductions; ++j) {
      Pack<float, at_once> share;
#pragma unroll
      for (int i = 0; i < at_once; ++i) share.at[i] = weight * added[j].at[i];
      if (exists) atomic_add(to + j * apart, share);
    }
  }
};

// Returns the lanes of a warp with an index within their unit, as bits.
template <typename S>
constexpr unsigned lanes_with_index(int lane) {
  return ~0u / ((1u << S::lanes) - 1) << lane;
}

// Computes the dot products of all taps and, with `scatter`, adds to grad_value. A corner of a tap
// is read at pixel_of(place, corner) and added to at grad_of(place, corner). With is_whole(k), all
// corners of tap k are inside the image in all units of the warp.
template <typename Place, bool scatter, typename S, typename PixelOf, typename GradOf,
          typename IsWhole>
__device__ __forceinline__ void process_taps(const BackwardTaps<S>& shared,
                                             const UnitGradient<S>& grad, const PixelOf& pixel_of,
                                             const GradOf& grad_of, const IsWhole& is_whole) {
  Place place = shared.template place<Place>(0);
  Corners<float> weights = shared.weights(0);
  Pack<typename S::scalar_t, S::vec> pixels[4];
  const auto load = [&] {
#pragma unroll
    for (int corner = 0; corner < 4; ++corner)
      pixels[corner] = pixels[corner].load(pixel_of(place, corner));
  };
  load();
#pragma unroll
  for (int k = 0; k < S::taps; ++k) {
    Corners<float> dots = {};
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      const auto wide = pixels[corner].template to<float>();
#pragma unroll
      for (int i = 0; i < S::vec; ++i) dots.at[corner] += grad.read.at[i] * wide.at[i];
    }
    const Place this_place = place;
    const Corners<float> this_weights = weights;
    if (k + 1 < S::taps) {  // loads before the reductions, behind which nvcc does not move them
      place = shared.template place<Place>(k + 1);
      weights = shared.weights(k + 1);
      load();
    }
    const auto add = [&](auto all_inside) {
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        const float weight = this_weights.at[corner];
        if (!all_inside && ops_dcnv4::bit_cast<unsigned>(weight) == CellPixels::none) continue;
        grad.add(grad_of(this_place, corner), weight);
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
}

}  // namespace ops_dcnv4
