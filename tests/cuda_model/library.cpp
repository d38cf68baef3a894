// The CUDA operators for CPU tensors, compiled for the CUDA emulator.
#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <cstddef>

#include "model.h"
#include "operators.h"

namespace {

// Allocates memory directly before (or, with `before`, directly after) a guard region, where every
// access is a segmentation fault. Alignment can leave a gap of up to 15 bytes.
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

// Applies to all CPU tensors created afterwards.
void guard_tensors(bool before) {
  static GuardedAllocator allocator;
  allocator.before = before;
  c10::SetCPUAllocator(&allocator);
}

}  // namespace

TORCH_LIBRARY(ops_dcnv4_cuda_model, m) {
  const auto define = [&](const char* name, auto* function) {
    m.def(name, torch::dispatch(c10::DispatchKey::CPU, function));
  };
  define("dcnv4", &ops_dcnv4::Schema<ops_dcnv4::dcnv4_cuda>::call);
  define("dcnv4_backward", &ops_dcnv4::Schema<ops_dcnv4::dcnv4_backward_cuda>::call);
  define("ms_deform_attn", &ops_dcnv4::ms_deform_attn<ops_dcnv4::ms_deform_attn_cuda>);
  define("ms_deform_attn_backward",
         &ops_dcnv4::ms_deform_attn_backward<ops_dcnv4::ms_deform_attn_backward_cuda>);
  define("flash_deform_attn", &ops_dcnv4::flash_deform_attn<ops_dcnv4::ms_deform_attn_cuda>);
  define("flash_deform_attn_backward",
         &ops_dcnv4::flash_deform_attn_backward<ops_dcnv4::ms_deform_attn_backward_cuda>);
  m.def("guard_tensors(bool before) -> ()", guard_tensors);
  m.def("set_order(int order) -> ()", cuda_model::set_order);
}
