// The CUDA operators, compiled with the model of CUDA's execution, on tensors of the CPU.
#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include <memory>

#include "dcnv4.h"
#include "model.h"

namespace {

// A copy of the tensor which ends before, or with `before` starts behind, memory on which every
// access is a segmentation fault. Up to 15 bytes are left in between, for the alignment.
at::Tensor guarded(const at::Tensor& tensor, bool before) {
  const std::size_t bytes = (tensor.nbytes() + 15) / 16 * 16;
  const auto memory = std::make_shared<cuda_model::Guarded>(bytes);
  void* data = before ? memory->begin() : memory->end() - bytes;
  return at::from_blob(data, tensor.sizes(), [memory](void*) {}, tensor.options()).copy_(tensor);
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
  m.def("guarded(Tensor tensor, bool before=False) -> Tensor", guarded);
  m.def("set_order(int order) -> ()", cuda_model::set_order);
}

TORCH_LIBRARY_IMPL(ops_dcnv4_cuda_model, CPU, m) {
  m.impl("dcnv4", ops_dcnv4::dcnv4_cuda);
  m.impl("dcnv4_backward", ops_dcnv4::dcnv4_backward_cuda);
}
