// The parts of CUDA that the kernels use. Without nvcc, the kernels compile as C++ for the tests'
// serial emulator of CUDA's execution model, whose folder must be on the include path.
#pragma once

#include <c10/macros/Macros.h>

#include <cstring>

#if defined(__CUDACC__)

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_fp16.h>

#define OPS_DCNV4_LAUNCH(kernel, grid, block, ...)                            \
  kernel<<<grid, block, 0, c10::cuda::getCurrentCUDAStream()>>>(__VA_ARGS__); \
  C10_CUDA_KERNEL_LAUNCH_CHECK()

#define OPS_DCNV4_ASSERT(condition, message) CUDA_KERNEL_ASSERT_MSG(condition, message)

#else

#include "cuda_fp16.h"
#include "model.h"

#include <stdexcept>

#define OPS_DCNV4_LAUNCH(kernel, grid, block, ...) \
  cuda_model::launch(grid, block, 0, kernel, __VA_ARGS__)

#define OPS_DCNV4_ASSERT(condition, message) \
  if (!(condition)) throw std::runtime_error(message)

#endif

namespace ops_dcnv4 {

constexpr int warp_size = 32;

template <typename To, typename From>
__device__ __forceinline__ To bit_cast(const From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace ops_dcnv4
