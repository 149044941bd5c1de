// Mixers with a memory, token after token. A piece of work is a run of rows of one text and some of its channels or one
// of its heads, so that what a run computes does not depend on how it is cut.
#pragma once
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

// y_t = act(Σ_i w_i x_{t−k+1+i} + b), each of n ≤ 16 channels by itself. `held` are the last k − 1 inputs, channels apart
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

// h_t = e^{Δ_t A} h_{t−1} + Δ_t x_t B_t, y_t = (C_t h_t + D x_t) silu(z_t), for n ≤ 16 channels with N states each.
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

// S_t = e^{Δ_t A} S_{t−1} + k_t (Δ_t v_t)ᵀ, y_t = (S_tᵀ q_t + D v_t) silu(z_t) for one head: S is states × head_width.
// Row r holds v of all heads, then k, then q of all groups.
inline void recall(const Op& op, Rows in, Rows steps, Rows gate, Rows out, int rows, int head, float* S) {
  const int K = op.states, V = op.head_width, group = head / (op.heads / op.groups);
  const int64_t keys = (int64_t)op.heads * V + (int64_t)group * K, queries = keys + (int64_t)op.groups * K;
  for (int r = 0; r < rows; r++) {
    const float dt = steps.row(r)[head], *row = in.row(r), *k = row + keys, *q = row + queries;
    const float decay = exp(splat(dt * op.decay[head]))[0];
    sixteens(V, [&](int at, int n) {
      const F v = load(row + head * V + at, n), written = v * dt;
      F y = v * op.skip[head];
      for (int s = 0; s < K; s++) {
        float* place = S + (int64_t)s * V + at;
        const F state = fma(splat(decay), load(place, n), written * k[s]);
        store(place, state, n);
        y = fma(state, splat(q[s]), y);
      }
      if (gate.first) y *= activated(SILU, load(gate.row(r) + head * V + at, n), 0);
      store(out.row(r) + head * V + at, y, n);
    });
  }
}

}  // namespace qkv
