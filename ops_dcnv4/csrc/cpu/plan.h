// Sampling plans: the pixels and weights of taps, computed for several taps at a time.
//
// A unit of work is one output pixel and channel group of DCNv4 (dcnv4_sampler.h), or one query and
// head of attention (ms_deform_attn_sampler.h). These files provide, for as many taps from k on as
// a vector holds,
//   coordinates(k), modulation(k)     the sampling points
//   level(k), scale_x(k), scale_y(k)  the sampled levels, and factors on the points' gradients
#pragma once

#include "bilinear.h"
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace ops_dcnv4 {
namespace {

struct PlannedUnit {
  int64_t image, pixel, group;  // output pixels (or queries) are counted over the batch
  bool inside;                  // whether all pixels of all its cells are inside the image
};

// The pixels and weights of a unit's taps, one array per quantity. Count is a number or a
// compile-time constant, which makes the distances between the arrays constant too.
template <typename acc_t, typename Count>
struct Plan {
  acc_t* numbers;
  int32_t* indices;
  Count taps;

  // Corners: 0 top left, 1 top right, 2 bottom left, 3 bottom right.
  OPS_DCNV4_INLINE acc_t* weight(int corner) const { return number(corner); }
  OPS_DCNV4_INLINE int32_t* pixel() const { return index(0); }  // top left

  // Only if not all cells are inside the image. If half of a cell is outside, the other half is
  // read twice, with half the weight. If no pixel of a cell is inside, pixel() is negative.
  OPS_DCNV4_INLINE int32_t* step_x() const { return index(1); }  // from left to right: 1 or 0
  OPS_DCNV4_INLINE int32_t* step_y() const { return index(2); }  // from top to bottom: a row or 0

  // Only for the backward pass.
  OPS_DCNV4_INLINE acc_t* dx() const { return number(4); }  // position within the cell
  OPS_DCNV4_INLINE acc_t* dy() const { return number(5); }
  OPS_DCNV4_INLINE acc_t* modulation() const { return number(6); }
  OPS_DCNV4_INLINE acc_t* col() const { return number(7); }   // of the top left pixel,
  OPS_DCNV4_INLINE acc_t* row() const { return number(8); }   // if not all cells are inside
  OPS_DCNV4_INLINE acc_t* dots() const { return number(9); }  // four per tap, one per corner

  // Returns the next plan of the strip.
  template <bool backward>
  OPS_DCNV4_INLINE Plan next() const {
    const int64_t stride = plan_stride(taps);
    return {numbers + (backward ? 13 : 4) * stride, indices + 3 * stride, taps};
  }

 private:
  OPS_DCNV4_INLINE acc_t* number(int i) const { return numbers + i * plan_stride(taps); }
  OPS_DCNV4_INLINE int32_t* index(int i) const { return indices + i * plan_stride(taps); }
};

// Returns the first plan of a strip, which follows the arrays shared by all plans.
template <typename acc_t, typename Count>
Plan<acc_t, Count> first_plan(const Scratch<acc_t>& scratch, Count taps) {
  const int64_t shared = shared_arrays * plan_stride(taps);
  return {scratch.numbers + shared, scratch.indices + shared, taps};
}

// Coordinates of a vector of taps, in pixels.
template <typename acc_t>
struct Coordinates {
  typename Native<acc_t>::type x, y;
};

// Loads the pairs (x, y) of the taps from `first` on, and zeros beyond the last tap.
template <typename acc_t, typename T>
OPS_DCNV4_INLINE Coordinates<acc_t> load_pairs(const T* pairs, int64_t taps, int64_t first) {
  using L = Native<acc_t>;
  constexpr int width = native_width<acc_t>;
  const int64_t count = 2 * (taps - first);
  const T* from = pairs + 2 * first;
  const auto low = L::load_first(from, count), high = L::load_first(from + width, count - width);
  return {L::template permute<EveryOther<0>>(low, high),
          L::template permute<EveryOther<1>>(low, high)};
}

// Stores the weights of as many taps from k on as a vector holds.
template <typename L, typename acc_t, typename Count>
OPS_DCNV4_INLINE void store_weights(const Plan<acc_t, Count>& plan, int64_t k,
                                    typename L::type left, typename L::type right,
                                    typename L::type top, typename L::type bottom) {
  const auto weights = corner_weights(left, right, top, bottom);
  for (int corner = 0; corner < 4; ++corner) {
    L::store(plan.weight(corner) + k, weights.at[corner]);
  }
}

// Weights of the two pixels that are read along one axis. If one is outside the image, the other is
// read twice, with half its weight.
template <typename acc_t>
struct ReadWeights {
  using V = typename Native<acc_t>::type;
  V first, second;

  OPS_DCNV4_INLINE explicit ReadWeights(const CellAxis<Native<acc_t>>& axis) {
    const V zero = Native<acc_t>::zero(), one = Native<acc_t>::fill(1);
    const V half_first = acc_t(0.5) * (one - axis.distance);
    const V half_second = acc_t(0.5) * axis.distance;
    const auto both = axis.has_first & axis.has_second;
    first = select(axis.has_first, half_first, half_second) + select(both, half_first, zero);
    second = select(axis.has_second, half_second, half_first) + select(both, half_second, zero);
  }
};

// Fills the plan of a unit whose cells may extend beyond the image.
template <bool backward, typename acc_t, typename Count, typename Sampler, typename Points>
OPS_DCNV4_INLINE void plan_border(const Plan<acc_t, Count> plan, const Sampler& sampler,
                                  const Points& points) {
  using L = Native<acc_t>;
  using Ints = Lanes<int32_t, native_width<acc_t>>;
  for (int64_t k = 0; k < plan.taps; k += native_width<acc_t>) {
    const auto at = points.coordinates(k);
    const auto level = sampler.level(k);
    const auto cell = locate<L>(at.x, at.y, level);
    const ReadWeights<acc_t> x(cell.x), y(cell.y);
    const auto modulation = select(cell.counts, points.modulation(k), L::zero());
    store_weights<L>(plan, k, x.first, x.second, modulation * y.first, modulation * y.second);
    Ints::store(plan.pixel() + k, select(L::index(cell.counts), cell.pixel(level), Ints::fill(-1)));
    Ints::store(plan.step_x() + k, L::index(cell.x.step(L::fill(1))));
    Ints::store(plan.step_y() + k, L::index(cell.y.step(L::fill(1))) * level.row_pixels);
    if (!backward) continue;
    L::store(plan.dx() + k, cell.x.distance);
    L::store(plan.dy() + k, cell.y.distance);
    L::store(plan.modulation() + k, modulation);
    L::store(plan.col() + k, cell.x.first);
    L::store(plan.row() + k, cell.y.first);
  }
}

// Prefetches `count` elements, `distance` elements from an address. Addresses outside the tensor
// are harmless. Distances are unsigned and wrap around.
template <typename T>
OPS_DCNV4_INLINE void prefetch(const T* from, uintptr_t distance, int64_t count) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(from) + distance * sizeof(T);
  for (uintptr_t i = 0; i < count * sizeof(T); i += 64) {
    OPS_DCNV4_PREFETCH(reinterpret_cast<const char*>(first + i));
  }
}

}  // namespace
}  // namespace ops_dcnv4
