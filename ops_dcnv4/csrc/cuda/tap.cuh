// Taps, and the four pixels that each of them reads.
#pragma once

#include "bilinear.h"
#include "cuda/memory.cuh"
#include "cuda/units.cuh"

namespace ops_dcnv4 {

// A point (x, y) in pixels of a level, and its modulation or attention weight.
template <typename acc_t>
struct Tap {
  acc_t x, y, weight;
  Level<int, int> level;
};

// The pixels of a cell, as offsets in memory from the first pixel of the image. A pixel outside the
// level is replaced by its neighbor inside, whose weight is then zero: loads need no branch, and
// read no pixel that the sample does not depend on.
template <typename index_t>
struct CellOffsets {
  index_t first;         // of the top-left pixel; -1 if the tap reaches no pixel
  index_t right, below;  // steps to the neighbors; 0 if there is none

  CellOffsets() = default;
  template <typename Math>
  __device__ __forceinline__ CellOffsets(const Cell<Math>& cell, const Level<int, int>& level,
                                         index_t channels)
      : first(cell.counts ? cell.pixel(level) * channels : -1),
        right(cell.x.step(channels)),
        below(cell.y.step(level.row_pixels * channels)) {}
  __device__ __forceinline__ CellOffsets(index_t first, index_t right, index_t below)
      : first(first), right(right), below(below) {}

  __device__ __forceinline__ bool is_none() const { return first < 0; }

  // Returns the offset of a corner: top left, top right, bottom left, bottom right.
  __device__ __forceinline__ index_t offset(int corner) const {
    return first + (corner & 1 ? right : 0) + (corner & 2 ? below : 0);
  }

  // Loads the four pixels, which are arbitrary for a tap that reaches none.
  template <typename scalar_t, int n>
  __device__ __forceinline__ void load(const scalar_t* image,
                                       Pack<scalar_t, n> (&pixels)[4]) const {
    const CellOffsets readable{is_none() ? 0 : first, right, below};
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      pixels[corner] = Pack<scalar_t, n>::load(image + readable.offset(corner));
    }
  }
};

// Returns the offsets of a tap's pixels, and calls make(cell, weight) with the rest of its plan.
template <typename index_t, typename acc_t, typename Make>
__device__ __forceinline__ CellOffsets<index_t> locate_tap(const Tap<acc_t>& tap, index_t channels,
                                                           const Make& make) {
  const auto cell = locate<Scalar<acc_t, index_t>>(tap.x, tap.y, tap.level);
  make(cell, tap.weight);
  return {cell, tap.level, channels};
}

}  // namespace ops_dcnv4
