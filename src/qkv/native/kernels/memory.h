// Mixers with a memory, token after token. A piece of work is a run of rows of one text and some of its channels or one
// of its heads, so that what a run computes does not depend on how it is cut.
#pragma once
#include <algorithm>

#include "attention.h"
#include "norm.h"
#include "program.h"
#include "simd.h"

namespace qkv {

// A row of a buffer: its beginning, and how far apart rows are.
struct Rows {
  float* first;
  int64_t width;

  float* row(int64_t r) const { return first + r * width; }
};

// y_t = act(Σ_i w_i x_{t−k+1+i} + b), each of n ≤ LANES channels by itself. `held` are the last k − 1 inputs, channels apart
// `op.inputs`; weights are k × op.inputs.
inline void convolve(const Op& op, Rows in, Rows out, int rows, int channel, int n, float* held) {
  const int taps = op.taps;
  const float* w = (const float*)op.weight + channel;
  const F bias = op.bias ? load(op.bias + channel, n) : F{};
  for (int r = 0; r < rows; r++) {
    F y = bias, now = load(in.row(r) + channel, n);
    for (int i = 0; i < taps - 1; i++) {
      float* place = held + (int64_t)i * op.inputs + channel;
      F x = load(place, n);
      y = fma(x, load(w + (int64_t)i * op.inputs, n), y);
      if (i) store(place - op.inputs, x, n);
    }
    if (taps > 1) store(held + (int64_t)(taps - 2) * op.inputs + channel, now, n);
    y = fma(now, load(w + (int64_t)(taps - 1) * op.inputs, n), y);
    store(out.row(r) + channel, activated(op.act, y, 0), n);
  }
}

// h_t = e^{Δ_t A} h_{t−1} + Δ_t x_t B_t, y_t = (C_t h_t + D x_t) silu(z_t), for n ≤ LANES channels with N states each.
// A and h are N × channels; B and C stand side by side in a row of `keys`.
inline void scan(const Op& op, Rows x, Rows steps, Rows keys, Rows gate, Rows out, int rows, int channel, int n,
                 float* h) {
  const int N = op.states;
  const float* A = op.decay + channel;
  const F D = load(op.skip + channel, n);
  for (int r = 0; r < rows; r++) {
    const F u = load(x.row(r) + channel, n), dt = load(steps.row(r) + channel, n), written = dt * u;
    const float *B = keys.row(r), *C = B + N;
    F y = D * u;
    for (int s = 0; s < N; s++) {
      float* place = h + (int64_t)s * op.inputs + channel;
      F state = fma(exp(dt * load(A + (int64_t)s * op.inputs, n)), load(place, n), written * B[s]);
      store(place, state, n);
      y = fma(state, splat(C[s]), y);
    }
    if (gate.first) y *= activated(SILU, load(gate.row(r) + channel, n), 0);
    store(out.row(r) + channel, y, n);
  }
}

// φ(x) of one head of a query or key, in place, then turned by its position:
//   POINTWISE act(x) · POSITIVE elu(x) + 1 · SOFTMAX softmax(x) · UNIT act(x) / √(Σ act(x)² + ε)
inline void feature(const Op& op, float* x, int position) {
  const int n = op.head_width;
  F top = splat(-INFINITY);
  if (op.feature == SOFTMAX)
    for (int i = 0; i < n; i++) top = max(top, splat(x[i]));
  vectors(n, [&](int at, int some) {
    F v = load(x + at, some);
    switch (op.feature) {
      case POINTWISE:
      case UNIT: v = activated(op.act, v, 0); break;
      case POSITIVE: v = choose(v > 0, v + 1.0f, exp(v)); break;
      case SOFTMAX: v = exp(v - top); break;
    }
    store(x + at, v, some);
  });
  if (op.feature == SOFTMAX || op.feature == UNIT) {
    const float scale = op.feature == UNIT ? 1 / std::sqrt(squares(x, n, 0) + op.eps) : 1 / total(x, n);
    vectors(n, [&](int at, int some) { store(x + at, load(x + at, some) * scale, some); });
  }
  const int64_t row = (int64_t)position * op.turned / 2;
  if (op.turned) rotate(x, op.turned, op.cos + row, op.sin + row);
}

// What is left of the memories of a group of heads when a token comes: e^{a softplus(x)}, or e^{a e^x} if `act` is not
// SOFTPLUS; for an EXPONENTIAL rule its logarithm. Without an `a` the key is tied to it, k = most σ(−x), and 1 − k left.
inline void decay(const Op& op, const float* x, float* out, float* keys, int group) {
  const int n = op.shares, heads = op.heads / op.groups;
  vectors(n, [&](int at, int some) {
    F y = load(x + at, some);
    if (op.decay) {
      y = (op.act == SOFTPLUS ? softplus(y) : exp(y)) * op.decay[group];
      if (op.rule != EXPONENTIAL) y = exp(y);
    } else {
      store(keys + at, op.most * sigmoid(-y), some);
      y = fma(splat(op.most), sigmoid(y), splat(1 - op.most));
    }
    for (int h = 0; h < heads; h++) store(out + (int64_t)(group * heads + h) * n + at, y, some);
  });
}

// S_t = rule(e^{g_t} ⊙ S_{t−1}, k_t, v_t), y_t = scale S_tᵀ q_t + D v_t for one head, then y act(z), or act(z) norm(y).
//   STEP e^g = e^{Δ a}, writes k (Δ v)ᵀ · SUM writes k vᵀ · MEAN the same, read as y / (n·q + ε)
//   DELTA writes most β k (v − (e^g ⊙ S)ᵀ k)ᵀ · EXPONENTIAL writes e^i k vᵀ, read as y / (max(|n·q|, 1) + ε)
//   BONUS writes k vᵀ once S_{t−1} + (u ⊙ k) vᵀ has been read
// A row of `in` holds v of all heads, then k, then q of all groups; one of `steps` Δ, or e^g (1 or K to a head), or g
// where it is EXPONENTIAL; none, or a constant a beside none, is the same decay for all tokens.
// S is K × V, in blocks of at most 4 vectors of columns, each by itself; after those of all heads come n (K) and m of each.
struct Recall {
  const Op& op;
  Rows in, steps, writes, gate, out;
  int rows, head;
  float* state;

  int64_t K = op.states, V = op.head_width, value = head * V;
  int64_t key = op.heads * V + head / (op.heads / op.groups) * K, query = key + op.groups * K;

  void all() const {
    if (op.rule == EXPONENTIAL) level(state + op.heads * (K * V + K) + head);
    for (int at = 0; at < V; at += 4 * LANES) switch (std::min<int>(V - at + LANES - 1, 4 * LANES) / LANES) {
        case 4: block<4>(at); break;
        case 3: block<3>(at); break;
        case 2: block<2>(at); break;
        case 1: block<1>(at); break;
      }
    if (op.rule == MEAN || op.rule == EXPONENTIAL) divide(state + op.heads * K * V + head * K);
    for (int r = 0; r < rows; r++) finish(r);
  }

  // e^g where it is one number.
  float share(int r) const {
    const float step = steps.first ? steps.row(r)[head] : 1;
    return op.decay && op.rule != EXPONENTIAL ? exp(splat(op.decay[head] * step))[0] : step;
  }

  float written(int r) const {
    switch (op.rule) {
      case STEP: return steps.row(r)[head];
      case DELTA: return op.most * writes.row(r)[head];
      case EXPONENTIAL: return writes.row(r)[head];
      default: return 1;
    }
  }

  // All is held divided by e^m, the largest weight in it: m_t = max(g_t + m_{t−1}, i_t). Afterwards `steps` holds
  // e^{g_t + m_{t−1} − m_t}, and `writes` e^{i_t − m_t} and, a row of heads further on, e^{−m_t}.
  void level(float* m) const {
    for (int r = 0; r < rows; r++) {
      float *g = steps.row(r) + head * op.shares, *i = writes.row(r) + head;
      if (op.decay) *g = op.decay[head];
      const float now = std::max(*std::max_element(g, g + op.shares) + *m, *i), less = *m - now;
      vectors(op.shares, [&](int at, int n) { store(g + at, exp(load(g + at, n) + less), n); });
      const F both = exp(F{*i - now, -now});
      i[0] = both[0], i[op.heads] = both[1], *m = now;
    }
  }

  template <int N>
  void block(int at) const {
    switch (op.rule) {
      case DELTA: return op.shares > 1 ? columns<N, DELTA, true>(at) : columns<N, DELTA, false>(at);
      case BONUS: return op.shares > 1 ? columns<N, BONUS, true>(at) : columns<N, BONUS, false>(at);
      default: return op.shares > 1 ? columns<N, SUM, true>(at) : columns<N, SUM, false>(at);
    }
  }

  // N vectors of columns from `at` on, the last of them perhaps not whole.
  template <int N, Rule RULE, bool EACH>
  void columns(int at) const {
    const int last = std::min<int64_t>(LANES, V - at - (N - 1) * LANES), wide = (N - 1) * LANES + last;
    auto some = [&](int u) { return u == N - 1 ? last : LANES; };
    float* S = state + head * K * V + at * K;
    for (int r = 0; r < rows; r++) {
      const float *row = in.row(r), *k = row + key, *q = row + query, *left = EACH ? steps.row(r) + head * K : nullptr;
      const float one = EACH ? 1 : share(r), write = written(r);
      F v[N], y[N] = {};
      for (int u = 0; u < N; u++) v[u] = load(row + value + at + u * LANES, some(u));
      if (RULE == DELTA) {
        F held[N] = {};
        for (int s = 0; s < K; s++) {
          const F by = splat(k[s] * (EACH ? left[s] : one));
          for (int u = 0; u < N; u++) held[u] = fma(load(S + s * wide + u * LANES, some(u)), by, held[u]);
        }
        for (int u = 0; u < N; u++) v[u] -= held[u];
      }
      for (int u = 0; u < N; u++) v[u] *= write;
      if (RULE == BONUS) {
        F own{};
        vectors(K, [&](int s, int n) {
          own = fma(load(op.skip + head * K + s, n) * load(k + s, n), load(q + s, n), own);
        });
        for (int u = 0; u < N; u++) y[u] = v[u] * sum(own);
      }
      for (int s = 0; s < K; s++) {
        const F by = splat(EACH ? left[s] : one);
        for (int u = 0; u < N; u++) {
          float* place = S + s * wide + u * LANES;
          const F before = load(place, some(u)), now = fma(before, by, v[u] * k[s]);
          store(place, now, some(u));
          y[u] = fma(RULE == BONUS ? before : now, splat(q[s]), y[u]);
        }
      }
      for (int u = 0; u < N; u++) store(out.row(r) + value + at + u * LANES, y[u], some(u));
    }
  }

  // n_t = e^{g_t} ⊙ n_{t−1} + e^i k_t, what S would hold in a column of ones.
  void divide(float* n) const {
    for (int r = 0; r < rows; r++) {
      const float *row = in.row(r), *left = op.shares > 1 ? steps.row(r) + head * K : nullptr;
      const float one = left ? 1 : share(r), write = written(r);
      F sums{};
      vectors(K, [&](int at, int some) {
        const F by = left ? load(left + at, some) : splat(one);
        const F now = fma(load(n + at, some), by, load(row + key + at, some) * write);
        store(n + at, now, some);
        sums = fma(now, load(row + query + at, some), sums);
      });
      float whole = sum(sums) * op.scale;
      if (op.rule == EXPONENTIAL) whole = std::max(std::fabs(whole), writes.row(r)[op.heads + head]);
      vectors(V, [&](int at, int some) {
        float* y = out.row(r) + value + at;
        store(y, load(y, some) / (whole + op.least), some);
      });
    }
  }

  void finish(int r) const {
    float* y = out.row(r) + value;
    vectors(V, [&](int at, int n) {
      F x = load(y + at, n) * op.scale;
      if (op.rule == STEP) x = fma(load(in.row(r) + value + at, n), splat(op.skip[head]), x);
      store(y + at, x, n);
    });
    const float* bias = op.norm_bias ? op.norm_bias + value : nullptr;
    if (op.norm) norm_row(op.norm, y, V, op.eps, op.norm_weight + value, bias, y);
    if (!gate.first) return;
    vectors(V, [&](int at, int n) {
      store(y + at, load(y + at, n) * activated(op.act, load(gate.row(r) + value + at, n), 0), n);
    });
  }
};

}  // namespace qkv
