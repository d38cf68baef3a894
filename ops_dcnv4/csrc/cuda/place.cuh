// The four pixels that a tap reads.
#pragma once

#include "bilinear.h"
#include "cuda/memory.cuh"
#include "cuda/units.cuh"

namespace ops_dcnv4 {

// An image that taps sample: all of an image of value, or one of its levels.
struct Level {
  int height, width;
  int start;  // the first pixel
};

// A point (y, x) in pixels of an image, and its modulation or attention weight.
template <typename acc_t>
struct Tap {
  acc_t y, x, weight;
  Level level;
};

// The four pixels of a cell, as offsets in memory from the image's first pixel. A pixel outside the
// image is replaced by its neighbour inside, whose weight is then zero: loads need no branch, and
// read no pixel that the sample does not depend on.
template <typename index_t>
struct Place {
  index_t first;         // offset of the top-left pixel; -1 if the tap reaches no pixel
  index_t right, below;  // steps to the neighbours; 0 if there is none

  __device__ __forceinline__ bool is_none() const { return first < 0; }

  __device__ __forceinline__ Place from_lane(int lane, int lanes) const {
    return {ops_dcnv4::from_lane(first, lane, lanes), ops_dcnv4::from_lane(right, lane, lanes),
            ops_dcnv4::from_lane(below, lane, lanes)};
  }

  // Returns the offset of a corner: top left, top right, bottom left, bottom right.
  __device__ __forceinline__ index_t offset(int corner) const {
    return first + (corner & 1 ? right : 0) + (corner & 2 ? below : 0);
  }

  // Loads the four pixels, which are arbitrary for a tap that reaches none.
  template <typename scalar_t, int n>
  __device__ __forceinline__ void load(const scalar_t* image,
                                       Pack<scalar_t, n> (&pixels)[4]) const {
    const Place readable{is_none() ? 0 : first, right, below};
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      pixels[corner] = Pack<scalar_t, n>::load(image + readable.offset(corner));
    }
  }
};

// Which pixels of a cell are inside the image.
struct Inside {
  bool left, right, top, bottom;
};

// Returns the place of a tap, and passes the rest of its plan to make(inside, cell, weight).
template <typename index_t, typename acc_t, typename Make>
__device__ __forceinline__ Place<index_t> place_tap(const Tap<acc_t>& tap, index_t channels,
                                                    const Make& make) {
  const auto [height, width, start] = tap.level;
  const Cell<acc_t> cell = locate(tap.y, tap.x, height, width);
  const Inside in{cell.col >= 0, cell.col + 1 < width, cell.row >= 0, cell.row + 1 < height};
  make(in, cell, tap.weight);
  const index_t row = in.top ? cell.row : 0, col = in.left ? cell.col : 0;
  return {cell.row == outside ? -1 : (start + row * width + col) * channels,
          in.left && in.right ? channels : 0, in.top && in.bottom ? width * channels : 0};
}

}  // namespace ops_dcnv4
