// Vectors of fixed width, implemented with the vector types of GCC and Clang or in plain C++.
// Include after choosing the instruction set (see kernels_*.cpp). Everything is local to the
// including file, so that the linker cannot mix code of different instruction sets.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "inline.h"

#if defined(__GNUC__)
#define OPS_DCNV4_PREFETCH(address) __builtin_prefetch(address)
#else
#define OPS_DCNV4_PREFETCH(address)
#endif

#if defined(_MSC_VER)
#define OPS_DCNV4_NOINLINE __declspec(noinline)
#else
#define OPS_DCNV4_NOINLINE __attribute__((noinline))
#endif

namespace ops_dcnv4 {
namespace {

// Result of comparing two T: all bits set, or none.
template <typename T>
using Mask = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

#if defined(__GNUC__) && !defined(OPS_DCNV4_PLAIN_VECTORS)

template <typename T, int width>
using Vector __attribute__((vector_size(sizeof(T) * width))) = T;

template <typename To, typename From>
OPS_DCNV4_INLINE To convert(From v) {
  return __builtin_convertvector(v, To);
}

template <typename M, typename V>
OPS_DCNV4_INLINE V select(M mask, V a, V b) {
  return mask ? a : b;
}

// Returns the lanes that Pattern selects from `a` and, for indices from `width` on, from `b`.
template <typename Pattern, typename T, int width, size_t... i>
OPS_DCNV4_INLINE Vector<T, width> pick(Vector<T, width> a, Vector<T, width> b,
                                       std::index_sequence<i...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Pattern::lane(i, width)...);
#else
  return __builtin_shuffle(a, b, Vector<Mask<T>, width>{Pattern::lane(i, width)...});
#endif
}

#else

template <typename T, int width>
struct Vector {
  T lanes[width];
  T& operator[](int i) { return lanes[i]; }
  const T& operator[](int i) const { return lanes[i]; }
};

#define OPS_DCNV4_LANEWISE(op, Result, sign)                                                       \
  template <typename T, int width>                                                                 \
  inline Vector<Result, width> operator op(const Vector<T, width>& a, const Vector<T, width>& b) { \
    Vector<Result, width> result;                                                                  \
    for (int i = 0; i < width; ++i) result[i] = sign(a[i] op b[i]);                                \
    return result;                                                                                 \
  }                                                                                                \
  template <typename T, int width>                                                                 \
  inline Vector<Result, width> operator op(T a, const Vector<T, width>& b) {                       \
    Vector<Result, width> result;                                                                  \
    for (int i = 0; i < width; ++i) result[i] = sign(a op b[i]);                                   \
    return result;                                                                                 \
  }                                                                                                \
  template <typename T, int width>                                                                 \
  inline Vector<Result, width> operator op(const Vector<T, width>& a, T b) {                       \
    Vector<Result, width> result;                                                                  \
    for (int i = 0; i < width; ++i) result[i] = sign(a[i] op b);                                   \
    return result;                                                                                 \
  }
OPS_DCNV4_LANEWISE(+, T, +)
OPS_DCNV4_LANEWISE(-, T, +)
OPS_DCNV4_LANEWISE(*, T, +)
OPS_DCNV4_LANEWISE(&, T, +)
OPS_DCNV4_LANEWISE(<, Mask<T>, -)
OPS_DCNV4_LANEWISE(>, Mask<T>, -)
OPS_DCNV4_LANEWISE(>=, Mask<T>, -)
#undef OPS_DCNV4_LANEWISE

template <typename T, int width>
inline Vector<T, width>& operator+=(Vector<T, width>& a, const Vector<T, width>& b) {
  return a = a + b;
}

template <typename To, typename T, int width>
inline To convert(const Vector<T, width>& v) {
  To result;
  for (int i = 0; i < width; ++i) result[i] = static_cast<std::decay_t<decltype(result[0])>>(v[i]);
  return result;
}

template <typename T, int width>
inline Vector<T, width> select(const Vector<Mask<T>, width>& mask, const Vector<T, width>& a,
                               const Vector<T, width>& b) {
  Vector<T, width> result;
  for (int i = 0; i < width; ++i) result[i] = mask[i] ? a[i] : b[i];
  return result;
}

template <typename Pattern, typename T, int width, size_t... i>
inline Vector<T, width> pick(const Vector<T, width>& a, const Vector<T, width>& b,
                             std::index_sequence<i...>) {
  const auto lane = [&](int from) { return from < width ? a[from] : b[from - width]; };
  return {{lane(Pattern::lane(i, width))...}};
}

#endif

// Patterns for `pick`. Every other lane of a and b, from `first` on.
template <int first>
struct EveryOther {
  static constexpr int lane(int i, int) { return 2 * i + first; }
};

// Runs of `run` lanes, alternately from a and b: the first or second run of each pair of runs.
template <int run, int second>
struct Alternate {
  static constexpr int lane(int i, int width) {
    return i / run % 2 * width + i / (2 * run) * 2 * run + second * run + i % run;
  }
};

// The first (half = 0) or second half of a and b, interleaved.
template <int half>
struct Interleave {
  static constexpr int lane(int i, int width) { return i % 2 * width + half * width / 2 + i / 2; }
};

template <typename T, int width>
struct Lanes;

// Implementation for all instruction sets; use it through Lanes.
template <typename T, int width>
struct PortableLanes {
  using type = Vector<T, width>;
  using Element = T;
  using Pixel = type;  // whole numbers, which need no conversion to be compared
  using PixelElement = T;
  using Mask = decltype(type{} < type{});

  static OPS_DCNV4_INLINE type zero() { return fill(T(0)); }
  static OPS_DCNV4_INLINE type fill(T number) { return number - type{}; }

  template <typename Storage>
  static OPS_DCNV4_INLINE type load(const Storage* from) {
    type result;
    if constexpr (std::is_same_v<Storage, T>) {
      std::memcpy(&result, from, sizeof(result));
#if defined(__GNUC__) && !defined(OPS_DCNV4_PLAIN_VECTORS)
    } else if constexpr (std::is_same_v<Storage, c10::BFloat16> && std::is_same_v<T, float>) {
      Vector<uint16_t, width> bits;
      std::memcpy(&bits, from, sizeof(bits));
      const auto shifted = convert<Vector<uint32_t, width>>(bits) << 16;
      std::memcpy(&result, &shifted, sizeof(result));
#endif
    } else {
      for (int i = 0; i < width; ++i) result[i] = static_cast<T>(from[i]);
    }
    return result;
  }

  template <typename Storage>
  static OPS_DCNV4_INLINE void store(Storage* to, type v) {
    if constexpr (std::is_same_v<Storage, T>) {
      std::memcpy(to, &v, sizeof(v));
#if defined(__GNUC__) && !defined(OPS_DCNV4_PLAIN_VECTORS)
    } else if constexpr (std::is_same_v<Storage, c10::BFloat16> && std::is_same_v<T, float>) {
      // Rounds to nearest, ties to even, like c10.
      using Words = Vector<uint32_t, width>;
      Words bits;
      std::memcpy(&bits, &v, sizeof(bits));
      const Words rounded = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16;
      const auto halves = convert<Vector<uint16_t, width>>(v == v ? rounded : Words{} + 0x7FC0);
      std::memcpy(static_cast<void*>(to), &halves, sizeof(halves));
#endif
    } else {
      for (int i = 0; i < width; ++i) to[i] = static_cast<Storage>(v[i]);
    }
  }

  // Loads the first `count` lanes, and zeros in the others.
  template <typename Storage>
  static OPS_DCNV4_INLINE type load_first(const Storage* from, int64_t count) {
    if (count >= width) return Lanes<T, width>::load(from);
    // Collected in a register: a vector that is loaded after narrower stores has to wait for them.
    using Bits = std::conditional_t<sizeof(Storage) == 2, uint16_t, T>;
    Vector<Bits, width> padded = {};
    for (int i = 0; i < width && i < count; ++i) {
      Bits bits;
      std::memcpy(&bits, from + i, sizeof(bits));
      padded[i] = bits;
    }
    Storage whole[width];
    std::memcpy(static_cast<void*>(whole), &padded, sizeof(whole));
    return Lanes<T, width>::load(whole);
  }
  template <typename Storage>
  static OPS_DCNV4_INLINE void store_first(Storage* to, type v, int64_t count) {
    if (count >= width) return Lanes<T, width>::store(to, v);
    Storage padded[width];
    Lanes<T, width>::store(padded, v);
    if (count > 0) std::memcpy(static_cast<void*>(to), padded, count * sizeof(Storage));
  }

  template <typename Pattern>
  static OPS_DCNV4_INLINE type permute(type a, type b) {
    return pick<Pattern, T, width>(a, b, std::make_index_sequence<width>());
  }

  template <typename M, typename V>
  static OPS_DCNV4_INLINE V select(M mask, V a, V b) {
    return ops_dcnv4::select(mask, a, b);
  }
  static OPS_DCNV4_INLINE Mask both(Mask a, Mask b) { return a & b; }
  template <typename V>
  static OPS_DCNV4_INLINE V number(V v) {
    return v;
  }
  template <typename V>
  static OPS_DCNV4_INLINE auto index(V v) {
    return convert<Vector<int32_t, width>>(v);
  }

  // Only for values in the range of int.
  static OPS_DCNV4_INLINE type floor(type v) {
    using Ints = Vector<int32_t, width>;
    const type truncated = convert<type>(convert<Ints>(v));
    return truncated - select(truncated > v, fill(T(1)), zero());
  }

  // Returns whether lower <= v < upper in each of the first `count` lanes. False for NaN.
  static OPS_DCNV4_INLINE bool all_within(type v, T lower, T upper, int64_t count) {
    const auto within = (v >= lower) & (v < upper);
    bool all = true;
    for (int i = 0; i < width; ++i) all &= (i >= count) | (within[i] != 0);
    return all;
  }

  // Returns the sums over the lanes of four vectors.
  static OPS_DCNV4_INLINE Vector<T, 4> sums(type a, type b, type c, type d) {
    if constexpr (width < 4) {
      static_assert(width == 2);
      return Vector<T, 4>{a[0] + a[1], b[0] + b[1], c[0] + c[1], d[0] + d[1]};
    } else {
      const type ab = permute<Alternate<1, 0>>(a, b) + permute<Alternate<1, 1>>(a, b);
      const type cd = permute<Alternate<1, 0>>(c, d) + permute<Alternate<1, 1>>(c, d);
      return Lanes<T, width>::fold(permute<Alternate<2, 0>>(ab, cd) +
                                   permute<Alternate<2, 1>>(ab, cd));
    }
  }

  // Sums lanes i, i + 4, i + 8, ...
  static OPS_DCNV4_INLINE Vector<T, 4> fold(type v) {
    static_assert(width == 4);
    return v;
  }
};

template <typename T, int width>
struct Lanes : PortableLanes<T, width> {};

// Number of lanes in a register.
template <typename T>
constexpr int native_width = OPS_DCNV4_VECTOR_BYTES / sizeof(T);

template <typename T>
using Native = Lanes<T, native_width<T>>;

// A single lane is a plain scalar.
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
  static OPS_DCNV4_INLINE Vector<T, 4> sums(T a, T b, T c, T d) { return Vector<T, 4>{a, b, c, d}; }
};

}  // namespace
}  // namespace ops_dcnv4

#if OPS_DCNV4_VECTOR_BYTES >= 32
#include "cpu/avx2.h"
#endif
#if OPS_DCNV4_VECTOR_BYTES >= 64
#include "cpu/avx512.h"
#endif
