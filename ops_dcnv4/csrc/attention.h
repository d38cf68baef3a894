// Sizes of a deformable attention call, shared by the CPU and CUDA kernels.
#pragma once

#include <array>
#include <cstdint>

#include "inline.h"
#include "operators.h"

namespace ops_dcnv4 {

struct Attention {
  int64_t batch;
  int pixels, queries;  // per image; pixels of all levels
  int64_t heads, head_channels;
  int levels, points;
  bool fused;  // locations and logits in one tensor, not locations and weights in two

  std::array<int64_t, 3> output_shape() const { return {batch, queries, channels()}; }

  OPS_DCNV4_INLINE int64_t channels() const { return heads * head_channels; }
  OPS_DCNV4_INLINE int taps() const { return levels * points; }

  // Distance in elements from one (query, head) to the next, and index of the first weight. In the
  // fused form, the same tensor is passed as locations and as weights, so that kernels read both
  // forms alike. Kernels compiled for a fixed number of taps pass it as a constant.
  OPS_DCNV4_INLINE int location_stride(int taps) const { return (fused ? 3 : 2) * taps; }
  OPS_DCNV4_INLINE int weight_stride(int taps) const { return (fused ? 3 : 1) * taps; }
  OPS_DCNV4_INLINE int first_weight() const { return fused ? 2 * taps() : 0; }
};

// Validate everything that keeps the kernels within their tensors, except the contents of the two
// index tensors. attention.py performs the same checks with more helpful messages.
Attention make_attention(const AttentionInputs& inputs);

}  // namespace ops_dcnv4
