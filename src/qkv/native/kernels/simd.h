// Sixteen floats, or sixteen integers, at a time. The compiler's own vectors serve every processor; what it does not
// know of a processor's instructions (halves, dot products of bytes) stands here once for AVX-512, AVX2 and NEON.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace qkv {

using F = float __attribute__((vector_size(64)));
using I = int32_t __attribute__((vector_size(64)));
constexpr int LANES = 16;

inline F splat(float x) { return F{} + x; }
inline I splat(int32_t x) { return I{} + x; }

template <class V>
inline V load(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline F load(const float* p) { return load<F>(p); }
inline void store(float* p, F v) { memcpy(p, &v, sizeof v); }

// The first n lanes, the others 0: the end of a row whose width is no multiple of 16.
inline F load(const float* p, int n) {
  if (n >= LANES) return load(p);
  F v{};
  memcpy(&v, p, n * sizeof(float));
  return v;
}
inline void store(float* p, F v, int n) {
  if (n >= LANES) return store(p, v);
  memcpy(p, &v, n * sizeof(float));
}

inline F choose(I mask, F yes, F no) { return mask ? yes : no; }
inline F max(F a, F b) { return a > b ? a : b; }
inline F min(F a, F b) { return a < b ? a : b; }

// bytes(p, a) stores small numbers, and gives their sum.
#ifdef __AVX512F__
inline F fma(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline F abs(F a) { return (F)_mm512_abs_ps((__m512)a); }
inline F nearest(F a) { return (F)_mm512_roundscale_ps((__m512)a, 0); }
inline I rounded(F a) { return (I)_mm512_cvtps_epi32((__m512)a); }
inline F floats(I a) { return (F)_mm512_cvtepi32_ps((__m512i)a); }
inline float sum(F a) { return _mm512_reduce_add_ps((__m512)a); }
inline float largest(F a) { return _mm512_reduce_max_ps((__m512)a); }
inline int32_t bytes(int8_t* p, I a) {
  const __m128i b = _mm512_cvtepi32_epi8((__m512i)a);
  _mm_storeu_si128((__m128i*)p, b);
  const __m128i eights = _mm_sad_epu8(_mm_xor_si128(b, _mm_set1_epi8(-128)), _mm_setzero_si128());
  return _mm_cvtsi128_si32(eights) + _mm_extract_epi32(eights, 2) - 16 * 128;
}
#else
inline F fma(F a, F b, F c) {
  F r;
  for (int i = 0; i < LANES; i++) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
}
inline F abs(F a) { return (F)((I)a & 0x7fffffff); }
inline F nearest(F a) { return a + 12582912.0f - 12582912.0f; }  // halves to even: 1.5 · 2²³ leaves no fraction
inline I rounded(F a) { return __builtin_convertvector(nearest(a), I); }
inline F floats(I a) { return __builtin_convertvector(a, F); }
template <class V>
inline auto folded(V a, auto join) {
  auto r = a[0];
  for (int i = 1; i < LANES; i++) r = join(r, a[i]);
  return r;
}
inline float sum(F a) { return folded(a, [](float x, float y) { return x + y; }); }
inline int32_t sum(I a) { return folded(a, [](int32_t x, int32_t y) { return x + y; }); }
inline float largest(F a) { return folded(a, [](float x, float y) { return x > y ? x : y; }); }
inline int32_t bytes(int8_t* p, I a) {
  for (int i = 0; i < LANES; i++) p[i] = (int8_t)a[i];
  return sum(a);
}
#endif

// --- half precision ---

using half = uint16_t;  // the bits of an IEEE binary16
struct bfloat {         // the upper half of a float
  uint16_t bits;
};

#if defined(__AVX512F__)
inline F load(const half* p) { return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline float to_float(half h) { return _cvtsh_ss(h); }
inline half to_half(float x) { return _cvtss_sh(x, 0); }
#elif defined(__F16C__)
inline F load(const half* p) {
  __m256 lo = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
  __m256 hi = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1));
  F v;
  memcpy(&v, &lo, 32);
  memcpy((char*)&v + 32, &hi, 32);
  return v;
}
inline float to_float(half h) { return _cvtsh_ss(h); }
inline half to_half(float x) { return _cvtss_sh(x, 0); }
#else
inline float to_float(half h) {
  _Float16 x;
  memcpy(&x, &h, 2);
  return (float)x;
}
inline half to_half(float x) {
  _Float16 y = (_Float16)x;
  half h;
  memcpy(&h, &y, 2);
  return h;
}
inline F load(const half* p) {
  F v;
  for (int i = 0; i < LANES; i++) v[i] = to_float(p[i]);
  return v;
}
#endif
inline float to_float(float x) { return x; }


// Sixteen numbers as a cache keeps them. One of halves holds no infinity: 0 times it, where a key is masked, would be no
// number.
inline void kept(F x, half* p) {
  x = min(max(x, splat(-65504.0f)), splat(65504.0f));
#ifdef __AVX512F__
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, 0));
#else
  for (int i = 0; i < LANES; i++) p[i] = to_half(x[i]);
#endif
}
inline void kept(F x, float* p) { store(p, x); }

// --- pairs of bfloats, the first of a pair in the lower half of a lane ---

// Sixteen floats, rounded to the nearest bfloat.
inline void round_to(bfloat* p, F x) {
#ifdef __AVX512BF16__
  const __m256bh b = _mm512_cvtneps_pbh((__m512)x);
  memcpy(p, &b, 32);
#else
  const I bits = (I)x, nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  for (int i = 0; i < LANES; i++) p[i].bits = nearest[i];
#endif
}

// sum + the products of the pairs
inline F dot_pairs(F sum, F a, F b) {
#ifdef __AVX512BF16__
  return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  sum = fma((F)((I)a << 16), (F)((I)b << 16), sum);
  return fma((F)((I)a & (int32_t)0xffff0000), (F)((I)b & (int32_t)0xffff0000), sum);
#endif
}

// --- dot products of four unsigned with four signed bytes, in each lane ---

#if defined(__AVX512VNNI__)
inline I dot4(I sum, I u, int32_t s) { return (I)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)u, _mm512_set1_epi32(s)); }
inline I dot8(I sum, I u, int32_t s) { return dot4(sum, u, s); }
constexpr int TAKEN8 = 0;  // what dot8 takes off each unsigned byte first
#elif defined(__AVX512BW__)
inline I dot_bytes(I sum, __m512i u, __m512i s) {
  return sum + (I)_mm512_madd_epi16(_mm512_maddubs_epi16(u, s), _mm512_set1_epi16(1));
}
inline I dot4(I sum, I u, int32_t s) { return dot_bytes(sum, (__m512i)u, _mm512_set1_epi32(s)); }
inline I dot8(I sum, I u, int32_t s) {  // sums of 0…255 times ±127 would saturate: move the sign over instead
  __m512i w = (__m512i)(u ^ (int32_t)0x80808080), x = _mm512_set1_epi32(s);
  return dot_bytes(sum, _mm512_abs_epi8(w), _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), _mm512_setzero_si512(), x));
}
constexpr int TAKEN8 = 128;
#elif defined(__AVX2__)
inline __m256i dot_half(__m256i u, __m256i s) {
  return _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1));
}
template <class Dot>
inline I both(I sum, I w, Dot dot) {
  __m256i lo, hi;
  memcpy(&lo, &w, 32);
  memcpy(&hi, (char*)&w + 32, 32);
  lo = dot(lo), hi = dot(hi);
  I r;
  memcpy(&r, &lo, 32);
  memcpy((char*)&r + 32, &hi, 32);
  return sum + r;
}
inline I dot4(I sum, I u, int32_t s) {
  return both(sum, u, [&](__m256i w) { return dot_half(w, _mm256_set1_epi32(s)); });
}
inline I dot8(I sum, I u, int32_t s) {  // sums of 0…255 times ±127 would saturate: move the sign over instead
  return both(sum, u ^ (int32_t)0x80808080, [&](__m256i w) {
    return dot_half(_mm256_sign_epi8(w, w), _mm256_sign_epi8(_mm256_set1_epi32(s), w));
  });
}
constexpr int TAKEN8 = 128;
#elif defined(__ARM_FEATURE_DOTPROD)
inline I dot4(I sum, I u, int32_t s) {
  int32x4_t a[4];
  int8x16_t w[4], x = vreinterpretq_s8_s32(vdupq_n_s32(s));
  memcpy(a, &sum, 64);
  memcpy(w, &u, 64);
  for (int i = 0; i < 4; i++) a[i] = vdotq_s32(a[i], w[i], x);
  memcpy(&sum, a, 64);
  return sum;
}
inline I dot8(I sum, I u, int32_t s) { return dot4(sum, u ^ (int32_t)0x80808080, s); }
constexpr int TAKEN8 = 128;
#else
inline I dot4(I sum, I u, int32_t s) {
  for (int i = 0; i < 4; i++) sum += ((u >> (8 * i)) & 255) * (int32_t)(int8_t)(s >> (8 * i));
  return sum;
}
inline I dot8(I sum, I u, int32_t s) { return dot4(sum, u, s); }
constexpr int TAKEN8 = 0;
#endif

// --- functions ---

// 2^n p for whole n, and 1 / a.
#ifdef __AVX512F__
inline F scaled(F p, F n) { return (F)_mm512_scalef_ps((__m512)p, (__m512)n); }
inline F inverse(F a) {  // an estimate of 14 bits, and one step of Newton's
  F r = (F)_mm512_rcp14_ps((__m512)a);
  return r * fma(-a, r, splat(2.0f));
}
#else
inline F scaled(F p, F n) { return (F)((I)p + (rounded(n) << 23)); }
inline F inverse(F a) { return 1.0f / a; }
#endif

// e^x, relative error below 1e-7: x log₂ e = n + r, a polynomial for 2^r, and n into the exponent.
inline F exp(F x) {
  x = min(max(x, splat(-87.0f)), splat(88.0f));
  F n = nearest(x * 1.44269504f);
  F r = fma(x, splat(1.44269502f), -n);
  r = fma(x, splat(1.92596303e-8f), r);
  F p = splat(1.53375768e-4f);
  for (float c : {1.33998604e-3f, 9.61851953e-3f, 5.5503290e-2f, 0.240226466f, 0.693147206f, 1.0f})
    p = fma(p, r, splat(c));
  return scaled(p, n);
}
inline F sigmoid(F x) { return inverse(1.0f + exp(-x)); }
inline F tanh(F x) {  // near 0 a series, where 2 σ(2x) − 1 would lose its digits
  F s = x * x, p = splat(-0.0088632f);
  for (float c : {0.0218695f, -0.0539683f, 0.1333333f, -0.3333333f, 1.0f}) p = fma(p, s, splat(c));
  return choose(abs(x) < 0.4f, x * p, 2.0f * sigmoid(2.0f * x) - 1.0f);
}

// ln(1 + e^x) = max(x, 0) + ln(1 + y), y = e^−|x|, by 2 artanh(y / (2 + y)).
inline F softplus(F x) {
  F y = exp(-abs(x)), s = y / (2.0f + y), q = s * s, p = splat(1.0f / 15);
  for (float c : {1.0f / 13, 1.0f / 11, 1.0f / 9, 1.0f / 7, 0.2f, 1.0f / 3, 1.0f}) p = fma(p, q, splat(c));
  return max(x, F{}) + 2.0f * s * p;
}

// Φ(x), the normal distribution: ½ + x p(x²) up to where it is 1, absolute error below 3e-7.
inline F normal(F x) {
  constexpr float END = 5.4f;
  x = min(max(x, splat(-END)), splat(END));
  F v = fma(x * x, splat(2 / (END * END)), splat(-1.0f)), p = splat(-8.72613332e-4f);
  for (float c : {2.18585078e-3f, -1.66566055e-3f, 1.94903474e-3f, -6.15171784e-3f, 1.07505779e-2f, -1.42791047e-2f,
                  1.92848643e-2f, -2.56612347e-2f, 3.21723325e-2f, -3.92165582e-2f, 4.84963926e-2f, -6.53277411e-2f,
                  0.130928142f})
    p = fma(p, v, splat(c));
  return fma(x, p, splat(0.5f));
}

}  // namespace qkv
