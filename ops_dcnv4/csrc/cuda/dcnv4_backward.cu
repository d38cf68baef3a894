#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>

#include "checks.h"
#include "cuda/launch.h"
#include "cuda/static.cuh"
#include "cuda/units.cuh"
#include "operators.h"
#include "dispatch.h"
#include "geometry.h"

namespace ops_dcnv4 {
namespace {

// What the gradients of a tap are computed from.
template <typename acc_t>
struct Sample {
  acc_t dx, dy, modulation;
  unsigned inside;  // a bit per corner: top left, top right, bottom left, bottom right

  Sample() = default;
  __device__ __forceinline__ Sample(const Inside& in, const Cell<acc_t>& cell, acc_t modulation)
      : dx(cell.dx),
        dy(cell.dy),
        modulation(modulation),
        inside((in.top && in.left) | (in.top && in.right) << 1 | (in.bottom && in.left) << 2 |
               (in.bottom && in.right) << 3) {}

  __device__ __forceinline__ Sample from_lane(int lane, int lanes) const {
    Sample result;
    result.dx = ops_dcnv4::from_lane(dx, lane, lanes);
    result.dy = ops_dcnv4::from_lane(dy, lane, lanes);
    result.modulation = ops_dcnv4::from_lane(modulation, lane, lanes);
    result.inside = ops_dcnv4::from_lane(inside, lane, lanes);
    return result;
  }

  __device__ __forceinline__ bool is_inside(int corner) const { return inside >> corner & 1; }

  __device__ __forceinline__ void get_weights(acc_t (&weights)[4]) const {
    const acc_t top = modulation * (1 - dy), bottom = modulation * dy;
    weights[0] = top * (1 - dx);
    weights[1] = top * dx;
    weights[2] = bottom * (1 - dx);
    weights[3] = bottom * dx;
  }
};

// Gradients of a tap's offset and modulation.
template <typename acc_t>
struct TapGradients {
  acc_t x = 0, y = 0, modulation = 0;

  TapGradients() = default;
  // `dots` are the products of grad_output with the corners.
  __device__ __forceinline__ TapGradients(const Sample<acc_t>& tap, const acc_t (&dots)[4],
                                          acc_t offset_scale) {
    acc_t d[4];
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) d[corner] = tap.is_inside(corner) ? dots[corner] : 0;
    const acc_t top = (1 - tap.dx) * d[0] + tap.dx * d[1];
    const acc_t bottom = (1 - tap.dx) * d[2] + tap.dx * d[3];
    const acc_t slope_x = (1 - tap.dy) * (d[1] - d[0]) + tap.dy * (d[3] - d[2]);
    x = offset_scale * tap.modulation * slope_x;
    y = offset_scale * tap.modulation * (bottom - top);
    modulation = (1 - tap.dy) * top + tap.dy * bottom;
  }

  // Adds up the shares of a unit's lanes, in each of them.
  __device__ __forceinline__ void reduce(int lanes) {
#pragma unroll
    for (int step = warp_size / 2; step > 0; step /= 2) {
      if (step >= lanes) continue;
      x += __shfl_xor_sync(0xffffffff, x, step);
      y += __shfl_xor_sync(0xffffffff, y, step);
      modulation += __shfl_xor_sync(0xffffffff, modulation, step);
    }
  }
};

// grad_offset_mask, padding channels included, without atomics: the threads of a unit hold all that
// its gradients depend on. With `scatter` also grad_value, zero at the start, in any order.
template <typename S, bool scatter, typename scalar_t = typename S::scalar_t,
          typename acc_t = typename S::acc_t>
__global__ void __launch_bounds__(block_threads)
    backward(const Geometry g, const Layout layout, const acc_t offset_scale,
             const scalar_t* __restrict__ grad_output, const scalar_t* __restrict__ value,
             const scalar_t* __restrict__ offset_mask, acc_t* __restrict__ grad_value,
             scalar_t* __restrict__ grad_offset_mask) {
  using index_t = typename S::index_t;
  using Pixels = Pack<scalar_t, S::vec>;
  const int lanes = S::lanes(layout);
  const int taps = S::taps ? S::taps : g.taps();
  const int group_channels = S::group_channels ? S::group_channels : g.group_channels;
  const index_t channels = g.channels(), offset_channels = g.offset_channels;

  for_units(g, layout, lanes, [&](const Unit& unit) {
    const scalar_t* offsets = at_unit(offset_mask, g, unit, offset_channels, 3 * taps);
    scalar_t* grad_offsets = at_unit(grad_offset_mask, g, unit, offset_channels, 3 * taps);
    const scalar_t* grads = at_unit(grad_output, g, unit, channels, group_channels);
    const int64_t first_value = unit.image * g.height * g.width * channels +
                                (unit.exists ? unit.group * group_channels : 0);
    const scalar_t* image = computed(value + first_value);
    acc_t* grad_image = grad_value + first_value;
    Pack<acc_t, S::vec> grad;
    if (S::taps) grad = Pixels::load(grads + unit.lane * S::vec).template to<acc_t>();
#pragma unroll
    for (int first = 0; first < taps; first += lanes) {
      const int own = first + unit.lane;
      TapGradients<acc_t> own_gradients;
      Sample<acc_t> own_sample;
      const auto own_place = plan_tap<S::window, index_t>(
          g, offset_scale, taps, S::remove_center(g), unit, offsets, std::min(own, taps - 1),
          [&](auto... arguments) { own_sample = Sample<acc_t>(arguments...); });
#pragma unroll
      for (int lane = 0; lane < std::min(lanes, taps - first); ++lane) {
        const auto place = own_place.from_lane(lane, lanes);
        const auto tap = own_sample.from_lane(lane, lanes);
        TapGradients<acc_t> gradients;
        if (!place.is_none()) {
          acc_t weights[4], dots[4] = {};
          tap.get_weights(weights);
          for (int c = unit.lane * S::vec; c < group_channels; c += lanes * S::vec) {
            Pixels pixels[4];
            place.load(image + c, pixels);
            if (!S::taps) grad = Pixels::load(grads + c).template to<acc_t>();
#pragma unroll
            for (int corner = 0; corner < 4; ++corner) {
              const auto wide = pixels[corner].template to<acc_t>();
              Pack<acc_t, S::vec> share;
#pragma unroll
              for (int i = 0; i < S::vec; ++i) {
                dots[corner] += grad.at[i] * wide.at[i];
                share.at[i] = weights[corner] * grad.at[i];
              }
              if (scatter && unit.exists && tap.is_inside(corner)) {
                atomic_add(grad_image + c + place.offset(corner), share);
              }
            }
          }
          gradients = TapGradients<acc_t>(tap, dots, offset_scale);
        }
        gradients.reduce(lanes);
        if (lane == unit.lane) own_gradients = gradients;
      }
      if (unit.exists && own < taps) {
        grad_offsets[2 * own] = static_cast<scalar_t>(own_gradients.x);
        grad_offsets[2 * own + 1] = static_cast<scalar_t>(own_gradients.y);
        grad_offsets[2 * taps + own] = static_cast<scalar_t>(own_gradients.modulation);
      }
    }
    if (unit.exists && unit.group == g.groups - 1) {  // padding channels have no gradient
      const index_t behind = offset_channels - unit.group * 3 * taps;
      for (index_t c = 3 * taps + unit.lane; c < behind; c += lanes) grad_offsets[c] = scalar_t(0);
    }
  });
}

// grad_value alone, in a fixed order: a warp owns a group of an image, a thread its channels. The
// 32 threads plan a tap each, which are then followed one by one.
template <typename scalar_t, typename acc_t>
__global__ void __launch_bounds__(block_threads)
    scatter_in_order(const Geometry g, const acc_t offset_scale,
                     const scalar_t* __restrict__ grad_output,
                     const scalar_t* __restrict__ offset_mask, acc_t* __restrict__ grad_value) {
  const int lane = threadIdx.x % warp_size, warps = block_threads / warp_size;
  const int taps = g.taps();
  const int64_t channels = g.channels();
  Unit unit;
  unit.lane = lane;
  unit.exists = true;
  unit.group = blockIdx.x * warps + threadIdx.x / warp_size;
  if (unit.group >= g.groups) return;
  for (unit.image = blockIdx.z; unit.image < g.batch; unit.image += gridDim.z) {
    acc_t* image = grad_value + unit.image * g.height * g.width * channels +
                   unit.group * g.group_channels;
    const int64_t pixels = int64_t(g.out_height) * g.out_width;
    for (int64_t first = 0; first < pixels * taps; first += warp_size) {
      const int64_t own = std::min(first + lane, pixels * taps - 1), in_image = own / taps;
      unit.row = static_cast<int>(in_image / g.out_width);
      unit.col = static_cast<int>(in_image % g.out_width);
      Sample<acc_t> own_sample;
      const auto own_place = plan_tap<0, int64_t>(
          g, offset_scale, taps, g.remove_center, unit,
          at_unit(offset_mask, g, unit, g.offset_channels, 3 * taps), static_cast<int>(own % taps),
          [&](auto... arguments) { own_sample = Sample<acc_t>(arguments...); });
      for (int from = 0; from < std::min<int64_t>(warp_size, pixels * taps - first); ++from) {
        const auto place = own_place.from_lane(from, warp_size);
        const auto tap = own_sample.from_lane(from, warp_size);
        if (place.is_none()) continue;
        const scalar_t* grads = grad_output + unit.group * g.group_channels +
                                (unit.image * pixels + (first + from) / taps) * channels;
        acc_t weights[4];
        tap.get_weights(weights);
        for (int64_t c = lane; c < g.group_channels; c += warp_size) {
          const acc_t grad = static_cast<acc_t>(grads[c]);
          acc_t sums[4];  // of different pixels: all are loaded before the first is stored
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            if (tap.is_inside(corner)) sums[corner] = image[place.offset(corner) + c];
          }
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            if (tap.is_inside(corner)) {
              image[place.offset(corner) + c] = sums[corner] + weights[corner] * grad;
            }
          }
        }
      }
    }
  }
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> dcnv4_backward_cuda(
    const at::Tensor& grad_output, const at::Tensor& value, const at::Tensor& offset_mask,
    at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, double offset_scale, bool remove_center) {
  const Geometry g = make_geometry(value, offset_mask, kernel_size, stride, padding, dilation,
                                   groups, offset_scale, remove_center);
  check_grad_output(g.output_shape(), grad_output, value);
  const c10::DeviceGuard guard(value.device());
  const at::Tensor go = grad_output.contiguous(), v = value.contiguous(),
                   o = offset_mask.contiguous();
  if (v.numel() == 0 || o.numel() == 0)
    return {at::zeros(v.sizes(), v.options()), at::zeros(o.sizes(), o.options())};
  at::Tensor grad_value;
  at::Tensor grad_offset_mask = at::empty(o.sizes(), o.options());
  const bool in_order = at::globalContext().deterministicAlgorithms();
  dispatch(v.scalar_type(), [&](auto scalar, auto acc) {
    using scalar_t = decltype(scalar);
    using acc_t = decltype(acc);
    const acc_t scale = static_cast<acc_t>(g.offset_scale);
    grad_value = at::zeros(v.sizes(), v.options().dtype(c10::CppTypeToScalarType<acc_t>::value));
    with_static<scalar_t, acc_t>(g, {&v, &go}, [&](auto is_static) {
      using S = decltype(is_static);
      const Layout layout(g, lanes_for(g.group_channels, S::vec));
      const auto kernel = in_order ? &backward<S, false> : &backward<S, true>;
      OPS_DCNV4_LAUNCH(kernel, layout.grid(g), block_threads, g, layout, scale,
                       go.const_data_ptr<scalar_t>(), v.const_data_ptr<scalar_t>(),
                       o.const_data_ptr<scalar_t>(), grad_value.data_ptr<acc_t>(),
                       grad_offset_mask.data_ptr<scalar_t>());
    });
    if (in_order) {
      const dim3 grid(divide_up(g.groups, block_threads / warp_size), 1,
                      std::min<int64_t>(g.batch, 65535));
      OPS_DCNV4_LAUNCH((scatter_in_order<scalar_t, acc_t>), grid, block_threads, g, scale,
                       go.const_data_ptr<scalar_t>(), o.const_data_ptr<scalar_t>(),
                       grad_value.data_ptr<acc_t>());
    }
  });
  return {grad_value.to(v.scalar_type()), grad_offset_mask};
}

}  // namespace ops_dcnv4
