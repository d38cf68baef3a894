#include "attention.h"
#include "checks.h"
#include "cuda/backward.cuh"
#include "cuda/ms_deform_attn_backward.cuh"
#include "cuda/ms_deform_attn_sampler.cuh"
#include "dispatch.h"
#include "operators.h"

namespace ops_dcnv4 {

AttentionGradients ms_deform_attn_backward_cuda(const AttentionInputs& in,
                                                const Tensor& grad_output, bool deterministic) {
  const Attention a = make_attention(in);
  check_grad_output(a.output_shape(), grad_output, in.value);
  const DeviceGuard guard(in.value.get_device_index());
  const Tensor go = dense(grad_output), v = dense(in.value), l = dense(in.locations),
               w = a.fused ? l : dense(in.weights), shapes = dense(in.spatial_shapes),
               starts = dense(in.level_start_index);
  const bool is_empty = v.numel() == 0 || l.numel() == 0;
  const ScalarType acc_dtype = accumulated(v.scalar_type());
  const auto make = [&](const Tensor& like) {
    return is_empty ? zero_tensor(like.sizes(), like, acc_dtype)
                    : empty_tensor(like.sizes(), like, acc_dtype);
  };
  const Tensor grad_locations = make(l), grad_weights = a.fused ? grad_locations : make(w);
  const Tensor grad_value = zero_tensor(v.sizes(), v, acc_dtype);
  const LevelTensors levels{shapes.const_data_ptr<int64_t>(), starts.const_data_ptr<int64_t>()};
  if (!is_empty) {
    dispatch(v.scalar_type(), l.scalar_type(), [&](auto scalar, auto acc, auto point) {
      using scalar_t = decltype(scalar);
      using acc_t = decltype(acc);
      using point_t = decltype(point);
      const auto* grads = go.const_data_ptr<scalar_t>();
      const auto* pixels = v.const_data_ptr<scalar_t>();
      const auto* locations = l.const_data_ptr<point_t>();
      const auto* weights = w.const_data_ptr<point_t>() + a.first_weight();
      auto* grad_pixels = grad_value.mutable_data_ptr<acc_t>();
      auto* grad_points = grad_locations.mutable_data_ptr<acc_t>();
      auto* grad_factors = grad_weights.mutable_data_ptr<acc_t>() + a.first_weight();
      // A thread of the general kernels holds as many channels as it adds to grad_value at once, so
      // that the threads of a unit together add to whole memory sectors.
      constexpr int bytes = 16 / sizeof(acc_t) * sizeof(scalar_t);
      with_sampler<scalar_t, acc_t, point_t, bytes>(a, levels, {&v, &go}, [&](auto sampler) {
        if constexpr (decltype(sampler)::Compiled::taps != 0) {
          launch_attention_backward(sampler, !deterministic, grads, pixels, locations, weights,
                                    grad_pixels, grad_points, grad_factors);
          if (deterministic) {
            launch_scatter_in_order(sampler, grads, locations, weights, grad_pixels);
          }
        } else {
          launch_backward(sampler, deterministic, grads, pixels, locations, weights, grad_pixels,
                          grad_points, grad_factors);
        }
      });
    });
  }
  const ScalarType dtype = in.locations.scalar_type();
  return {cast(grad_value, v.scalar_type()), cast(grad_locations, dtype),
          cast(grad_weights, dtype)};
}

}  // namespace ops_dcnv4
