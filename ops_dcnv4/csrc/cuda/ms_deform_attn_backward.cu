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

at::Tensor empty_gradient(const at::Tensor& points) {
  const bool is_double = points.scalar_type() == at::kDouble;
  return at::empty(points.sizes(), points.options().dtype(is_double ? at::kDouble : at::kFloat));
}

}  // namespace

AttentionGradients ms_deform_attn_backward_cuda(const AttentionInputs& in,
                                                const at::Tensor& grad_output) {
  const Attention a = make_attention(in);
  check_grad_output(a.output_shape(), grad_output, in.value);
  const c10::DeviceGuard guard(in.value.device());
  const at::Tensor go = dense(grad_output), v = dense(in.value), l = dense(in.locations),
                   w = a.fused ? l : dense(in.weights), shapes = dense(in.spatial_shapes),
                   starts = dense(in.level_start_index);
  const at::Tensor grad_locations = empty_gradient(l);
  const at::Tensor grad_weights = a.fused ? grad_locations : empty_gradient(w);
  const at::Tensor grad_value =
      at::zeros(v.sizes(), v.options().dtype(grad_locations.scalar_type()));
  const bool in_order = at::globalContext().deterministicAlgorithms();
  const LevelTensors levels{shapes.const_data_ptr<int64_t>(), starts.const_data_ptr<int64_t>()};
  if (v.numel() == 0 || l.numel() == 0) {
    grad_locations.zero_();
    grad_weights.zero_();
  } else {
    dispatch(v.scalar_type(), l.scalar_type(), [&](auto scalar, auto acc, auto point) {
      using scalar_t = decltype(scalar);
      using acc_t = decltype(acc);
      using point_t = decltype(point);
      // A thread holds as many channels as it adds to grad_value at once, so that the threads of a
      // unit together add to whole memory sectors.
      constexpr int bytes = 16 / sizeof(acc_t) * sizeof(scalar_t);
      with_sampler<scalar_t, acc_t, point_t, bytes>(a, levels, {&v, &go}, [&](auto sampler) {
        launch_backward(sampler, in_order, go.const_data_ptr<scalar_t>(),
                        v.const_data_ptr<scalar_t>(), l.const_data_ptr<point_t>(),
                        w.const_data_ptr<point_t>() + a.first_weight(),
                        grad_value.data_ptr<acc_t>(), grad_locations.data_ptr<acc_t>(),
                        grad_weights.data_ptr<acc_t>() + a.first_weight());
      });
    });
  }
  const at::ScalarType dtype = in.locations.scalar_type();
  return {grad_value.to(v.scalar_type()), grad_locations.to(dtype),
          a.fused ? at::Tensor() : grad_weights.to(dtype)};
}

}  // namespace ops_dcnv4
