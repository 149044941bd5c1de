// Weights in tiles of 16 outputs, and their product with up to 16 rows of activations.
//
// Packed: 32 inputs at a time, the four bytes of a lane being four consecutive inputs of one output, so that a dot
// product needs no sum across lanes. A tile is, for each 32 inputs,
//   numbers  4 bits: 4 × 64 bytes, inputs 0…15 in the low and 16…31 in the high nibbles; 8 bits: 8 × 64 bytes
//   scales   d: 16 halves, twice where each half of the 32 has its own; then the same for the minima m
// in one stream, since two would halve the speed at which memory is read. A weight is d (q − zero), or d q + m.
// Activations are quantised to 8 bits with a scale for each 32 of them.
// Dense: a tile is inputs × 16 floats, or bfloats; activations stay floats.
//
// Every product adds in the same order whatever the number of rows: steps equal prefill, bit for bit.
#pragma once
#include "simd.h"

namespace qkv {

constexpr int BLOCK = 32, ROWS = 16;

// A store is a few bits: 4 or 8 bits, halves with scales of their own, minima; or it is dense.
enum Store : int32_t { BITS8 = 1, HALVES = 2, MINIMA = 4, FLOAT = 8, BFLOAT = 9 };

inline bool dense(int store) { return store >= FLOAT; }

constexpr int numbers_bytes(int store) { return store & BITS8 ? 512 : 256; }
constexpr int scales_bytes(int store) { return 32 * (store & HALVES ? 2 : 1) * (store & MINIMA ? 2 : 1); }

constexpr int block_bytes(int store) { return numbers_bytes(store) + scales_bytes(store); }

inline int64_t tile_bytes(int store, int64_t inputs) {
  if (store == FLOAT) return inputs * 64;
  if (store == BFLOAT) return inputs * 32;
  return (inputs / BLOCK * block_bytes(store) + 63) & ~63;
}

// --- activations ---

struct Block {  // what goes with 32 quantised activations x ≈ scale q
  float scale;
  int32_t sum, low;  // Σ q of all and of the first half
  float moment;      // scale × sum
};

struct Activations {  // of several rows
  int8_t* q;
  Block* blocks;
  int inputs;

  Activations row(int64_t r) const { return {q + r * inputs, blocks + r * (inputs / BLOCK), inputs}; }
};

// scale = max |x| / 127, q = x / scale rounded.
inline void quantise(const float* x, Activations to) {
  for (int b = 0; b < to.inputs / BLOCK; b++) {
    F u = load(x + BLOCK * b), v = load(x + BLOCK * b + LANES);
    float most = largest(max(abs(u), abs(v)));
    float inverse = most > 0 ? 127 / most : 0;
    I lo = rounded(u * inverse), hi = rounded(v * inverse);
    bytes(to.q + BLOCK * b, lo);
    bytes(to.q + BLOCK * b + LANES, hi);
    Block& block = to.blocks[b];
    block.scale = most / 127;
    block.low = sum(lo);
    block.sum = block.low + sum(hi);
    block.moment = block.scale * (float)block.sum;
  }
}

// --- packed products ---

constexpr int AHEAD = 4096;  // bytes to prefetch: one row reads weights as fast as memory gives them

template <int S>
inline void numbers(const uint8_t* w, I u[8]) {
  if constexpr (S & BITS8) {
    for (int v = 0; v < 8; v++) u[v] = load<I>(w + 64 * v);
  } else {
    for (int v = 0; v < 4; v++) {
      I both = load<I>(w + 64 * v);
      u[v] = both & 0x0f0f0f0f;
      u[v + 4] = (both >> 4) & 0x0f0f0f0f;
    }
  }
}

template <int S>
inline I dots(I sum, const I* u, const int8_t* q) {  // four vectors: 16 inputs
  for (int v = 0; v < 4; v++) {
    int32_t x;
    memcpy(&x, q + 4 * v, 4);
    sum = S & BITS8 ? dot8(sum, u[v], x) : dot4(sum, u[v], x);
  }
  return sum;
}

// out[r][lane] = Σ over inputs, for R rows and one tile.
template <int S, int R>
void tile(const uint8_t* w, Activations x, float* out) {
  constexpr int zero = (S & MINIMA ? 0 : S & BITS8 ? 128 : 8) - (S & BITS8 ? TAKEN8 : 0);
  constexpr bool halves = S & HALVES, minima = S & MINIMA;
  const int blocks = x.inputs / BLOCK;
  F sums[R] = {};
  for (int b = 0; b < blocks; b++, w += block_bytes(S)) {
    const half* scales = (const half*)(w + numbers_bytes(S));
    I u[8];
    numbers<S>(w, u);
    if (R == 1)
      for (int at = 0; at < block_bytes(S); at += 64) __builtin_prefetch(w + AHEAD + at);
    F d = load(scales), d2 = halves ? load(scales + LANES) : F{};
    F m = minima ? load(scales + LANES * (1 + halves)) : F{}, m2 = minima && halves ? load(scales + 3 * LANES) : F{};
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const int8_t* q = x.q + (int64_t)r * x.inputs + BLOCK * b;
      const Block& block = x.blocks[r * blocks + b];
      if constexpr (halves) {
        int high = block.sum - block.low;
        I lo = dots<S>(splat(-zero * block.low), u, q), hi = dots<S>(splat(-zero * high), u + 4, q + 16);
        F y = fma(floats(lo), d, floats(hi) * d2);
        if (minima) y = fma(m, splat((float)block.low), fma(m2, splat((float)high), y));
        sums[r] = fma(y, splat(block.scale), sums[r]);
      } else {
        I all = splat(-zero * block.sum);
        all = R == 1 ? dots<S>(all, u, q) + dots<S>(I{}, u + 4, q + 16) : dots<S>(dots<S>(all, u, q), u + 4, q + 16);
        sums[r] = fma(floats(all) * d, splat(block.scale), sums[r]);
        if (minima) sums[r] = fma(m, splat(block.moment), sums[r]);
      }
    }
  }
  for (int r = 0; r < R; r++) store(out + LANES * r, sums[r]);
}

template <int S>
void tile_rows(const uint8_t* w, Activations x, int rows, float* out) {
  for (int r = 0; r < rows;) {
    int n = rows - r;
    auto some = x.row(r);
    float* to = out + LANES * r;
    if (n >= 16) tile<S, 16>(w, some, to), r += 16;
    else if (n >= 8) tile<S, 8>(w, some, to), r += 8;
    else if (n >= 4) tile<S, 4>(w, some, to), r += 4;
    else if (n >= 2) tile<S, 2>(w, some, to), r += 2;
    else tile<S, 1>(w, some, to), r += 1;
  }
}

// One packed tile and up to 16 rows → out[row][16].
inline void packed_tile(int store, const uint8_t* w, Activations x, int rows, float* out) {
  switch (store) {
    case 0: return tile_rows<0>(w, x, rows, out);
    case BITS8: return tile_rows<BITS8>(w, x, rows, out);
    case HALVES: return tile_rows<HALVES>(w, x, rows, out);
    case BITS8 | HALVES: return tile_rows<BITS8 | HALVES>(w, x, rows, out);
    case MINIMA: return tile_rows<MINIMA>(w, x, rows, out);
    case BITS8 | MINIMA: return tile_rows<BITS8 | MINIMA>(w, x, rows, out);
    case HALVES | MINIMA: return tile_rows<HALVES | MINIMA>(w, x, rows, out);
    case BITS8 | HALVES | MINIMA: return tile_rows<BITS8 | HALVES | MINIMA>(w, x, rows, out);
  }
}

// --- dense products ---

// T tiles side by side keep enough sums in flight to hide the latency of a multiplication.
template <class W, int T, int R>
void dense_tile(const W* w, int64_t stride, const float* x, int64_t width, int inputs, float* out, int64_t apart) {
  F sums[T][R] = {};
  for (int k = 0; k < inputs; k++) {
    F column[T];
    for (int t = 0; t < T; t++) column[t] = load(w + t * stride + LANES * k);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      F value = splat(x[r * width + k]);
#pragma GCC unroll 4
      for (int t = 0; t < T; t++) sums[t][r] = fma(column[t], value, sums[t][r]);
    }
  }
  for (int t = 0; t < T; t++)
    for (int r = 0; r < R; r++) store(out + t * apart + LANES * r, sums[t][r]);
}

template <class W, int T>
void dense_rows(const W* w, int64_t stride, const float* x, int64_t width, int inputs, int rows, float* out,
                int64_t apart) {
  for (int r = 0; r < rows;) {
    int n = rows - r;
    const float* some = x + r * width;
    float* to = out + LANES * r;
    if (n >= 6) dense_tile<W, T, 6>(w, stride, some, width, inputs, to, apart), r += 6;
    else if (n >= 4) dense_tile<W, T, 4>(w, stride, some, width, inputs, to, apart), r += 4;
    else if (n >= 2) dense_tile<W, T, 2>(w, stride, some, width, inputs, to, apart), r += 2;
    else dense_tile<W, T, 1>(w, stride, some, width, inputs, to, apart), r += 1;
  }
}

// `tiles` dense tiles and up to 16 rows (`width` floats apart) → out[tile][row][16], tiles `apart` floats apart.
template <class W>
void dense_tiles(const uint8_t* at, int tiles, const float* x, int64_t width, int inputs, int rows, float* out,
                 int64_t apart) {
  const W* w = (const W*)at;
  const int64_t stride = (int64_t)inputs * LANES;
  for (int t = 0; t < tiles;) {
    const W* from = w + t * stride;
    float* to = out + t * apart;
    if (tiles - t >= 4) dense_rows<W, 4>(from, stride, x, width, inputs, rows, to, apart), t += 4;
    else if (tiles - t >= 2) dense_rows<W, 2>(from, stride, x, width, inputs, rows, to, apart), t += 2;
    else dense_rows<W, 1>(from, stride, x, width, inputs, rows, to, apart), t += 1;
  }
}

// --- one row of a matrix, for embeddings ---

inline float packed_weight(int store, const uint8_t* w, int lane, int k) {
  int b = k / BLOCK, i = k % BLOCK;
  const uint8_t* n = w + (int64_t)b * block_bytes(store);
  const half* scales = (const half*)(n + numbers_bytes(store)) + lane;
  int q;
  if (store & BITS8) {
    q = n[64 * (i / 4) + 4 * lane + i % 4];
  } else {
    int both = n[64 * (i % 16 / 4) + 4 * lane + i % 4];
    q = i < 16 ? both & 15 : both >> 4;
  }
  int second = store & HALVES && i >= 16;
  float d = to_float(scales[LANES * second]);
  if (store & MINIMA) return d * q + to_float(scales[LANES * ((store & HALVES ? 2 : 1) + second)]);
  return d * (q - (store & BITS8 ? 128 : 8));
}

inline void matrix_row(int store, const uint8_t* weight, int inputs, int row, float* out) {
  const uint8_t* w = weight + row / LANES * tile_bytes(store, inputs);
  int lane = row % LANES;
  for (int k = 0; k < inputs; k++) {
    if (store == FLOAT) {
      out[k] = ((const float*)w)[LANES * k + lane];
    } else if (store == BFLOAT) {
      uint32_t bits = (uint32_t)((const bfloat*)w)[LANES * k + lane].bits << 16;
      memcpy(out + k, &bits, 4);
    } else {
      out[k] = packed_weight(store, w, lane, k);
    }
  }
}

}  // namespace qkv
