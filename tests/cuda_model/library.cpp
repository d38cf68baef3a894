// The CUDA operators for CPU tensors, compiled for the CUDA emulator.
#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <cstddef>

#include "model.h"
#include "registration.h"

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

STABLE_TORCH_LIBRARY(ops_dcnv4_cuda_model, library) { ops_dcnv4::define_operators(library); }

STABLE_TORCH_LIBRARY_IMPL(ops_dcnv4_cuda_model, CPU, library) {
  ops_dcnv4::CudaOperators::implement(library);
}

TORCH_LIBRARY_FRAGMENT(ops_dcnv4_cuda_model, m) {
  m.def("guard_tensors(bool before) -> ()", guard_tensors);
  m.def("set_order(int order) -> ()", cuda_model::set_order);
}
