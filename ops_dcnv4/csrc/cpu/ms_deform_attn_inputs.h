// The inputs of the attention operators, in the form that the kernels expect.
#pragma once

#include "attention.h"
#include "checks.h"
#include "cpu/kernels.h"

namespace ops_dcnv4 {

inline void check_levels(const Attention& a, const Tensor& shapes, const Tensor& start) {
  for (int64_t level = 0; level < a.levels; ++level) {
    const int64_t height = shapes.const_data_ptr<int64_t>()[2 * level];
    const int64_t width = shapes.const_data_ptr<int64_t>()[2 * level + 1];
    const int64_t first = start.const_data_ptr<int64_t>()[level];
    OPS_DCNV4_CHECK(is_side(height) && is_side(width) && first >= 0 && first <= a.pixels &&
                        height <= (a.pixels - first) / width,
                    "level ", level,
                    " of spatial_shapes and level_start_index must lie within the ", a.pixels,
                    " pixels of value, got ", height, " x ", width, " from ", first, " on");
  }
}

// Contiguous, with locations and normalized weights in the accumulator's type.
struct DenseInputs {
  ScalarType dtype;  // of locations and weights
  Tensor value, spatial_shapes, level_start_index, locations, weights;

  DenseInputs(const Attention& a, const AttentionInputs& in)
      : dtype(accumulated(in.value.scalar_type())),
        value(dense(in.value)),
        spatial_shapes(dense(in.spatial_shapes)),
        level_start_index(dense(in.level_start_index)),
        locations(cast(dense(in.locations), dtype)),
        weights(a.fused ? torch::stable::narrow(locations, 3, a.first_weight(), a.taps())
                        : cast(dense(in.weights), dtype)) {
    check_levels(a, spatial_shapes, level_start_index);
    if (a.fused) weights = call_operator("aten::_softmax", weights, int64_t(-1), false);
  }

  bool is_empty() const { return value.numel() == 0 || locations.numel() == 0; }

  template <typename scalar_t>
  AttentionTensors<scalar_t> tensors() const {
    using acc_t = Accumulated<scalar_t>;
    return {spatial_shapes.const_data_ptr<int64_t>(), level_start_index.const_data_ptr<int64_t>(),
            value.const_data_ptr<scalar_t>(), locations.const_data_ptr<acc_t>(),
            weights.const_data_ptr<acc_t>()};
  }
};

}  // namespace ops_dcnv4
