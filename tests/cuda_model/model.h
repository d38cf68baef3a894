// A serial CUDA emulator. With the headers in include/ instead of CUDA's own, CUDA sources compile
// as plain C++. Their kernels run on the CPU, one thread at a time, with checks that a GPU does not
// make. Static __shared__ variables are not supported and do not compile.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <tuple>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct alignas(8) uint2 {
  unsigned x, y;
};

struct uint3 {
  unsigned x, y, z;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct alignas(8) float2 {
  float x, y;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Indices of the running thread.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_model {

// The order in which blocks, warps and the lanes of a warp run. A thread runs until it has to wait,
// so a kernel with a missing barrier gives different results in the orders `forward` and `reverse`.
// Positive numbers are seeds of random orders.
constexpr std::int64_t forward = 0, reverse = -1;
void set_order(std::int64_t order);

// Returns the block's dynamic shared memory. It has exactly the size given at launch, is aligned to
// 16 bytes as CUDA guarantees, and is filled with NaN (bytes of 0xff) when the block starts.
void* shared_memory();

// Runs `thread` for every thread of the grid. Throws std::runtime_error for a launch that CUDA
// rejects and for a misused barrier or shuffle. Exceptions of a thread are rethrown.
void run(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& thread);

// Receives launches instead of the emulator: the kernel's address, its parameters as laid out in
// the device's constant memory, and the sizes.
using Launcher = void (*)(const void* kernel, const void* parameters, std::size_t bytes,
                          const dim3* grid, const dim3* block, std::size_t shared_bytes);
void set_launcher(Launcher launcher);  // null for the emulator
Launcher launcher();

// Returns a kernel's parameters, each aligned to its type.
template <typename... Parameters>
std::vector<char> layout_of(const Parameters&... parameters) {
  std::vector<char> bytes;
  const auto append = [&](const auto& parameter) {
    const std::size_t alignment = alignof(decltype(parameter));
    const std::size_t begin = (bytes.size() + alignment - 1) / alignment * alignment;
    bytes.resize(begin + sizeof(parameter));
    std::memcpy(bytes.data() + begin, &parameter, sizeof(parameter));
  };
  (append(parameters), ...);
  return bytes;
}

// Runs a kernel with these arguments.
template <typename... Parameters, typename... Arguments>
void launch(dim3 grid, dim3 block, std::size_t shared_bytes, void (*kernel)(Parameters...),
            const Arguments&... arguments) {
  static_assert((std::is_trivially_copyable_v<Parameters> && ...),
                "a kernel's parameters are copied to the device byte by byte");
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "parameters take 4 KiB at most");
  const std::tuple<Parameters...> parameters(arguments...);
  if (launcher()) {
    const auto bytes = std::apply(layout_of<Parameters...>, parameters);
    launcher()(reinterpret_cast<const void*>(kernel), bytes.data(), bytes.size(), &grid, &block,
               shared_bytes);
    return;
  }
  run(grid, block, shared_bytes, [&] { std::apply(kernel, parameters); });
}

// Memory between two guard regions, where every access is a segmentation fault.
class Guarded {
 public:
  explicit Guarded(std::size_t bytes);  // rounded up to whole pages
  ~Guarded();
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  char* begin() const { return begin_; }
  char* end() const { return end_; }

 private:
  char *begin_, *end_;
};

// The source line at which a thread waits. As a default argument, `here` gives the caller's line.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

enum class Shuffle { any_lane, up, down, exchange };

void block_barrier(Site site);
void warp_barrier(unsigned mask, Site site);
unsigned ballot(unsigned mask, bool predicate, const char* operation, Site site);
std::uint64_t shuffle(Shuffle kind, unsigned mask, std::uint64_t bits, unsigned operand, int width,
                      Site site);

template <typename T>
T shuffle(Shuffle kind, unsigned mask, T value, unsigned operand, int width, Site site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                "CUDA shuffles numbers of 4 or 8 bytes");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(kind, mask, bits, operand, width, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace cuda_model

enum cudaError_t { cudaSuccess };
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};

// Runs the kernel before returning, and reports errors as exceptions.
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  cuda_model::launch(config->gridDim, config->blockDim, config->dynamicSmemBytes, kernel,
                     arguments...);
  return cudaSuccess;
}

inline void __syncthreads(cuda_model::Site site = cuda_model::Site::here()) {
  cuda_model::block_barrier(site);
}

inline void __syncwarp(unsigned mask = 0xffffffff,
                       cuda_model::Site site = cuda_model::Site::here()) {
  cuda_model::warp_barrier(mask, site);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize,
              cuda_model::Site site = cuda_model::Site::here()) {
  return cuda_model::shuffle(cuda_model::Shuffle::any_lane, mask, value, lane, width, site);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 cuda_model::Site site = cuda_model::Site::here()) {
  return cuda_model::shuffle(cuda_model::Shuffle::up, mask, value, delta, width, site);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   cuda_model::Site site = cuda_model::Site::here()) {
  return cuda_model::shuffle(cuda_model::Shuffle::down, mask, value, delta, width, site);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                  cuda_model::Site site = cuda_model::Site::here()) {
  return cuda_model::shuffle(cuda_model::Shuffle::exchange, mask, value, lane_mask, width, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              cuda_model::Site site = cuda_model::Site::here()) {
  return cuda_model::ballot(mask, predicate != 0, "__ballot_sync", site);
}

inline int __any_sync(unsigned mask, int predicate,
                      cuda_model::Site site = cuda_model::Site::here()) {
  return cuda_model::ballot(mask, predicate != 0, "__any_sync", site) != 0;
}

inline int __all_sync(unsigned mask, int predicate,
                      cuda_model::Site site = cuda_model::Site::here()) {
  return cuda_model::ballot(mask, predicate == 0, "__all_sync", site) == 0;
}

// Returns the upper half of the product.
inline unsigned __umulhi(unsigned a, unsigned b) { return std::uint64_t(a) * b >> 32; }

// Returns the position of the lowest bit that is set, counted from 1, or 0 if there is none.
inline int __ffs(int bits) { return __builtin_ffs(bits); }

// Rounds down. Numbers beyond the integers give the nearest one, and NaN gives 0.
inline int __float2int_rd(float number) {
  if (std::isnan(number)) return 0;
  constexpr double lowest = std::numeric_limits<int>::min(),
                   highest = std::numeric_limits<int>::max();
  return static_cast<int>(std::clamp<double>(std::floor(number), lowest, highest));
}

// T is deduced only from the first parameter; the second is converted, as by CUDA's overloads.
template <typename T>
T atomicAdd(T* address, std::common_type_t<T> value) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> ||
                    std::is_same_v<T, unsigned long long> || std::is_same_v<T, float> ||
                    std::is_same_v<T, double>,
                "CUDA has no atomicAdd for this type");
  const T old = *address;
  *address = old + value;
  return old;
}

template <typename T>
T __ldg(const T* address) {
  static_assert(std::is_arithmetic_v<T>, "CUDA has no __ldg for this type");
  return *address;
}
