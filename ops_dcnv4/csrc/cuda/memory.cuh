// Vectorized loads, stores and atomic additions.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "cuda/launch.h"

namespace ops_dcnv4 {

// Keeps nvcc from recomputing a pointer to global memory for every load.
template <typename T>
__device__ __forceinline__ T* computed(T* pointer) {
#if defined(__CUDA_ARCH__)
  asm("" : "+l"(pointer));
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

// Keeps nvcc from computing a number again where it is used.
__device__ __forceinline__ float computed(float number) {
#if defined(__CUDA_ARCH__)
  asm("" : "+f"(number));
#endif
  return number;
}
__device__ __forceinline__ unsigned computed(unsigned number) {
#if defined(__CUDA_ARCH__)
  asm("" : "+r"(number));
#endif
  return number;
}

template <typename T>
__device__ __forceinline__ T* advance(T* pointer, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(pointer) + bytes);
}

// Advances a pointer by a number of steps. The compiler may extend the factors to 64 bits in front
// of a branch, and then multiply 64 bits behind it.
template <typename T>
__device__ __forceinline__ T* advance(T* pointer, int steps, int bytes) {
#if defined(__CUDA_ARCH__)
  int64_t distance;
  asm("mul.wide.s32 %0, %1, %2;" : "=l"(distance) : "r"(steps), "r"(bytes));
  return advance(pointer, distance);
#else
  return advance(pointer, int64_t(steps) * bytes);
#endif
}

// Two 16-bit numbers, on which an instruction computes at once.
template <typename scalar_t>
using PairOf = std::conditional_t<std::is_same_v<scalar_t, c10::Half>, __half2, __nv_bfloat162>;

__device__ __forceinline__ __half2 twice_first(__half2 pair) { return __low2half2(pair); }
__device__ __forceinline__ __half2 twice_second(__half2 pair) { return __high2half2(pair); }
__device__ __forceinline__ __nv_bfloat162 twice_first(__nv_bfloat162 pair) {
  return __low2bfloat162(pair);
}
__device__ __forceinline__ __nv_bfloat162 twice_second(__nv_bfloat162 pair) {
  return __high2bfloat162(pair);
}

// Rounds two numbers at once; the first is the lower half of the result.
template <typename scalar_t>
__device__ __forceinline__ unsigned rounded_pair(float first, float second) {
  if constexpr (std::is_same_v<scalar_t, c10::Half>) {
    return ops_dcnv4::bit_cast<unsigned>(__floats2half2_rn(first, second));
  } else {
    return ops_dcnv4::bit_cast<unsigned>(__floats2bfloat162_rn(first, second));
  }
}

// n elements, loaded and stored at once if they take 4, 8 or 16 bytes.
template <typename T, int n>
struct Pack {
  static constexpr int bytes = sizeof(T) * n;
  using Word = std::conditional_t<
      bytes == 16, uint4,
      std::conditional_t<bytes == 8, uint2, std::conditional_t<bytes == 4, unsigned, T>>>;
  union {
    T at[n];
    Word word;
  };

  static __device__ __forceinline__ Pack load(const T* from) {
    static_assert(sizeof(Word) == sizeof(T) * n, "not a size that is loaded at once");
    Pack result;
    result.word = *reinterpret_cast<const Word*>(from);
    return result;
  }
  __device__ __forceinline__ void store(T* to) const {
    static_assert(sizeof(Word) == sizeof(T) * n, "not a size that is stored at once");
#if defined(__CUDA_ARCH__)
    if constexpr (sizeof(Word) == 16) {  // nvcc would otherwise split the store into four
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
                   "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w)
                   : "memory");
      return;
    }
#endif
    *reinterpret_cast<Word*>(to) = word;
  }

  template <typename To>
  __device__ __forceinline__ Pack<To, n> to() const {
    Pack<To, n> result;
    if constexpr (std::is_same_v<T, c10::BFloat16> && std::is_same_v<To, float> && n % 2 == 0) {
#pragma unroll
      for (int i = 0; i < n; i += 2) {  // a bfloat16 is the upper half of a float
        const unsigned pair = reinterpret_cast<const unsigned*>(&word)[i / 2];
        result.at[i] = ops_dcnv4::bit_cast<float>(pair << 16);
        result.at[i + 1] = ops_dcnv4::bit_cast<float>(pair & 0xffff0000u);
      }
    } else if constexpr (std::is_same_v<T, float> && sizeof(To) == 2 && n % 2 == 0) {
#pragma unroll
      for (int i = 0; i < n; i += 2) {
        reinterpret_cast<unsigned*>(&result.word)[i / 2] = rounded_pair<To>(at[i], at[i + 1]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < n; ++i) result.at[i] = static_cast<To>(at[i]);
    }
    return result;
  }
};

template <typename T>
__device__ __forceinline__ void atomic_add(T* to, T a, T b) {
  atomicAdd(to, a);
  atomicAdd(to + 1, b);
}
template <typename T>
__device__ __forceinline__ void atomic_add(T* to, T a, T b, T c, T d) {
  atomic_add(to, a, b);
  atomic_add(to + 2, c, d);
}

// Reductions of several numbers at once need PTX 8.1, which CUDA 12.1 introduced.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && \
    __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1201
__device__ __forceinline__ void atomic_add(float* to, float a, float b) {
  asm volatile(
      "red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)),
      "f"(a), "f"(b)
      : "memory");
}
__device__ __forceinline__ void atomic_add(float* to, float a, float b, float c, float d) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(
                   __cvta_generic_to_global(to)),
               "f"(a), "f"(b), "f"(c), "f"(d)
               : "memory");
}
#endif

// Adds v to *to atomically; many threads may do so at once, in any order.
template <typename T, int n>
__device__ __forceinline__ void atomic_add(T* to, const Pack<T, n>& v) {
  if constexpr (n % 4 == 0) {
#pragma unroll
    for (int i = 0; i < n; i += 4) {
      atomic_add(to + i, v.at[i], v.at[i + 1], v.at[i + 2], v.at[i + 3]);
    }
  } else if constexpr (n % 2 == 0) {
#pragma unroll
    for (int i = 0; i < n; i += 2) atomic_add(to + i, v.at[i], v.at[i + 1]);
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) atomicAdd(to + i, v.at[i]);
  }
}

}  // namespace ops_dcnv4
