// Backward pass.
#pragma once

#include "cpu/channels.h"
#include "cpu/dcnv4_sampler.h"
#include "cpu/ms_deform_attn_sampler.h"

namespace ops_dcnv4 {
namespace {

// Copies one group of one image between its tensor, where a pixel has all channels, and a worker's
// memory, where it only has those of the group.
template <typename To, typename From>
OPS_DCNV4_INLINE void copy_slice(To* to, int64_t to_channels, const From* from,
                                 int64_t from_channels, int64_t pixels, int64_t channels) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel, to += to_channels, from += from_channels) {
    using acc_t = std::conditional_t<sizeof(To) < sizeof(From), From, To>;
    prefetch(from, 16 * from_channels, channels);
    for_channel_blocks<acc_t, native_width<acc_t>>(
        channels, [&](auto width, int64_t c) OPS_DCNV4_INLINE_LAMBDA {
          using L = Lanes<acc_t, width.value>;
          L::store(to + c, L::load(from + c));
        });
  }
}

// Copies a slice of value to the worker's memory and clears its gradient there.
template <typename scalar_t, typename acc_t>
void begin_slice(const Scratch<acc_t>& scratch, const scalar_t* value, int64_t value_channels,
                 int64_t pixels, int64_t channels) {
  copy_slice(scratch.value, channels, value, value_channels, pixels, channels);
  std::memset(static_cast<void*>(scratch.grad_value), 0, pixels * channels * sizeof(acc_t));
}

// Clears the gradient of the padding channels of one image.
template <typename scalar_t>
void clear_padding(const Geometry& g, scalar_t* grad_offset_mask) {
  const int64_t used = 3 * g.taps() * g.groups, padding = g.offset_channels - used;
  for (int64_t pixel = 0; padding > 0 && pixel < int64_t(g.out_height) * g.out_width; ++pixel) {
    std::memset(static_cast<void*>(grad_offset_mask + pixel * g.offset_channels + used), 0,
                padding * sizeof(scalar_t));
  }
}

// Computes the gradients of a unit's points and modulation from the plan's dot products of
// grad_output with the pixels of each cell.
template <typename T, typename acc_t, typename Count, typename Sampler>
OPS_DCNV4_INLINE void differentiate(const Plan<acc_t, Count> plan, const Sampler& sampler,
                                    bool inside, T* grad_points, T* grad_modulation) {
  using L = Native<acc_t>;
  constexpr int width = native_width<acc_t>;
  for (int64_t k = 0; k < plan.taps; k += width) {
    const acc_t* dots = plan.dots() + 4 * k;
    const auto d0 = L::load(dots), d1 = L::load(dots + width);
    const auto d2 = L::load(dots + 2 * width), d3 = L::load(dots + 3 * width);
    const auto left_low = L::template permute<EveryOther<0>>(d0, d1);
    const auto left_high = L::template permute<EveryOther<0>>(d2, d3);
    const auto right_low = L::template permute<EveryOther<1>>(d0, d1);
    const auto right_high = L::template permute<EveryOther<1>>(d2, d3);
    auto top_left = L::template permute<EveryOther<0>>(left_low, left_high);
    auto top_right = L::template permute<EveryOther<0>>(right_low, right_high);
    auto bottom_left = L::template permute<EveryOther<1>>(left_low, left_high);
    auto bottom_right = L::template permute<EveryOther<1>>(right_low, right_high);
    if (!inside) {  // pixels outside the image count as zero
      const auto level = sampler.level(k);
      const auto zero = L::zero(), col = L::load(plan.col() + k), row = L::load(plan.row() + k);
      const auto left = col >= acc_t(0), top = row >= acc_t(0);
      const auto right = (col >= acc_t(-1)) & (col < level.width - acc_t(1));
      const auto bottom = (row >= acc_t(-1)) & (row < level.height - acc_t(1));
      top_left = select(top & left, top_left, zero);
      top_right = select(top & right, top_right, zero);
      bottom_left = select(bottom & left, bottom_left, zero);
      bottom_right = select(bottom & right, bottom_right, zero);
    }
    const auto sample =
        interpolate<acc_t, typename L::type>(L::load(plan.dx() + k), L::load(plan.dy() + k),
                                             {{top_left, top_right, bottom_left, bottom_right}});
    const auto modulation = L::load(plan.modulation() + k);
    const auto grad_x = sampler.scale_x(k) * modulation * sample.slope_x;
    const auto grad_y = sampler.scale_y(k) * modulation * sample.slope_y;
    const int64_t count = plan.taps - k;
    T* to = grad_points + 2 * k;
    L::store_first(to, L::template permute<Interleave<0>>(grad_x, grad_y), 2 * count);
    L::store_first(to + width, L::template permute<Interleave<1>>(grad_x, grad_y),
                   2 * count - width);
    L::store_first(grad_modulation + k, sample.value, count);
  }
}

// Adds a unit's contribution to grad_value, and computes the dot products of grad_output with the
// pixels of its cells. `value` and `grad_value` are the worker's copies of the slice.
template <typename scalar_t, typename acc_t, typename Count, typename Channels>
OPS_DCNV4_INLINE void scatter(const Plan<acc_t, Count> plan, bool inside,
                              const scalar_t* grad_output, const acc_t* value, acc_t* grad_value,
                              Channels right, int64_t below) {
  const acc_t zeros[widest_block<acc_t>] = {};  // read in place of pixels outside the image
  acc_t discarded[widest_block<acc_t>] = {};    // receives their gradients
  for_channel_blocks<acc_t>(right, [&](auto width, int64_t c) OPS_DCNV4_INLINE_LAMBDA {
    constexpr int parts = width.value > native_width<acc_t> ? 2 : 1;
    constexpr int lanes = width.value / parts;
    using L = Lanes<acc_t, lanes>;
    typename L::type grad[parts];
    for (int part = 0; part < parts; ++part) grad[part] = L::load(grad_output + c + part * lanes);
    const auto add = [&](int64_t k, const acc_t* v, acc_t* gv, int64_t to_right,
                         int64_t to_below) OPS_DCNV4_INLINE_LAMBDA {
      const auto corner = [&](int i, int64_t offset) OPS_DCNV4_INLINE_LAMBDA {
        auto dots = L::zero();
        for (int part = 0; part < parts; ++part, offset += lanes) {
          L::store(gv + offset, L::load(gv + offset) + plan.weight(i)[k] * grad[part]);
          dots += grad[part] * L::load(v + offset);
        }
        return dots;
      };
      const auto top_left = corner(0, 0), top_right = corner(1, to_right);
      const auto bottom_left = corner(2, to_below), bottom_right = corner(3, to_below + to_right);
      using Dots = Lanes<acc_t, 4>;
      auto dots = L::sums(top_left, top_right, bottom_left, bottom_right);
      if (c > 0) dots += Dots::load(plan.dots() + 4 * k);
      Dots::store(plan.dots() + 4 * k, dots);
    };
    if (inside) {
      for (int64_t k = 0; k < plan.taps; ++k) {
        const int64_t first = plan.pixel()[k] * right;
        add(k, value + c + first, grad_value + c + first, right, below);
      }
    } else {
      for (int64_t k = 0; k < plan.taps; ++k) {
        const int64_t pixel = plan.pixel()[k], first = pixel * right + c;
        add(k, pixel < 0 ? zeros : value + first, pixel < 0 ? discarded : grad_value + first,
            plan.step_x()[k] * right, plan.step_y()[k] * right);
      }
    }
  });
}

// `width` is the image width. It is only used for units whose cells are all inside the image.
template <typename scalar_t, typename acc_t, typename Count>
OPS_DCNV4_NOINLINE void scatter_strip(const Plan<acc_t, Count> first, int64_t width,
                                      int64_t channels, int64_t group_channels,
                                      const scalar_t* grad_output, const Scratch<acc_t> scratch,
                                      const PlannedUnit* units, int64_t count) {
  with_group_channels(group_channels, [&](auto right) OPS_DCNV4_INLINE_LAMBDA {
    Plan<acc_t, Count> plan = first;
    for (int64_t i = 0; i < count; ++i, plan = plan.template next<true>()) {
      const scalar_t* grad = grad_output + units[i].pixel * channels + units[i].group * right;
      prefetch(grad, strip_plans(plan.taps) * channels, right);
      scatter(plan, units[i].inside, grad, scratch.value, scratch.grad_value, right, width * right);
    }
  });
}

template <typename scalar_t, typename acc_t, typename Count>
OPS_DCNV4_NOINLINE void differentiate_windows(Plan<acc_t, Count> plan,
                                              const Dcnv4Sampler<acc_t> sampler,
                                              scalar_t* grad_offset_mask, int64_t offset_channels,
                                              const PlannedUnit* units, int64_t count) {
  for (int64_t i = 0; i < count; ++i, plan = plan.template next<true>()) {
    scalar_t* grad_offsets =
        grad_offset_mask + units[i].pixel * offset_channels + units[i].group * 3 * plan.taps;
    differentiate(plan, sampler, units[i].inside, grad_offsets, grad_offsets + 2 * plan.taps);
  }
}

// Processes (image, group) slices [begin, end), counted over the batch. Only one worker writes to a
// slice.
template <typename scalar_t, typename acc_t, typename Count>
void backward(const Geometry& g, const Dcnv4Tensors<scalar_t>& t, const Scratch<acc_t>& scratch,
              Count taps, int64_t begin, int64_t end) {
  const Dcnv4Sampler<acc_t> sampler(g, scratch.numbers);
  const auto first = first_plan(scratch, taps);
  const int64_t channels = g.channels(), slice_channels = g.group_channels;
  const int64_t pixels_in = int64_t(g.height) * g.width;
  const int64_t pixels_out = int64_t(g.out_height) * g.out_width, strip = strip_plans(taps);
  PlannedUnit units[strip_plans(1)];
  for (int64_t slice = begin; slice < end; ++slice) {
    const int64_t image = slice / g.groups, group = slice % g.groups;
    const int64_t first_value = image * pixels_in * channels + group * slice_channels;
    begin_slice(scratch, t.value + first_value, channels, pixels_in, slice_channels);
    Walk walk(g, image * pixels_out, group, group + 1);
    for (int64_t i = 0; i < pixels_out; i += strip) {
      const int64_t count = pixels_out - i < strip ? pixels_out - i : strip;
      plan_windows<true>(first, sampler, g, t, walk, units, count);
      scatter_strip(first, g.width, channels, slice_channels, t.grad_output, scratch, units, count);
      differentiate_windows(first, sampler, t.grad_offset_mask, g.offset_channels, units, count);
    }
    copy_slice(t.grad_value + first_value, channels, scratch.grad_value, slice_channels, pixels_in,
               slice_channels);
    if (group == 0) clear_padding(g, t.grad_offset_mask + image * pixels_out * g.offset_channels);
  }
}

template <typename acc_t, typename Count>
OPS_DCNV4_NOINLINE void differentiate_queries(Plan<acc_t, Count> plan,
                                              const MsDeformAttnSampler<acc_t> sampler,
                                              const Attention& a, acc_t* grad_locations,
                                              acc_t* grad_weights, int64_t unit, int64_t count) {
  for (int64_t i = 0; i < count; ++i, unit += a.heads, plan = plan.template next<true>()) {
    differentiate(plan, sampler, false, grad_locations + unit * a.location_stride(plan.taps),
                  grad_weights + unit * plan.taps);
  }
}

// Processes (image, head) slices [begin, end), counted over the batch. Only one worker writes to a
// slice.
template <typename scalar_t, typename acc_t, typename Count>
void backward(const Attention& a, const AttentionTensors<scalar_t>& t,
              const Scratch<acc_t>& scratch, Count taps, int64_t begin, int64_t end) {
  const MsDeformAttnSampler<acc_t> sampler(a, t.spatial_shapes, t.level_start_index,
                                           scratch.numbers, scratch.indices);
  const auto first = first_plan(scratch, taps);
  const int64_t channels = a.channels(), strip = strip_plans(taps);
  PlannedUnit units[strip_plans(1)];
  for (int64_t slice = begin; slice < end; ++slice) {
    const int64_t image = slice / a.heads, head = slice % a.heads;
    const int64_t first_value = image * a.pixels * channels + head * a.head_channels;
    begin_slice(scratch, t.value + first_value, channels, a.pixels, a.head_channels);
    for (int64_t i = 0; i < a.queries; i += strip) {
      const int64_t count = a.queries - i < strip ? a.queries - i : strip;
      const int64_t first_unit = (image * a.queries + i) * a.heads + head;
      plan_queries<true>(first, sampler, a, t, units, first_unit, count);
      scatter_strip(first, 0, channels, a.head_channels, t.grad_output, scratch, units, count);
      differentiate_queries(first, sampler, a, t.grad_locations, t.grad_weights, first_unit, count);
    }
    copy_slice(t.grad_value + first_value, channels, scratch.grad_value, a.head_channels, a.pixels,
               a.head_channels);
  }
}

}  // namespace
}  // namespace ops_dcnv4
