#include "geometry.h"

#include "checks.h"

namespace ops_dcnv4 {
namespace {

Axis axis(int i, at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
          at::IntArrayRef dilation) {
  return {to_int(kernel_size[i], "kernel_size"), to_int(stride[i], "stride"),
          to_int(padding[i], "padding"), to_int(dilation[i], "dilation")};
}

}  // namespace

Geometry make_geometry(const at::Tensor& value, const at::Tensor& offset_mask,
                       at::IntArrayRef kernel_size, at::IntArrayRef stride,
                       at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                       double offset_scale, bool remove_center) {
  TORCH_CHECK_VALUE(value.dim() == 4 && offset_mask.dim() == 4,
                    "value and offset_mask must have 4 dimensions");
  for (const at::IntArrayRef pair : {kernel_size, stride, padding, dilation}) {
    TORCH_CHECK_VALUE(pair.size() == 2,
                      "kernel_size, stride, padding and dilation must be pairs, got ", pair);
  }
  TORCH_CHECK_VALUE(value.device() == offset_mask.device(), "devices differ");
  TORCH_CHECK_VALUE(value.size(0) == offset_mask.size(0), "batch sizes differ");
  TORCH_CHECK_TYPE(value.scalar_type() == offset_mask.scalar_type(), "dtypes differ");
  TORCH_CHECK_VALUE(groups > 0 && value.size(3) % groups == 0,
                    "the channels of value must be a multiple of groups");
  const Geometry g{value.size(0),
                   to_int(value.size(1), "the height of value"),
                   to_int(value.size(2), "the width of value"),
                   to_int(offset_mask.size(1), "the height of offset_mask"),
                   to_int(offset_mask.size(2), "the width of offset_mask"),
                   groups,
                   value.size(3) / groups,
                   offset_mask.size(3),
                   axis(0, kernel_size, stride, padding, dilation),
                   axis(1, kernel_size, stride, padding, dilation),
                   offset_scale,
                   remove_center};
  TORCH_CHECK_VALUE(g.y.kernel > 0 && g.x.kernel > 0, "kernel_size must be positive");
  to_int(int64_t(g.y.kernel) * g.x.kernel, "the product of kernel_size");
  to_int(g.channels(), "the number of channels of value");
  to_int(g.offset_channels, "the number of channels of offset_mask");
  to_int(int64_t(g.height) * g.width, "the number of pixels of an image");
  to_int(int64_t(g.out_height) * g.out_width, "the number of pixels of an output image");
  TORCH_CHECK_VALUE(g.offset_channels >= 3 * groups * g.taps(), "offset_mask has too few channels");
  return g;
}

}  // namespace ops_dcnv4
