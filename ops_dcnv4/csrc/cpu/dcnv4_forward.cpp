#include <algorithm>

#include "checks.h"
#include "cpu/workers.h"
#include "dispatch.h"
#include "geometry.h"
#include "operators.h"

namespace ops_dcnv4 {

Tensor dcnv4_cpu(const Window& window, const Tensor& value, const Tensor& offset_mask) {
  const Geometry g = make_geometry(window, value, offset_mask);
  if (value.numel() == 0 || offset_mask.numel() == 0) {
    return zero_tensor(g.output_shape(), value);
  }
  const Tensor v = dense(value), o = dense(offset_mask);
  Tensor output = empty_tensor(g.output_shape(), v);
  const int64_t pixels = g.batch * g.out_height * g.out_width;
  const int64_t work = std::max<int64_t>(4 * g.channels() * g.taps(), 1);
  dispatch(v.scalar_type(), [&](auto scalar, auto acc) {
    using scalar_t = decltype(scalar);
    using acc_t = decltype(acc);
    Dcnv4Tensors<scalar_t> tensors{v.const_data_ptr<scalar_t>(), o.const_data_ptr<scalar_t>()};
    tensors.output = output.mutable_data_ptr<scalar_t>();
    const auto& kernels = instruction_set().kernels(scalar);
    torch::stable::parallel_for(0, pixels, grain / work + 1, [&](int64_t begin, int64_t end) {
      const ScratchMemory<acc_t> memory(g.taps(), 0);
      kernels.dcnv4_forward(g, tensors, memory.scratch, begin, end);
    });
  });
  return output;
}

}  // namespace ops_dcnv4
