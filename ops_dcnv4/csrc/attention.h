// The sizes of one call of deformable attention, shared by every compiled backend.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>

#include "bilinear.h"

namespace ops_dcnv4 {

struct Attention {
  int64_t batch;
  int pixels, queries;  // of one image: all levels' pixels
  int64_t heads, head_channels;
  int levels, points;
  bool fused;  // one tensor for locations and weights, and these are logits

  std::array<int64_t, 3> output_shape() const { return {batch, queries, channels()}; }

  OPS_DCNV4_INLINE int64_t channels() const { return heads * head_channels; }
  OPS_DCNV4_INLINE int taps() const { return levels * points; }

  // The form with two tensors and the fused one, which passes for both, are read alike: numbers
  // from one (query, head) to the next, and the first of its weights. Kernels that are compiled for
  // a number of taps pass it as a constant.
  OPS_DCNV4_INLINE int location_stride(int taps) const { return (fused ? 3 : 2) * taps; }
  OPS_DCNV4_INLINE int weight_stride(int taps) const { return (fused ? 3 : 1) * taps; }
  OPS_DCNV4_INLINE int first_weight() const { return fused ? 2 * taps() : 0; }
};

// Check what keeps the kernels inside their tensors, but for the contents of the two index tensors;
// attention.py checks with friendlier texts.
Attention make_attention(const at::Tensor& value, const at::Tensor& spatial_shapes,
                         const at::Tensor& level_start_index, const at::Tensor& sampling_locations,
                         const at::Tensor& attention_weights);
Attention make_fused_attention(const at::Tensor& value, const at::Tensor& spatial_shapes,
                               const at::Tensor& level_start_index,
                               const at::Tensor& sampling_loc_attn, int64_t n_points);

}  // namespace ops_dcnv4
