#include "cpu/dcnv4.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/simd.h"
#include "geometry.h"

namespace ops_dcnv4 {
namespace {

template <typename scalar_t, typename acc_t>
struct Tensors {
  const scalar_t* value;
  const scalar_t* offset_mask;
  scalar_t* output;             // forward
  const scalar_t* grad_output;  // backward
  acc_t* grad_value;            // backward, zero at the start
  scalar_t* grad_offset_mask;   // backward, zero at the start
};

// One kernel tap of one (pixel, group), ready for the loop over channels.
template <typename acc_t>
struct Tap {
  Cell<acc_t> cell;
  int64_t offset;  // elements from the group's slice of pixel (0, 0) to the cell's top-left pixel
  acc_t modulation;
};

// The taps of one (pixel, group) in offset_mask's order: kernel columns outside, rows inside.
// `offsets` points at the group's 2*taps offsets, followed by its `taps` modulation scalars.
template <typename scalar_t, typename acc_t>
OPS_DCNV4_INLINE void plan(const Geometry& g, int row, int col, const scalar_t* offsets,
                           Tap<acc_t>* taps) {
  const acc_t scale = static_cast<acc_t>(g.offset_scale);
  const scalar_t* modulation = offsets + 2 * g.taps();
  for (int tap_x = 0; tap_x < g.x.kernel; ++tap_x) {
    for (int tap_y = 0; tap_y < g.y.kernel; ++tap_y) {
      if (g.skips(tap_y, tap_x)) continue;
      const acc_t x = g.x.sample(col, tap_x, static_cast<acc_t>(offsets[0]), scale);
      const acc_t y = g.y.sample(row, tap_y, static_cast<acc_t>(offsets[1]), scale);
      taps->cell = locate(y, x, g.height, g.width);
      taps->offset = (int64_t(taps->cell.row) * g.width + taps->cell.col) * g.channels();
      taps->modulation = static_cast<acc_t>(*modulation);
      offsets += 2, ++modulation, ++taps;
    }
  }
}

// Calls body(width constant, first channel) for consecutive blocks that cover all channels.
template <typename Body>
OPS_DCNV4_INLINE void for_channel_blocks(int64_t channels, const Body& body) {
  int64_t c = 0;
  for (; c + 32 <= channels; c += 32) body(std::integral_constant<int, 32>(), c);
  for (; c + 16 <= channels; c += 16) body(std::integral_constant<int, 16>(), c);
  for (; c + 8 <= channels; c += 8) body(std::integral_constant<int, 8>(), c);
  for (; c + 4 <= channels; c += 4) body(std::integral_constant<int, 4>(), c);
  for (; c < channels; ++c) body(std::integral_constant<int, 1>(), c);
}

// Sum over the taps for `width` channels.
template <int width, typename scalar_t, typename acc_t>
OPS_DCNV4_INLINE void aggregate(const Geometry& g, const Tap<acc_t>* taps, const scalar_t* value,
                                scalar_t* output) {
  using L = Lanes<acc_t, width>;
  const int64_t right = g.channels(), below = g.width * g.channels();
  typename L::type sum = L::zero();
  for (const Tap<acc_t>* tap = taps; tap != taps + g.taps(); ++tap) {
    const Cell<acc_t>& cell = tap->cell;
    const acc_t bottom = tap->modulation * cell.dy, top = tap->modulation - bottom;
    const acc_t top_right = top * cell.dx, bottom_right = bottom * cell.dx;
    const acc_t top_left = top - top_right, bottom_left = bottom - bottom_right;
    const scalar_t* v = value + tap->offset;
    if (cell.all()) {
      sum = sum + top_left * L::load(v) + top_right * L::load(v + right) +
            bottom_left * L::load(v + below) + bottom_right * L::load(v + below + right);
      continue;
    }
    if (cell.top && cell.left) sum = sum + top_left * L::load(v);
    if (cell.top && cell.right) sum = sum + top_right * L::load(v + right);
    if (cell.bottom && cell.left) sum = sum + bottom_left * L::load(v + below);
    if (cell.bottom && cell.right) sum = sum + bottom_right * L::load(v + below + right);
  }
  L::store(output, sum);
}

// Output pixels [begin, end), counted over the batch.
template <typename scalar_t, typename acc_t>
OPS_DCNV4_INLINE void forward(const Geometry& g, const Tensors<scalar_t, acc_t>& t,
                              Tap<acc_t>* taps, int64_t begin, int64_t end) {
  const int64_t pixels_in = int64_t(g.height) * g.width;
  const int64_t pixels_out = int64_t(g.out_height) * g.out_width;
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const int64_t image = pixel / pixels_out, position = pixel % pixels_out;
    const int row = position / g.out_width, col = position % g.out_width;
    const scalar_t* value = t.value + image * pixels_in * g.channels();
    for (int64_t group = 0; group < g.groups; ++group) {
      plan(g, row, col, t.offset_mask + pixel * g.offset_channels + group * 3 * g.taps(), taps);
      for_channel_blocks(g.group_channels, [&](auto width, int64_t c) OPS_DCNV4_INLINE_LAMBDA {
        const int64_t channel = group * g.group_channels + c;
        aggregate<width.value>(g, taps, value + channel,
                               t.output + pixel * g.channels() + channel);
      });
    }
  }
}

// Adds the gradients of one (pixel, group) for `width` channels: to grad_value in place, and to
// grads, three sums per tap: d/dx, d/dy (per unit of modulation) and d/dmodulation.
template <int width, typename scalar_t, typename acc_t>
OPS_DCNV4_INLINE void differentiate(const Geometry& g, const Tap<acc_t>* taps,
                                    const scalar_t* value, const scalar_t* grad_output,
                                    acc_t* grad_value, acc_t* grads) {
  using L = Lanes<acc_t, width>;
  using V = typename L::type;
  const int64_t right = g.channels(), below = g.width * g.channels();
  const V grad = L::load(grad_output);
  for (const Tap<acc_t>* tap = taps; tap != taps + g.taps(); ++tap, grads += 3) {
    const Cell<acc_t>& cell = tap->cell;
    if (!cell.any()) continue;
    const V weighted = tap->modulation * grad;
    const auto corner = [&](bool inside, int64_t offset, acc_t weight) OPS_DCNV4_INLINE_LAMBDA {
      if (!inside) return L::zero();
      acc_t* to = grad_value + tap->offset + offset;
      L::store(to, L::load(to) + weight * weighted);
      return L::load(value + tap->offset + offset);
    };
    const acc_t dy = cell.dy, dx = cell.dx;
    const V top_left = corner(cell.top && cell.left, 0, (1 - dy) * (1 - dx));
    const V top_right = corner(cell.top && cell.right, right, (1 - dy) * dx);
    const V bottom_left = corner(cell.bottom && cell.left, below, dy * (1 - dx));
    const V bottom_right = corner(cell.bottom && cell.right, below + right, dy * dx);
    const V top = top_left + dx * (top_right - top_left);
    const V bottom = bottom_left + dx * (bottom_right - bottom_left);
    const V slope_x = top_right - top_left +
                      dy * (bottom_right - bottom_left - (top_right - top_left));
    grads[0] += L::sum(grad * slope_x);
    grads[1] += L::sum(grad * (bottom - top));
    grads[2] += L::sum(grad * (top + dy * (bottom - top)));
  }
}

// (image, group) slices [begin, end), counted over the batch: a worker owns all that it writes.
template <typename scalar_t, typename acc_t>
OPS_DCNV4_INLINE void backward(const Geometry& g, const Tensors<scalar_t, acc_t>& t,
                               Tap<acc_t>* taps, acc_t* grads, int64_t begin, int64_t end) {
  const int64_t pixels_in = int64_t(g.height) * g.width;
  const int64_t pixels_out = int64_t(g.out_height) * g.out_width;
  const acc_t scale = static_cast<acc_t>(g.offset_scale);
  for (int64_t slice = begin; slice < end; ++slice) {
    const int64_t image = slice / g.groups, group = slice % g.groups;
    const int64_t first_value = image * pixels_in * g.channels() + group * g.group_channels;
    for (int64_t position = 0; position < pixels_out; ++position) {
      const int64_t pixel = image * pixels_out + position;
      const int row = position / g.out_width, col = position % g.out_width;
      const int64_t first_offset = pixel * g.offset_channels + group * 3 * g.taps();
      plan(g, row, col, t.offset_mask + first_offset, taps);
      std::fill_n(grads, 3 * g.taps(), acc_t(0));
      for_channel_blocks(g.group_channels, [&](auto width, int64_t c) OPS_DCNV4_INLINE_LAMBDA {
        differentiate<width.value>(
            g, taps, t.value + first_value + c,
            t.grad_output + pixel * g.channels() + group * g.group_channels + c,
            t.grad_value + first_value + c, grads);
      });
      scalar_t* grad_offsets = t.grad_offset_mask + first_offset;
      scalar_t* grad_modulation = grad_offsets + 2 * g.taps();
      for (int k = 0; k < g.taps(); ++k) {
        const acc_t factor = scale * taps[k].modulation;
        // Zero times an infinite factor would be NaN at a tap that does not contribute.
        const bool any = taps[k].cell.any();
        grad_offsets[2 * k] = static_cast<scalar_t>(any ? factor * grads[3 * k] : 0);
        grad_offsets[2 * k + 1] = static_cast<scalar_t>(any ? factor * grads[3 * k + 1] : 0);
        grad_modulation[k] = static_cast<scalar_t>(grads[3 * k + 2]);
      }
    }
  }
}

// target_clones takes no templates: one pair of entry points per dtype, everything else inlined.
#define OPS_DCNV4_ENTRY_POINTS(scalar_t, acc_t)                                                  \
  OPS_DCNV4_MULTIVERSION void run_forward(const Geometry& g,                                     \
                                          const Tensors<scalar_t, acc_t>& t, Tap<acc_t>* taps,   \
                                          int64_t begin, int64_t end) {                          \
    forward(g, t, taps, begin, end);                                                             \
  }                                                                                              \
  OPS_DCNV4_MULTIVERSION void run_backward(const Geometry& g,                                    \
                                           const Tensors<scalar_t, acc_t>& t, Tap<acc_t>* taps,  \
                                           acc_t* grads, int64_t begin, int64_t end) {           \
    backward(g, t, taps, grads, begin, end);                                                     \
  }
OPS_DCNV4_ENTRY_POINTS(float, float)
OPS_DCNV4_ENTRY_POINTS(double, double)
OPS_DCNV4_ENTRY_POINTS(at::BFloat16, float)
OPS_DCNV4_ENTRY_POINTS(at::Half, float)
#undef OPS_DCNV4_ENTRY_POINTS

int to_int(int64_t number, const char* what) {
  TORCH_CHECK_VALUE(number <= std::numeric_limits<int>::max() / 4 &&
                        number >= std::numeric_limits<int>::min() / 4,
                    what, " is too large: ", number);
  return static_cast<int>(number);
}

Axis axis(int i, at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
          at::IntArrayRef dilation) {
  return {to_int(kernel_size[i], "kernel_size"), to_int(stride[i], "stride"),
          to_int(padding[i], "padding"), to_int(dilation[i], "dilation")};
}

// The checks that keep the kernels inside their tensors; ops.py has those with the friendly texts.
Geometry geometry(const at::Tensor& value, const at::Tensor& offset_mask,
                  at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
                  at::IntArrayRef dilation, int64_t groups, double offset_scale,
                  bool remove_center) {
  TORCH_CHECK_VALUE(value.dim() == 4 && offset_mask.dim() == 4,
                    "value and offset_mask must have 4 dimensions");
  for (const at::IntArrayRef pair : {kernel_size, stride, padding, dilation}) {
    TORCH_CHECK_VALUE(pair.size() == 2,
                      "kernel_size, stride, padding and dilation must be pairs, got ", pair);
  }
  TORCH_CHECK_VALUE(value.size(0) == offset_mask.size(0), "batch sizes differ");
  TORCH_CHECK_TYPE(value.scalar_type() == offset_mask.scalar_type(), "dtypes differ");
  TORCH_CHECK_VALUE(groups > 0 && value.size(3) % groups == 0,
                    "the channels of value must be a multiple of groups");
  const Geometry g{value.size(0),
                   to_int(value.size(1), "the height of value"),
                   to_int(value.size(2), "the width of value"),
                   to_int(offset_mask.size(1), "the height of offset_mask"),
                   to_int(offset_mask.size(2), "the width of offset_mask"),
                   groups,
                   value.size(3) / groups,
                   offset_mask.size(3),
                   axis(0, kernel_size, stride, padding, dilation),
                   axis(1, kernel_size, stride, padding, dilation),
                   offset_scale,
                   remove_center};
  TORCH_CHECK_VALUE(g.y.kernel > 0 && g.x.kernel > 0, "kernel_size must be positive");
  to_int(int64_t(g.y.kernel) * g.x.kernel, "the product of kernel_size");
  TORCH_CHECK_VALUE(g.offset_channels >= 3 * groups * g.taps(), "offset_mask has too few channels");
  return g;
}

// About this many multiply-adds make a thread worth waking.
constexpr int64_t grain = 1 << 15;

template <typename Function>
void dispatch(at::ScalarType dtype, const Function& function) {
  switch (dtype) {
    case at::kFloat:
      return function(float(), float());
    case at::kDouble:
      return function(double(), double());
    case at::kBFloat16:
      return function(at::BFloat16(), float());
    case at::kHalf:
      return function(at::Half(), float());
    default:
      TORCH_CHECK_TYPE(false, "value must be a floating-point tensor, got ", dtype);
  }
}

}  // namespace

at::Tensor dcnv4_cpu(const at::Tensor& value, const at::Tensor& offset_mask,
                     at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
                     at::IntArrayRef dilation, int64_t groups, double offset_scale,
                     bool remove_center) {
  const Geometry g = geometry(value, offset_mask, kernel_size, stride, padding, dilation, groups,
                              offset_scale, remove_center);
  const at::Tensor v = value.contiguous(), o = offset_mask.contiguous();
  at::Tensor output = at::empty({g.batch, g.out_height, g.out_width, g.channels()}, v.options());
  const int64_t pixels = g.batch * g.out_height * g.out_width;
  const int64_t work = std::max<int64_t>(4 * g.channels() * g.taps(), 1);
  dispatch(v.scalar_type(), [&](auto scalar, auto acc) {
    using scalar_t = decltype(scalar);
    using acc_t = decltype(acc);
    const Tensors<scalar_t, acc_t> tensors{v.const_data_ptr<scalar_t>(),
                                           o.const_data_ptr<scalar_t>(),
                                           output.data_ptr<scalar_t>(),
                                           nullptr,
                                           nullptr,
                                           nullptr};
    at::parallel_for(0, pixels, grain / work + 1, [&](int64_t begin, int64_t end) {
      std::vector<Tap<acc_t>> taps(g.taps());
      run_forward(g, tensors, taps.data(), begin, end);
    });
  });
  return output;
}

std::tuple<at::Tensor, at::Tensor> dcnv4_backward_cpu(
    const at::Tensor& grad_output, const at::Tensor& value, const at::Tensor& offset_mask,
    at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, double offset_scale, bool remove_center) {
  const Geometry g = geometry(value, offset_mask, kernel_size, stride, padding, dilation, groups,
                              offset_scale, remove_center);
  const std::vector<int64_t> output_shape{g.batch, g.out_height, g.out_width, g.channels()};
  TORCH_CHECK_VALUE(grad_output.sizes() == at::IntArrayRef(output_shape) &&
                        grad_output.scalar_type() == value.scalar_type(),
                    "grad_output must have the shape and dtype of the output");
  const at::Tensor go = grad_output.contiguous(), v = value.contiguous(),
                   o = offset_mask.contiguous();
  const bool is_half = v.scalar_type() == at::kHalf || v.scalar_type() == at::kBFloat16;
  const at::Tensor grad_value =
      at::zeros(v.sizes(), v.options().dtype(is_half ? at::kFloat : v.scalar_type()));
  at::Tensor grad_offset_mask = at::zeros(o.sizes(), o.options());
  dispatch(v.scalar_type(), [&](auto scalar, auto acc) {
    using scalar_t = decltype(scalar);
    using acc_t = decltype(acc);
    const Tensors<scalar_t, acc_t> tensors{v.const_data_ptr<scalar_t>(),
                                           o.const_data_ptr<scalar_t>(),
                                           nullptr,
                                           go.const_data_ptr<scalar_t>(),
                                           grad_value.data_ptr<acc_t>(),
                                           grad_offset_mask.data_ptr<scalar_t>()};
    at::parallel_for(0, g.batch * g.groups, 1, [&](int64_t begin, int64_t end) {
      std::vector<Tap<acc_t>> taps(g.taps());
      std::vector<acc_t> grads(3 * g.taps());
      run_backward(g, tensors, taps.data(), grads.data(), begin, end);
    });
  });
  return {grad_value.to(v.scalar_type()), grad_offset_mask};
}

}  // namespace ops_dcnv4
