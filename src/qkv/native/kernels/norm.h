// Norms over the features of one row, and the pointwise functions.
#pragma once
#include "program.h"
#include "simd.h"

namespace qkv {

template <class Each>
inline void vectors(int n, Each each) {  // each(at, how many) over n values, a vector at a time
  for (int at = 0; at < n; at += LANES) each(at, n - at < LANES ? n - at : LANES);
}

inline float total(const float* x, int n) {
  F all{};
  vectors(n, [&](int at, int some) { all += load(x + at, some); });
  return sum(all);
}

inline float squares(const float* x, int n, float mean) {
  F all{};
  vectors(n, [&](int at, int some) {
    F v = load(x + at, some) - mean;
    if (some < LANES)
      for (int i = some; i < LANES; i++) v[i] = 0;
    all = fma(v, v, all);
  });
  return sum(all);
}

// y = norm(x), and in place if y is x:
//   RMS γ x / √(mean x² + ε) · LAYER γ (x − mean) / √(var + ε) + β · TANH γ tanh(ε x) + β · AFFINE γ x + β
inline void norm_row(Norm kind, const float* x, int n, float eps, const float* weight, const float* bias, float* y) {
  float mean = kind == LAYER ? total(x, n) / n : 0, scale = 1;
  if (kind == RMS || kind == LAYER) scale = 1 / std::sqrt(squares(x, n, mean) / n + eps);
  vectors(n, [&](int at, int some) {
    F v = (load(x + at, some) - mean) * scale;
    if (kind == TANH) v = tanh(v * eps);
    if (weight) v *= load(weight + at, some);
    if (bias) v += load(bias + at, some);
    store(y + at, v, some);
  });
}

inline F activated(Act act, F x, float cap) {
  switch (act) {
    case IDENTITY: return x;
    case RELU: return max(x, F{});
    case GELU: return x * normal(x);
    case GELU_TANH: return x * sigmoid(1.59576912f * fma(x * x * x, splat(0.044715f), x));
    case SILU: return x * sigmoid(x);
    case TANH_ACT: return tanh(x);
    case SIGMOID: return sigmoid(x);
    case SOFTPLUS: return softplus(x);
    case SOFTCAP: return cap * tanh(x / cap);
  }
  return x;
}

}  // namespace qkv
