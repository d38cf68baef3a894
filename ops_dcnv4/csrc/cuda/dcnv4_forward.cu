#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>

#include "checks.h"
#include "cuda/dcnv4_sampler.cuh"
#include "cuda/forward.cuh"
#include "dispatch.h"
#include "geometry.h"
#include "operators.h"

namespace ops_dcnv4 {

at::Tensor dcnv4_cuda(const Window& window, const at::Tensor& value,
                      const at::Tensor& offset_mask) {
  const Geometry g = make_geometry(window, value, offset_mask);
  const c10::DeviceGuard guard(value.device());
  const at::Tensor v = dense(value), o = dense(offset_mask);
  if (v.numel() == 0 || o.numel() == 0) return at::zeros(g.output_shape(), v.options());
  at::Tensor output = at::empty(g.output_shape(), v.options());
  dispatch(v.scalar_type(), [&](auto scalar, auto acc) {
    using scalar_t = decltype(scalar);
    with_sampler<scalar_t, decltype(acc)>(g, {&v, &output}, [&](auto sampler) {
      launch_forward(sampler, v.const_data_ptr<scalar_t>(), o.const_data_ptr<scalar_t>(),
                     o.const_data_ptr<scalar_t>(), output.data_ptr<scalar_t>());
    });
  });
  return output;
}

}  // namespace ops_dcnv4
