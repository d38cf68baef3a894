#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>

#include "checks.h"
#include "cuda/backward.cuh"
#include "cuda/dcnv4_sampler.cuh"
#include "dispatch.h"
#include "geometry.h"
#include "operators.h"

namespace ops_dcnv4 {

std::tuple<at::Tensor, at::Tensor> dcnv4_backward_cuda(const Window& window,
                                                       const at::Tensor& grad_output,
                                                       const at::Tensor& value,
                                                       const at::Tensor& offset_mask) {
  const Geometry g = make_geometry(window, value, offset_mask);
  check_grad_output(g.output_shape(), grad_output, value);
  const c10::DeviceGuard guard(value.device());
  const at::Tensor go = dense(grad_output), v = dense(value), o = dense(offset_mask);
  if (v.numel() == 0 || o.numel() == 0)
    return {at::zeros(v.sizes(), v.options()), at::zeros(o.sizes(), o.options())};
  at::Tensor grad_value;
  at::Tensor grad_offset_mask = at::empty(o.sizes(), o.options());
  const bool in_order = at::globalContext().deterministicAlgorithms();
  dispatch(v.scalar_type(), [&](auto scalar, auto acc) {
    using scalar_t = decltype(scalar);
    using acc_t = decltype(acc);
    grad_value = at::zeros(v.sizes(), v.options().dtype(c10::CppTypeToScalarType<acc_t>::value));
    with_sampler<scalar_t, acc_t>(g, {&v, &go}, [&](auto sampler) {
      launch_backward(sampler, in_order, go.const_data_ptr<scalar_t>(),
                      v.const_data_ptr<scalar_t>(), o.const_data_ptr<scalar_t>(),
                      o.const_data_ptr<scalar_t>(), grad_value.data_ptr<acc_t>(),
                      grad_offset_mask.data_ptr<scalar_t>(), grad_offset_mask.data_ptr<scalar_t>());
    });
  });
  return {grad_value.to(v.scalar_type()), grad_offset_mask};
}

}  // namespace ops_dcnv4
