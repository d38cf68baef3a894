// Where and with which weights the taps of one (pixel, group) sample, several taps at a time.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace ops_dcnv4 {
namespace {

// What the plans of all windows have in common, in copies: stores to plans cannot change them.
template <typename acc_t>
struct Frame {
  int row_pixels;                     // of an image
  int reach;  // from a window's centre to the first row that it does not read, but for offsets
  acc_t width, height, last_x, last_y;  // sizes and last positions of an image
  int start_x, step_x, start_y, step_y;  // of the windows' centres
  acc_t scale;
  const acc_t *grid_x, *grid_y;  // the window's regular grid

  explicit Frame(const Geometry& g, acc_t* grid);
};

// Where the taps of one (pixel, group) sample: an array per quantity, in offset_mask's order,
// column by column. Count is a number or a constant, which makes all distances constant.
template <typename acc_t, typename Count>
struct Plan {
  acc_t* numbers;
  int32_t* indices;
  Count taps;

  // Of the cell's pixels: 0 top left, 1 top right, 2 bottom left, 3 bottom right.
  OPS_DCNV4_INLINE acc_t* weight(int corner) const { return number(corner); }
  OPS_DCNV4_INLINE int32_t* pixel() const { return index(0); }  // the top left one

  // In plans of cells that are not all inside the image. A cell with a half outside has the other
  // half twice, with half the weight. A cell without a pixel inside has a negative pixel.
  OPS_DCNV4_INLINE int32_t* step_x() const { return index(1); }  // from left to right: 1 or 0
  OPS_DCNV4_INLINE int32_t* step_y() const { return index(2); }  // from top to bottom: 1 or 0

  // For the backward pass only.
  OPS_DCNV4_INLINE acc_t* dx() const { return number(4); }  // position within the cell
  OPS_DCNV4_INLINE acc_t* dy() const { return number(5); }
  OPS_DCNV4_INLINE acc_t* modulation() const { return number(6); }
  OPS_DCNV4_INLINE acc_t* col() const { return number(7); }  // of the top left pixel,
  OPS_DCNV4_INLINE acc_t* row() const { return number(8); }  // where not all cells are inside
  OPS_DCNV4_INLINE acc_t* dots() const { return number(9); }  // four per tap, one per corner

  // The next plan of the strip.
  template <bool backward>
  OPS_DCNV4_INLINE Plan next() const {
    const int64_t stride = plan_stride(taps);
    return {numbers + (backward ? 13 : 4) * stride, indices + 3 * stride, taps};
  }

 private:
  OPS_DCNV4_INLINE acc_t* number(int i) const { return numbers + i * plan_stride(taps); }
  OPS_DCNV4_INLINE int32_t* index(int i) const { return indices + i * plan_stride(taps); }
};

// As many lanes as a register has.
template <typename T>
using Native = Lanes<T, OPS_DCNV4_VECTOR_BYTES / sizeof(T)>;

template <typename acc_t>
Frame<acc_t>::Frame(const Geometry& g, acc_t* grid)
    : row_pixels(g.width),
      reach(g.y.grid(g.y.kernel - 1) + 2),
      width(static_cast<acc_t>(g.width)),
      height(static_cast<acc_t>(g.height)),
      last_x(static_cast<acc_t>(g.width - 1)),
      last_y(static_cast<acc_t>(g.height - 1)),
      start_x(g.x.center_of(0)),
      step_x(g.x.stride),
      start_y(g.y.center_of(0)),
      step_y(g.y.stride),
      scale(static_cast<acc_t>(g.offset_scale)),
      grid_x(grid),
      grid_y(grid + plan_stride(g.taps())) {
  acc_t *x = grid, *y = grid + plan_stride(g.taps());
  for (int64_t k = 0; k < 2 * plan_stride(g.taps()); ++k) grid[k] = 0;
  for (int tap_x = 0; tap_x < g.x.kernel; ++tap_x) {
    for (int tap_y = 0; tap_y < g.y.kernel; ++tap_y) {
      if (g.skips(tap_y, tap_x)) continue;
      *x++ = static_cast<acc_t>(g.x.grid(tap_x));
      *y++ = static_cast<acc_t>(g.y.grid(tap_y));
    }
  }
}

// What the plan of one (pixel, group) is made from.
template <typename scalar_t, typename acc_t>
struct Window {
  acc_t center_x, center_y;
  const scalar_t* offsets;  // pairs (dx, dy), followed by the modulation scalars
};

// The taps from `first` on, as many as a vector holds; zero offsets and modulation after the last.
template <typename acc_t>
struct Taps {
  using L = Native<acc_t>;
  static constexpr int width = sizeof(typename L::type) / sizeof(acc_t);
  typename L::type x, y;

  template <typename scalar_t, typename Count>
  OPS_DCNV4_INLINE Taps(const Frame<acc_t>& frame, const Window<scalar_t, acc_t>& window,
                        Count taps, int64_t first) {
    const int64_t count = 2 * (taps - first);
    const scalar_t* from = window.offsets + 2 * first;
    const auto low = L::load_first(from, count), high = L::load_first(from + width, count - width);
    const auto dx = L::template permute<EveryOther<0>>(low, high);
    const auto dy = L::template permute<EveryOther<1>>(low, high);
    x = window.center_x + frame.scale * (L::load(frame.grid_x + first) + dx);
    y = window.center_y + frame.scale * (L::load(frame.grid_y + first) + dy);
  }
};

template <typename L, typename acc_t, typename Count>
OPS_DCNV4_INLINE void store_weights(const Plan<acc_t, Count>& plan, int64_t k,
                                    typename L::type left, typename L::type right,
                                    typename L::type top, typename L::type bottom) {
  L::store(plan.weight(0) + k, top * left);
  L::store(plan.weight(1) + k, top * right);
  L::store(plan.weight(2) + k, bottom * left);
  L::store(plan.weight(3) + k, bottom * right);
}

// One axis of cells that may lie partly or wholly outside an image of `size` pixels on this axis.
template <typename acc_t>
struct BorderAxis {
  using L = Native<acc_t>;
  using Vec = typename L::type;
  Vec first, distance;        // the cell's first pixel, the distance from there
  Vec weight_first, weight_second;              // weights of the first and the second pixel
  Vec clamped, step;          // the first pixel to be read, and how many on is the second

  OPS_DCNV4_INLINE BorderAxis(Vec coordinate, acc_t last) {
    const Vec zero = L::zero(), one = L::fill(1);
    first = L::floor(coordinate);
    distance = coordinate - first;
    const auto starts_inside = first >= acc_t(0), ends_inside = first < last;
    const Vec half_first = acc_t(0.5) * (one - distance), half_second = acc_t(0.5) * distance;
    weight_first = select(starts_inside, half_first, half_second);
    weight_second = select(ends_inside, half_second, half_first);
    weight_first += select(ends_inside, select(starts_inside, half_first, zero), zero);
    weight_second += select(ends_inside, select(starts_inside, half_second, zero), zero);
    clamped = select(starts_inside, first, zero);
    step = select(starts_inside, select(ends_inside, one, zero), zero);
  }
};

// Fills the plan of a window with cells beyond the image's border.
template <bool backward, typename scalar_t, typename acc_t, typename Count>
OPS_DCNV4_INLINE void plan_border(const Plan<acc_t, Count> plan, const Frame<acc_t> frame,
                                  const Window<scalar_t, acc_t> window) {
  using L = Native<acc_t>;
  using Ints = Lanes<int32_t, Taps<acc_t>::width>;
  for (int64_t k = 0; k < plan.taps; k += Taps<acc_t>::width) {
    const Taps<acc_t> taps(frame, window, plan.taps, k);
    auto modulation = L::load_first(window.offsets + 2 * plan.taps + k, plan.taps - k);
    // False for NaN, and before the conversion to int, so that huge coordinates are safe.
    const auto counts = (taps.x > acc_t(-1)) & (taps.x < frame.width) & (taps.y > acc_t(-1)) &
                        (taps.y < frame.height);
    const auto nowhere = L::fill(acc_t(outside));
    const BorderAxis<acc_t> x(select(counts, taps.x, nowhere), frame.last_x);
    const BorderAxis<acc_t> y(select(counts, taps.y, nowhere), frame.last_y);
    modulation = select(counts, modulation, L::zero());
    store_weights<L>(plan, k, x.weight_first, x.weight_second, modulation * y.weight_first,
                     modulation * y.weight_second);
    const auto col = select(counts, x.clamped, L::fill(-1));
    const auto pixel = convert<typename Ints::type>(y.clamped) * frame.row_pixels +
                       convert<typename Ints::type>(col);
    Ints::store(plan.pixel() + k, pixel);
    Ints::store(plan.step_x() + k, convert<typename Ints::type>(x.step));
    Ints::store(plan.step_y() + k, convert<typename Ints::type>(y.step));
    if (!backward) continue;
    L::store(plan.dx() + k, x.distance);
    L::store(plan.dy() + k, y.distance);
    L::store(plan.modulation() + k, modulation);
    L::store(plan.col() + k, x.first);
    L::store(plan.row() + k, y.first);
  }
}

// Fills the plan of a window, and returns whether all pixels of all its cells lie inside the image.
template <bool backward, typename scalar_t, typename acc_t, typename Count>
OPS_DCNV4_INLINE bool make_plan(const Plan<acc_t, Count> plan, const Frame<acc_t> frame,
                                const Window<scalar_t, acc_t> window) {
  using L = Native<acc_t>;
  using Ints = Lanes<int32_t, Taps<acc_t>::width>;
  bool inside = true;
  for (int64_t k = 0; k < plan.taps; k += Taps<acc_t>::width) {
    const Taps<acc_t> taps(frame, window, plan.taps, k);
    inside = inside && L::all_within(taps.x, 0, frame.last_x, plan.taps - k) &&
             L::all_within(taps.y, 0, frame.last_y, plan.taps - k);
  }
  if (!inside) {
    plan_border<backward>(plan, frame, window);
    return false;
  }
  for (int64_t k = 0; k < plan.taps; k += Taps<acc_t>::width) {
    const Taps<acc_t> taps(frame, window, plan.taps, k);
    const auto modulation = L::load_first(window.offsets + 2 * plan.taps + k, plan.taps - k);
    const auto col = L::floor(taps.x), row = L::floor(taps.y);
    const auto dx = taps.x - col, dy = taps.y - row;
    store_weights<L>(plan, k, acc_t(1) - dx, dx, modulation * (acc_t(1) - dy), modulation * dy);
    const auto pixel = convert<typename Ints::type>(row) * frame.row_pixels +
                       convert<typename Ints::type>(col);
    Ints::store(plan.pixel() + k, pixel);
    if (!backward) continue;
    L::store(plan.dx() + k, dx);
    L::store(plan.dy() + k, dy);
    L::store(plan.modulation() + k, modulation);
  }
  return true;
}

// One (pixel, group) whose plan is made; pixels are counted over the batch.
struct Unit {
  int64_t image, pixel, group;
  bool inside;
};

// Output pixel by output pixel, and for each its groups [first_group, last_group).
class Walk {
 public:
  Walk(const Geometry& g, int64_t pixel, int64_t first_group, int64_t last_group)
      : out_height(g.out_height),
        out_width(g.out_width),
        first_group(first_group),
        last_group(last_group),
        at{pixel / g.out_width / g.out_height, pixel, first_group, false},
        row(static_cast<int>(pixel / g.out_width % g.out_height)),
        col(static_cast<int>(pixel % g.out_width)) {}

  OPS_DCNV4_INLINE void next() {
    if (++at.group < last_group) return;
    at.group = first_group;
    ++at.pixel;
    if (++col < out_width) return;
    col = 0;
    if (++row < out_height) return;
    row = 0;
    ++at.image;
  }

 private:
  int out_height, out_width;
  int64_t first_group, last_group;

 public:
  Unit at;
  int row, col;
};

// Asks for the cache lines of `count` numbers, `distance` from an address; beyond the ends of a
// tensor this does no harm.
template <typename T>
OPS_DCNV4_INLINE void prefetch(const T* from, int64_t distance, int64_t count) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(from) + distance * sizeof(T);
  for (uintptr_t i = 0; i < count * sizeof(T); i += 64) {
    OPS_DCNV4_PREFETCH(reinterpret_cast<const char*>(first + i));
  }
}

// Plans `count` units, so that the processor has several to work on side by side: the computations
// of a single one all wait for each other.
template <bool backward, typename scalar_t, typename acc_t, typename Count>
OPS_DCNV4_NOINLINE void plan_strip(Plan<acc_t, Count> plan, const Frame<acc_t> frame,
                                   const Geometry& g, const Tensors<scalar_t>& t, Walk& walk,
                                   Unit* units, int64_t count) {
  const int64_t offset_channels = g.offset_channels, channels = g.channels();
  const int64_t image = int64_t(g.height) * g.width * channels;
  Walk w = walk;
  // To the same place in the next strip: the hardware does not foresee where a slice goes on.
  const int64_t ahead = strip_plans(plan.taps) * (backward ? offset_channels : 3 * plan.taps);
  for (int64_t i = 0; i < count; ++i, w.next(), plan = plan.template next<backward>()) {
    const scalar_t* offsets =
        t.offset_mask + w.at.pixel * offset_channels + w.at.group * 3 * plan.taps;
    prefetch(offsets, ahead, 3 * plan.taps);
    if (!backward) {  // the pixel that the windows of the next row will be the first to read
      const int64_t row = frame.start_y + w.row * frame.step_y + frame.reach;
      const int64_t col = frame.start_x + w.col * frame.step_x;
      const int64_t pixel = row * frame.row_pixels + col;
      prefetch(t.value, w.at.image * image + pixel * channels + w.at.group * g.group_channels,
               g.group_channels);
    }
    const Window<scalar_t, acc_t> window{acc_t(frame.start_x + w.col * frame.step_x),
                                         acc_t(frame.start_y + w.row * frame.step_y), offsets};
    units[i] = w.at;
    units[i].inside = make_plan<backward>(plan, frame, window);
  }
  walk = w;
}

}  // namespace
}  // namespace ops_dcnv4
