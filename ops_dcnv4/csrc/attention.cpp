#include "attention.h"

#include "checks.h"

namespace ops_dcnv4 {
namespace {

void check_points(const at::Tensor& points, const char* name, const at::Tensor& value) {
  TORCH_CHECK_VALUE(points.device() == value.device(), "value and ", name,
                    " must be on one device, got ", value.device(), " and ", points.device());
  const at::ScalarType dtype = points.scalar_type(), of_value = value.scalar_type();
  const bool is_16_bit = of_value == at::kHalf || of_value == at::kBFloat16;
  TORCH_CHECK_TYPE(dtype == of_value || (dtype == at::kFloat && is_16_bit), name,
                   " must have the dtype of value, or be float32 if value has 16 bits, got ", dtype,
                   " and value of ", of_value);
}

Attention make(const at::Tensor& value, const at::Tensor& spatial_shapes,
               const at::Tensor& level_start_index, int64_t queries, int64_t points, bool fused) {
  check_equal<int64_t>("the number of dimensions of value", value.dim(), 4);
  for (const at::Tensor* levels : {&spatial_shapes, &level_start_index}) {
    TORCH_CHECK_TYPE(levels->scalar_type() == at::kLong,
                     "spatial_shapes and level_start_index must contain 64-bit integers, got ",
                     levels->scalar_type());
    check_equal("the device of spatial_shapes and level_start_index", levels->device(),
                value.device());
  }
  TORCH_CHECK_VALUE(
      spatial_shapes.dim() == 2 && spatial_shapes.size(1) == 2 && spatial_shapes.size(0) > 0,
      "spatial_shapes must be (L, 2), got shape ", spatial_shapes.sizes());
  check_equal("the shape of level_start_index", level_start_index.sizes(),
              spatial_shapes.sizes().slice(0, 1));
  const Attention a{value.size(0),
                    to_int(value.size(1), "the number of pixels of value", 1),
                    to_int(queries, "the number of queries"),
                    to_int(value.size(2), "the number of heads"),
                    to_int(value.size(3), "the number of channels of a head"),
                    to_int(spatial_shapes.size(0), "the number of levels"),
                    to_int(points, "the number of points", 1),
                    fused};
  to_int(3 * int64_t(a.levels) * a.points, "the number of points of all levels");
  to_int(a.channels(), "the number of channels of value");
  return a;
}

}  // namespace

Attention make_attention(const at::Tensor& value, const at::Tensor& spatial_shapes,
                         const at::Tensor& level_start_index, const at::Tensor& sampling_locations,
                         const at::Tensor& attention_weights) {
  check_equal<int64_t>("the number of dimensions of sampling_locations", sampling_locations.dim(),
                       6);
  const Attention a = make(value, spatial_shapes, level_start_index, sampling_locations.size(1),
                           sampling_locations.size(4), false);
  const int64_t shape[] = {a.batch, a.queries, a.heads, a.levels, a.points, 2};
  check_equal("the shape of sampling_locations, (N, Lq, M, L, K, 2),", sampling_locations.sizes(),
              at::IntArrayRef(shape));
  check_equal("the shape of attention_weights, (N, Lq, M, L, K),", attention_weights.sizes(),
              at::IntArrayRef(shape, 5));
  check_points(sampling_locations, "sampling_locations", value);
  check_points(attention_weights, "attention_weights", value);
  check_dtype(value);
  TORCH_CHECK_TYPE(sampling_locations.scalar_type() == attention_weights.scalar_type(),
                   "sampling_locations and attention_weights must have one dtype, got ",
                   sampling_locations.scalar_type(), " and ", attention_weights.scalar_type());
  return a;
}

Attention make_fused_attention(const at::Tensor& value, const at::Tensor& spatial_shapes,
                               const at::Tensor& level_start_index,
                               const at::Tensor& sampling_loc_attn, int64_t n_points) {
  check_equal<int64_t>("the number of dimensions of sampling_loc_attn", sampling_loc_attn.dim(), 4);
  const Attention a =
      make(value, spatial_shapes, level_start_index, sampling_loc_attn.size(1), n_points, true);
  const int64_t shape[] = {a.batch, a.queries, a.heads, 3 * int64_t(a.taps())};
  check_equal("the shape of sampling_loc_attn, (N, Lq, M, 3 * L * n_points),",
              sampling_loc_attn.sizes(), at::IntArrayRef(shape));
  check_points(sampling_loc_attn, "sampling_loc_attn", value);
  check_dtype(value);
  return a;
}

}  // namespace ops_dcnv4
