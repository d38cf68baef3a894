// Forward pass.
#pragma once

#include "cpu/channels.h"
#include "cpu/dcnv4_sampler.h"
#include "cpu/ms_deform_attn_sampler.h"

namespace ops_dcnv4 {
namespace {

// Computes the output of one unit. `value` and `output` point to the first channel of its group.
template <bool inside, typename scalar_t, typename acc_t, typename Count, typename Channels>
OPS_DCNV4_INLINE void sum_taps(const Plan<acc_t, Count> plan, const scalar_t* value,
                               scalar_t* output, Channels group_channels, int64_t right,
                               int64_t below, const scalar_t* zeros) {
  const auto sum_block = [&](auto width, int64_t c) OPS_DCNV4_INLINE_LAMBDA {
    constexpr int parts = width.value > native_width<acc_t> ? 2 : 1;
    constexpr int lanes = width.value / parts;
    using L = Lanes<acc_t, lanes>;
    // One sum per corner makes short chains of dependent additions instead of a long one.
    typename L::type sums[4][parts];
    for (int i = 0; i < 4 * parts; ++i) sums[i / parts][i % parts] = L::zero();
    for (int64_t k = 0; k < plan.taps; ++k) {
      const int64_t pixel = plan.pixel()[k];
      const scalar_t* v = inside || pixel >= 0 ? value + c + pixel * right : zeros;
      const int64_t to_right = inside ? right : plan.step_x()[k] * right;
      const int64_t to_below = inside ? below : plan.step_y()[k] * right;
      const scalar_t* corners[4] = {v, v + to_right, v + to_below, v + to_below + to_right};
      for (int i = 0; i < 4; ++i) {
        const acc_t weight = plan.weight(i)[k];
        for (int part = 0; part < parts; ++part) {
          sums[i][part] += weight * L::load(corners[i] + part * lanes);
        }
      }
    }
    for (int part = 0; part < parts; ++part) {
      L::store(output + c + part * lanes,
               (sums[0][part] + sums[1][part]) + (sums[2][part] + sums[3][part]));
    }
  };
  for_channel_blocks<acc_t>(group_channels, sum_block);
}

// `width` is the image width. It is only used for units whose cells are all inside the image.
template <typename scalar_t, typename acc_t, typename Count>
OPS_DCNV4_NOINLINE void sum_strip(const Plan<acc_t, Count> first, int64_t pixels, int64_t width,
                                  int64_t channels, int64_t channels_of_group,
                                  const scalar_t* values, scalar_t* outputs,
                                  const PlannedUnit* units, int64_t count) {
  // Read for points outside the image, which avoids a branch that could be mispredicted.
  const scalar_t zeros[widest_block<acc_t>] = {};
  with_group_channels(channels_of_group, [&](auto group_channels) OPS_DCNV4_INLINE_LAMBDA {
    Plan<acc_t, Count> plan = first;
    for (int64_t i = 0; i < count; ++i, plan = plan.template next<false>()) {
      const int64_t channel = units[i].group * group_channels, below = width * channels;
      const scalar_t* value = values + units[i].image * pixels * channels + channel;
      scalar_t* output = outputs + units[i].pixel * channels + channel;
      if (units[i].inside) {
        sum_taps<true>(plan, value, output, group_channels, channels, below, zeros);
      } else {
        sum_taps<false>(plan, value, output, group_channels, channels, below, zeros);
      }
    }
  });
}

// Processes output pixels [begin, end), counted over the batch.
template <typename scalar_t, typename acc_t, typename Count>
void forward(const Geometry& g, const Dcnv4Tensors<scalar_t>& t, const Scratch<acc_t>& scratch,
             Count taps, int64_t begin, int64_t end) {
  const Dcnv4Sampler<acc_t> sampler(g, scratch.numbers);
  const auto first = first_plan(scratch, taps);
  const int64_t units = (end - begin) * g.groups, strip = strip_plans(taps);
  const int64_t pixels = int64_t(g.height) * g.width;
  Walk walk(g, begin, 0, g.groups);
  PlannedUnit planned[strip_plans(1)];
  for (int64_t i = 0; i < units; i += strip) {
    const int64_t count = units - i < strip ? units - i : strip;
    plan_windows<false>(first, sampler, g, t, walk, planned, count);
    sum_strip(first, pixels, g.width, g.channels(), g.group_channels, t.value, t.output, planned,
              count);
  }
}

// Number of queries that are processed head by head. What they read of one head fits in the L2
// cache.
constexpr int64_t block_queries = 1024;

// Processes queries [begin, end), counted over the batch.
template <typename scalar_t, typename acc_t, typename Count>
void forward(const Attention& a, const AttentionTensors<scalar_t>& t, const Scratch<acc_t>& scratch,
             Count taps, int64_t begin, int64_t end) {
  const MsDeformAttnSampler<acc_t> sampler(a, t.spatial_shapes, t.level_start_index,
                                           scratch.numbers, scratch.indices);
  const auto first = first_plan(scratch, taps);
  const int64_t strip = strip_plans(taps);
  PlannedUnit planned[strip_plans(1)];
  for (int64_t block = begin; block < end; block += block_queries) {
    const int64_t block_end = block + block_queries < end ? block + block_queries : end;
    for (int64_t head = 0; head < a.heads; ++head) {
      for (int64_t i = block; i < block_end; i += strip) {
        const int64_t count = block_end - i < strip ? block_end - i : strip;
        plan_queries<false>(first, sampler, a, t, planned, i * a.heads + head, count);
        sum_strip(first, a.pixels, 0, a.channels(), a.head_channels, t.value, t.output, planned,
                  count);
      }
    }
  }
}

}  // namespace
}  // namespace ops_dcnv4
