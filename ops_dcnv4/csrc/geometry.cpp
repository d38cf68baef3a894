#include "geometry.h"

#include "checks.h"

namespace ops_dcnv4 {
namespace {

// With this limit, window coordinates fit in 32 bits even for images of the largest size.
constexpr int64_t largest_parameter = 1 << 27;

int parameter(int64_t number, bool may_be_zero, const char* name) {
  TORCH_CHECK_VALUE(number > 0 || (may_be_zero && number == 0), name, " must be positive",
                    may_be_zero ? " or zero" : "", ", got ", number);
  TORCH_CHECK_VALUE(number <= largest_parameter, name, " is too large: ", number);
  return static_cast<int>(number);
}

Axis axis(int i, at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
          at::IntArrayRef dilation) {
  return {parameter(kernel_size[i], false, "kernel_size"), parameter(stride[i], false, "stride"),
          parameter(padding[i], true, "padding"), parameter(dilation[i], false, "dilation")};
}

int to_side(int64_t number, const char* what) {
  TORCH_CHECK_VALUE(is_side(number), what, " must be from 1 to ", largest_side, ", got ", number);
  return static_cast<int>(number);
}

// Same rule as output_size in ops.py.
int output_size(int size, const Axis& axis, int64_t given, const char* what) {
  const int64_t window = int64_t(axis.dilation) * (axis.kernel - 1) + 1;
  const int64_t room = size + 2 * int64_t(axis.padding) - window;
  TORCH_CHECK_VALUE(room >= 0, "the output would be empty: the window of ", window,
                    " pixels is larger than value with its padding");
  const int64_t expected = room / axis.stride + 1;
  TORCH_CHECK_VALUE(given == expected, what, " must be ", expected,
                    " like that of the output, got ", given);
  return to_int(expected, what);
}

}  // namespace

Geometry make_geometry(const at::Tensor& value, const at::Tensor& offset_mask,
                       at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
                       at::IntArrayRef dilation, int64_t groups, double offset_scale,
                       bool remove_center) {
  TORCH_CHECK_VALUE(value.dim() == 4 && offset_mask.dim() == 4,
                    "value and offset_mask must have 4 dimensions");
  for (const at::IntArrayRef pair : {kernel_size, stride, padding, dilation}) {
    TORCH_CHECK_VALUE(pair.size() == 2,
                      "kernel_size, stride, padding and dilation must be pairs, got ", pair);
  }
  TORCH_CHECK_VALUE(value.device() == offset_mask.device(), "devices differ");
  TORCH_CHECK_VALUE(value.size(0) == offset_mask.size(0), "batch sizes differ");
  TORCH_CHECK_TYPE(value.scalar_type() == offset_mask.scalar_type(), "dtypes differ");
  check_dtype(value);
  TORCH_CHECK_VALUE(groups > 0 && value.size(3) % groups == 0,
                    "the channels of value must be a multiple of groups");
  const int height = to_side(value.size(1), "the height of value");
  const int width = to_side(value.size(2), "the width of value");
  const Axis y = axis(0, kernel_size, stride, padding, dilation);
  const Axis x = axis(1, kernel_size, stride, padding, dilation);
  const Geometry g{value.size(0),
                   height,
                   width,
                   output_size(height, y, offset_mask.size(1), "the height of offset_mask"),
                   output_size(width, x, offset_mask.size(2), "the width of offset_mask"),
                   to_int(groups, "groups"),
                   value.size(3) / groups,
                   to_int(offset_mask.size(3), "the number of channels of offset_mask"),
                   y,
                   x,
                   offset_scale,
                   remove_center};
  const int64_t window = int64_t(y.kernel) * x.kernel, taps = window - (remove_center ? 1 : 0);
  to_int(window, "the product of kernel_size");
  to_int(value.size(3), "the number of channels of value");
  to_int(int64_t(height) * width, "the number of pixels of an image");
  to_int(int64_t(g.out_height) * g.out_width, "the number of pixels of an output image");
  TORCH_CHECK_VALUE(g.offset_channels >= 3 * groups * taps, "offset_mask has too few channels");
  return g;
}

}  // namespace ops_dcnv4
