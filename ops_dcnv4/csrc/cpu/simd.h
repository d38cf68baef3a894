// Fixed-width vectors and one-binary dispatch over instruction sets, with plain C++ as the fallback.
#pragma once

#include <cstdlib>  // defines __GLIBC__
#include <cstring>
#include <type_traits>

#include "bilinear.h"

// On x86 Linux a marked function is compiled once per instruction set, and the loader takes the best
// that the processor has. Everything such a function calls must be inlined into it to follow suit.
// The sets are named by features: a named processor (arch=haswell) would match only that very model.
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__)
#if !defined(__clang__) && __GNUC__ >= 12
#define OPS_DCNV4_MULTIVERSION \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define OPS_DCNV4_MULTIVERSION __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define OPS_DCNV4_MULTIVERSION
#endif

namespace ops_dcnv4 {

#if defined(__GNUC__) && !defined(OPS_DCNV4_PLAIN_VECTORS)

template <typename T, int width>
using Vector __attribute__((vector_size(sizeof(T) * width))) = T;

#else

template <typename T, int width>
struct Vector {
  T lanes[width];
  T& operator[](int i) { return lanes[i]; }
  const T& operator[](int i) const { return lanes[i]; }
};

#define OPS_DCNV4_LANEWISE(op)                                                                \
  template <typename T, int width>                                                            \
  inline Vector<T, width> operator op(const Vector<T, width>& a, const Vector<T, width>& b) { \
    Vector<T, width> result;                                                                  \
    for (int i = 0; i < width; ++i) result[i] = a[i] op b[i];                                 \
    return result;                                                                            \
  }                                                                                           \
  template <typename T, int width>                                                            \
  inline Vector<T, width> operator op(T a, const Vector<T, width>& b) {                       \
    Vector<T, width> result;                                                                  \
    for (int i = 0; i < width; ++i) result[i] = a op b[i];                                    \
    return result;                                                                            \
  }
OPS_DCNV4_LANEWISE(+)
OPS_DCNV4_LANEWISE(-)
OPS_DCNV4_LANEWISE(*)
#undef OPS_DCNV4_LANEWISE

template <typename T, int width>
inline Vector<T, width>& operator+=(Vector<T, width>& a, const Vector<T, width>& b) {
  return a = a + b;
}

#endif

template <typename T, int width>
struct Lanes {
  using type = Vector<T, width>;

  template <typename Storage>
  static OPS_DCNV4_INLINE type load(const Storage* from) {
    type result;
    if constexpr (std::is_same_v<Storage, T>) {
      std::memcpy(&result, from, sizeof(result));
    } else {
      for (int i = 0; i < width; ++i) result[i] = static_cast<T>(from[i]);
    }
    return result;
  }
  template <typename Storage>
  static OPS_DCNV4_INLINE void store(Storage* to, type v) {
    if constexpr (std::is_same_v<Storage, T>) {
      std::memcpy(to, &v, sizeof(v));
    } else {
      for (int i = 0; i < width; ++i) to[i] = static_cast<Storage>(v[i]);
    }
  }
  static OPS_DCNV4_INLINE type zero() {
    type result;
    for (int i = 0; i < width; ++i) result[i] = T(0);
    return result;
  }
  static OPS_DCNV4_INLINE T sum(type v) {
    using Half = Lanes<T, width / 2>;
    typename Half::type low, high;
    std::memcpy(&low, &v, sizeof(low));
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(high));
    return Half::sum(low + high);
  }
};

// A single lane is the scalar itself.
template <typename T>
struct Lanes<T, 1> {
  using type = T;

  template <typename Storage>
  static OPS_DCNV4_INLINE T load(const Storage* from) {
    return static_cast<T>(*from);
  }
  template <typename Storage>
  static OPS_DCNV4_INLINE void store(Storage* to, T v) {
    *to = static_cast<Storage>(v);
  }
  static OPS_DCNV4_INLINE T zero() { return T(0); }
  static OPS_DCNV4_INLINE T sum(T v) { return v; }
};

}  // namespace ops_dcnv4
