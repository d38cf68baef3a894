#include "attention.h"

#include "checks.h"

namespace ops_dcnv4 {
namespace {

void check_points(const Tensor& points, const char* name, const Tensor& value) {
  OPS_DCNV4_CHECK(points.device() == value.device(), "value and ", name,
                  " must be on one device, got ", value.device(), " and ", points.device());
  const ScalarType dtype = points.scalar_type(), of_value = value.scalar_type();
  OPS_DCNV4_CHECK(dtype == of_value || (dtype == ScalarType::Float && is_16_bit(of_value)), name,
                  " must have the dtype of value, or be float32 if value has 16 bits, got ", dtype,
                  " and value of ", of_value);
}

}  // namespace

Attention make_attention(const AttentionInputs& in) {
  check_equal<int64_t>("the number of dimensions of value", in.value.dim(), 4);
  check_equal<int64_t>(in.fused ? "the number of dimensions of sampling_loc_attn"
                                : "the number of dimensions of sampling_locations",
                       in.locations.dim(), in.fused ? 4 : 6);
  for (const Tensor* levels : {&in.spatial_shapes, &in.level_start_index}) {
    OPS_DCNV4_CHECK(levels->scalar_type() == ScalarType::Long,
                    "spatial_shapes and level_start_index must contain 64-bit integers, got ",
                    levels->scalar_type());
    check_equal("the device of spatial_shapes and level_start_index", levels->device(),
                in.value.device());
  }
  const IntArrayRef levels = in.spatial_shapes.sizes();
  OPS_DCNV4_CHECK(levels.size() == 2 && levels[1] == 2 && levels[0] > 0,
                  "spatial_shapes must be (L, 2), got shape ", levels);
  check_shape("the shape of level_start_index", in.level_start_index.sizes(), levels.slice(0, 1));
  const Attention a{
      in.value.size(0),
      to_int(in.value.size(1), "the number of pixels of value", 1),
      to_int(in.locations.size(1), "the number of queries"),
      to_int(in.value.size(2), "the number of heads"),
      to_int(in.value.size(3), "the number of channels of a head"),
      to_int(levels[0], "the number of levels"),
      to_int(in.fused ? in.n_points : in.locations.size(4), "the number of points", 1),
      in.fused};
  to_int(3 * int64_t(a.levels) * a.points, "the number of points of all levels");
  to_int(a.channels(), "the number of channels of value");
  const int64_t shape[] = {a.batch, a.queries, a.heads, a.levels, a.points, 2};
  const int64_t fused_shape[] = {a.batch, a.queries, a.heads, 3 * int64_t(a.taps())};
  if (a.fused) {
    check_shape("the shape of sampling_loc_attn, (N, Lq, M, 3 * L * n_points),",
                in.locations.sizes(), fused_shape);
    check_points(in.locations, "sampling_loc_attn", in.value);
  } else {
    check_shape("the shape of sampling_locations, (N, Lq, M, L, K, 2),", in.locations.sizes(),
                shape);
    check_shape("the shape of attention_weights, (N, Lq, M, L, K),", in.weights.sizes(),
                IntArrayRef(shape, 5));
    check_points(in.locations, "sampling_locations", in.value);
    check_points(in.weights, "attention_weights", in.value);
  }
  check_dtype(in.value);
  OPS_DCNV4_CHECK(in.locations.scalar_type() == in.weights.scalar_type(),
                  "sampling_locations and attention_weights must have one dtype, got ",
                  in.locations.scalar_type(), " and ", in.weights.scalar_type());
  return a;
}

}  // namespace ops_dcnv4
