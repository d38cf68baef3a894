// The CUDA operators for CPU tensors, compiled for the CUDA emulator.
#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <vector>

#include "model.h"
#include "registration.h"

namespace {

std::mutex live_mutex;
std::map<const void*, std::size_t> live;  // sizes of tensors from GuardedAllocator

// Allocates memory directly before (or, with `before`, directly after) a guard region, where every
// access is a segmentation fault. Alignment can leave a gap of up to 15 bytes.
class GuardedAllocator final : public c10::Allocator {
 public:
  bool before = false;

  c10::DataPtr allocate(std::size_t bytes) override {
    bytes = (bytes + 15) / 16 * 16;
    auto* memory = new cuda_model::Guarded(bytes);
    void* data = before ? memory->begin() : memory->end() - bytes;
    const std::scoped_lock lock(live_mutex);
    live[data] = bytes;
    return {data, memory, free, at::kCPU};
  }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  static void free(void* context) {
    auto* memory = static_cast<cuda_model::Guarded*>(context);
    {
      const std::scoped_lock lock(live_mutex);
      live.erase(live.lower_bound(memory->begin()));
    }
    delete memory;
  }
};

// Applies to all CPU tensors created afterwards.
void guard_tensors(bool before) {
  static GuardedAllocator allocator;
  allocator.before = before;
  c10::SetCPUAllocator(&allocator);
}

// Returns the first address and the size of each such tensor, one after the other.
std::vector<std::int64_t> memory_of_tensors() {
  const std::scoped_lock lock(live_mutex);
  std::vector<std::int64_t> extents;
  for (const auto& [begin, bytes] : live) {
    extents.push_back(reinterpret_cast<std::intptr_t>(begin));
    extents.push_back(static_cast<std::int64_t>(bytes));
  }
  return extents;
}

// Passes launches on to the function at an address; 0 runs them here.
void set_launcher(std::int64_t address) {
  cuda_model::set_launcher(reinterpret_cast<cuda_model::Launcher>(address));
}

// Returns the address of a kernel within this library's file.
std::int64_t address_in_file(std::int64_t kernel) {
  Dl_info info;
  if (!dladdr(reinterpret_cast<const void*>(kernel), &info)) return -1;
  return kernel - reinterpret_cast<std::intptr_t>(info.dli_fbase);
}

}  // namespace

STABLE_TORCH_LIBRARY(ops_dcnv4_cuda_model, library) { ops_dcnv4::define_operators(library); }

STABLE_TORCH_LIBRARY_IMPL(ops_dcnv4_cuda_model, CPU, library) {
  ops_dcnv4::CudaOperators::implement(library);
}

TORCH_LIBRARY_FRAGMENT(ops_dcnv4_cuda_model, m) {
  m.def("guard_tensors(bool before) -> ()", guard_tensors);
  m.def("set_order(int order) -> ()", cuda_model::set_order);
  m.def("memory_of_tensors() -> int[]", memory_of_tensors);
  m.def("set_launcher(int address) -> ()", set_launcher);
  m.def("address_in_file(int kernel) -> int", address_in_file);
}
