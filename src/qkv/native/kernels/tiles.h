// Weights in tiles of so many outputs as a vector has lanes, and their product with up to 16 rows of activations.
//
// Packed: 32 inputs at a time, the four bytes of a lane being four consecutive inputs of one output, so that a dot
// product needs no sum across lanes. A tile is, for each 32 inputs,
//   numbers  4 bits: 4 vectors, inputs 0…15 in the low and 16…31 in the high nibbles; 8 bits: 8 vectors
//   scales   d: a half for each lane, twice where each half of the 32 has its own; then the same for the minima m
// in one stream, since two would halve the speed at which memory is read. A weight is d (q − zero), or d q + m.
// Activations are quantised to 8 bits with a scale for each 32 of them.
// Dense: a tile is inputs × lanes floats, or inputs / 2 × lanes pairs of bfloats; activations are kept as the weights
// are, or as floats where no instruction multiplies pairs.
//
// Every product adds in the same order whatever the number of rows: steps equal prefill, bit for bit.
#pragma once
#include <algorithm>

#include "dot.h"

namespace qkv {

constexpr int BLOCK = 32, ROWS = 16;

// A store is a few bits: 4 or 8 bits, halves with scales of their own, minima; or it is dense.
enum Store : int32_t { BITS8 = 1, HALVES = 2, MINIMA = 4, FLOAT = 8, BFLOAT = 9 };

inline bool dense(int store) { return store >= FLOAT; }

constexpr int VECTOR = 4 * LANES;  // bytes
constexpr int numbers_bytes(int store) { return VECTOR * (store & BITS8 ? 8 : 4); }
constexpr int scales_bytes(int store) { return 2 * LANES * (store & HALVES ? 2 : 1) * (store & MINIMA ? 2 : 1); }

constexpr int block_bytes(int store) { return numbers_bytes(store) + scales_bytes(store); }

// The columns of a dense tile, a vector each, and how many times 4 bytes a row of activations has for each of them.
inline int64_t columns(int store, int64_t inputs) { return store == FLOAT ? inputs : (inputs + 1) / 2; }
constexpr int words(int store) { return store == FLOAT || PAIRED ? 1 : 2; }

inline int64_t tile_bytes(int store, int64_t inputs) {
  if (dense(store)) return columns(store, inputs) * VECTOR;
  return (inputs / BLOCK * block_bytes(store) + 63) & ~63;
}

// --- activations ---

constexpr int four_bytes(int store) { return store & BITS8 ? Dot<true>::BYTES : Dot<false>::BYTES; }

// What stands for 0 among the numbers of a store, as products see them.
constexpr int zero_of(int store) {
  const int kept = store & MINIMA ? 0 : store & BITS8 ? 128 : 8;
  return kept - (store & BITS8 ? Dot<true>::TAKEN : Dot<false>::TAKEN);
}

struct Block {  // what goes with 32 quantised activations x ≈ scale q
  float scale, moment;  // moment = scale Σ q
  float sums[2];        // Σ q of each half
  int32_t from[2];      // what a product's sums begin with: −zero Σ q of all, or where the halves have scales, of each
};

struct Activations {  // of several rows
  int8_t* q;
  Block* blocks;
  int inputs;
  int store;  // of the weights they are multiplied with

  Activations row(int64_t r) const {
    return {q + r * inputs / 4 * four_bytes(store), blocks + r * (inputs / BLOCK), inputs, store};
  }
};

// scale = max |x| / 127, q = x / scale rounded.
template <int BYTES>
void quantise(const float* x, Activations to) {
  constexpr int VECTORS = BLOCK / LANES;
  const int zero = zero_of(to.store);
  const bool halves = to.store & HALVES;
  for (int b = 0; b < to.inputs / BLOCK; b++) {
    F some[VECTORS], magnitude{};
    for (int v = 0; v < VECTORS; v++) {
      some[v] = load(x + BLOCK * b + LANES * v);
      magnitude = max(magnitude, abs(some[v]));
    }
    const float most = largest(magnitude), inverse = most > 0 ? 127 / most : 0;
    int32_t sums[2] = {};
    for (int v = 0; v < VECTORS; v++)
      sums[2 * v / VECTORS] += small<BYTES>(to.q + (BLOCK * b + LANES * v) / 4 * BYTES, rounded(some[v] * inverse));
    const int32_t all = sums[0] + sums[1], first = halves ? sums[0] : all, last = halves ? sums[1] : 0;
    to.blocks[b] = {most / 127, most / 127 * all, {(float)sums[0], (float)sums[1]}, {-zero * first, -zero * last}};
  }
}

inline void quantise(const float* x, Activations to) {
  four_bytes(to.store) == 4 ? quantise<4>(x, to) : quantise<Dot<true>::BYTES>(x, to);
}

// --- packed products ---

// How many bytes one row, which reads weights as fast as memory gives them, looks ahead.
constexpr int AHEAD = LANES < 16 ? 1536 : 4096;

// What a product of tiles brings into the cache meanwhile: so many bytes for each 32 inputs.
struct Ahead {
  const uint8_t* at;
  int bytes;
};

// What 32 inputs of a tile are multiplied with after they have been added up in whole numbers.
template <int S>
struct Scales {
  static constexpr bool halves = S & HALVES, minima = S & MINIMA;
  using Product = Dot<(S & BITS8) != 0>;
  using Sum = typename Product::Sum;
  F d, d2, m, m2;

  explicit Scales(const half* p)
      : d(load(p)), d2(halves ? load(p + LANES) : F{}), m(minima ? load(p + LANES * (1 + halves)) : F{}),
        m2(minima && halves ? load(p + 3 * LANES) : F{}) {}

  // What a sum begins with: nothing, where no weight is shifted.
  static int from(const Block& block, int half) { return zero_of(S) ? block.from[half] : 0; }

  // y + scale (d Σ + m Σ q), for the sums of the halves where they have scales of their own; else `low` is that of all.
  F add(F y, Sum low, Sum high, const Block& block) const {
    F one = floats(Product::total(low, from(block, 0)));
    if constexpr (halves) {
      one = fma(one, d, floats(Product::total(high, from(block, 1))) * d2);
      if (minima) one = fma(m, splat(block.sums[0]), fma(m2, splat(block.sums[1]), one));
      return fma(one, splat(block.scale), y);
    }
    y = fma(one * d, splat(block.scale), y);
    return minima ? fma(m, splat(block.moment), y) : y;
  }
};

// out[t][r][lane] = Σ over inputs, for T tiles side by side, `apart` bytes apart, and R rows.
template <int S, int T, int R>
void packed_tile(const uint8_t* w, int64_t apart, Activations x, float* out, Ahead ahead) {
  using Product = typename Scales<S>::Product;
  constexpr bool halves = S & HALVES, two = halves || R == 1;  // sums: of each half, or of one row, for their latency
  constexpr int four = Product::BYTES;
  const int blocks = x.inputs / BLOCK;
  const int64_t row = (int64_t)x.inputs / 4 * four;
  F sums[T][R] = {};
  for (int b = 0; b < blocks; b++, w += block_bytes(S)) {
    const int bytes = T == 1 ? block_bytes(S) : ahead.bytes;
    for (int at = 0; at < bytes; at += 64) __builtin_prefetch(ahead.at + at);
    ahead.at += bytes;
    typename Product::Sum all[2][T][R];
    for (int h = 0; h < 2; h++)
      for (int t = 0; t < T; t++)
        for (int r = 0; r < R; r++) all[h][t][r] = Product::begin(Scales<S>::from(x.blocks[r * blocks + b], h));
    const auto multiply = [&, q = x.q + BLOCK / 4 * four * b](int v, const auto& u) {
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) {
          auto& sum = all[two ? v / 4 : 0][t][r];
          sum = Product::add(sum, u[t], q + r * row + four * v);
        }
    };
#pragma GCC unroll 8
    for (int v = 0; v < (S & BITS8 ? 8 : 4); v++) {
      typename Product::Weights u[T], high[T];
      for (int t = 0; t < T; t++) {
        const I numbers = load<I>(w + t * apart + VECTOR * v);
        u[t] = Product::of(S & BITS8 ? numbers : numbers & 0x0f0f0f0f);
        high[t] = Product::of((numbers >> 4) & 0x0f0f0f0f);
      }
      multiply(v, u);
      if (!(S & BITS8)) multiply(v + 4, high);
    }
#pragma GCC unroll 2
    for (int t = 0; t < T; t++) {
      const Scales<S> scales((const half*)(w + t * apart + numbers_bytes(S)));
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const auto low = two && !halves ? all[0][t][r] + all[1][t][r] : all[0][t][r];
        sums[t][r] = scales.add(sums[t][r], low, all[1][t][r], x.blocks[r * blocks + b]);
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
        packed_some<S, 1>(some, from, apart, x.row(r), to + t * ROWS * LANES, {from + AHEAD, block_bytes(S)});
      }
    }
  }
}

// Some packed tiles and up to 16 rows → out[tile][row][lane]. Tiles that are read for the first time are `fresh`.
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

// A row of floats as products with bfloats want it; the last of an odd number makes a pair with 0.
inline void round_row(const float* x, int inputs, float* to) {
  const int whole = 2 * columns(BFLOAT, inputs);
  for (int k = 0; k < whole; k += LANES) {
    const F some = load(x + k, inputs - k);
#ifdef __AVX512BF16__
    bfloat near[LANES];
    store(near, some);
    memcpy((bfloat*)to + k, near, std::min(LANES, whole - k) * sizeof(bfloat));
#else
    store(to + k, (F)near_bfloats(some), whole - k);
#endif
  }
}

// What word `n` of a row of activations is multiplied with, of the weights in a column.
template <int S>
inline F part(F column, int n) {
  if (S == FLOAT || PAIRED) return column;
  return n ? (F)((I)column & (int32_t)0xffff0000) : (F)((I)column << 16);
}

template <int S>
inline F product(F sum, F column, F value) {
#ifdef __AVX512BF16__
  if (S == BFLOAT) return dot_pairs(sum, column, value);
#endif
  return fma(column, value, sum);
}

constexpr int TILES = REGISTERS > 16 ? 4 : 2;  // dense ones side by side: enough sums to hide a multiplication's latency

template <int S, int T, int R>
void dense_tile(const float* w, const float* x, int columns, float* out) {
  constexpr int W = words(S);
  F sums[T][R] = {};
  for (int k = 0; k < columns; k++)
#pragma GCC unroll 2
    for (int n = 0; n < W; n++) {
      F column[T];
      for (int t = 0; t < T; t++) column[t] = part<S>(load(w + LANES * (t * (int64_t)columns + k)), n);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const F value = splat(x[(r * (int64_t)columns + k) * W + n]);
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
    const float* some = x + r * (int64_t)columns * words(S);
    float* to = out + LANES * r;
    if (n >= 6) dense_tile<S, T, 6>(w, some, columns, to), r += 6;
    else if (n >= 4) dense_tile<S, T, 4>(w, some, columns, to), r += 4;
    else if (n >= 2) dense_tile<S, T, 2>(w, some, columns, to), r += 2;
    else dense_tile<S, T, 1>(w, some, columns, to), r += 1;
  }
}

// `tiles` dense tiles, TILES at most, and up to 16 rows → out[tile][row][lane].
template <int S>
void dense_tiles(const uint8_t* at, int tiles, const float* x, int columns, int rows, float* out) {
  const float* w = (const float*)at;
  for (int t = 0; t < tiles;) {
    const float* from = w + t * (int64_t)columns * LANES;
    float* to = out + t * ROWS * LANES;
    if (tiles - t >= TILES) dense_rows<S, TILES>(from, x, columns, rows, to), t += TILES;
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
    q = n[VECTOR * (i / 4) + 4 * lane + i % 4];
  } else {
    int both = n[VECTOR * (i % 16 / 4) + 4 * lane + i % 4];
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
