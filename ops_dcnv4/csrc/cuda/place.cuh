// Which four pixels a point reads.
#pragma once

#include "bilinear.h"
#include "cuda/memory.cuh"
#include "cuda/units.cuh"

namespace ops_dcnv4 {

// One of value's images: all of it, or a level.
struct Image {
  int height, width;
  int start;  // the first pixel
};

// A point (y, x) in pixels of an image, and its factor: modulation or attention weight.
template <typename acc_t>
struct Tap {
  acc_t y, x, weight;
  Image image;
};

// Where the four pixels of a cell lie: distances in memory from the image's first pixel. A pixel
// outside the image is replaced by its neighbour inside, to be given the weight zero: loads need no
// branch, and read no pixel that the sample does not depend on.
template <typename index_t>
struct Place {
  index_t first;         // of the top-left pixel; -1 where the tap reaches no pixel
  index_t right, below;  // steps to the neighbours, 0 if there is none

  __device__ __forceinline__ bool is_none() const { return first < 0; }

  __device__ __forceinline__ Place from_lane(int lane, int lanes) const {
    return {ops_dcnv4::from_lane(first, lane, lanes), ops_dcnv4::from_lane(right, lane, lanes),
            ops_dcnv4::from_lane(below, lane, lanes)};
  }

  // To a corner: top left, top right, bottom left, bottom right.
  __device__ __forceinline__ index_t offset(int corner) const {
    return first + (corner & 1 ? right : 0) + (corner & 2 ? below : 0);
  }

  // The four pixels; any, for a tap that reaches none.
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

// Which pixels of a cell lie inside the image.
struct Inside {
  bool left, right, top, bottom;
};

// Finds the place of a tap and calls make(inside, cell, weight) for its numbers.
template <typename index_t, typename acc_t, typename Make>
__device__ __forceinline__ Place<index_t> place_tap(const Tap<acc_t>& tap, index_t channels,
                                                    const Make& make) {
  const auto [height, width, start] = tap.image;
  const Cell<acc_t> cell = locate(tap.y, tap.x, height, width);
  const Inside in{cell.col >= 0, cell.col + 1 < width, cell.row >= 0, cell.row + 1 < height};
  make(in, cell, tap.weight);
  const index_t row = in.top ? cell.row : 0, col = in.left ? cell.col : 0;
  return {cell.row == outside ? -1 : (start + row * width + col) * channels,
          in.left && in.right ? channels : 0, in.top && in.bottom ? width * channels : 0};
}

}  // namespace ops_dcnv4
