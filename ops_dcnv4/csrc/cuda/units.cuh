// Distribution of work over threads, shared by the forward and backward kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/launch.h"
#include "inline.h"

namespace ops_dcnv4 {

// A unit of work is one output pixel (or query) and one channel group (or head). The `lanes`
// neighboring threads of a unit hold up to 16 bytes of channels each. Each of them plans some of
// the taps, and they exchange the plans in registers or, where sizes are constant, in shared
// memory. A block processes the pixels of a tile, and as many groups as fill a cache line of 128
// bytes: warps read whole lines, and neighbors find each other's pixels in the L1 cache. Blocks are
// small, four warps for a tile of 4 x 4 pixels or 16 queries, so that the small images of late
// stages are still distributed over many multiprocessors. Tensor sizes only determine the grid.
// (Groups of more than 128 bytes have tiles of fewer pixels and, beyond 32 lanes, take several
// rounds. If groups are not aligned, a thread holds one channel at a time.)
constexpr int block_threads = 128;

// Width of a tile in pixels; 0 if a tile is part of a single row.
constexpr int square_tiles = 4, queries_in_a_row = 0;

// Size of the output; for attention, a row of queries.
struct Extents {
  int64_t batch;
  int height, width, groups;
};

// Divides numbers below 2^31 with a multiplication and a shift (Granlund and Montgomery, 1994).
struct Divisor {
  unsigned by, magic = 1, shift = 0;

  explicit Divisor(unsigned by) : by(by) {
    while (shift < 31 && 1u << shift < by) ++shift;
    magic += static_cast<unsigned>(((uint64_t(1) << shift) - by) * (uint64_t(1) << 32) / by);
  }
  __device__ __forceinline__ int divide(unsigned n) const {
    return static_cast<int>((__umulhi(n, magic) + n) >> shift);
  }
};

inline int64_t divide_up(int64_t size, int64_t by) { return (size + by - 1) / by; }

constexpr int tile_pixels(int lanes) { return block_threads / (lanes < 8 ? 8 : lanes); }

struct Layout {
  Extents output;
  int lane_bits;
  Divisor groups, tiles_x;
  int tiles;

  // Distributes the groups evenly over as few blocks as can hold them.
  Layout(const Extents& output, int lanes, int tile_width)
      : output(output),
        lane_bits(0),
        groups(divide_up(output.groups, divide_up(output.groups, std::max(8 / lanes, 1)))),
        tiles_x(divide_up(output.width, tile_width ? tile_width : tile_pixels(lanes))) {
    const int tile_height = tile_width ? tile_pixels(lanes) / tile_width : 1;
    tiles = tiles_x.by * divide_up(output.height, tile_height);
    while (1 << lane_bits < lanes) ++lane_bits;
  }

  // Returns the threads per unit, a power of two up to 32.
  OPS_DCNV4_INLINE int lanes() const { return 1 << lane_bits; }

  dim3 grid() const {
    const int64_t limit = 65535;  // of y and z; the kernels loop over the rest
    return dim3(tiles, std::min(divide_up(output.groups, groups.by), limit),
                std::min(output.batch, limit));
  }
};

struct ThreadUnit {
  int lane;     // index of this thread within the unit
  bool exists;  // false for threads beyond the image or the groups, which still join in shuffles
  int64_t image;
  int group, row, col;
};

// A thread's pixel, and its group within the block's.
struct TilePosition {
  int row, col, in_groups;
  bool exists;  // whether the pixel does
};

// Returns the position of this thread's unit. `lanes` is that of the layout, as a constant if it is
// known at compile time.
template <int tile_width>
__device__ __forceinline__ TilePosition position_in_tile(const Layout& layout, int lanes) {
  const int in_block = threadIdx.x / lanes;
  const int tile_pixel = layout.groups.divide(in_block);
  TilePosition position;
  position.in_groups = in_block - tile_pixel * static_cast<int>(layout.groups.by);
  if constexpr (tile_width == queries_in_a_row) {
    position.row = 0;
    position.col = blockIdx.x * tile_pixels(lanes) + tile_pixel;
  } else {
    const int tile_row = layout.tiles_x.divide(blockIdx.x);
    const int tile_col = blockIdx.x - tile_row * layout.tiles_x.by;
    const unsigned width = tile_width;  // unsigned division takes fewer instructions
    position.row = tile_row * (tile_pixels(lanes) / tile_width) + tile_pixel / width;
    position.col = tile_col * tile_width + tile_pixel % width;
  }
  position.exists = tile_pixel < tile_pixels(lanes) && position.row < layout.output.height &&
                    position.col < layout.output.width;
  return position;
}

// Calls body(unit) for this thread's unit, or for several units if there are more groups or images
// than the grid has rows and layers. Whole warps call body together.
template <int tile_width, typename Body>
__device__ __forceinline__ void for_units(const Layout& layout, int lanes, const Body& body) {
  const auto position = position_in_tile<tile_width>(layout, lanes);
  const int groups = layout.output.groups, groups_of_block = layout.groups.by;
  ThreadUnit unit;
  unit.lane = threadIdx.x % lanes;
  unit.row = position.row;
  unit.col = position.col;
  for (unit.image = blockIdx.z; unit.image < layout.output.batch; unit.image += gridDim.z) {
    for (int first = blockIdx.y * groups_of_block; first < groups;
         first += gridDim.y * groups_of_block) {
      unit.group = first + position.in_groups;
      unit.exists = position.exists && unit.group < groups;
      if (__any_sync(0xffffffff, unit.exists)) body(unit);
    }
  }
}

// Returns the first element of a unit's part of a tensor of the output's size, with `channels` per
// pixel and `group_channels` per group. For a unit that does not exist, returns the start of the
// tensor, which is safe to read.
template <typename index_t, typename T>
__device__ __forceinline__ T* at_unit(T* tensor, const Extents& output, const ThreadUnit& unit,
                                      index_t channels, int group_channels) {
  using Unsigned = std::make_unsigned_t<index_t>;  // units that do not exist may overflow
  T* image = tensor + unit.image * output.height * output.width * channels;
  const Unsigned pixel = Unsigned(unit.row) * Unsigned(output.width) + Unsigned(unit.col);
  const Unsigned in_image =
      pixel * Unsigned(channels) + Unsigned(unit.group) * Unsigned(group_channels);
  return unit.exists ? image + static_cast<index_t>(in_image) : tensor;
}

// Returns the value of another lane of the unit. T is a number or a struct of numbers.
template <typename T>
__device__ __forceinline__ T from_lane(const T& v, int lane, int lanes) {
  struct Words {
    unsigned at[sizeof(T) / sizeof(unsigned)];
  } words = ops_dcnv4::bit_cast<Words>(v);
#pragma unroll
  for (unsigned& word : words.at) word = __shfl_sync(0xffffffff, word, lane, lanes);
  return ops_dcnv4::bit_cast<T>(words);
}

// Reduces the values of a unit's lanes with `combine`; each lane receives the result.
template <typename T, typename Combine>
__device__ __forceinline__ T over_lanes(T v, int lanes, const Combine& combine) {
#pragma unroll
  for (int step = warp_size / 2; step > 0; step /= 2) {
    if (step < lanes) v = combine(v, __shfl_xor_sync(0xffffffff, v, step));
  }
  return v;
}

}  // namespace ops_dcnv4
