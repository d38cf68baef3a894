#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>

#include "attention.h"
#include "checks.h"
#include "cuda/backward.cuh"
#include "cuda/ms_deform_attn_sampler.cuh"
#include "dispatch.h"
#include "operators.h"

namespace ops_dcnv4 {
namespace {

// Writes the gradients of locations and weights (one tensor in the fused form) in the accumulator's
// dtype, and returns the gradient of value.
at::Tensor attend_backward(const Attention& a, const at::Tensor& grad_output,
                           const at::Tensor& value, const at::Tensor& spatial_shapes,
                           const at::Tensor& level_start_index, const at::Tensor& locations,
                           const at::Tensor& weights, const at::Tensor& grad_locations,
                           const at::Tensor& grad_weights) {
  const at::Tensor go = dense(grad_output), v = dense(value), l = dense(locations),
                   w = dense(weights), shapes = dense(spatial_shapes),
                   starts = dense(level_start_index);
  const at::Tensor grad_value =
      at::zeros(v.sizes(), v.options().dtype(grad_locations.scalar_type()));
  if (v.numel() == 0 || l.numel() == 0) {
    grad_locations.zero_();
    grad_weights.zero_();
    return grad_value;
  }
  const bool in_order = at::globalContext().deterministicAlgorithms();
  const LevelTensors levels{shapes.const_data_ptr<int64_t>(), starts.const_data_ptr<int64_t>()};
  dispatch(v.scalar_type(), l.scalar_type(), [&](auto scalar, auto acc, auto point) {
    using scalar_t = decltype(scalar);
    using acc_t = decltype(acc);
    using point_t = decltype(point);
    // A thread holds as many channels as it adds to grad_value at once, so that the threads of a
    // unit together add to whole memory sectors.
    constexpr int bytes = 16 / sizeof(acc_t) * sizeof(scalar_t);
    with_ms_deform_attn_sampler<scalar_t, acc_t, point_t, bytes>(
        a, levels, {&v, &go}, [&](auto sampler) {
          launch_backward(sampler, in_order, go.const_data_ptr<scalar_t>(),
                          v.const_data_ptr<scalar_t>(), l.const_data_ptr<point_t>(),
                          w.const_data_ptr<point_t>() + a.first_weight(),
                          grad_value.data_ptr<acc_t>(), grad_locations.data_ptr<acc_t>(),
                          grad_weights.data_ptr<acc_t>() + a.first_weight());
        });
  });
  return grad_value;
}

at::Tensor empty_gradient(const at::Tensor& points) {
  const bool is_double = points.scalar_type() == at::kDouble;
  return at::empty(points.sizes(), points.options().dtype(is_double ? at::kDouble : at::kFloat));
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_backward_cuda(
    const at::Tensor& grad_output, const at::Tensor& value, const at::Tensor& spatial_shapes,
    const at::Tensor& level_start_index, const at::Tensor& sampling_locations,
    const at::Tensor& attention_weights) {
  const Attention a = make_attention(value, spatial_shapes, level_start_index, sampling_locations,
                                     attention_weights);
  check_grad_output(a.output_shape(), grad_output, value);
  const c10::DeviceGuard guard(value.device());
  const at::Tensor grad_locations = empty_gradient(sampling_locations);
  const at::Tensor grad_weights = empty_gradient(attention_weights);
  const at::Tensor grad_value =
      attend_backward(a, grad_output, value, spatial_shapes, level_start_index, sampling_locations,
                      attention_weights, grad_locations, grad_weights);
  return {grad_value.to(value.scalar_type()), grad_locations.to(sampling_locations.scalar_type()),
          grad_weights.to(attention_weights.scalar_type())};
}

std::tuple<at::Tensor, at::Tensor> flash_deform_attn_backward_cuda(
    const at::Tensor& grad_output, const at::Tensor& value, const at::Tensor& spatial_shapes,
    const at::Tensor& level_start_index, const at::Tensor& sampling_loc_attn, int64_t n_points) {
  const Attention a =
      make_fused_attention(value, spatial_shapes, level_start_index, sampling_loc_attn, n_points);
  check_grad_output(a.output_shape(), grad_output, value);
  const c10::DeviceGuard guard(value.device());
  const at::Tensor packed = dense(sampling_loc_attn), grad = empty_gradient(packed);
  const at::Tensor grad_value = attend_backward(a, grad_output, value, spatial_shapes,
                                                level_start_index, packed, packed, grad, grad);
  return {grad_value.to(value.scalar_type()), grad.to(packed.scalar_type())};
}

}  // namespace ops_dcnv4
