#include "dcnv4.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <vector>

#include "cpu/simd.h"
#include "dispatch.h"
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

// Where and with which weights the taps of one (pixel, group) sample, an array per quantity so that
// it is computed several taps at a time. In offset_mask's order: column by column of the kernel.
template <typename acc_t>
struct Plan {
  int64_t taps;
  acc_t *grid_x, *grid_y;  // the window's regular grid, the same for all pixels
  acc_t *dx, *dy, *modulation;
  acc_t* weights;          // four per tap: top left, top right, bottom left, bottom right
  int *row, *col, *pixel;  // of the cell's top-left pixel
  int* interior;           // whether all four pixels of the cell lie inside the image
};

template <typename acc_t>
class PlanBuffer {
 public:
  explicit PlanBuffer(const Geometry& g) : numbers_(9 * g.taps()), indices_(4 * g.taps()) {
    plan.taps = g.taps();
    acc_t* numbers = numbers_.data();
    for (acc_t** array : {&plan.grid_x, &plan.grid_y, &plan.dx, &plan.dy, &plan.modulation}) {
      *array = numbers;
      numbers += plan.taps;
    }
    plan.weights = numbers;
    int* indices = indices_.data();
    for (int** array : {&plan.row, &plan.col, &plan.pixel, &plan.interior}) {
      *array = indices;
      indices += plan.taps;
    }
    int k = 0;
    for (int tap_x = 0; tap_x < g.x.kernel; ++tap_x) {
      for (int tap_y = 0; tap_y < g.y.kernel; ++tap_y) {
        if (g.skips(tap_y, tap_x)) continue;
        plan.grid_x[k] = g.x.grid(tap_x);
        plan.grid_y[k++] = g.y.grid(tap_y);
      }
    }
  }

  Plan<acc_t> plan;

 private:
  std::vector<acc_t> numbers_;
  std::vector<int> indices_;
};

// Fills the plan of one output pixel and group. `offsets` points at the group's 2*taps offsets,
// followed by its `taps` modulation scalars. Plan and sizes come as copies: through a reference,
// every store might change them, and the loop would not be vectorised.
template <typename scalar_t, typename acc_t>
OPS_DCNV4_INLINE void make_plan(const Plan<acc_t> p, const Geometry& g, int out_row, int out_col,
                                const scalar_t* offsets) {
  const int height = g.height, width = g.width;
  const acc_t scale = static_cast<acc_t>(g.offset_scale);
  const acc_t center_x = g.x.center_of(out_col), center_y = g.y.center_of(out_row);
  const scalar_t* modulations = offsets + 2 * p.taps;
#pragma GCC ivdep
  for (int64_t k = 0; k < p.taps; ++k) {
    const acc_t x = center_x + scale * (p.grid_x[k] + static_cast<acc_t>(offsets[2 * k]));
    const acc_t y = center_y + scale * (p.grid_y[k] + static_cast<acc_t>(offsets[2 * k + 1]));
    const Cell<acc_t> cell = locate(y, x, height, width);
    const acc_t modulation = static_cast<acc_t>(modulations[k]);
    const acc_t bottom = modulation * cell.dy, top = modulation * (1 - cell.dy);
    p.row[k] = cell.row;
    p.col[k] = cell.col;
    p.pixel[k] = cell.row * width + cell.col;
    p.dx[k] = cell.dx;
    p.dy[k] = cell.dy;
    p.modulation[k] = modulation;
    p.weights[4 * k] = top * (1 - cell.dx);
    p.weights[4 * k + 1] = top * cell.dx;
    p.weights[4 * k + 2] = bottom * (1 - cell.dx);
    p.weights[4 * k + 3] = bottom * cell.dx;
    p.interior[k] = (cell.row >= 0) & (cell.row + 1 < height) & (cell.col >= 0) &
                    (cell.col + 1 < width);
  }
}

// Which pixels of a cell that reaches the image lie inside it.
struct Inside {
  bool top_left, top_right, bottom_left, bottom_right;

  OPS_DCNV4_INLINE Inside(const Geometry& g, int row, int col) {
    const bool top = row >= 0, bottom = row + 1 < g.height;
    const bool left = col >= 0, right = col + 1 < g.width;
    top_left = top && left, top_right = top && right;
    bottom_left = bottom && left, bottom_right = bottom && right;
  }
};

// An output pixel, counted over the batch.
struct OutputPixel {
  int64_t image;
  int row, col;

  OPS_DCNV4_INLINE void next(const Geometry& g) {
    if (++col < g.out_width) return;
    col = 0;
    if (++row < g.out_height) return;
    row = 0;
    ++image;
  }
};

constexpr int widest_block = 16;

// Calls body(width constant, first channel) for consecutive blocks that cover all channels.
template <typename Body>
OPS_DCNV4_INLINE void for_channel_blocks(int64_t channels, const Body& body) {
  int64_t c = 0;
  for (; c + widest_block <= channels; c += widest_block) {
    body(std::integral_constant<int, widest_block>(), c);
  }
  for (; c + 4 <= channels; c += 4) body(std::integral_constant<int, 4>(), c);
  for (; c < channels; ++c) body(std::integral_constant<int, 1>(), c);
}

// Output pixels [begin, end), counted over the batch.
template <typename scalar_t, typename acc_t>
OPS_DCNV4_INLINE void forward(const Geometry& g, const Tensors<scalar_t, acc_t>& t,
                              const Plan<acc_t> plan, int64_t begin, int64_t end) {
  const int64_t right = g.channels(), below = g.width * right;  // to neighbouring pixels
  const int64_t pixels_in = int64_t(g.height) * g.width;
  const scalar_t zeros[widest_block] = {};  // stands in for pixels outside: no branch to mispredict
  OutputPixel at{begin / g.out_width / g.out_height, int(begin / g.out_width % g.out_height),
                 int(begin % g.out_width)};
  for (int64_t pixel = begin; pixel < end; ++pixel, at.next(g)) {
    const scalar_t* value = t.value + at.image * pixels_in * right;
    const scalar_t* offsets = t.offset_mask + pixel * g.offset_channels;
    scalar_t* output = t.output + pixel * right;
    for (int64_t group = 0; group < g.groups; ++group) {
      make_plan(plan, g, at.row, at.col, offsets + group * 3 * plan.taps);
      for_channel_blocks(g.group_channels, [&](auto width, int64_t c) OPS_DCNV4_INLINE_LAMBDA {
        using L = Lanes<acc_t, width.value>;
        const int64_t channel = group * g.group_channels + c;
        // A sum per corner: four short chains of dependent additions instead of a long one.
        typename L::type top_left = L::zero(), top_right = top_left;
        typename L::type bottom_left = top_left, bottom_right = top_left;
        for (int64_t k = 0; k < plan.taps; ++k) {
          const scalar_t* v = value + channel + plan.pixel[k] * right;
          const acc_t* weight = plan.weights + 4 * k;
          if (plan.interior[k]) {
            top_left += weight[0] * L::load(v);
            top_right += weight[1] * L::load(v + right);
            bottom_left += weight[2] * L::load(v + below);
            bottom_right += weight[3] * L::load(v + below + right);
            continue;
          }
          if (plan.row[k] == outside) continue;
          const Inside in(g, plan.row[k], plan.col[k]);
          top_left += weight[0] * L::load(in.top_left ? v : zeros);
          top_right += weight[1] * L::load(in.top_right ? v + right : zeros);
          bottom_left += weight[2] * L::load(in.bottom_left ? v + below : zeros);
          bottom_right += weight[3] * L::load(in.bottom_right ? v + below + right : zeros);
        }
        L::store(output + channel, (top_left + top_right) + (bottom_left + bottom_right));
      });
    }
  }
}

// Gradient of one (pixel, group)'s slice of offset_mask, from the products `dots` of grad_output
// with the four pixels of each tap's cell, zero for those outside the image.
template <typename scalar_t, typename acc_t>
OPS_DCNV4_INLINE void differentiate(const Plan<acc_t> p, acc_t offset_scale, const acc_t* dots,
                                    scalar_t* grad_offsets) {
  scalar_t* grad_modulation = grad_offsets + 2 * p.taps;
#pragma GCC ivdep
  for (int64_t k = 0; k < p.taps; ++k) {
    const acc_t top_left = dots[4 * k], top_right = dots[4 * k + 1];
    const acc_t bottom_left = dots[4 * k + 2], bottom_right = dots[4 * k + 3];
    const acc_t dx = p.dx[k], dy = p.dy[k];
    const acc_t top = (1 - dx) * top_left + dx * top_right;
    const acc_t bottom = (1 - dx) * bottom_left + dx * bottom_right;
    const acc_t slope_x = (1 - dy) * (top_right - top_left) + dy * (bottom_right - bottom_left);
    // A tap that reaches no pixel has no gradient, however infinite its modulation.
    const acc_t factor = p.row[k] == outside ? 0 : offset_scale * p.modulation[k];
    grad_offsets[2 * k] = static_cast<scalar_t>(factor * slope_x);
    grad_offsets[2 * k + 1] = static_cast<scalar_t>(factor * (bottom - top));
    grad_modulation[k] = static_cast<scalar_t>((1 - dy) * top + dy * bottom);
  }
}

// (image, group) slices [begin, end), counted over the batch: a worker owns all that it writes.
template <typename scalar_t, typename acc_t>
OPS_DCNV4_INLINE void backward(const Geometry& g, const Tensors<scalar_t, acc_t>& t,
                               const Plan<acc_t> plan, acc_t* dots, int64_t begin, int64_t end) {
  const int64_t right = g.channels(), below = g.width * right;  // to neighbouring pixels
  const int64_t pixels_in = int64_t(g.height) * g.width;
  const int64_t pixels_out = int64_t(g.out_height) * g.out_width;
  const scalar_t zeros[widest_block] = {};  // stands in for pixels outside the image,
  acc_t nowhere[widest_block] = {};         // and this for their gradients
  for (int64_t slice = begin; slice < end; ++slice) {
    const int64_t image = slice / g.groups, group = slice % g.groups;
    const int64_t first_value = image * pixels_in * g.channels() + group * g.group_channels;
    OutputPixel at{image, 0, 0};
    const int64_t first_pixel = image * pixels_out;
    for (int64_t pixel = first_pixel; pixel < first_pixel + pixels_out; ++pixel, at.next(g)) {
      const int64_t first_offset = pixel * g.offset_channels + group * 3 * plan.taps;
      make_plan(plan, g, at.row, at.col, t.offset_mask + first_offset);
      std::fill_n(dots, 4 * plan.taps, acc_t(0));
      for_channel_blocks(g.group_channels, [&](auto width, int64_t c) OPS_DCNV4_INLINE_LAMBDA {
        using L = Lanes<acc_t, width.value>;
        const scalar_t* value = t.value + first_value + c;
        acc_t* grad_value = t.grad_value + first_value + c;
        const auto grad =
            L::load(t.grad_output + pixel * g.channels() + group * g.group_channels + c);
        const auto corner = [&](int64_t i, bool inside, int64_t offset) OPS_DCNV4_INLINE_LAMBDA {
          acc_t* to = inside ? grad_value + offset : nowhere;
          L::store(to, L::load(to) + plan.weights[i] * grad);
          dots[i] += L::sum(grad * L::load(inside ? value + offset : zeros));
        };
        for (int64_t k = 0; k < plan.taps; ++k) {
          const int64_t first = plan.pixel[k] * right;
          if (plan.row[k] == outside) continue;
          const Inside in(g, plan.row[k], plan.col[k]);
          corner(4 * k, in.top_left, first);
          corner(4 * k + 1, in.top_right, first + right);
          corner(4 * k + 2, in.bottom_left, first + below);
          corner(4 * k + 3, in.bottom_right, first + below + right);
        }
      });
      differentiate(plan, static_cast<acc_t>(g.offset_scale), dots,
                    t.grad_offset_mask + first_offset);
    }
  }
}

// target_clones takes no templates: one pair of entry points per dtype, everything else inlined.
#define OPS_DCNV4_ENTRY_POINTS(scalar_t, acc_t)                                               \
  OPS_DCNV4_MULTIVERSION void run_forward(const Geometry& g,                                  \
                                          const Tensors<scalar_t, acc_t>& t,                  \
                                          const Plan<acc_t>& plan, int64_t begin,             \
                                          int64_t end) {                                      \
    forward(g, t, plan, begin, end);                                                          \
  }                                                                                           \
  OPS_DCNV4_MULTIVERSION void run_backward(const Geometry& g,                                 \
                                           const Tensors<scalar_t, acc_t>& t,                 \
                                           const Plan<acc_t>& plan, acc_t* dots,              \
                                           int64_t begin, int64_t end) {                      \
    backward(g, t, plan, dots, begin, end);                                                   \
  }
OPS_DCNV4_ENTRY_POINTS(float, float)
OPS_DCNV4_ENTRY_POINTS(double, double)
OPS_DCNV4_ENTRY_POINTS(at::BFloat16, float)
OPS_DCNV4_ENTRY_POINTS(at::Half, float)
#undef OPS_DCNV4_ENTRY_POINTS

// About this many multiply-adds make a thread worth waking.
constexpr int64_t grain = 1 << 15;

}  // namespace

at::Tensor dcnv4_cpu(const at::Tensor& value, const at::Tensor& offset_mask,
                     at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
                     at::IntArrayRef dilation, int64_t groups, double offset_scale,
                     bool remove_center) {
  const Geometry g = make_geometry(value, offset_mask, kernel_size, stride, padding, dilation,
                                   groups, offset_scale, remove_center);
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
      const PlanBuffer<acc_t> buffer(g);
      run_forward(g, tensors, buffer.plan, begin, end);
    });
  });
  return output;
}

std::tuple<at::Tensor, at::Tensor> dcnv4_backward_cpu(
    const at::Tensor& grad_output, const at::Tensor& value, const at::Tensor& offset_mask,
    at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, double offset_scale, bool remove_center) {
  const Geometry g = make_geometry(value, offset_mask, kernel_size, stride, padding, dilation,
                                   groups, offset_scale, remove_center);
  check_grad_output(g, grad_output, value);
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
      const PlanBuffer<acc_t> buffer(g);
      std::vector<acc_t> dots(4 * g.taps());
      run_backward(g, tensors, buffer.plan, dots.data(), begin, end);
    });
  });
  return {grad_value.to(v.scalar_type()), grad_offset_mask};
}

}  // namespace ops_dcnv4
