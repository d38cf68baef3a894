// The taps of windows of 3 x 3 pixels, shared by the forward and backward kernels that are
// specialized for them. The group widths of the published models are constants; kernels for other
// widths share the work among a number of lanes that is only known at runtime. The last lanes may
// have no channels, and join the last lane that has some.
//
// These kernels compute what the general ones do, with fewer instructions: most warps sample only
// pixels inside the image, where taps need no checks; sizes are computed by the host; and lanes
// exchange their plans through shared memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <type_traits>

#include "cuda/memory.cuh"
#include "cuda/static.cuh"
#include "cuda/units.cuh"
#include "geometry.h"

namespace ops_dcnv4 {

// The sizes of a call. Distances are in bytes.
struct WindowCall {
  Layout layout;
  int height, width, group_channels;
  int64_t value_image, points_image, output_image;  // from image to image
  int value_pixel, value_row, points_pixel;
  int stride_y, stride_x, first_y, first_x;  // of the windows' centers
  float last_y, last_x;                      // last row and column
  float offset_scale;
  float2 taps[9];  // (x, y), relative to the window's center

  WindowCall(const Geometry& g, const Layout& layout, int element_bytes)
      : layout(layout),
        height(g.height),
        width(g.width),
        group_channels(g.group_channels),
        value_image(g.height * g.width * g.channels() * element_bytes),
        points_image(g.out_height * g.out_width * g.offset_channels * element_bytes),
        output_image(g.out_height * g.out_width * g.channels() * element_bytes),
        value_pixel(g.channels() * element_bytes),
        value_row(g.width * value_pixel),
        points_pixel(g.offset_channels * element_bytes),
        stride_y(g.y.stride),
        stride_x(g.x.stride),
        first_y(g.y.center_of(0)),
        first_x(g.x.center_of(0)),
        last_y(g.height - 1),
        last_x(g.width - 1),
        offset_scale(g.offset_scale) {
    int k = 0;
    for (int x = 0; x < 3; ++x) {
      for (int y = 0; y < 3; ++y) {
        if (!g.skips(y, x)) taps[k++] = {offset_scale * g.x.grid(x), offset_scale * g.y.grid(y)};
      }
    }
  }

  // Whether the kernel's integers and coordinates can represent a call, in a single grid.
  static bool can_represent(const Geometry& g, int element_bytes) {
    constexpr int64_t most = std::numeric_limits<int>::max(), grid = 65535;
    constexpr int64_t exact = 1 << 23;  // so that sums of two are integers up to 2^24
    const int64_t channels = std::max(g.channels(), g.offset_channels) * element_bytes;
    const auto is_exact = [](const Axis& axis, int size, int out_size) {
      const int64_t first = axis.center_of(0), last = first + int64_t(out_size - 1) * axis.stride;
      return size <= exact && std::abs(first) <= exact && std::abs(last) <= exact;
    };
    return int64_t(g.height) * g.width <= most / (g.channels() * element_bytes) &&
           int64_t(g.out_height) * g.out_width <= most / channels && g.batch <= grid &&
           g.groups <= grid && is_exact(g.y, g.height, g.out_height) &&
           is_exact(g.x, g.width, g.out_width);
  }
};

// A thread's unit, and the consecutive taps of the unit that the thread plans. Coordinates are
// relative to the window's center.
template <typename S>
struct WindowUnit {
  using scalar_t = typename S::scalar_t;
  static constexpr int taps = S::taps;
  static constexpr int planners = S::lanes ? S::lanes : least_lanes;  // lanes that plan taps
  static constexpr int units = block_threads / planners;              // of a block, at most
  // A lane plans `own` consecutive taps, and the next lane begins `step` taps later.
  static constexpr int own = (taps + planners - 1) / planners;
  static constexpr int step = (taps - own + planners - 2) / (planners - 1);

  int lanes;
  bool exists;
  int pixel, group;  // zero, which is safe to read, for a unit that does not exist
  int lane, first;   // this thread's lane, and the first of its taps
  int center_x, center_y;
  float origin_x, origin_y, right, bottom;  // the first and the last pixels of the image
  float x[own], y[own], modulation[own];

  __device__ __forceinline__ WindowUnit(const WindowCall& call, const scalar_t* offset_mask)
      : lanes(S::lanes ? S::lanes : call.layout.lanes()) {
    const Layout& layout = call.layout;
    const auto position = position_in_tile<square_tiles>(layout, lanes);
    group = blockIdx.y * layout.groups.by + position.in_groups;
    exists = position.exists & (group < layout.output.groups);  // without branches
    pixel = exists ? position.row * layout.output.width + position.col : 0;
    group = exists ? group : 0;
    lane = threadIdx.x % lanes;
    first = std::min(lane * step, taps - own);

    const scalar_t* points = at(call, offset_mask);
    const scalar_t *offsets = points + 2 * first, *modulations = points + first + 2 * taps;
#pragma unroll
    for (int i = 0; i < own; ++i) {
      const float2 tap = call.taps[first + i];
      x[i] = tap.x + call.offset_scale * static_cast<float>(offsets[2 * i]);
      y[i] = tap.y + call.offset_scale * static_cast<float>(offsets[2 * i + 1]);
      modulation[i] = static_cast<float>(modulations[i]);
    }
    center_x = position.col * call.stride_x + call.first_x;
    center_y = position.row * call.stride_y + call.first_y;
    origin_x = -static_cast<float>(center_x), right = call.last_x + origin_x;
    origin_y = -static_cast<float>(center_y), bottom = call.last_y + origin_y;
  }

  // Returns this unit's part of offset_mask or its gradient.
  template <typename T>
  __device__ __forceinline__ T* at(const WindowCall& call, T* offset_mask) const {
    return advance(offset_mask, blockIdx.z * call.points_image +
                                    (pixel * call.points_pixel +
                                     group * static_cast<int>(3 * taps * sizeof(scalar_t))));
  }

  static __device__ __forceinline__ int group_channels(const WindowCall& call) {
    return S::group_channels ? S::group_channels : call.group_channels;
  }

  // Whether the lane has channels.
  __device__ __forceinline__ bool has_channels(const WindowCall& call) const {
    return S::lanes || lane * S::vec < call.group_channels;
  }

  // Returns the first channel of the group that the lane reads.
  __device__ __forceinline__ int first_channel(const WindowCall& call) const {
    const int first = lane * S::vec;
    return S::lanes ? first : std::min(first, call.group_channels - S::vec);
  }

  // Returns the distance of this channel from the first one of a pixel, in bytes.
  __device__ __forceinline__ int channel(const WindowCall& call) const {
    constexpr int bytes = sizeof(scalar_t);
    return group * (group_channels(call) * bytes) + first_channel(call) * bytes;
  }

  // Whether the thread's taps only sample pixels inside the image.
  __device__ __forceinline__ bool is_inside() const {
    bool inside = exists;  // computed without branches, and therefore not with &&
#pragma unroll
    for (int i = 0; i < own; ++i) {
      inside &= (x[i] >= origin_x) & (x[i] < right) & (y[i] >= origin_y) & (y[i] < bottom);
    }
    return inside;
  }

  // The lane that plans tap k, as its tap i.
  struct Planner {
    int lane, i;
  };
  static constexpr __device__ Planner planner_of(int k) {
    const int lane = k < own ? 0 : (k - own) / step + 1;
    return {lane, k - std::min(lane * step, taps - own)};
  }

  // Whether the thread is the one that plans its tap i; the last taps of a lane may be the first of
  // the next.
  __device__ __forceinline__ bool plans(int i) const {
    constexpr int planned_before = own - step;  // by the lane before
    constexpr int planners_with_taps = std::min(planners, taps);
    return (i >= planned_before || lane == 0) &&
           (S::lanes == planners_with_taps || lane < planners_with_taps);
  }
};

// The pixels around a tap, relative to the window's center.
struct WindowCell {
  int x, y;
  float dx, dy;

  // Not with initializers, which nvcc also compiles for the host.
  __device__ __forceinline__ WindowCell(float tap_x, float tap_y) {
    x = __float2int_rd(tap_x), y = __float2int_rd(tap_y);
    dx = tap_x - x, dy = tap_y - y;
  }
};

// The pixels around a tap that may be outside the image, relative to the image.
struct RimCell {
  int left, right, top, bottom;  // columns and rows; one outside is replaced by its neighbor inside
  bool counts;                   // whether any pixel is inside
  bool has_left, has_right, has_top,
      has_bottom;  // not left and right for a cell that does not count
  float dx, dy;    // finite

  template <typename S>
  __device__ __forceinline__ RimCell(const WindowCall& call, const WindowUnit<S>& unit, int i) {
    const float x = unit.x[i], y = unit.y[i];
    counts = unit.exists & (x > unit.origin_x - 1) & (x < unit.right + 1) &
             (y > unit.origin_y - 1) & (y < unit.bottom + 1);
    const WindowCell cell(counts ? x : unit.origin_x - 2, counts ? y : 0);
    dx = cell.dx, dy = cell.dy;
    const int column = unit.center_x + cell.x, row = unit.center_y + cell.y;
    const auto clamped = [](int place, int last) { return std::max(std::min(place, last), 0); };
    left = clamped(column, call.width - 1), right = clamped(column + 1, call.width - 1);
    top = clamped(row, call.height - 1), bottom = clamped(row + 1, call.height - 1);
    has_left = column >= 0,
    has_right = static_cast<unsigned>(column + 1) < static_cast<unsigned>(call.width);
    has_top = row >= 0, has_bottom = row + 1 < call.height;
  }

  // Returns a bit per corner: whether it is inside the image.
  __device__ __forceinline__ unsigned inside() const {
    const unsigned columns = (has_left ? 0b0101 : 0) | (has_right ? 0b1010 : 0);
    const unsigned rows = (has_top ? 0b0011 : 0) | (has_bottom ? 0b1100 : 0);
    return columns & rows;
  }
};

}  // namespace ops_dcnv4
