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
namespace {

at::Tensor attend(const Attention& a, const at::Tensor& value, const at::Tensor& spatial_shapes,
                  const at::Tensor& level_start_index, const at::Tensor& locations,
                  const at::Tensor& weights) {
  const c10::DeviceGuard guard(value.device());
  const at::Tensor v = dense(value), l = dense(locations), w = dense(weights),
                   shapes = dense(spatial_shapes), starts = dense(level_start_index);
  if (v.numel() == 0 || l.numel() == 0) return at::zeros(a.output_shape(), v.options());
  at::Tensor output = at::empty(a.output_shape(), v.options());
  const LevelTensors levels{shapes.const_data_ptr<int64_t>(), starts.const_data_ptr<int64_t>()};
  dispatch(v.scalar_type(), l.scalar_type(), [&](auto scalar, auto acc, auto point) {
    using scalar_t = decltype(scalar);
    using point_t = decltype(point);
    with_ms_deform_attn_sampler<scalar_t, decltype(acc), point_t, 16>(
        a, levels, {&v, &output}, [&](auto sampler) {
          launch_forward(sampler, v.const_data_ptr<scalar_t>(), l.const_data_ptr<point_t>(),
                         w.const_data_ptr<point_t>() + a.first_weight(),
                         output.data_ptr<scalar_t>());
        });
  });
  return output;
}

}  // namespace

at::Tensor ms_deform_attn_cuda(const at::Tensor& value, const at::Tensor& spatial_shapes,
                               const at::Tensor& level_start_index,
                               const at::Tensor& sampling_locations,
                               const at::Tensor& attention_weights) {
  const Attention a = make_attention(value, spatial_shapes, level_start_index, sampling_locations,
                                     attention_weights);
  return attend(a, value, spatial_shapes, level_start_index, sampling_locations, attention_weights);
}

at::Tensor flash_deform_attn_cuda(const at::Tensor& value, const at::Tensor& spatial_shapes,
                                  const at::Tensor& level_start_index,
                                  const at::Tensor& sampling_loc_attn, int64_t n_points) {
  const Attention a =
      make_fused_attention(value, spatial_shapes, level_start_index, sampling_loc_attn, n_points);
  const at::Tensor packed = dense(sampling_loc_attn);
  return attend(a, value, spatial_shapes, level_start_index, packed, packed);
}

}  // namespace ops_dcnv4
