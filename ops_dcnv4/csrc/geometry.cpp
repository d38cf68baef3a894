#include "geometry.h"

#include "checks.h"

namespace ops_dcnv4 {
namespace {

// With this limit, window coordinates fit in 32 bits even for images of the largest size.
constexpr int64_t largest_parameter = 1 << 27;

Axis make_axis(int i, const Window& w) {
  return {to_int(w.kernel_size[i], "kernel_size", 1, largest_parameter),
          to_int(w.stride[i], "stride", 1, largest_parameter),
          to_int(w.padding[i], "padding", 0, largest_parameter),
          to_int(w.dilation[i], "dilation", 1, largest_parameter)};
}

// Same rule as output_size in ops.py.
int output_size(int size, const Axis& axis, int64_t given, const char* what) {
  const int64_t window = int64_t(axis.dilation) * (axis.kernel - 1) + 1;
  const int64_t room = size + 2 * int64_t(axis.padding) - window;
  OPS_DCNV4_CHECK(room >= 0, "the output would be empty: the window of ", window,
                  " pixels is larger than value with its padding");
  const int64_t expected = room / axis.stride + 1;
  check_equal(what, given, expected);
  return to_int(expected, what);
}

}  // namespace

Geometry make_geometry(const Window& w, const Tensor& value, const Tensor& offset_mask) {
  check_equal<int64_t>("the number of dimensions of value", value.dim(), 4);
  check_equal<int64_t>("the number of dimensions of offset_mask", offset_mask.dim(), 4);
  for (const IntArrayRef pair : {w.kernel_size, w.stride, w.padding, w.dilation}) {
    OPS_DCNV4_CHECK(pair.size() == 2,
                    "kernel_size, stride, padding and dilation must be pairs, got ", pair);
  }
  check_equal("the device of offset_mask", offset_mask.device(), value.device());
  check_equal("the batch size of offset_mask", offset_mask.size(0), value.size(0));
  OPS_DCNV4_CHECK(value.scalar_type() == offset_mask.scalar_type(),
                  "value and offset_mask must have one dtype, got ", value.scalar_type(), " and ",
                  offset_mask.scalar_type());
  check_dtype(value);
  OPS_DCNV4_CHECK(w.groups > 0 && value.size(3) % w.groups == 0,
                  "groups must be positive and divide the channels of value (", value.size(3),
                  "), got ", w.groups);
  const int height = to_int(value.size(1), "the height of value", 1, largest_side);
  const int width = to_int(value.size(2), "the width of value", 1, largest_side);
  const Axis y = make_axis(0, w);
  const Axis x = make_axis(1, w);
  const Geometry g{value.size(0),
                   height,
                   width,
                   output_size(height, y, offset_mask.size(1), "the height of offset_mask"),
                   output_size(width, x, offset_mask.size(2), "the width of offset_mask"),
                   to_int(w.groups, "groups", 1),
                   value.size(3) / w.groups,
                   to_int(offset_mask.size(3), "the number of channels of offset_mask"),
                   y,
                   x,
                   w.offset_scale,
                   w.remove_center};
  const int64_t window = int64_t(y.kernel) * x.kernel, taps = window - (w.remove_center ? 1 : 0);
  to_int(window, "the product of kernel_size");
  to_int(value.size(3), "the number of channels of value");
  to_int(int64_t(height) * width, "the number of pixels of an image");
  to_int(int64_t(g.out_height) * g.out_width, "the number of pixels of an output image");
  OPS_DCNV4_CHECK(g.offset_channels >= 3 * w.groups * taps, "offset_mask must have at least ",
                  3 * w.groups * taps, " channels, got ", g.offset_channels);
  return g;
}

}  // namespace ops_dcnv4
