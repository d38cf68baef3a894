// Who computes what, and where a tap samples: shared by the forward and backward kernels.
#pragma once

#include <algorithm>

#include "cuda/launch.h"
#include "geometry.h"

namespace ops_dcnv4 {

// The work is divided into units of one output pixel and one group of channels. The `lanes`
// neighbouring threads of a unit hold 16 bytes of channels each; each plans every lanes-th tap, and
// they pass the plans round in registers. A block takes as many groups as fill a cache line of 128
// bytes, of the pixels of a tile: warps read whole lines, and neighbours find each other's pixels
// in the L1 cache. It is small, four warps for a tile of 4 x 4 pixels, so that the small images of
// late stages still spread over many multiprocessors. Tensor sizes decide nothing but the grid.
// (Groups of more than 128 bytes have tiles of fewer pixels, and beyond 32 lanes several rounds;
// where groups are not aligned to 16 bytes, a thread holds one channel at a time.)
constexpr int block_threads = 128;
constexpr int tile_width = 4;

// Divides numbers below 2^31 by a multiplication and a shift (Granlund and Montgomery, 1994).
struct Divisor {
  unsigned by, magic = 1, shift = 0;

  explicit Divisor(unsigned by) : by(by) {
    while (shift < 31 && 1u << shift < by) ++shift;
    magic += static_cast<unsigned>(((uint64_t(1) << shift) - by) * (uint64_t(1) << 32) / by);
  }
  __device__ __forceinline__ int divide(unsigned n) const {
    return static_cast<int>((static_cast<unsigned>(uint64_t(n) * magic >> 32) + n) >> shift);
  }
};

inline int64_t divide_up(int64_t size, int64_t by) { return (size + by - 1) / by; }

constexpr int tile_pixels(int lanes) { return block_threads / (lanes < 8 ? 8 : lanes); }

struct Layout {
  int lanes;  // threads of a unit, a power of two up to 32
  Divisor groups, tiles_x;

  // The groups are spread evenly over as few blocks as can hold them.
  Layout(const Geometry& g, int lanes)
      : lanes(lanes),
        groups(divide_up(g.groups, divide_up(g.groups, std::max(8 / lanes, 1)))),
        tiles_x(divide_up(g.out_width, tile_width)) {}

  dim3 grid(const Geometry& g) const {
    const int64_t limit = 65535;  // of y and z; the kernels loop over what is beyond
    return dim3(tiles_x.by * divide_up(g.out_height, tile_pixels(lanes) / tile_width),
                std::min(divide_up(g.groups, groups.by), limit), std::min(g.batch, limit));
  }
};

struct Unit {
  int lane;     // of this thread among the unit's
  bool exists;  // threads at the rim of the image or of the groups have none, but take part
  int64_t image;
  int group, row, col;
};

// Calls body(unit) for this thread's unit, in whole warps: one, or several if there are more groups
// or images than the grid has rows and layers. `lanes` is the layout's, as a constant if it is one.
template <typename Body>
__device__ __forceinline__ void for_units(const Geometry& g, const Layout& layout, int lanes,
                                          const Body& body) {
  const int in_block = threadIdx.x / lanes;
  const int tile_pixel = layout.groups.divide(in_block);
  const int tile_row = layout.tiles_x.divide(blockIdx.x);
  const int tile_col = blockIdx.x - tile_row * layout.tiles_x.by;
  const int groups = g.groups, groups_of_block = layout.groups.by;
  const int in_groups = in_block - tile_pixel * groups_of_block;
  Unit unit;
  unit.lane = threadIdx.x % lanes;
  unit.row = tile_row * (tile_pixels(lanes) / tile_width) + tile_pixel / tile_width;
  unit.col = tile_col * tile_width + tile_pixel % tile_width;
  const bool pixel_exists =
      tile_pixel < tile_pixels(lanes) && unit.row < g.out_height && unit.col < g.out_width;
  for (unit.image = blockIdx.z; unit.image < g.batch; unit.image += gridDim.z) {
    for (int first = blockIdx.y * groups_of_block; first < groups;
         first += gridDim.y * groups_of_block) {
      unit.group = first + in_groups;
      unit.exists = pixel_exists && unit.group < groups;
      if (__any_sync(0xffffffff, unit.exists)) body(unit);
    }
  }
}

// The first element of a unit's part of a tensor of the output's size, `channels` per pixel and
// `group_channels` per group. Where there is no unit, that of the first: it may be read.
template <typename index_t, typename T>
__device__ __forceinline__ T* at_unit(T* tensor, const Geometry& g, const Unit& unit,
                                      index_t channels, int group_channels) {
  T* image = tensor + unit.image * g.out_height * g.out_width * channels;
  const index_t pixel = unit.row * g.out_width + unit.col;
  return unit.exists ? image + (pixel * channels + unit.group * group_channels) : tensor;
}

// The value of another lane of the unit.
template <typename T>
__device__ __forceinline__ T from_lane(T v, int lane, int lanes) {
  return __shfl_sync(0xffffffff, v, lane, lanes);
}

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

// Finds the place of tap k of a unit and calls make(inside, cell, modulation) for its numbers.
// `offsets` points at the unit's part of offset_mask, column by column of the window; `window` is
// the kernel size where the compiler knows it.
template <int window, typename index_t, typename acc_t, typename scalar_t, typename Make>
__device__ __forceinline__ Place<index_t> plan_tap(const Geometry& g, acc_t offset_scale, int taps,
                                                   bool remove_center, const Unit& unit,
                                                   const scalar_t* offsets, int k,
                                                   const Make& make) {
  const int rows = window ? window : g.y.kernel;
  const int center = window ? window * window / 2 : g.x.kernel / 2 * rows + g.y.kernel / 2;
  const int in_window = remove_center && k >= center ? k + 1 : k;
  const int tap_x = window == 3 ? in_window * 11 >> 5 : in_window / rows;  // a cheap third
  const int tap_y = in_window - tap_x * rows;
  const acc_t x = g.x.center_of(unit.col) +
                  offset_scale * (g.x.grid(tap_x) + static_cast<acc_t>(offsets[2 * k]));
  const acc_t y = g.y.center_of(unit.row) +
                  offset_scale * (g.y.grid(tap_y) + static_cast<acc_t>(offsets[2 * k + 1]));
  const Cell<acc_t> cell = locate(y, x, g.height, g.width);
  const Inside in{cell.col >= 0, cell.col + 1 < g.width, cell.row >= 0, cell.row + 1 < g.height};
  make(in, cell, static_cast<acc_t>(offsets[2 * taps + k]));
  const index_t channels = g.channels();
  const index_t row = in.top ? cell.row : 0, col = in.left ? cell.col : 0;
  return {cell.row == outside ? -1 : (row * g.width + col) * channels,
          in.left && in.right ? channels : 0, in.top && in.bottom ? g.width * channels : 0};
}

}  // namespace ops_dcnv4
