#include "checks.h"
#include "cuda/backward.cuh"
#include "cuda/dcnv4_sampler.cuh"
#include "cuda/window_backward.cuh"
#include "dispatch.h"
#include "geometry.h"
#include "operators.h"

namespace ops_dcnv4 {

std::tuple<Tensor, Tensor> dcnv4_backward_cuda(const Window& window, const Tensor& grad_output,
                                               const Tensor& value, const Tensor& offset_mask,
                                               bool deterministic) {
  const Geometry g = make_geometry(window, value, offset_mask);
  check_grad_output(g.output_shape(), grad_output, value);
  const DeviceGuard guard(value.get_device_index());
  const Tensor go = dense(grad_output), v = dense(value), o = dense(offset_mask);
  if (v.numel() == 0 || o.numel() == 0)
    return {zero_tensor(v.sizes(), v), zero_tensor(o.sizes(), o)};
  const Tensor grad_value = zero_tensor(v.sizes(), v, accumulated(v.scalar_type()));
  const Tensor grad_offset_mask = empty_tensor(o.sizes(), o);
  dispatch(v.scalar_type(), [&](auto scalar, auto acc) {
    using scalar_t = decltype(scalar);
    using acc_t = decltype(acc);
    const auto* grads = go.const_data_ptr<scalar_t>();
    const auto* pixels = v.const_data_ptr<scalar_t>();
    const auto* points = o.const_data_ptr<scalar_t>();
    auto* grad_pixels = grad_value.mutable_data_ptr<acc_t>();
    auto* grad_points = grad_offset_mask.mutable_data_ptr<scalar_t>();
    const bool specialize = WindowCall::can_represent(g, sizeof(acc_t));
    with_sampler<scalar_t, acc_t>(g, {&v, &go}, specialize, [&](auto sampler) {
      using S = typename decltype(sampler)::Compiled;
      if constexpr (S::taps != 0) {
        launch_window_backward<S>(g, !deterministic, grads, pixels, points, grad_pixels,
                                  grad_points);
        if (deterministic) {
          launch_scatter_in_order(sampler, grads, points, points, grad_pixels);
        }
      } else {
        launch_backward(sampler, deterministic, grads, pixels, points, points, grad_pixels,
                        grad_points, grad_points);
      }
    });
  });
  return {cast(grad_value, v.scalar_type()), grad_offset_mask};
}

}  // namespace ops_dcnv4
