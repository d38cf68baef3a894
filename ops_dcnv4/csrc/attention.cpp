#include "attention.h"

#include "checks.h"

namespace ops_dcnv4 {
namespace {

void check_points(const at::Tensor& points, const char* name, const at::Tensor& value) {
  TORCH_CHECK_VALUE(points.device() == value.device(), "devices of value and ", name, " differ");
  const at::ScalarType dtype = points.scalar_type(), of_value = value.scalar_type();
  const bool is_16_bit = of_value == at::kHalf || of_value == at::kBFloat16;
  TORCH_CHECK_TYPE(dtype == of_value || (dtype == at::kFloat && is_16_bit), name,
                   " must have the dtype of value, or be float32 beside 16 bits");
}

Attention make(const at::Tensor& value, const at::Tensor& spatial_shapes,
               const at::Tensor& level_start_index, int64_t queries, int64_t points, bool fused) {
  TORCH_CHECK_VALUE(value.dim() == 4, "value must have 4 dimensions");
  for (const at::Tensor* levels : {&spatial_shapes, &level_start_index}) {
    TORCH_CHECK_TYPE(levels->scalar_type() == at::kLong,
                     "spatial_shapes and level_start_index must be of 64-bit integers");
    TORCH_CHECK_VALUE(levels->device() == value.device(),
                      "spatial_shapes and level_start_index must be on the device of value");
  }
  TORCH_CHECK_VALUE(
      spatial_shapes.dim() == 2 && spatial_shapes.size(1) == 2 && spatial_shapes.size(0) > 0,
      "spatial_shapes must be (L, 2)");
  TORCH_CHECK_VALUE(
      level_start_index.dim() == 1 && level_start_index.size(0) == spatial_shapes.size(0),
      "level_start_index must have a number for each level");
  TORCH_CHECK_VALUE(points > 0, "there must be at least one point");
  TORCH_CHECK_VALUE(value.size(1) > 0, "value must have at least one pixel");
  const Attention a{value.size(0),
                    to_int(value.size(1), "the length of value"),
                    to_int(queries, "the number of queries"),
                    to_int(value.size(2), "the number of heads"),
                    to_int(value.size(3), "the number of channels of a head"),
                    to_int(spatial_shapes.size(0), "the number of levels"),
                    to_int(points, "the number of points"),
                    fused};
  to_int(3 * int64_t(a.levels) * a.points, "the number of points of all levels");
  to_int(a.channels(), "the number of channels of value");
  return a;
}

}  // namespace

Attention make_attention(const at::Tensor& value, const at::Tensor& spatial_shapes,
                         const at::Tensor& level_start_index, const at::Tensor& sampling_locations,
                         const at::Tensor& attention_weights) {
  TORCH_CHECK_VALUE(sampling_locations.dim() == 6, "sampling_locations must have 6 dimensions");
  const Attention a = make(value, spatial_shapes, level_start_index, sampling_locations.size(1),
                           sampling_locations.size(4), false);
  const int64_t shape[] = {a.batch, a.queries, a.heads, a.levels, a.points, 2};
  TORCH_CHECK_VALUE(sampling_locations.sizes() == at::IntArrayRef(shape),
                    "sampling_locations must be (N, Lq, M, L, K, 2)");
  TORCH_CHECK_VALUE(attention_weights.sizes() == at::IntArrayRef(shape, 5),
                    "attention_weights must be (N, Lq, M, L, K)");
  check_points(sampling_locations, "sampling_locations", value);
  check_points(attention_weights, "attention_weights", value);
  check_dtype(value);
  TORCH_CHECK_TYPE(sampling_locations.scalar_type() == attention_weights.scalar_type(),
                   "dtypes of sampling_locations and attention_weights differ");
  return a;
}

Attention make_fused_attention(const at::Tensor& value, const at::Tensor& spatial_shapes,
                               const at::Tensor& level_start_index,
                               const at::Tensor& sampling_loc_attn, int64_t n_points) {
  TORCH_CHECK_VALUE(sampling_loc_attn.dim() == 4, "sampling_loc_attn must have 4 dimensions");
  const Attention a =
      make(value, spatial_shapes, level_start_index, sampling_loc_attn.size(1), n_points, true);
  const int64_t shape[] = {a.batch, a.queries, a.heads, 3 * int64_t(a.taps())};
  TORCH_CHECK_VALUE(sampling_loc_attn.sizes() == at::IntArrayRef(shape),
                    "sampling_loc_attn must be (N, Lq, M, 3 * L * n_points)");
  check_points(sampling_loc_attn, "sampling_loc_attn", value);
  check_dtype(value);
  return a;
}

}  // namespace ops_dcnv4
