// The plans of taps in forward kernels whose lanes exchange them through shared memory.
#pragma once

#include <algorithm>

#include "cuda/launch.h"
#include "cuda/memory.cuh"

namespace ops_dcnv4 {

// The pixels of a tap; one outside the image is replaced by its neighbor inside, whose
// weight is zero. The first is -1 if the tap reaches no pixel.
struct TapPixels {
  int at[4];
};

// The plans of a block's taps, in shared memory. A plan consists of weights and the place of a
// cell, an int or TapPixels.
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
  __device__ __forceinline__ void store(int k, const Place& place, const Weights& weights) const {
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

// Adds the samples of all taps to sum. `origin` is the thread's part of the first pixel. With
// `all_reach`, all taps reach a pixel.
template <bool all_reach, typename Weights, int taps, typename scalar_t, int n>
__device__ __forceinline__ void add_samples(const Plans<Weights, taps>& plans,
                                            const scalar_t* origin, int pixel_bytes,
                                            Pack<float, n>& sum) {
#pragma unroll
  for (int k = 0; k < taps; ++k) {
    plans.template load<TapPixels>(k, [&](const TapPixels& place, const Weights& weights) {
      Pack<scalar_t, n> pixels[4];
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        const bool may_be_none = !all_reach && corner == 0;
        const int pixel = may_be_none ? std::max(place.at[0], 0) : place.at[corner];
        pixels[corner] = pixels[corner].load(advance(origin, pixel, pixel_bytes));
      }
      weights.add_sample(pixels, all_reach || place.at[0] >= 0, sum);
    });
  }
}

}  // namespace ops_dcnv4
