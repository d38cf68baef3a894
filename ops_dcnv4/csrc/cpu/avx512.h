// Specializations of simd.h for AVX-512.
#pragma once

#include "cpu/avx2.h"

namespace ops_dcnv4 {
namespace {

OPS_DCNV4_INLINE __m512 widen(__m256i bits, c10::BFloat16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
OPS_DCNV4_INLINE __m512 widen(__m256i bits, c10::Half) { return _mm512_cvtph_ps(bits); }

// Rounds to nearest, ties to even, like c10.
OPS_DCNV4_INLINE __m256i narrow(__m512 v, c10::BFloat16) {
  const __m512i bits = _mm512_castps_si512(v), one = _mm512_set1_epi32(1);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC0)));
}
OPS_DCNV4_INLINE __m256i narrow(__m512 v, c10::Half) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// Returns a mask of the first `count` lanes.
OPS_DCNV4_INLINE unsigned first_bits(int64_t count, int width) {
  return count >= width ? (1u << width) - 1 : (1u << (count > 0 ? count : 0)) - 1;
}

template <>
struct Lanes<float, 16> : PortableLanes<float, 16> {
  static OPS_DCNV4_INLINE type load(const float* from) { return _mm512_loadu_ps(from); }
  template <typename Storage>
  static OPS_DCNV4_INLINE type load(const Storage* from) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)), Storage());
  }
  static OPS_DCNV4_INLINE void store(float* to, type v) { _mm512_storeu_ps(to, v); }
  template <typename Storage>
  static OPS_DCNV4_INLINE void store(Storage* to, type v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow(v, Storage()));
  }

  static OPS_DCNV4_INLINE type load_first(const float* from, int64_t count) {
    return _mm512_maskz_loadu_ps(first_bits(count, 16), from);
  }
  template <typename Storage>
  static OPS_DCNV4_INLINE type load_first(const Storage* from, int64_t count) {
    return widen(_mm256_maskz_loadu_epi16(first_bits(count, 16), from), Storage());
  }
  static OPS_DCNV4_INLINE void store_first(float* to, type v, int64_t count) {
    _mm512_mask_storeu_ps(to, first_bits(count, 16), v);
  }
  template <typename Storage>
  static OPS_DCNV4_INLINE void store_first(Storage* to, type v, int64_t count) {
    _mm256_mask_storeu_epi16(to, first_bits(count, 16), narrow(v, Storage()));
  }

  static OPS_DCNV4_INLINE Vector<float, 4> fold(type v) {
    const __m256 half = _mm512_castps512_ps256(v) + _mm512_extractf32x8_ps(v, 1);
    return _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
  }

  static OPS_DCNV4_INLINE type floor(type v) { return _mm512_floor_ps(v); }
  static OPS_DCNV4_INLINE bool all_within(type v, float lower, float upper, int64_t count) {
    const __mmask16 not_below = _mm512_cmp_ps_mask(v, _mm512_set1_ps(lower), _CMP_GE_OQ);
    const unsigned within =
        _mm512_mask_cmp_ps_mask(not_below, v, _mm512_set1_ps(upper), _CMP_LT_OQ);
    return (~within & first_bits(count, 16)) == 0;
  }
};

template <>
struct Lanes<double, 8> : PortableLanes<double, 8> {
  static OPS_DCNV4_INLINE type load_first(const double* from, int64_t count) {
    return _mm512_maskz_loadu_pd(first_bits(count, 8), from);
  }
  static OPS_DCNV4_INLINE void store_first(double* to, type v, int64_t count) {
    _mm512_mask_storeu_pd(to, first_bits(count, 8), v);
  }
  static OPS_DCNV4_INLINE Vector<double, 4> fold(type v) {
    return _mm512_castpd512_pd256(v) + _mm512_extractf64x4_pd(v, 1);
  }
  static OPS_DCNV4_INLINE type floor(type v) { return _mm512_floor_pd(v); }
  static OPS_DCNV4_INLINE bool all_within(type v, double lower, double upper, int64_t count) {
    const __mmask8 not_below = _mm512_cmp_pd_mask(v, _mm512_set1_pd(lower), _CMP_GE_OQ);
    const unsigned within =
        _mm512_mask_cmp_pd_mask(not_below, v, _mm512_set1_pd(upper), _CMP_LT_OQ);
    return (~within & first_bits(count, 8)) == 0;
  }
};

}  // namespace
}  // namespace ops_dcnv4
