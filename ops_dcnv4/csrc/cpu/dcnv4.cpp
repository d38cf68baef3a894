#include "operators.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstring>

#include "checks.h"
#include "cpu/kernels.h"
#include "dispatch.h"
#include "geometry.h"

namespace ops_dcnv4 {
namespace {

const InstructionSet& instruction_set() {
#if defined(OPS_DCNV4_X86)
  static const InstructionSet& best = [&]() -> const InstructionSet& {
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = __builtin_cpu_supports("avx512f") &&
                            __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vl");
    return has_avx512 ? avx512 : has_avx2 ? avx2 : baseline;
  }();
  return best;
#else
  return baseline;
#endif
}

// Memory of one worker; the backward pass has slices in it.
template <typename acc_t>
class Memory {
 public:
  Memory(int64_t taps, int64_t slice_numbers) {
    const int64_t numbers = scratch_numbers(taps) * sizeof(acc_t);
    const int64_t indices = scratch_indices(taps) * sizeof(int32_t);
    const int64_t slice = (slice_numbers * sizeof(acc_t) + 63) / 64 * 64;
    memory_ = c10::GetCPUAllocator()->allocate(numbers + indices + 2 * slice);
    char* start = static_cast<char*>(memory_.get());
    // Lanes beyond the last tap are computed and ignored; as denormal numbers they would be slow.
    std::memset(start, 0, numbers + indices);
    scratch = {reinterpret_cast<acc_t*>(start), reinterpret_cast<int32_t*>(start + numbers),
               reinterpret_cast<acc_t*>(start + numbers + indices),
               reinterpret_cast<acc_t*>(start + numbers + indices + slice)};
  }

  Scratch<acc_t> scratch;

 private:
  at::DataPtr memory_;
};

// About this many multiply-adds make a thread worth waking.
constexpr int64_t grain = 1 << 15;

}  // namespace

at::Tensor dcnv4_cpu(const at::Tensor& value, const at::Tensor& offset_mask,
                     at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
                     at::IntArrayRef dilation, int64_t groups, double offset_scale,
                     bool remove_center) {
  const Geometry g = make_geometry(value, offset_mask, kernel_size, stride, padding, dilation,
                                   groups, offset_scale, remove_center);
  const at::Tensor v = value.contiguous(), o = offset_mask.contiguous();
  at::Tensor output = at::empty(g.output_shape(), v.options());
  const int64_t pixels = g.batch * g.out_height * g.out_width;
  const int64_t work = std::max<int64_t>(4 * g.channels() * g.taps(), 1);
  dispatch(v.scalar_type(), [&](auto scalar, auto acc) {
    using scalar_t = decltype(scalar);
    using acc_t = decltype(acc);
    const Tensors<scalar_t> tensors{v.const_data_ptr<scalar_t>(),
                                    o.const_data_ptr<scalar_t>(),
                                    output.data_ptr<scalar_t>(),
                                    nullptr,
                                    nullptr,
                                    nullptr};
    at::parallel_for(0, pixels, grain / work + 1, [&](int64_t begin, int64_t end) {
      const Memory<acc_t> memory(g.taps(), 0);
      instruction_set().kernels(scalar).forward(g, tensors, memory.scratch, begin, end);
    });
  });
  return output;
}

std::tuple<at::Tensor, at::Tensor> dcnv4_backward_cpu(
    const at::Tensor& grad_output, const at::Tensor& value, const at::Tensor& offset_mask,
    at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, double offset_scale, bool remove_center) {
  const Geometry g = make_geometry(value, offset_mask, kernel_size, stride, padding, dilation,
                                   groups, offset_scale, remove_center);
  check_grad_output(g.output_shape(), grad_output, value);
  const at::Tensor go = grad_output.contiguous(), v = value.contiguous(),
                   o = offset_mask.contiguous();
  const at::Tensor grad_value = at::empty(v.sizes(), v.options());
  const at::Tensor grad_offset_mask = at::empty(o.sizes(), o.options());
  const int64_t slice_numbers = g.height * g.width * g.group_channels;
  dispatch(v.scalar_type(), [&](auto scalar, auto acc) {
    using scalar_t = decltype(scalar);
    using acc_t = decltype(acc);
    const Tensors<scalar_t> tensors{v.const_data_ptr<scalar_t>(),
                                    o.const_data_ptr<scalar_t>(),
                                    nullptr,
                                    go.const_data_ptr<scalar_t>(),
                                    grad_value.data_ptr<scalar_t>(),
                                    grad_offset_mask.data_ptr<scalar_t>()};
    at::parallel_for(0, g.batch * g.groups, 1, [&](int64_t begin, int64_t end) {
      const Memory<acc_t> memory(g.taps(), slice_numbers);
      instruction_set().kernels(scalar).backward(g, tensors, memory.scratch, begin, end);
    });
  });
  return {grad_value, grad_offset_mask};
}

}  // namespace ops_dcnv4
