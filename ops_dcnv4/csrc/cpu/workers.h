// Memory and granularity of the CPU workers.
#pragma once

#include <cstring>
#include <memory>
#include <new>

#include "cpu/kernels.h"

namespace ops_dcnv4 {

// Memory of one worker; the backward pass also stores slices of value and its gradient in it.
template <typename acc_t>
class ScratchMemory {
 public:
  ScratchMemory(int64_t taps, int64_t slice_numbers) {
    const int64_t numbers = scratch_numbers(taps) * sizeof(acc_t);
    const int64_t indices = scratch_indices(taps) * sizeof(int32_t);
    const int64_t slice = (slice_numbers * sizeof(acc_t) + 63) / 64 * 64;
    memory_.reset(static_cast<char*>(::operator new(numbers + indices + 2 * slice, alignment)));
    char* start = memory_.get();
    // Lanes beyond the last tap are computed and ignored. Denormal numbers there would be slow.
    std::memset(start, 0, numbers + indices);
    scratch = {reinterpret_cast<acc_t*>(start), reinterpret_cast<int32_t*>(start + numbers),
               reinterpret_cast<acc_t*>(start + numbers + indices),
               reinterpret_cast<acc_t*>(start + numbers + indices + slice)};
  }

  Scratch<acc_t> scratch;

 private:
  static constexpr std::align_val_t alignment{64};  // of the widest vectors
  struct Free {
    void operator()(char* memory) const { ::operator delete(memory, alignment); }
  };
  std::unique_ptr<char, Free> memory_;
};

// Approximate number of multiply-adds that makes it worthwhile to wake a thread.
constexpr int64_t grain = 1 << 15;

}  // namespace ops_dcnv4
