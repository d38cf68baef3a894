// Sampling points of attention queries.
#pragma once

#include "cpu/plan.h"

namespace ops_dcnv4 {
namespace {

// Provides the level of each tap; the taps are the points of all levels. Arrays are padded with
// zeros.
template <typename acc_t>
struct MsDeformAttnSampler {
  const acc_t *width, *height;
  const int32_t *row_pixels, *first_pixel;

  MsDeformAttnSampler(const Attention& a, const int64_t* shapes, const int64_t* start,
                      acc_t* numbers, int32_t* indices) {
    const int64_t taps = a.taps(), stride = plan_stride(taps);
    std::memset(numbers, 0, 2 * stride * sizeof(acc_t));
    std::memset(indices, 0, 2 * stride * sizeof(int32_t));
    for (int64_t k = 0; k < taps; ++k) {
      const int64_t level = k / a.points;
      numbers[k] = static_cast<acc_t>(shapes[2 * level + 1]);
      numbers[stride + k] = static_cast<acc_t>(shapes[2 * level]);
      indices[k] = static_cast<int32_t>(shapes[2 * level + 1]);
      indices[stride + k] = static_cast<int32_t>(start[level]);
    }
    width = numbers, height = numbers + stride;
    row_pixels = indices, first_pixel = indices + stride;
  }

  OPS_DCNV4_INLINE auto level(int64_t k) const {
    using L = Native<acc_t>;
    using Ints = Lanes<int32_t, native_width<acc_t>>;
    return Level<typename L::type, typename Ints::type>{L::load(width + k), L::load(height + k),
                                                        Ints::load(row_pixels + k),
                                                        Ints::load(first_pixel + k)};
  }
  OPS_DCNV4_INLINE auto scale_x(int64_t k) const { return Native<acc_t>::load(width + k); }
  OPS_DCNV4_INLINE auto scale_y(int64_t k) const { return Native<acc_t>::load(height + k); }
};

// The sampling points of a unit.
template <typename acc_t, typename Count>
struct QueryPoints {
  const MsDeformAttnSampler<acc_t>& sampler;
  Count taps;
  const acc_t *locations, *weights;

  OPS_DCNV4_INLINE Coordinates<acc_t> coordinates(int64_t k) const {
    using L = Native<acc_t>;
    const auto location = load_pairs<acc_t>(locations, taps, k);
    return {location.x * L::load(sampler.width + k) - acc_t(0.5),
            location.y * L::load(sampler.height + k) - acc_t(0.5)};
  }
  OPS_DCNV4_INLINE auto modulation(int64_t k) const {
    return Native<acc_t>::load_first(weights + k, taps - k);
  }
};

// Plans one head of `count` queries. `unit` is the first (query, head), counted over the batch.
template <bool backward, typename scalar_t, typename acc_t, typename Count>
OPS_DCNV4_NOINLINE void plan_queries(Plan<acc_t, Count> plan,
                                     const MsDeformAttnSampler<acc_t> sampler, const Attention& a,
                                     const AttentionTensors<scalar_t>& t, PlannedUnit* units,
                                     int64_t unit, int64_t count) {
  const int64_t head = unit % a.heads;
  for (int64_t i = 0; i < count; ++i, unit += a.heads, plan = plan.template next<backward>()) {
    const int64_t query = unit / a.heads;
    units[i] = {query / a.queries, query, head, false};
    const QueryPoints<acc_t, Count> points{sampler, plan.taps,
                                           t.locations + unit * a.location_stride(plan.taps),
                                           t.weights + unit * plan.taps};
    plan_border<backward>(plan, sampler, points);
  }
}

}  // namespace
}  // namespace ops_dcnv4
