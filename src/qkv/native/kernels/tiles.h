// Weights in tiles of 16 outputs, and their product with up to 16 rows of activations.
//
// Packed: 32 inputs at a time, the four bytes of a lane being four consecutive inputs of one output, so that a dot
// product needs no sum across lanes. A tile is, for each 32 inputs,
//   numbers  4 bits: 4 × 64 bytes, inputs 0…15 in the low and 16…31 in the high nibbles; 8 bits: 8 × 64 bytes
//   scales   d: 16 halves, twice where each half of the 32 has its own; then the same for the minima m
// in one stream, since two would halve the speed at which memory is read. A weight is d (q − zero), or d q + m.
// Activations are quantised to 8 bits with a scale for each 32 of them.
// Dense: a tile is inputs × 16 floats, or inputs / 2 × 16 pairs of bfloats; activations are kept as the weights are.
//
// Every product adds in the same order whatever the number of rows: steps equal prefill, bit for bit.
#pragma once
#include <algorithm>

#include "simd.h"

namespace qkv {

constexpr int BLOCK = 32, ROWS = 16;

// A store is a few bits: 4 or 8 bits, halves with scales of their own, minima; or it is dense.
enum Store : int32_t { BITS8 = 1, HALVES = 2, MINIMA = 4, FLOAT = 8, BFLOAT = 9 };

inline bool dense(int store) { return store >= FLOAT; }

constexpr int numbers_bytes(int store) { return store & BITS8 ? 512 : 256; }
constexpr int scales_bytes(int store) { return 32 * (store & HALVES ? 2 : 1) * (store & MINIMA ? 2 : 1); }

constexpr int block_bytes(int store) { return numbers_bytes(store) + scales_bytes(store); }

// The columns of a dense tile, 64 bytes each, and what a row of activations has for each of them, 4 bytes.
inline int64_t columns(int store, int64_t inputs) { return store == FLOAT ? inputs : (inputs + 1) / 2; }

inline int64_t tile_bytes(int store, int64_t inputs) {
  if (dense(store)) return columns(store, inputs) * 64;
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
    const int32_t low = bytes(to.q + BLOCK * b, rounded(u * inverse));
    const int32_t all = low + bytes(to.q + BLOCK * b + LANES, rounded(v * inverse));
    to.blocks[b] = {most / 127, all, low, most / 127 * (float)all};
  }
}

// --- packed products ---

constexpr int AHEAD = 4096;  // bytes: how far one row, which reads weights as fast as memory gives them, looks ahead

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

// sums[t] += the dot products of 16 inputs, of which those of vectors v…v + 3, with tile t.
template <int S, int T>
inline void dots(I (&sums)[T], const I (&u)[T][8], int v, const int8_t* q) {
  for (int i = 0; i < 4; i++) {
    int32_t x;
    memcpy(&x, q + 4 * i, 4);
    for (int t = 0; t < T; t++) sums[t] = S & BITS8 ? dot8(sums[t], u[t][v + i], x) : dot4(sums[t], u[t][v + i], x);
  }
}

// What a product brings into the cache meanwhile: so many bytes for each 32 inputs.
struct Ahead {
  const uint8_t* at;
  int bytes;
};

// out[t][r][lane] = Σ over inputs, for T tiles side by side, `apart` bytes apart, and R rows.
template <int S, int T, int R>
void packed_tile(const uint8_t* w, int64_t apart, Activations x, float* out, Ahead ahead) {
  constexpr int zero = (S & MINIMA ? 0 : S & BITS8 ? 128 : 8) - (S & BITS8 ? TAKEN8 : 0);
  constexpr bool halves = S & HALVES, minima = S & MINIMA;
  const int blocks = x.inputs / BLOCK;
  F sums[T][R] = {};
  for (int b = 0; b < blocks; b++, w += block_bytes(S)) {
    I u[T][8];
    F d[T], d2[T], m[T], m2[T];
#pragma GCC unroll 2
    for (int t = 0; t < T; t++) {
      const half* scales = (const half*)(w + t * apart + numbers_bytes(S));
      numbers<S>(w + t * apart, u[t]);
      d[t] = load(scales), d2[t] = halves ? load(scales + LANES) : F{};
      m[t] = minima ? load(scales + LANES * (1 + halves)) : F{};
      m2[t] = minima && halves ? load(scales + 3 * LANES) : F{};
    }
    for (int at = 0; at < ahead.bytes; at += 64) __builtin_prefetch(ahead.at + at);
    ahead.at += ahead.bytes;
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const int8_t* q = x.q + (int64_t)r * x.inputs + BLOCK * b;
      const Block& block = x.blocks[r * blocks + b];
      const int high = block.sum - block.low;
      const bool two = halves || R == 1;  // sums: of the halves, or of one row, for the latency of a product
      I all[T], rest[T];
      for (int t = 0; t < T; t++) {
        all[t] = splat(-zero * (halves ? block.low : block.sum));
        rest[t] = splat(halves ? -zero * high : 0);
      }
      dots<S>(all, u, 0, q);
      dots<S>(two ? rest : all, u, 4, q + 16);
#pragma GCC unroll 2
      for (int t = 0; t < T; t++) {
        F& sum = sums[t][r];
        if constexpr (halves) {
          F y = fma(floats(all[t]), d[t], floats(rest[t]) * d2[t]);
          if (minima) y = fma(m[t], splat((float)block.low), fma(m2[t], splat((float)high), y));
          sum = fma(y, splat(block.scale), sum);
        } else {
          sum = fma(floats(two ? all[t] + rest[t] : all[t]) * d[t], splat(block.scale), sum);
          if (minima) sum = fma(m[t], splat(block.moment), sum);
        }
      }
    }
  }
  for (int t = 0; t < T; t++)
    for (int r = 0; r < R; r++) store(out + (t * ROWS + r) * LANES, sums[t][r]);
}

template <int S, int T>
void packed_some(int rows, const uint8_t* w, int64_t apart, Activations x, float* out, Ahead ahead) {
  switch (rows) {
    case 1: return packed_tile<S, T, 1>(w, apart, x, out, ahead);
    case 2: return packed_tile<S, T, 2>(w, apart, x, out, ahead);
    case 3: return packed_tile<S, T, 3>(w, apart, x, out, ahead);
    case 4: return packed_tile<S, T, 4>(w, apart, x, out, ahead);
  }
}

// Two tiles share what is read of the rows; for one or two rows each is read by itself, which memory gives faster.
// Each of several groups of rows brings its part of the next tiles.
template <int S>
void packed_rows(const uint8_t* w, int tiles, int64_t apart, Activations x, int rows, float* out, bool fresh) {
  const int blocks = x.inputs / BLOCK;
  const uint8_t* next = w + tiles * apart;
  for (int r = 0, some; r < rows; r += some) {
    some = rows - r == 5 ? 3 : std::min(rows - r, 4);  // a row by itself costs as much as two
    float* to = out + LANES * r;
    if (tiles == 2 && rows > 2) {
      const Ahead ahead{next, fresh ? 2 * block_bytes(S) * some / rows : 0};
      packed_some<S, 2>(some, w, apart, x.row(r), to, ahead);
      next += (int64_t)blocks * ahead.bytes;
    } else {
      for (int t = 0; t < tiles; t++) {
        const uint8_t* from = w + t * apart;
        const Ahead ahead{from + AHEAD, rows <= 2 ? block_bytes(S) : 0};
        packed_some<S, 1>(some, from, apart, x.row(r), to + t * ROWS * LANES, ahead);
      }
    }
  }
}

// One packed tile or two, and up to 16 rows → out[tile][row][16]. Tiles that are read for the first time are `fresh`.
inline void packed_tiles(int store, const uint8_t* w, int tiles, int64_t apart, Activations x, int rows, float* out,
                         bool fresh) {
  switch (store) {
    case 0: return packed_rows<0>(w, tiles, apart, x, rows, out, fresh);
    case BITS8: return packed_rows<BITS8>(w, tiles, apart, x, rows, out, fresh);
    case HALVES: return packed_rows<HALVES>(w, tiles, apart, x, rows, out, fresh);
    case BITS8 | HALVES: return packed_rows<BITS8 | HALVES>(w, tiles, apart, x, rows, out, fresh);
    case MINIMA: return packed_rows<MINIMA>(w, tiles, apart, x, rows, out, fresh);
    case BITS8 | MINIMA: return packed_rows<BITS8 | MINIMA>(w, tiles, apart, x, rows, out, fresh);
    case HALVES | MINIMA: return packed_rows<HALVES | MINIMA>(w, tiles, apart, x, rows, out, fresh);
    case BITS8 | HALVES | MINIMA: return packed_rows<BITS8 | HALVES | MINIMA>(w, tiles, apart, x, rows, out, fresh);
  }
}

// --- dense products ---

// A row of floats as bfloats; the last of an odd number makes a pair with 0.
inline void round_row(const float* x, int inputs, bfloat* to) {
  for (int k = 0; k < inputs; k += LANES) {
    bfloat some[LANES];
    round_to(some, load(x + k, inputs - k));
    memcpy(to + k, some, std::min<int>(LANES, 2 * columns(BFLOAT, inputs - k)) * sizeof(bfloat));
  }
}

template <int S>
inline F product(F sum, F column, F value) {
  return S == FLOAT ? fma(column, value, sum) : dot_pairs(sum, column, value);
}

// T tiles side by side keep enough sums in flight to hide the latency of a multiplication.
template <int S, int T, int R>
void dense_tile(const float* w, const float* x, int columns, float* out) {
  F sums[T][R] = {};
  for (int k = 0; k < columns; k++) {
    F column[T];
    for (int t = 0; t < T; t++) column[t] = load(w + LANES * (t * (int64_t)columns + k));
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const F value = splat(x[r * (int64_t)columns + k]);
#pragma GCC unroll 4
      for (int t = 0; t < T; t++) sums[t][r] = product<S>(sums[t][r], column[t], value);
    }
  }
  for (int t = 0; t < T; t++)
    for (int r = 0; r < R; r++) store(out + (t * ROWS + r) * LANES, sums[t][r]);
}

template <int S, int T>
void dense_rows(const float* w, const float* x, int columns, int rows, float* out) {
  for (int r = 0; r < rows;) {
    const int n = rows - r;
    const float* some = x + r * (int64_t)columns;
    float* to = out + LANES * r;
    if (n >= 6) dense_tile<S, T, 6>(w, some, columns, to), r += 6;
    else if (n >= 4) dense_tile<S, T, 4>(w, some, columns, to), r += 4;
    else if (n >= 2) dense_tile<S, T, 2>(w, some, columns, to), r += 2;
    else dense_tile<S, T, 1>(w, some, columns, to), r += 1;
  }
}

// `tiles` dense tiles and up to 16 rows → out[tile][row][16].
template <int S>
void dense_tiles(const uint8_t* at, int tiles, const float* x, int columns, int rows, float* out) {
  const float* w = (const float*)at;
  for (int t = 0; t < tiles;) {
    const float* from = w + t * (int64_t)columns * LANES;
    float* to = out + t * ROWS * LANES;
    if (tiles - t >= 4) dense_rows<S, 4>(from, x, columns, rows, to), t += 4;
    else if (tiles - t >= 2) dense_rows<S, 2>(from, x, columns, rows, to), t += 2;
    else dense_rows<S, 1>(from, x, columns, rows, to), t += 1;
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
      uint32_t bits = (uint32_t)((const bfloat*)w)[2 * (LANES * (k / 2) + lane) + k % 2].bits << 16;
      memcpy(out + k, &bits, 4);
    } else {
      out[k] = packed_weight(store, w, lane, k);
    }
  }
}

}  // namespace qkv
