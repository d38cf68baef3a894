#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>

#include "attention.h"
#include "checks.h"
#include "cuda/forward.cuh"
#include "cuda/ms_deform_attn_sampler.cuh"
#include "dispatch.h"
#include "operators.h"

namespace ops_dcnv4 {

at::Tensor ms_deform_attn_cuda(const AttentionInputs& in) {
  const Attention a = make_attention(in);
  const c10::DeviceGuard guard(in.value.device());
  const at::Tensor v = dense(in.value), l = dense(in.locations),
                   w = a.fused ? l : dense(in.weights), shapes = dense(in.spatial_shapes),
                   starts = dense(in.level_start_index);
  if (v.numel() == 0 || l.numel() == 0) return at::zeros(a.output_shape(), v.options());
  at::Tensor output = at::empty(a.output_shape(), v.options());
  const LevelTensors levels{shapes.const_data_ptr<int64_t>(), starts.const_data_ptr<int64_t>()};
  dispatch(v.scalar_type(), l.scalar_type(), [&](auto scalar, auto acc, auto point) {
    using scalar_t = decltype(scalar);
    using point_t = decltype(point);
    with_sampler<scalar_t, decltype(acc), point_t, 16>(a, levels, {&v, &output}, [&](auto sampler) {
      launch_forward(sampler, v.const_data_ptr<scalar_t>(), l.const_data_ptr<point_t>(),
                     w.const_data_ptr<point_t>() + a.first_weight(), output.data_ptr<scalar_t>());
    });
  });
  return output;
}

}  // namespace ops_dcnv4
