// Geometry of a DCNv4 call, shared by the CPU and CUDA kernels.
#pragma once

#include <array>
#include <cstdint>

#include "inline.h"
#include "operators.h"

namespace ops_dcnv4 {

// Geometry of one axis of the window.
struct Axis {
  int kernel;
  int stride;
  int padding;
  int dilation;

  // Distance from the first kernel tap to the window's center, in pixels.
  OPS_DCNV4_INLINE int center() const { return dilation * (kernel - 1) / 2; }

  // Distance of a tap from the window's center, in pixels.
  OPS_DCNV4_INLINE int grid(int tap) const { return tap * dilation - center(); }

  // Input coordinate of the window's center for output coordinate `out`.
  OPS_DCNV4_INLINE int center_of(int out) const { return out * stride - padding + center(); }
};

struct Geometry {
  int64_t batch;
  int height, width, out_height, out_width;
  int64_t groups, group_channels;
  int64_t offset_channels;  // of offset_mask, including padding channels
  Axis y, x;
  double offset_scale;
  bool remove_center;

  std::array<int64_t, 4> output_shape() const { return {batch, out_height, out_width, channels()}; }

  OPS_DCNV4_INLINE int64_t channels() const { return groups * group_channels; }
  OPS_DCNV4_INLINE int taps() const { return y.kernel * x.kernel - (remove_center ? 1 : 0); }
  OPS_DCNV4_INLINE bool skips(int tap_y, int tap_x) const {
    return remove_center && tap_y == y.kernel / 2 && tap_x == x.kernel / 2;
  }
};

// Validates everything that keeps the kernels within their tensors. ops.py performs the same checks
// with more helpful messages.
Geometry make_geometry(const Window& window, const Tensor& value, const Tensor& offset_mask);

}  // namespace ops_dcnv4
