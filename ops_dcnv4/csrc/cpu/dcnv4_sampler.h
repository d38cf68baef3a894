// Sampling points of DCNv4 windows.
#pragma once

#include "cpu/plan.h"

namespace ops_dcnv4 {
namespace {

// The parameters shared by all windows: copies, so that stores to plans do not force reloads.
template <typename acc_t>
struct Dcnv4Sampler {
  int row_pixels;  // of an image
  int reach;  // from a window's center down to the first row that it does not read without offsets
  acc_t width, height;                   // of an image
  int start_x, step_x, start_y, step_y;  // of the windows' centers
  acc_t scale;
  const acc_t *grid_x, *grid_y;  // the window's regular grid

  explicit Dcnv4Sampler(const Geometry& g, acc_t* grid);

  OPS_DCNV4_INLINE Level<acc_t, int> level(int64_t) const { return {width, height, row_pixels, 0}; }
  OPS_DCNV4_INLINE acc_t scale_x(int64_t) const { return scale; }
  OPS_DCNV4_INLINE acc_t scale_y(int64_t) const { return scale; }
};

template <typename acc_t>
Dcnv4Sampler<acc_t>::Dcnv4Sampler(const Geometry& g, acc_t* grid)
    : row_pixels(g.width),
      reach(g.y.grid(g.y.kernel - 1) + 2),
      width(static_cast<acc_t>(g.width)),
      height(static_cast<acc_t>(g.height)),
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

// The sampling points of a unit. Taps are in the order of offset_mask, column by column.
template <typename scalar_t, typename acc_t, typename Count>
struct WindowPoints {
  const Dcnv4Sampler<acc_t>& sampler;
  Count taps;
  acc_t center_x, center_y;
  const scalar_t* offsets;  // pairs (dx, dy), followed by the modulation scalars

  OPS_DCNV4_INLINE Coordinates<acc_t> coordinates(int64_t k) const {
    using L = Native<acc_t>;
    const auto offset = load_pairs<acc_t>(offsets, taps, k);
    return {center_x + sampler.scale * (L::load(sampler.grid_x + k) + offset.x),
            center_y + sampler.scale * (L::load(sampler.grid_y + k) + offset.y)};
  }
  OPS_DCNV4_INLINE auto modulation(int64_t k) const {
    return Native<acc_t>::load_first(offsets + 2 * taps + k, taps - k);
  }
};

// Fills the plan of a window. Returns whether all pixels of all its cells are inside the image.
template <bool backward, typename scalar_t, typename acc_t, typename Count>
OPS_DCNV4_INLINE bool make_plan(const Plan<acc_t, Count> plan, const Dcnv4Sampler<acc_t>& sampler,
                                const WindowPoints<scalar_t, acc_t, Count> points) {
  using L = Native<acc_t>;
  using Ints = Lanes<int32_t, native_width<acc_t>>;
  bool inside = true;
  for (int64_t k = 0; k < plan.taps; k += native_width<acc_t>) {
    const auto at = points.coordinates(k);
    inside = inside && L::all_within(at.x, 0, sampler.width - 1, plan.taps - k) &&
             L::all_within(at.y, 0, sampler.height - 1, plan.taps - k);
  }
  if (!inside) {
    plan_border<backward>(plan, sampler, points);
    return false;
  }
  for (int64_t k = 0; k < plan.taps; k += native_width<acc_t>) {
    const auto at = points.coordinates(k);
    const auto modulation = points.modulation(k);
    const auto col = L::floor(at.x), row = L::floor(at.y);
    const auto dx = at.x - col, dy = at.y - row;
    store_weights<L>(plan, k, acc_t(1) - dx, dx, modulation * (acc_t(1) - dy), modulation * dy);
    const auto pixel =
        convert<typename Ints::type>(row) * sampler.row_pixels + convert<typename Ints::type>(col);
    Ints::store(plan.pixel() + k, pixel);
    if (!backward) continue;
    L::store(plan.dx() + k, dx);
    L::store(plan.dy() + k, dy);
    L::store(plan.modulation() + k, modulation);
  }
  return true;
}

// Iterates over output pixels and, for each pixel, over the groups [first_group, last_group).
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

  // Number of groups of the current pixel that are left.
  OPS_DCNV4_INLINE int64_t groups() const { return last_group - at.group; }

  // Proceeds by `groups` of the current pixel, to the next pixel if none is left.
  OPS_DCNV4_INLINE void advance(int64_t groups) {
    at.group += groups;
    if (at.group < last_group) return;
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
  PlannedUnit at;
  int row, col;
};

// Plans `count` units, so that the processor can overlap the computations of several units: those
// of a single unit all depend on each other.
template <bool backward, typename scalar_t, typename acc_t, typename Count>
OPS_DCNV4_NOINLINE void plan_windows(Plan<acc_t, Count> plan, const Dcnv4Sampler<acc_t> sampler,
                                     const Geometry& g, const Dcnv4Tensors<scalar_t>& t, Walk& walk,
                                     PlannedUnit* units, int64_t count) {
  const int64_t offset_channels = g.offset_channels, group_channels = g.group_channels;
  const int64_t channels = g.channels(), image = int64_t(g.height) * g.width * channels;
  const auto taps = plan.taps;
  Walk w = walk;
  // Prefetch the same place of the next strip: the hardware cannot predict where a slice continues.
  const int64_t ahead = strip_plans(taps) * (backward ? offset_channels : 3 * taps);
  for (int64_t i = 0; i < count;) {
    // The backward pass walks over the pixels of one group.
    const int64_t left = w.groups() < count - i ? w.groups() : count - i;
    const int64_t groups = backward ? 1 : left;
    const int x = sampler.start_x + w.col * sampler.step_x;
    const int y = sampler.start_y + w.row * sampler.step_y;
    WindowPoints<scalar_t, acc_t, Count> points{
        sampler, taps, acc_t(x), acc_t(y),
        t.offset_mask + w.at.pixel * offset_channels + w.at.group * 3 * taps};
    // The pixel that the windows of the next row will read first.
    const uintptr_t below = (uintptr_t(y) + sampler.reach) * sampler.row_pixels + x;
    uintptr_t value = w.at.image * image + below * channels + w.at.group * group_channels;
    for (PlannedUnit unit = w.at; unit.group < w.at.group + groups; ++unit.group, ++i) {
      prefetch(points.offsets, ahead, 3 * taps);
      if (!backward) prefetch(t.value, value, group_channels);
      units[i] = unit;
      units[i].inside = make_plan<backward>(plan, sampler, points);
      plan = plan.template next<backward>();
      points.offsets += 3 * taps;
      value += group_channels;
    }
    w.advance(groups);
  }
  walk = w;
}

}  // namespace
}  // namespace ops_dcnv4
