// Specializations of simd.h for AVX2 and F16C.
#pragma once

#include "cpu/simd.h"

namespace ops_dcnv4 {
namespace {

template <>
struct Lanes<float, 8> : PortableLanes<float, 8> {
  using PortableLanes<float, 8>::load;
  using PortableLanes<float, 8>::store;
  static OPS_DCNV4_INLINE type load(const c10::Half* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static OPS_DCNV4_INLINE type load(const c10::BFloat16* from) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static OPS_DCNV4_INLINE void store(c10::Half* to, type v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static OPS_DCNV4_INLINE Vector<float, 4> fold(type v) {
    return _mm256_castps256_ps128(v) + _mm256_extractf128_ps(v, 1);
  }
  static OPS_DCNV4_INLINE type floor(type v) { return _mm256_floor_ps(v); }
  static OPS_DCNV4_INLINE bool all_within(type v, float lower, float upper, int64_t count) {
    const __m256 within = _mm256_and_ps(_mm256_cmp_ps(v, _mm256_set1_ps(lower), _CMP_GE_OQ),
                                        _mm256_cmp_ps(v, _mm256_set1_ps(upper), _CMP_LT_OQ));
    return count <= 0 || (~_mm256_movemask_ps(within) & ((1 << (count < 8 ? count : 8)) - 1)) == 0;
  }
};

template <>
struct Lanes<float, 4> : PortableLanes<float, 4> {
  using PortableLanes<float, 4>::load;
  using PortableLanes<float, 4>::store;
  static OPS_DCNV4_INLINE type load(const c10::Half* from) {
    return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  }
  static OPS_DCNV4_INLINE type load(const c10::BFloat16* from) {
    const __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), bits));
  }
  static OPS_DCNV4_INLINE void store(c10::Half* to, type v) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
};

template <>
struct Lanes<double, 4> : PortableLanes<double, 4> {
  static OPS_DCNV4_INLINE type floor(type v) { return _mm256_floor_pd(v); }
};

}  // namespace
}  // namespace ops_dcnv4
