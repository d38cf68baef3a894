// Kernels for test_model.py, the tests of the emulator itself.
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>

#include "model.h"

namespace {

constexpr unsigned all_lanes = 0xffffffff;

template <typename T>
T* shared() {
  return static_cast<T*>(cuda_model::shared_memory());
}

unsigned thread_of_block() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}

// ---- Indices

__global__ void write_indices(int* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  int* mine = out + (block * threads + thread_of_block()) * 6;
  const unsigned indices[6] = {blockIdx.z,  blockIdx.y,  blockIdx.x,
                               threadIdx.z, threadIdx.y, threadIdx.x};
  for (int i = 0; i < 6; ++i) mine[i] += indices[i];
}

// ---- Barriers

// Sums each block's part of `in` with a tree reduction in shared memory.
__global__ void __launch_bounds__(1024) block_sum(const float* in, float* out) {
  float* sums = shared<float>();
  const unsigned i = threadIdx.x;
  sums[i] = __ldg(in + blockIdx.x * blockDim.x + i);
  __syncthreads();
  for (unsigned step = blockDim.x / 2; step > 0; step /= 2) {
    if (i < step) sums[i] += sums[i + step];
    __syncthreads();
  }
  if (i == 0) out[blockIdx.x] = sums[0];
}

// Like block_sum, but threads without work exit early.
__global__ void early_exits(float* out) {
  const int i = threadIdx.x;
  if (i >= 40) return;
  shared<float>()[i] = i;
  __syncthreads();
  out[i] = shared<float>()[39 - i];
}

__global__ void barriers_apart() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void barrier_and_shuffle() {
  if (threadIdx.x == 3) {
    __syncthreads();
  } else {
    __shfl_sync(all_lanes, 1, 0);
  }
}

// ---- Warp operations

__global__ void xor_sums(float* values, int width) {
  float v = values[threadIdx.x];
  for (int step = width / 2; step > 0; step /= 2) v += __shfl_xor_sync(all_lanes, v, step, width);
  values[threadIdx.x] = v;
}

__global__ void xor_sums_3d(float* values) {
  float v = values[thread_of_block()];
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(all_lanes, v, step);
  values[thread_of_block()] = v;
}

// The halves of a warp take different branches and use different masks.
__global__ void half_warps(double* out) {
  double v = threadIdx.x;
  if (threadIdx.x < 16) {
    for (int step = 8; step > 0; step /= 2) v += __shfl_xor_sync(0x0000ffff, v, step);
  } else {
    v = __shfl_sync(0xffff0000, v, 0, 16);
  }
  out[threadIdx.x] = v;
}

__global__ void shuffle_kinds(int* out, int operand, int width) {
  const int lane = threadIdx.x;
  out[lane] = __shfl_sync(all_lanes, lane, operand, width);
  out[32 + lane] = __shfl_up_sync(all_lanes, lane, operand, width);
  out[64 + lane] = __shfl_down_sync(all_lanes, lane, operand, width);
  out[96 + lane] = __shfl_xor_sync(all_lanes, lane, operand, width);
}

__global__ void votes(unsigned* out) {
  const int lane = threadIdx.x;
  out[lane] = __ballot_sync(all_lanes, lane % 3 == 0);
  out[32 + lane] = __any_sync(all_lanes, lane == 5);
  out[64 + lane] = __all_sync(all_lanes, lane >= 0);
  out[96 + lane] = __all_sync(all_lanes, lane >= 1);
}

__global__ void exited_lane() {
  if (threadIdx.x == 7) return;
  __syncwarp();
}

__global__ void different_masks() { __syncwarp(threadIdx.x < 8 ? 0x1ff : all_lanes); }

__global__ void different_lines() {
  if (threadIdx.x < 8) {
    __shfl_sync(all_lanes, 1, 0);
  } else {
    __shfl_sync(all_lanes, 1, 0);
  }
}

__global__ void not_in_its_mask() { __syncwarp(0xff); }

__global__ void reads_outside_of_mask() {
  if (threadIdx.x < 8) __shfl_sync(0xff, 1, 8);
}

__global__ void reads_absent_lane() { __shfl_down_sync(all_lanes, 1, 16); }

__global__ void odd_width() { __shfl_sync(all_lanes, 1, 0, 12); }

// ---- Shared memory

// Records the initial contents of shared memory, then overwrites them.
__global__ void find_shared(unsigned* out) {
  unsigned* mine = shared<unsigned>() + threadIdx.x;
  out[blockIdx.x * blockDim.x + threadIdx.x] = *mine;
  *mine = 0;
}

__global__ void write_shared(int at) { shared<char>()[at] = 1; }

__global__ void read_shared(int at) {
  volatile char byte = shared<char>()[at];
  static_cast<void>(byte);
}

__global__ void load_four(const float* from, float* to, int offset) {
  const float4 four = *reinterpret_cast<const float4*>(from + offset);
  to[threadIdx.x] = four.w;
}

// ---- Errors and order

struct CountsItsEnd {
  int* count;
  ~CountsItsEnd() { ++*count; }
};

__global__ void throws(int* ended) {
  const CountsItsEnd guard{ended};
  __syncthreads();
  if (threadIdx.x == 20) throw std::runtime_error("thrown in the kernel");
  __syncthreads();
}

// Reads the neighbor's number, with or without a barrier between writing and reading.
template <bool synced>
__global__ void neighbor(int* out) {
  const int i = threadIdx.x;
  shared<int>()[i] = i;
  if (synced) __syncwarp();
  out[i] = shared<int>()[i / 32 * 32 + (i + 1) % 32];
}

// Reads from the next warp, for which a barrier within the warp does not suffice.
template <bool synced>
__global__ void next_warp(int* out) {
  const int i = threadIdx.x;
  shared<int>()[i] = i;
  if (synced) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  out[i] = shared<int>()[(i + 32) % blockDim.x];
}

__global__ void record_turns(int* out, int* turn) {
  out[atomicAdd(turn, 1)] = blockIdx.x * blockDim.x + threadIdx.x;
}

__global__ void add_up(float* a, double* b, int* c, unsigned long long* d) {
  atomicAdd(a, 0.5);
  atomicAdd(b, 0.5f);
  atomicAdd(c, 2);
  atomicAdd(d, 3);
}

__global__ void do_nothing() {}

__global__ void many_barriers(float* out, int count) {
  float v = 1;
  for (int i = 0; i < count; ++i) {
    v = __shfl_xor_sync(all_lanes, v, 1);
    __syncthreads();
  }
  atomicAdd(out, v);
}

// ---- Interface for Python

// Launches the kernel and returns null, or the text of the error.
template <auto kernel>
struct Launcher;

template <typename... Parameters, void (*kernel)(Parameters...)>
struct Launcher<kernel> {
  static const char* launch(const unsigned* grid, const unsigned* block, std::size_t shared_bytes,
                            Parameters... arguments) {
    static std::string text;
    try {
      cuda_model::launch({grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared_bytes,
                         kernel, arguments...);
    } catch (const std::exception& error) {
      text = error.what();
      return text.c_str();
    }
    return nullptr;
  }
};

#define KERNEL(name) {#name, reinterpret_cast<void*>(&Launcher<name>::launch)}

const std::map<std::string, void*> launchers = {
    KERNEL(write_indices),
    KERNEL(block_sum),
    KERNEL(early_exits),
    KERNEL(barriers_apart),
    KERNEL(barrier_and_shuffle),
    KERNEL(xor_sums),
    KERNEL(xor_sums_3d),
    KERNEL(half_warps),
    KERNEL(shuffle_kinds),
    KERNEL(votes),
    KERNEL(exited_lane),
    KERNEL(different_masks),
    KERNEL(different_lines),
    KERNEL(not_in_its_mask),
    KERNEL(reads_outside_of_mask),
    KERNEL(reads_absent_lane),
    KERNEL(odd_width),
    KERNEL(find_shared),
    KERNEL(write_shared),
    KERNEL(read_shared),
    KERNEL(load_four),
    KERNEL(throws),
    KERNEL(neighbor<true>),
    KERNEL(neighbor<false>),
    KERNEL(next_warp<true>),
    KERNEL(next_warp<false>),
    KERNEL(record_turns),
    KERNEL(add_up),
    KERNEL(many_barriers),
    KERNEL(do_nothing),
};

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void* launcher(const char* name) { return launchers.at(name); }
EXPORTED void set_order(std::int64_t order) { cuda_model::set_order(order); }
