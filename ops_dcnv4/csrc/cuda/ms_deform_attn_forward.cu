#include "attention.h"
#include "checks.h"
#include "cuda/forward.cuh"
#include "cuda/ms_deform_attn_forward.cuh"
#include "cuda/ms_deform_attn_sampler.cuh"
#include "dispatch.h"
#include "operators.h"

namespace ops_dcnv4 {

Tensor ms_deform_attn_cuda(const AttentionInputs& in) {
  const Attention a = make_attention(in);
  const DeviceGuard guard(in.value.get_device_index());
  const Tensor v = dense(in.value), l = dense(in.locations), w = a.fused ? l : dense(in.weights),
               shapes = dense(in.spatial_shapes), starts = dense(in.level_start_index);
  if (v.numel() == 0 || l.numel() == 0) return zero_tensor(a.output_shape(), v);
  Tensor output = empty_tensor(a.output_shape(), v);
  const LevelTensors levels{shapes.const_data_ptr<int64_t>(), starts.const_data_ptr<int64_t>()};
  dispatch(v.scalar_type(), l.scalar_type(), [&](auto scalar, auto acc, auto point) {
    using scalar_t = decltype(scalar);
    using point_t = decltype(point);
    const auto* pixels = v.const_data_ptr<scalar_t>();
    const auto* locations = l.const_data_ptr<point_t>();
    const auto* weights = w.const_data_ptr<point_t>() + a.first_weight();
    auto* sums = output.mutable_data_ptr<scalar_t>();
    with_sampler<scalar_t, decltype(acc), point_t, 16>(a, levels, {&v, &output}, [&](auto sampler) {
      if constexpr (decltype(sampler)::Compiled::taps != 0) {
        launch_attention_forward(sampler, pixels, locations, weights, sums);
      } else {
        launch_forward(sampler, pixels, locations, weights, sums);
      }
    });
  });
  return output;
}

}  // namespace ops_dcnv4
