#include "checks.h"
#include "cuda/backward.cuh"
#include "cuda/dcnv4_sampler.cuh"
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
    with_sampler<scalar_t, acc_t>(g, {&v, &go}, true, [&](auto sampler) {
      launch_backward(sampler, deterministic, go.const_data_ptr<scalar_t>(),
                      v.const_data_ptr<scalar_t>(), o.const_data_ptr<scalar_t>(),
                      o.const_data_ptr<scalar_t>(), grad_value.mutable_data_ptr<acc_t>(),
                      grad_offset_mask.mutable_data_ptr<scalar_t>(),
                      grad_offset_mask.mutable_data_ptr<scalar_t>());
    });
  });
  return {cast(grad_value, v.scalar_type()), grad_offset_mask};
}

}  // namespace ops_dcnv4
