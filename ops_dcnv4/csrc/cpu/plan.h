// Where and with which weights the taps of one (pixel, group) sample, several taps at a time.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace ops_dcnv4 {
namespace {

// An array per quantity, in offset_mask's order: column by column of the kernel. Taps is a number or
// a constant, which makes all distances between the arrays constant.
template <typename acc_t, typename Taps>
struct Plan {
  const Scratch<acc_t>& scratch;
  const Taps taps;

  // The window's regular grid, the same for all pixels.
  OPS_DCNV4_INLINE acc_t* grid_x() const { return number(0); }
  OPS_DCNV4_INLINE acc_t* grid_y() const { return number(1); }
  // Of the cell's pixels: 0 top left, 1 top right, 2 bottom left, 3 bottom right.
  OPS_DCNV4_INLINE acc_t* weight(int corner) const { return number(2 + corner); }
  OPS_DCNV4_INLINE int32_t* pixel() const { return index(0); }  // the top left one

  // In plans of cells that are not all inside the image. A cell with a half outside has the other
  // half twice, with half the weight. A cell without a pixel inside has a negative pixel.
  OPS_DCNV4_INLINE int32_t* step_x() const { return index(1); }  // from left to right: 1 or 0
  OPS_DCNV4_INLINE int32_t* step_y() const { return index(2); }  // from top to bottom: 1 or 0

  // For the backward pass only.
  OPS_DCNV4_INLINE acc_t* dx() const { return number(6); }  // position within the cell
  OPS_DCNV4_INLINE acc_t* dy() const { return number(7); }
  OPS_DCNV4_INLINE acc_t* modulation() const { return number(8); }
  OPS_DCNV4_INLINE acc_t* col() const { return number(9); }  // of the top left pixel,
  OPS_DCNV4_INLINE acc_t* row() const { return number(10); }  // where not all cells are inside
  OPS_DCNV4_INLINE acc_t* dots() const { return number(11); }  // four per tap, one per corner

 private:
  OPS_DCNV4_INLINE acc_t* number(int i) const { return scratch.numbers + i * plan_stride(taps); }
  OPS_DCNV4_INLINE int32_t* index(int i) const { return scratch.indices + i * plan_stride(taps); }
};

// As many lanes as a register has.
template <typename T>
using Native = Lanes<T, OPS_DCNV4_VECTOR_BYTES / sizeof(T)>;

template <typename acc_t, typename Taps>
OPS_DCNV4_INLINE void lay_grid(const Plan<acc_t, Taps>& plan, const Geometry& g) {
  int64_t k = 0;
  for (int tap_x = 0; tap_x < g.x.kernel; ++tap_x) {
    for (int tap_y = 0; tap_y < g.y.kernel; ++tap_y) {
      if (g.skips(tap_y, tap_x)) continue;
      plan.grid_x()[k] = static_cast<acc_t>(g.x.grid(tap_x));
      plan.grid_y()[k++] = static_cast<acc_t>(g.y.grid(tap_y));
    }
  }
  for (; k < plan_stride(plan.taps); ++k) plan.grid_x()[k] = plan.grid_y()[k] = 0;
}

// What the plan of one (pixel, group) is made from.
template <typename scalar_t, typename acc_t>
struct Window {
  acc_t center_x, center_y, scale;
  const scalar_t* offsets;  // pairs (dx, dy), followed by the modulation scalars
};

// The taps from `first` on, as many as a vector holds; zero offsets and modulation after the last.
template <typename acc_t>
struct Taps {
  using L = Native<acc_t>;
  static constexpr int width = sizeof(typename L::type) / sizeof(acc_t);
  typename L::type x, y;

  template <typename scalar_t, typename Count>
  OPS_DCNV4_INLINE Taps(const Plan<acc_t, Count>& plan, const Window<scalar_t, acc_t>& window,
                        int64_t first) {
    const int64_t count = 2 * (plan.taps - first);
    const scalar_t* from = window.offsets + 2 * first;
    const auto low = L::load_first(from, count), high = L::load_first(from + width, count - width);
    const auto dx = L::template permute<EveryOther<0>>(low, high);
    const auto dy = L::template permute<EveryOther<1>>(low, high);
    x = window.center_x + window.scale * (L::load(plan.grid_x() + first) + dx);
    y = window.center_y + window.scale * (L::load(plan.grid_y() + first) + dy);
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
  Vec near, far;              // weights of the first and the second pixel
  Vec clamped, step;          // the first pixel to be read, and how many on is the second

  OPS_DCNV4_INLINE BorderAxis(Vec coordinate, int size) {
    const Vec zero = L::zero(), one = L::fill(1);
    first = L::floor(coordinate);
    distance = coordinate - first;
    const auto starts_inside = first >= acc_t(0), ends_inside = first < acc_t(size - 1);
    const Vec half_near = acc_t(0.5) * (one - distance), half_far = acc_t(0.5) * distance;
    near = select(starts_inside, half_near, half_far);
    far = select(ends_inside, half_far, half_near);
    near += select(ends_inside, select(starts_inside, half_near, zero), zero);
    far += select(ends_inside, select(starts_inside, half_far, zero), zero);
    clamped = select(starts_inside, first, zero);
    step = select(starts_inside, select(ends_inside, one, zero), zero);
  }
};

// Fills the plan of a window with cells beyond the image's border.
template <bool backward, typename scalar_t, typename acc_t, typename Count>
OPS_DCNV4_INLINE void plan_border(const Plan<acc_t, Count>& plan, const Geometry& g,
                                  const Window<scalar_t, acc_t>& window) {
  using L = Native<acc_t>;
  using Ints = Lanes<int32_t, Taps<acc_t>::width>;
  for (int64_t k = 0; k < plan.taps; k += Taps<acc_t>::width) {
    const Taps<acc_t> taps(plan, window, k);
    auto modulation = L::load_first(window.offsets + 2 * plan.taps + k, plan.taps - k);
    // False for NaN, and before the conversion to int, so that huge coordinates are safe.
    const auto counts = (taps.x > acc_t(-1)) & (taps.x < acc_t(g.width)) & (taps.y > acc_t(-1)) &
                        (taps.y < acc_t(g.height));
    const auto nowhere = L::fill(acc_t(outside));
    const BorderAxis<acc_t> x(select(counts, taps.x, nowhere), g.width);
    const BorderAxis<acc_t> y(select(counts, taps.y, nowhere), g.height);
    modulation = select(counts, modulation, L::zero());
    store_weights<L>(plan, k, x.near, x.far, modulation * y.near, modulation * y.far);
    const auto col = select(counts, x.clamped, L::fill(-1));
    const auto pixel = convert<typename Ints::type>(y.clamped) * g.width +
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
OPS_DCNV4_INLINE bool make_plan(const Plan<acc_t, Count>& plan, const Geometry& g,
                                const Window<scalar_t, acc_t>& window) {
  using L = Native<acc_t>;
  using Ints = Lanes<int32_t, Taps<acc_t>::width>;
  bool inside = true;
  for (int64_t k = 0; k < plan.taps; k += Taps<acc_t>::width) {
    const Taps<acc_t> taps(plan, window, k);
    inside = inside && L::all_within(taps.x, 0, acc_t(g.width - 1), plan.taps - k) &&
             L::all_within(taps.y, 0, acc_t(g.height - 1), plan.taps - k);
  }
  if (!inside) {
    plan_border<backward>(plan, g, window);
    return false;
  }
  for (int64_t k = 0; k < plan.taps; k += Taps<acc_t>::width) {
    const Taps<acc_t> taps(plan, window, k);
    const auto modulation = L::load_first(window.offsets + 2 * plan.taps + k, plan.taps - k);
    const auto col = L::floor(taps.x), row = L::floor(taps.y);
    const auto dx = taps.x - col, dy = taps.y - row;
    store_weights<L>(plan, k, acc_t(1) - dx, dx, modulation * (acc_t(1) - dy), modulation * dy);
    const auto pixel = convert<typename Ints::type>(row) * g.width +
                       convert<typename Ints::type>(col);
    Ints::store(plan.pixel() + k, pixel);
    if (!backward) continue;
    L::store(plan.dx() + k, dx);
    L::store(plan.dy() + k, dy);
    L::store(plan.modulation() + k, modulation);
  }
  return true;
}

}  // namespace
}  // namespace ops_dcnv4
