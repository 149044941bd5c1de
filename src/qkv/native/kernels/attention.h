// Attention over a paged cache. In a page, for each head of keys and values:
//   keys    PAGE/LANES × head_width × LANES   positions side by side, so that a score needs no sum across lanes
//   values  PAGE × width                      width is head_width rounded up to whole vectors
#pragma once
#include <algorithm>

#include "norm.h"
#include "program.h"
#include "simd.h"

namespace qkv {

constexpr int QUERIES = 8;  // rows of scores that are computed side by side

inline int padded(int width) { return (width + LANES - 1) / LANES * LANES; }

// --- writing ---

inline void rotate(float* x, int turned, const float* cos, const float* sin) {
  const int n = turned / 2;
  vectors(n, [&](int at, int some) {
    F a = load(x + at, some), b = load(x + n + at, some), c = load(cos + at, some), s = load(sin + at, some);
    store(x + at, a * c - b * s, some);
    store(x + n + at, b * c + a * s, some);
  });
}

// One head of one row: of the queries (normalised, turned, scaled in place), the keys or the values (into the cache).
template <class T>
void write_head(const Op& op, const Call& call, int row, int head, float* x) {
  const int heads = op.heads, groups = op.groups, width = op.head_width, position = call.positions[row];
  const bool query = head < heads, key = !query && head < heads + groups;
  if (query && op.query_weight) norm_row(op.norm, x, width, op.eps, op.query_weight, op.query_bias, x);
  if (key && op.key_weight) norm_row(op.norm, x, width, op.key_eps, op.key_weight, op.key_bias, x);
  if ((query || key) && op.turned)
    rotate(x, op.turned, op.cos + (int64_t)position * op.turned / 2, op.sin + (int64_t)position * op.turned / 2);
  if (query) {
    vectors(width, [&](int at, int some) { store(x + at, load(x + at, some) * op.scale, some); });
    return;
  }
  const Cache& cache = op.memory ? call.memory : call.text;
  uint8_t* page = cache.page(call.slots[row], position / PAGE);
  const int at = position % PAGE, group = (head - heads) % groups;
  if (key) {
    T* keys = (T*)(page + op.keys_at) + (int64_t)group * PAGE * width + at / LANES * LANES * width + at % LANES;
    vectors(width, [&](int i, int some) {
      T column[LANES];
      kept(load(x + i, some), column);
      for (int k = 0; k < some; k++) keys[LANES * (i + k)] = column[k];
    });
  } else {
    T* values = (T*)(page + op.values_at) + ((int64_t)group * PAGE + at) * padded(width);
    vectors(width, [&](int i, int some) { kept(load(x + i, some), values + i); });  // whose rows are whole vectors
  }
}

// --- reading ---

struct Query {
  const float* q;
  float* out;
  const float* distance;  // what a score gains, at the key's position; or none
  int from, to;           // the positions that it sees
};

// softmax(q K) V for N queries of one head, a vector of positions at a time; `scores` holds N rows of `stride` floats.
// What each query sums, and in what order, does not depend on the queries beside it.
template <class T, int N>
void attend(const Op& op, const Cache& cache, int text, int group, const Query* queries, float* scores, int stride) {
  constexpr int SIDES = (N + 1) * 4 < REGISTERS ? 4 : (N + 1) * 2 < REGISTERS ? 2 : 1;  // sums for each query
  const int width = op.head_width, wide = padded(width);
  int from = queries[0].from, to = queries[0].to;
  for (int i = 1; i < N; i++) from = std::min(from, queries[i].from), to = std::max(to, queries[i].to);
  const int first = from / LANES, last = (std::max(to, from) + LANES - 1) / LANES;
  const I lane = counted();
  F most[N];
  for (int i = 0; i < N; i++) most[i] = splat(-INFINITY);
  const auto score = [&]<int SIDE>(int b) {  // `SIDE` vectors of keys, which share what is read of the queries
    const T* keys = (const T*)(cache.page(text, b * LANES / PAGE) + op.keys_at) +
                    ((int64_t)group * PAGE + b * LANES % PAGE) * width;
    F sums[N][SIDE] = {};
    for (int k = 0; k < width; k++) {
      F column[SIDE];
      for (int u = 0; u < SIDE; u++) column[u] = load(keys + LANES * (u * width + k));
#pragma GCC unroll 8
      for (int i = 0; i < N; i++)
#pragma GCC unroll 4
        for (int u = 0; u < SIDE; u++) sums[i][u] = fma(column[u], splat(queries[i].q[k]), sums[i][u]);
    }
    for (int i = 0; i < N; i++)
      for (int u = 0; u < SIDE; u++) {
        const I at = lane + (b + u) * LANES;
        F s = sums[i][u];
        if (op.softcap) s = activated(SOFTCAP, s, op.softcap);
        if (queries[i].distance) s += load(queries[i].distance + (b + u) * LANES);
        s = choose((at >= queries[i].from) & (at < queries[i].to), s, splat(-INFINITY));
        most[i] = max(most[i], s);
        store(scores + (int64_t)i * stride + (b + u - first) * LANES, s);
      }
    return b + SIDE;
  };
  for (int b = first; b < last;) {
    const int whole = b % 4 ? b % 2 ? 1 : 2 : 4;  // no more than its page holds
    const int side = std::min({last - b, whole, SIDES});
    if constexpr (SIDES >= 4)
      if (side == 4) {
        b = score.template operator()<4>(b);
        continue;
      }
    if constexpr (SIDES >= 2)
      if (side >= 2) {
        b = score.template operator()<2>(b);
        continue;
      }
    b = score.template operator()<1>(b);
  }
  float inverse[N];
  for (int i = 0; i < N; i++) {
    const float top = largest(most[i]);
    F all{};
    for (int b = 0; b < last - first; b++) {
      float* p = scores + (int64_t)i * stride + b * LANES;
      F s = load(p);
      F e = choose(s > -INFINITY, exp(s - top), F{});
      all += e;
      store(p, e);
    }
    const float whole = sum(all);
    inverse[i] = whole > 0 ? 1 / whole : 0;  // a query that sees nothing gives zeros
  }
  const auto mix = [&]<int SIDE>(int c) {  // `SIDE` vectors of values, from column c on
    F sums[N][SIDE] = {};
    for (int b = first; b < last; b++) {
      const T* values = (const T*)(cache.page(text, b * LANES / PAGE) + op.values_at) +
                        ((int64_t)group * PAGE + b * LANES % PAGE) * wide + c;
      const float* p = scores + (b - first) * LANES;
      const int begin = std::max(0, from - b * LANES), end = std::min(LANES, to - b * LANES);
      for (int j = begin; j < end; j++) {
        F v[SIDE];
        for (int u = 0; u < SIDE; u++) v[u] = load(values + (int64_t)j * wide + u * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < N; i++)
#pragma GCC unroll 4
          for (int u = 0; u < SIDE; u++) sums[i][u] = fma(v[u], splat(p[(int64_t)i * stride + j]), sums[i][u]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; i++)
#pragma GCC unroll 4
      for (int u = 0; u < SIDE; u++) {
        const int at = c + u * LANES;
        if (at < width) store(queries[i].out + at, sums[i][u] * inverse[i], width - at);
      }
    return c + SIDE * LANES;
  };
  for (int c = 0; c < wide;)
    c = wide - c >= SIDES * LANES ? mix.template operator()<SIDES>(c) : mix.template operator()<1>(c);
}

template <class T>
void attend_all(const Op& op, const Cache& cache, int text, int group, const Query* queries, int n, float* scores,
                int stride) {
  constexpr int MANY = REGISTERS < 32 ? 6 : 8;  // queries that read keys and values together
  while (n > 0) {
    const int some = n >= MANY ? MANY : std::min(n, 4);
    switch (some) {
      case MANY: attend<T, MANY>(op, cache, text, group, queries, scores, stride); break;
      case 4: attend<T, 4>(op, cache, text, group, queries, scores, stride); break;
      case 3: attend<T, 3>(op, cache, text, group, queries, scores, stride); break;
      case 2: attend<T, 2>(op, cache, text, group, queries, scores, stride); break;
      case 1: attend<T, 1>(op, cache, text, group, queries, scores, stride); break;
    }
    queries += some, n -= some;
  }
}

}  // namespace qkv
