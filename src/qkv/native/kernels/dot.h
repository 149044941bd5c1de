// Sums of products of bytes, four to a lane: weights of 4 or of 8 bits without a sign, activations with one.
#pragma once
#include "simd.h"

namespace qkv {

// Dot<8 bits?>: a sum that begins with n takes up to 8 times four products, and `total` is n + Σ. `of` makes weights ready
// to be multiplied with several rows, TAKEN is what it takes off each, and BYTES is what four activations take.
template <bool BITS8>
struct Dot;

struct Whole {  // a sum that can hold all
  using Sum = I;
  static Sum begin(int32_t n) { return splat(n); }
  static I total(Sum sum, int32_t) { return sum; }
};

#if defined(__AVX512VNNI__) || (defined(__AVXVNNI__) && !defined(__AVX512F__))
template <bool BITS8>
struct Dot : Whole {
  using Weights = I;
  static constexpr int TAKEN = 0, BYTES = 4;
  static Weights of(I u) { return u; }
  static Sum add(Sum sum, Weights u, const int8_t* x) {
    const I four = splat(load<int32_t>(x));
#ifdef __AVX512VNNI__
    return (I)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)u, (__m512i)four);
#else
    return (I)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)u, (__m256i)four);
#endif
  }
};
#elif defined(__AVX512BW__) || (defined(__AVX2__) && !defined(__AVX512F__))
using Shorts = int16_t __attribute__((vector_size(4 * LANES)));
using UnsignedShorts = uint16_t __attribute__((vector_size(4 * LANES)));

#ifdef __AVX512BW__
inline Shorts byte_products(I u, I x) { return (Shorts)_mm512_maddubs_epi16((__m512i)u, (__m512i)x); }
inline I short_products(Shorts u, Shorts x) { return (I)_mm512_madd_epi16((__m512i)u, (__m512i)x); }
#else
inline Shorts byte_products(I u, I x) { return (Shorts)_mm256_maddubs_epi16((__m256i)u, (__m256i)x); }
inline I short_products(Shorts u, Shorts x) { return (I)_mm256_madd_epi16((__m256i)u, (__m256i)x); }
#endif

// A sum made here and now: additions that a compiler puts off keep more products waiting than there are registers.
template <class V>
inline V settled(V sum) {
  asm("" : "+v"(sum));
  return sum;
}

template <>
struct Dot<false> {  // 8 · 2 products of 15 and 127 stay within 16 bits
  using Sum = Shorts;
  using Weights = I;
  static constexpr int TAKEN = 0, BYTES = 4;
  static Weights of(I u) { return u; }
  static Sum begin(int32_t) { return Sum{}; }
  static Sum add(Sum sum, Weights u, const int8_t* x) {
    return settled(sum + byte_products(u, splat(load<int32_t>(x))));
  }
  static I total(Sum sum, int32_t n) { return short_products(sum, Shorts{} + 1) + n; }
};

template <>
struct Dot<true> : Whole {  // two of 255 and 127 do not: weights and activations become 16 bits, every second together
  struct Weights {
    Shorts even, odd;
  };
  static constexpr int TAKEN = 0, BYTES = 8;
  static Weights of(I u) { return {(Shorts)(u & 0x00ff00ff), (Shorts)((UnsignedShorts)u >> 8)}; }
  static Sum add(Sum sum, Weights u, const int8_t* x) {
    sum = settled(sum + short_products(u.even, (Shorts)splat(load<int32_t>(x))));
    return settled(sum + short_products(u.odd, (Shorts)splat(load<int32_t>(x + 4))));
  }
};
#elif defined(__ARM_FEATURE_DOTPROD)
template <bool BITS8>
struct Dot : Whole {
  using Weights = I;
  static constexpr int TAKEN = BITS8 ? 128 : 0, BYTES = 4;
  static Weights of(I u) { return BITS8 ? u ^ (int32_t)0x80808080 : u; }
  static Sum add(Sum sum, Weights u, const int8_t* x) {
    return (I)vdotq_s32((int32x4_t)sum, (int8x16_t)u, (int8x16_t)splat(load<int32_t>(x)));
  }
};
#else
template <bool BITS8>
struct Dot : Whole {
  using Weights = I;
  static constexpr int TAKEN = 0, BYTES = 4;
  static Weights of(I u) { return u; }
  static Sum add(Sum sum, Weights u, const int8_t* x) {
    for (int i = 0; i < 4; i++) sum += ((u >> (8 * i)) & 255) * (int32_t)x[i];
    return sum;
  }
};
#endif

// Stores small whole numbers as a product wants activations, BYTES for each four of them; their sum.
template <int BYTES>
inline int32_t small(int8_t* p, I a) {
  static_assert(BYTES == 4 || BYTES == 8);
#if defined(__AVX512F__)
  if constexpr (BYTES == 4) {
    const __m128i b = _mm512_cvtepi32_epi8((__m512i)a);
    _mm_storeu_si128((__m128i*)p, b);
    const __m128i eights = _mm_sad_epu8(_mm_xor_si128(b, _mm_set1_epi8(-128)), _mm_setzero_si128());
    return _mm_cvtsi128_si32(eights) + _mm_extract_epi32(eights, 2) - 16 * 128;
  }
#elif defined(__AVX2__)
  const __m128i eight = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)a), _mm256_extracti128_si256((__m256i)a, 1));
  __m128i s = _mm_madd_epi16(eight, _mm_set1_epi16(1));
  s = _mm_add_epi32(s, _mm_unpackhi_epi64(s, s));
  if constexpr (BYTES == 4) _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(eight, eight));
  else _mm_storeu_si128((__m128i*)p, _mm_shufflehi_epi16(_mm_shufflelo_epi16(eight, 0xd8), 0xd8));
  return _mm_cvtsi128_si32(s) + _mm_extract_epi32(s, 1);
#endif
  int32_t all = 0;
  for (int i = 0; i < LANES; i++) {
    all += a[i];
    if constexpr (BYTES == 4) p[i] = (int8_t)a[i];
    else ((int16_t*)p)[(i & ~3) | (i & 1) << 1 | (i & 2) >> 1] = (int16_t)a[i];  // 0 2 1 3
  }
  return all;
}

}  // namespace qkv
