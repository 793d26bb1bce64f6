// 512-bit vectors for the kernels: exponential, element types, transposes.
//
// Kernels read keys and values in units of one 32-bit word: two neighbouring bfloat16 numbers, or
// one float. A fused multiply-add over words then is the same loop for both types.

#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace saqqara {

constexpr int kLanes = 16;  // 32-bit lanes of a vector

// Stands for minus infinity where differences of two such values must stay numbers.
constexpr float kLowest = -1e30f;

constexpr float kLog2E = 1.44269504088896340736f;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The first `count` of 16 (or of 32) lanes; all for a count beyond that.
inline __mmask16 first_lanes(int count) {
  return count >= 16 ? __mmask16(0xffff) : __mmask16((1u << (count > 0 ? count : 0)) - 1u);
}
inline __mmask32 first_halves(int count) {
  return count >= 32 ? __mmask32(0xffffffff) : __mmask32((1u << (count > 0 ? count : 0)) - 1u);
}

// 2^x for x <= 126, 0 for very negative x; relative error below 2e-7. The polynomial is the
// minimax fit of 2^f on [0, 1); `scalef` multiplies by 2^floor(x).
inline __m512 exp2(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
  __m512 p = _mm512_set1_ps(0.0018775766948238015f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.00898933969438076f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.05582631751894951f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.24015361070632935f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6931530833244324f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.9999999403953552f));
  return _mm512_scalef_ps(p, x);
}

// Sums 16 tokens' products that lie in the halves of 8 vectors: vector i has those of tokens
// pair_token(i), low, and pair_token(i) + 4, high. Lane j of the result is the sum of token j. Each
// round interleaves two vectors and adds the halves of what comes out.
constexpr int pair_token(int i) { return i < 4 ? i : i + 4; }

inline __m512 sum_halves(const __m512 (&in)[8]) {
  __m512 a[4], b[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(in[i], in[i + 4], 0x88),
                         _mm512_shuffle_f32x4(in[i], in[i + 4], 0xdd));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    b[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]),
                         _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
  }
  const __m512d b0 = _mm512_castps_pd(b[0]);
  const __m512d b1 = _mm512_castps_pd(b[1]);
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(b0, b1)),
                       _mm512_castpd_ps(_mm512_unpackhi_pd(b0, b1)));
}

// Lane j of the result is the sum of the lanes of in[j].
inline __m512 sum_lanes(const __m512 (&in)[kLanes]) {
  __m512 halves[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512 low = in[pair_token(i)];
    const __m512 high = in[pair_token(i) + 4];
    halves[i] =
        _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x44), _mm512_shuffle_f32x4(low, high, 0xee));
  }
  return sum_halves(halves);
}

// Transposes a 16 x 16 matrix of 32-bit words in place.
inline void transpose(__m512 (&r)[kLanes]) {
  __m512 t[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512d x = _mm512_castps_pd(t[i + j]);
      const __m512d y = _mm512_castps_pd(t[i + j + 2]);
      r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
      r[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
    }
  }
  // Quad q of r[4 i + k] now is column 4 q + k of rows 4 i to 4 i + 3.
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    t[k] = _mm512_shuffle_f32x4(r[k], r[4 + k], 0x88);
    t[4 + k] = _mm512_shuffle_f32x4(r[k], r[4 + k], 0xdd);
    t[8 + k] = _mm512_shuffle_f32x4(r[8 + k], r[12 + k], 0x88);
    t[12 + k] = _mm512_shuffle_f32x4(r[8 + k], r[12 + k], 0xdd);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    r[k] = _mm512_shuffle_f32x4(t[k], t[8 + k], 0x88);
    r[8 + k] = _mm512_shuffle_f32x4(t[k], t[8 + k], 0xdd);
    r[4 + k] = _mm512_shuffle_f32x4(t[4 + k], t[12 + k], 0x88);
    r[12 + k] = _mm512_shuffle_f32x4(t[4 + k], t[12 + k], 0xdd);
  }
}

// bfloat16: a word is two numbers, the first in the low half.
struct Bf16 {
  using Number = uint16_t;
  static constexpr int kPerWord = 2;

  static __m512 mul_add(__m512i a, __m512i b, __m512 sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }

  // The word of two weights for every lane, from the floats of each.
  static __m512i pair(__m512 first, __m512 second) {
    const __m512i order =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(second, first));
  }

  static __m512 load(const Number* from, int count) {
    const __m256i numbers = _mm256_maskz_loadu_epi16(first_lanes(count), from);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
  }

  static void store(Number* to, __m512 x, int count) {
    _mm256_mask_storeu_epi16(to, first_lanes(count), (__m256i)_mm512_cvtneps_pbh(x));
  }
};

// float: a word is one number.
struct Fp32 {
  using Number = float;
  static constexpr int kPerWord = 1;

  static __m512 mul_add(__m512i a, __m512i b, __m512 sum) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
  }

  static __m512 load(const Number* from, int count) {
    return _mm512_maskz_loadu_ps(first_lanes(count), from);
  }

  static void store(Number* to, __m512 x, int count) {
    _mm512_mask_storeu_ps(to, first_lanes(count), x);
  }
};

}  // namespace saqqara
