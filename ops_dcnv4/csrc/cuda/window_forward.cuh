// Forward kernel of DCNv4 for windows of 3 x 3 pixels and the group widths of the published models.
//
// It computes what `forward` does, with fewer instructions: most warps sample only pixels inside
// the image, where taps need no checks; sizes are computed by the host; and lanes exchange their
// plans through shared memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <type_traits>

#include "cuda/corner_weights.cuh"
#include "cuda/memory.cuh"
#include "cuda/static.cuh"
#include "cuda/units.cuh"
#include "geometry.h"

namespace ops_dcnv4 {

// The sizes of a call. Distances are in bytes.
struct WindowCall {
  Layout layout;
  int height, width;
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

// The plans of a block's taps, in shared memory. A plan consists of the place of a cell and
// weights.
template <typename Weights, int taps>
class Plans {
  static constexpr bool together = sizeof(Weights) == 12;  // place and weights are 16 bytes
  static constexpr int words = together ? 4 : 5;

 public:
  static constexpr int bytes(int units) { return units * taps * words * sizeof(unsigned); }

  // Those of one of `units` units.
  __device__ __forceinline__ Plans(int unit, int units)
      : fours_(static_cast<uint4*>(shared_memory()) + unit * taps),
        places_(reinterpret_cast<int*>(static_cast<uint4*>(shared_memory()) + units * taps) +
                unit * taps) {}

  __device__ __forceinline__ void store(int k, int place, const Weights& weights) {
    if constexpr (together) {
      fours_[k] = ops_dcnv4::bit_cast<uint4>(Plan{place, weights});
    } else {
      fours_[k] = ops_dcnv4::bit_cast<uint4>(weights);
      places_[k] = place;
    }
  }

  // Calls use(place, weights) with the plan of tap k.
  template <typename Use>
  __device__ __forceinline__ void load(int k, const Use& use) const {
    if constexpr (together) {
      const auto plan = ops_dcnv4::bit_cast<Plan>(fours_[k]);
      use(plan.place, plan.weights);
    } else {
      use(places_[k], ops_dcnv4::bit_cast<Weights>(fours_[k]));
    }
  }

 private:
  struct Plan {
    int place;
    Weights weights;
  };
  uint4* fours_;
  int* places_;
};

template <typename T>
__device__ __forceinline__ T* advance(T* pointer, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(pointer) + bytes);
}

template <typename S, typename scalar_t = typename S::scalar_t>
__global__ void __launch_bounds__(block_threads)
    window_forward(const __grid_constant__ WindowCall call, const scalar_t* __restrict__ value,
                   const scalar_t* __restrict__ offset_mask, scalar_t* __restrict__ output) {
  using Weights = CornerWeightsOf<S>;
  using Pixels = Pack<scalar_t, S::vec>;
  constexpr int taps = S::taps, lanes = S::group_channels / S::vec, units = block_threads / lanes;
  // A lane plans `own` consecutive taps, and the next lane begins `step` taps later.
  constexpr int own = (taps + lanes - 1) / lanes, step = (taps - own + lanes - 2) / (lanes - 1);
  constexpr int group_bytes = S::group_channels * sizeof(scalar_t);

  const Layout& layout = call.layout;
  const auto position = position_in_tile<square_tiles>(layout, lanes);
  const int group = blockIdx.y * layout.groups.by + position.in_groups;
  const bool exists = position.exists & (group < layout.output.groups);  // without branches
  const int pixel = exists ? position.row * layout.output.width + position.col : 0;
  const int existing_group = exists ? group : 0;
  const int lane = threadIdx.x % lanes;
  const int first = std::min(lane * step, taps - own);

  const scalar_t* points =
      advance(offset_mask, blockIdx.z * call.points_image +
                               (pixel * call.points_pixel +
                                existing_group * static_cast<int>(3 * taps * sizeof(scalar_t))));
  const scalar_t *offsets = points + 2 * first, *modulations = points + first + 2 * taps;
  float x[own], y[own], modulation[own];
#pragma unroll
  for (int i = 0; i < own; ++i) {
    const float2 tap = call.taps[first + i];
    x[i] = tap.x + call.offset_scale * static_cast<float>(offsets[2 * i]);
    y[i] = tap.y + call.offset_scale * static_cast<float>(offsets[2 * i + 1]);
    modulation[i] = static_cast<float>(modulations[i]);
  }

  // Coordinates are relative to the window's center.
  const int center_x = position.col * call.stride_x + call.first_x;
  const int center_y = position.row * call.stride_y + call.first_y;
  const float origin_x = -static_cast<float>(center_x), right = call.last_x + origin_x;
  const float origin_y = -static_cast<float>(center_y), bottom = call.last_y + origin_y;
  bool inside = exists;  // computed without branches, and therefore not with &&
#pragma unroll
  for (int i = 0; i < own; ++i) {
    inside &= (x[i] >= origin_x) & (x[i] < right) & (y[i] >= origin_y) & (y[i] < bottom);
  }

  Plans<Weights, taps> plans(threadIdx.x / lanes, units);
  const auto store_plan = [&](int i, int place, const Weights& weights) {
    constexpr int planned_before = own - step;  // by the lane before
    const bool is_new = i >= planned_before || lane == 0;
    if (is_new && (lanes <= taps || lane < taps)) plans.store(first + i, place, weights);
  };
  const scalar_t* image = advance(value, blockIdx.z * call.value_image);
  const int channel = existing_group * group_bytes + lane * static_cast<int>(sizeof(Pixels));
  Pack<float, S::vec> sum = {};
  if (__all_sync(0xffffffff, inside)) {
#pragma unroll
    for (int i = 0; i < own; ++i) {
      const int cell_x = __float2int_rd(x[i]), cell_y = __float2int_rd(y[i]);
      const float dx = x[i] - cell_x, dy = y[i] - cell_y;
      store_plan(i, cell_y * call.width + cell_x, Weights(dx, dy, modulation[i]));
    }
    __syncwarp();
    const scalar_t* corners[4];  // of the cell at the window's center
    corners[0] = computed(advance(image, int64_t(center_y) * call.value_row +
                                             (int64_t(center_x) * call.value_pixel + channel)));
    corners[1] = computed(advance(corners[0], call.value_pixel));
    corners[2] = computed(advance(corners[0], call.value_row));
    corners[3] = computed(advance(corners[2], call.value_pixel));
#pragma unroll
    for (int k = 0; k < taps; ++k) {
      plans.load(k, [&](int place, const Weights& weights) {
        Pixels pixels[4];
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          pixels[corner] =
              Pixels::load(advance(corners[corner], int64_t(place) * call.value_pixel));
        }
        weights.add_sample(pixels, true, sum);
      });
    }
  } else {
    if (!__any_sync(0xffffffff, exists)) return;
#pragma unroll
    for (int i = 0; i < own; ++i) {
      const bool counts =
          (x[i] > origin_x - 1) & (x[i] < right + 1) & (y[i] > origin_y - 1) & (y[i] < bottom + 1);
      const int floor_x = __float2int_rd(x[i]), floor_y = __float2int_rd(y[i]);
      const float dx = x[i] - floor_x, dy = y[i] - floor_y;
      // Sums of unsigned numbers, because cells that do not count may be beyond the integers.
      const int column = static_cast<unsigned>(center_x) + floor_x;
      const int row = static_cast<unsigned>(center_y) + floor_y;
      const bool has_left = column >= 0, has_right = column < call.width - 1;
      const bool has_top = row >= 0, has_bottom = row < call.height - 1;
      const unsigned pixel = (has_top ? row : 0u) * call.width + (has_left ? column : 0u);
      const unsigned neighbors = (has_left && has_right ? 1 : 0) + (has_top && has_bottom ? 2 : 0);
      const Weights weights(has_left ? 1 - dx : 0, has_right ? dx : 0, has_top ? 1 - dy : 0,
                            has_bottom ? dy : 0, counts ? modulation[i] : 0);
      store_plan(i, counts ? static_cast<int>(4 * pixel + neighbors) : -1, weights);
    }
    __syncwarp();
    const scalar_t* origin = computed(advance(image, channel));
#pragma unroll
    for (int k = 0; k < taps; ++k) {
      plans.load(k, [&](int place, const Weights& weights) {
        const int readable = std::max(place, 0);
        const int64_t has_right = readable & 1, has_lower = (readable & 2) / 2;
        const scalar_t* upper = advance(origin, int64_t(readable >> 2) * call.value_pixel);
        const scalar_t* lower = advance(upper, has_lower * call.value_row);
        const Pixels pixels[4] = {
            Pixels::load(upper), Pixels::load(advance(upper, has_right * call.value_pixel)),
            Pixels::load(lower), Pixels::load(advance(lower, has_right * call.value_pixel))};
        weights.add_sample(pixels, place >= 0, sum);
      });
    }
    if (!exists) return;
  }
  sum.template to<scalar_t>().store(
      advance(output, blockIdx.z * call.output_image + (pixel * call.value_pixel + channel)));
}

template <typename S, typename scalar_t>
void launch_window_forward(const Geometry& g, const scalar_t* value, const scalar_t* offset_mask,
                           scalar_t* output) {
  constexpr int lanes = S::group_channels / S::vec;
  const Extents extents{g.batch, g.out_height, g.out_width, static_cast<int>(g.groups)};
  const Layout layout(extents, lanes, square_tiles);
  const int bytes = Plans<CornerWeightsOf<S>, S::taps>::bytes(block_threads / lanes);
  launch(window_forward<S>, {layout.grid(), block_threads, static_cast<std::size_t>(bytes)},
         WindowCall(g, layout, sizeof(scalar_t)), value, offset_mask, output);
}

}  // namespace ops_dcnv4
