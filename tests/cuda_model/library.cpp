// The CUDA operators, compiled with the model of CUDA's execution, on tensors of the CPU.
#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <cstddef>

#include "model.h"
#include "operators.h"

namespace {

// Gives memory that ends before, or with `before` starts behind, memory on which every access is a
// segmentation fault. Up to 15 bytes are left in between, for the alignment.
class GuardedAllocator final : public c10::Allocator {
 public:
  bool before = false;

  c10::DataPtr allocate(std::size_t bytes) override {
    bytes = (bytes + 15) / 16 * 16;
    auto* memory = new cuda_model::Guarded(bytes);
    void* data = before ? memory->begin() : memory->end() - bytes;
    const auto free = [](void* context) { delete static_cast<cuda_model::Guarded*>(context); };
    return {data, memory, free, at::kCPU};
  }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

// From now on, for all tensors of the CPU.
void guard_tensors(bool before) {
  static GuardedAllocator allocator;
  allocator.before = before;
  c10::SetCPUAllocator(&allocator);
}

}  // namespace

TORCH_LIBRARY(ops_dcnv4_cuda_model, m) {
  m.def(
      "dcnv4(Tensor value, Tensor offset_mask, int[2] kernel_size, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups, float offset_scale, bool remove_center) -> Tensor");
  m.def(
      "dcnv4_backward(Tensor grad_output, Tensor value, Tensor offset_mask, int[2] kernel_size, "
      "int[2] stride, int[2] padding, int[2] dilation, int groups, float offset_scale, "
      "bool remove_center) -> (Tensor, Tensor)");
  m.def(
      "ms_deform_attn(Tensor value, Tensor spatial_shapes, Tensor level_start_index, "
      "Tensor sampling_locations, Tensor attention_weights) -> Tensor");
  m.def(
      "ms_deform_attn_backward(Tensor grad_output, Tensor value, Tensor spatial_shapes, "
      "Tensor level_start_index, Tensor sampling_locations, Tensor attention_weights) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "flash_deform_attn(Tensor value, Tensor spatial_shapes, Tensor level_start_index, "
      "Tensor sampling_loc_attn, int n_points) -> Tensor");
  m.def(
      "flash_deform_attn_backward(Tensor grad_output, Tensor value, Tensor spatial_shapes, "
      "Tensor level_start_index, Tensor sampling_loc_attn, int n_points) -> (Tensor, Tensor)");
  m.def("guard_tensors(bool before) -> ()", guard_tensors);
  m.def("set_order(int order) -> ()", cuda_model::set_order);
}

TORCH_LIBRARY_IMPL(ops_dcnv4_cuda_model, CPU, m) {
  m.impl("dcnv4", ops_dcnv4::dcnv4_cuda);
  m.impl("dcnv4_backward", ops_dcnv4::dcnv4_backward_cuda);
  m.impl("ms_deform_attn", ops_dcnv4::ms_deform_attn_cuda);
  m.impl("ms_deform_attn_backward", ops_dcnv4::ms_deform_attn_backward_cuda);
  m.impl("flash_deform_attn", ops_dcnv4::flash_deform_attn_cuda);
  m.impl("flash_deform_attn_backward", ops_dcnv4::flash_deform_attn_backward_cuda);
}
