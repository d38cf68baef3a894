#include "checks.h"
#include "cuda/dcnv4_sampler.cuh"
#include "cuda/forward.cuh"
#include "dispatch.h"
#include "geometry.h"
#include "operators.h"

namespace ops_dcnv4 {

Tensor dcnv4_cuda(const Window& window, const Tensor& value, const Tensor& offset_mask) {
  const Geometry g = make_geometry(window, value, offset_mask);
  const DeviceGuard guard(value.get_device_index());
  const Tensor v = dense(value), o = dense(offset_mask);
  if (v.numel() == 0 || o.numel() == 0) return zero_tensor(g.output_shape(), v);
  Tensor output = empty_tensor(g.output_shape(), v);
  dispatch(v.scalar_type(), [&](auto scalar, auto acc) {
    using scalar_t = decltype(scalar);
    with_sampler<scalar_t, decltype(acc)>(g, {&v, &output}, [&](auto sampler) {
      launch_forward(sampler, v.const_data_ptr<scalar_t>(), o.const_data_ptr<scalar_t>(),
                     o.const_data_ptr<scalar_t>(), output.mutable_data_ptr<scalar_t>());
    });
  });
  return output;
}

}  // namespace ops_dcnv4
