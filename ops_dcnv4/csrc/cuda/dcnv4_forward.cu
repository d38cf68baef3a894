#include "checks.h"
#include "cuda/dcnv4_sampler.cuh"
#include "cuda/forward.cuh"
#include "cuda/window_forward.cuh"
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
    const bool specialize = WindowCall::can_represent(g, sizeof(scalar_t));
    with_sampler<scalar_t, decltype(acc)>(g, {&v, &output}, specialize, [&](auto sampler) {
      using S = typename decltype(sampler)::Compiled;
      const scalar_t* points = o.const_data_ptr<scalar_t>();
      if constexpr (S::taps != 0) {
        launch_window_forward<S>(g, v.const_data_ptr<scalar_t>(), points,
                                 output.mutable_data_ptr<scalar_t>());
      } else {
        launch_forward(sampler, v.const_data_ptr<scalar_t>(), points, points,
                       output.mutable_data_ptr<scalar_t>());
      }
    });
  });
  return output;
}

}  // namespace ops_dcnv4
