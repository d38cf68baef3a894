#pragma once

#include "cpu/channels.h"
#include "cpu/plan.h"

namespace ops_dcnv4 {
namespace {

// Output pixels [begin, end), counted over the batch.
template <typename scalar_t, typename acc_t, typename Count>
OPS_DCNV4_INLINE void forward(const Geometry& g, const Tensors<scalar_t>& t,
                              const Plan<acc_t, Count> plan, int64_t begin, int64_t end) {
  const int64_t right = g.channels(), below = g.width * right;  // to neighbouring pixels
  const int64_t pixels_in = int64_t(g.height) * g.width;
  const scalar_t zeros[widest_block<acc_t>] = {};  // read by points outside: nothing to mispredict
  lay_grid(plan, g);
  OutputPixel at{begin / g.out_width / g.out_height, int(begin / g.out_width % g.out_height),
                 int(begin % g.out_width)};
  for (int64_t pixel = begin; pixel < end; ++pixel, at.next(g)) {
    Window<scalar_t, acc_t> window{acc_t(g.x.center_of(at.col)), acc_t(g.y.center_of(at.row)),
                                   acc_t(g.offset_scale), t.offset_mask + pixel * g.offset_channels};
    for (int64_t group = 0; group < g.groups; ++group, window.offsets += 3 * plan.taps) {
      const bool inside = make_plan<false>(plan, g, window);
      for_channel_blocks<acc_t>(g.group_channels, [&](auto width, int64_t c)
                                                      OPS_DCNV4_INLINE_LAMBDA {
        using L = Lanes<acc_t, width.value>;
        const int64_t channel = group * g.group_channels + c;
        const scalar_t* value = t.value + at.image * pixels_in * right + channel;
        // A sum per corner: four short chains of dependent additions instead of a long one.
        typename L::type top_left = L::zero(), top_right = top_left;
        typename L::type bottom_left = top_left, bottom_right = top_left;
        const auto add = [&](int64_t k, const scalar_t* v, int64_t to_right, int64_t to_below)
                             OPS_DCNV4_INLINE_LAMBDA {
          top_left += plan.weight(0)[k] * L::load(v);
          top_right += plan.weight(1)[k] * L::load(v + to_right);
          bottom_left += plan.weight(2)[k] * L::load(v + to_below);
          bottom_right += plan.weight(3)[k] * L::load(v + to_below + to_right);
        };
        if (inside) {
          for (int64_t k = 0; k < plan.taps; ++k) {
            add(k, value + plan.pixel()[k] * right, right, below);
          }
        } else {
          for (int64_t k = 0; k < plan.taps; ++k) {
            const int64_t first = plan.pixel()[k];
            add(k, first < 0 ? zeros : value + first * right, plan.step_x()[k] * right,
                plan.step_y()[k] * below);
          }
        }
        L::store(t.output + pixel * right + channel,
                 (top_left + top_right) + (bottom_left + bottom_right));
      });
    }
  }
}

}  // namespace
}  // namespace ops_dcnv4
