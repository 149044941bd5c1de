// As many floats, or integers, as one of this processor's vectors holds. The compiler's own vectors serve every
// processor; what it does not know of a processor's instructions stands here once for AVX-512, AVX2 and NEON (and in
// dot.h for products of bytes).
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

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int REGISTERS = LANES == 8 ? 16 : 32;  // plain x86 has fewer, but there speed is no aim

using F = float __attribute__((vector_size(4 * LANES)));
using I = int32_t __attribute__((vector_size(4 * LANES)));

inline F splat(float x) { return x - F{}; }  // 0 + x would be an addition: it makes 0 of −0
inline I splat(int32_t x) { return I{} + x; }

template <class V>
inline V load(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline F load(const float* p) { return load<F>(p); }
inline void store(float* p, F v) { memcpy(p, &v, sizeof v); }

// The first n lanes, the others 0: the end of a row that is no whole number of vectors.
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

// 0, 1, 2, …
inline I counted() {
  I v{};
  for (int i = 0; i < LANES; i++) v[i] = i;
  return v;
}

#if defined(__AVX512F__)
inline F fma(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline F abs(F a) { return (F)_mm512_abs_ps((__m512)a); }
inline F nearest(F a) { return (F)_mm512_roundscale_ps((__m512)a, 0); }
inline I rounded(F a) { return (I)_mm512_cvtps_epi32((__m512)a); }
inline F floats(I a) { return (F)_mm512_cvtepi32_ps((__m512i)a); }
inline float sum(F a) { return _mm512_reduce_add_ps((__m512)a); }
inline float largest(F a) { return _mm512_reduce_max_ps((__m512)a); }
#elif defined(__AVX2__)
inline F fma(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline F abs(F a) { return (F)((I)a & 0x7fffffff); }
inline F nearest(F a) { return (F)_mm256_round_ps((__m256)a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline I rounded(F a) { return (I)_mm256_cvtps_epi32((__m256)a); }
inline F floats(I a) { return (F)_mm256_cvtepi32_ps((__m256i)a); }
template <class Join>
inline float folded(F a, Join join) {
  __m128 r = join(_mm256_castps256_ps128((__m256)a), _mm256_extractf128_ps((__m256)a, 1));
  r = join(r, _mm_movehl_ps(r, r));
  return _mm_cvtss_f32(join(r, _mm_movehdup_ps(r)));
}
inline float sum(F a) { return folded(a, [](__m128 x, __m128 y) { return _mm_add_ps(x, y); }); }
inline float largest(F a) { return folded(a, [](__m128 x, __m128 y) { return _mm_max_ps(x, y); }); }
#else
inline F fma(F a, F b, F c) {
#ifdef __ARM_NEON
  return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  F r;
  for (int i = 0; i < LANES; i++) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
#endif
}
inline F abs(F a) { return (F)((I)a & 0x7fffffff); }
inline F nearest(F a) { return a + 12582912.0f - 12582912.0f; }  // halves to even: 1.5 · 2²³ leaves no fraction
inline I rounded(F a) { return __builtin_convertvector(nearest(a), I); }
inline F floats(I a) { return __builtin_convertvector(a, F); }
inline float sum(F a) { return (a[0] + a[2]) + (a[1] + a[3]); }
inline float largest(F a) { return std::fmax(std::fmax(a[0], a[1]), std::fmax(a[2], a[3])); }
#endif

// --- half precision ---

using half = uint16_t;  // the bits of an IEEE binary16
struct bfloat {         // the upper half of a float
  uint16_t bits;
};

#ifdef __F16C__
inline float to_float(half h) { return _cvtsh_ss(h); }
inline half to_half(float x) { return _cvtss_sh(x, 0); }
#else
#ifdef __aarch64__
using Binary16 = __fp16;
#else
using Binary16 = _Float16;
#endif
inline float to_float(half h) {
  Binary16 x;
  memcpy(&x, &h, 2);
  return (float)x;
}
inline half to_half(float x) {
  const Binary16 y = (Binary16)x;
  half h;
  memcpy(&h, &y, 2);
  return h;
}
#endif
inline float to_float(float x) { return x; }

#if defined(__AVX512F__)
inline F load(const half* p) { return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline void store(half* p, F x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, 0)); }
#elif defined(__AVX2__) && defined(__F16C__)
inline F load(const half* p) { return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline void store(half* p, F x) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, 0)); }
#else
inline F load(const half* p) {
  F v{};
  for (int i = 0; i < LANES; i++) v[i] = to_float(p[i]);
  return v;
}
inline void store(half* p, F x) {
  for (int i = 0; i < LANES; i++) p[i] = to_half(x[i]);
}
#endif

// Numbers as a cache keeps them. One of halves holds no infinity: 0 times it, where a key is masked, would be no number.
inline void kept(F x, half* p) { store(p, min(max(x, splat(-65504.0f)), splat(65504.0f))); }
inline void kept(F x, float* p) { store(p, x); }

// --- bfloats, in pairs, the first in the lower half of a lane ---

// The nearest numbers that bfloats can be.
inline I near_bfloats(F x) {
  const I bits = (I)x;
  return (bits + 0x7fff + ((bits >> 16) & 1)) & (int32_t)0xffff0000;
}

#ifdef __AVX512BF16__
constexpr bool PAIRED = true;  // there is an instruction that multiplies pairs, so that activations go in pairs too

inline void store(bfloat* p, F x) {
  const __m256bh b = _mm512_cvtneps_pbh((__m512)x);
  memcpy(p, &b, 32);
}
inline F dot_pairs(F sum, F a, F b) { return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
#else
constexpr bool PAIRED = false;
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
