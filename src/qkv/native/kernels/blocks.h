// GGML's blocks to tiles, once, when a model is made ready. The equations stand in qkv/ops/blocks.
#pragma once
#include "tiles.h"

namespace qkv {

// 32 weights d q + m, or d (q − 8 or 128) where a format has no minima; the halves differ where it has parts of 16.
struct Part {
  uint8_t q[BLOCK];
  float d[2], m[2];
};

struct Format {
  int weights, bytes, store;
  void (*unpack)(const uint8_t* block, int part, Part& to);
};

inline float half_at(const uint8_t* p) {
  half h;
  memcpy(&h, p, 2);
  return to_float(h);
}

inline void same(Part& to, float d, float m = 0) { to.d[0] = to.d[1] = d, to.m[0] = to.m[1] = m; }

inline void nibbles(const uint8_t* q, Part& to) {
  for (int i = 0; i < 16; i++) to.q[i] = q[i] & 15, to.q[i + 16] = q[i] >> 4;
}

inline void fifth_bits(const uint8_t* high, Part& to, int added) {
  for (int i = 0; i < BLOCK; i++) to.q[i] += (high[i / 8] >> i % 8 & 1) * 16 + added;
}

// Scale and minimum j of 8, six bits each, from 12 bytes.
inline void six_bits(const uint8_t* b, int j, int& s, int& m) {
  if (j < 4) {
    s = b[j] & 63, m = b[j + 4] & 63;
  } else {
    s = (b[j + 4] & 15) | (b[j - 4] >> 6) << 4, m = (b[j + 4] >> 4) | (b[j] >> 6) << 4;
  }
}

inline void q4_0(const uint8_t* b, int, Part& to) { nibbles(b + 2, to), same(to, half_at(b)); }
inline void q4_1(const uint8_t* b, int, Part& to) { nibbles(b + 4, to), same(to, half_at(b), half_at(b + 2)); }
inline void q5_0(const uint8_t* b, int, Part& to) {
  nibbles(b + 6, to), fifth_bits(b + 2, to, 112), same(to, half_at(b));
}
inline void q5_1(const uint8_t* b, int, Part& to) {
  nibbles(b + 8, to), fifth_bits(b + 4, to, 0), same(to, half_at(b), half_at(b + 2));
}
inline void q8_0(const uint8_t* b, int, Part& to) {
  for (int i = 0; i < BLOCK; i++) to.q[i] = b[2 + i] ^ 128;
  same(to, half_at(b));
}
inline void q2_k(const uint8_t* b, int part, Part& to) {  // a run of 32 bytes holds four parts
  const uint8_t* q = b + 16 + part / 4 * 32;
  for (int i = 0; i < BLOCK; i++) to.q[i] = q[i] >> 2 * (part % 4) & 3;
  for (int h = 0; h < 2; h++) {
    int both = b[2 * part + h];
    to.d[h] = half_at(b + 80) * (both & 15), to.m[h] = -(half_at(b + 82) * (both >> 4));
  }
}
inline void q3_k(const uint8_t* b, int part, Part& to) {
  const uint8_t* q = b + 32 + part / 4 * 32;
  for (int i = 0; i < BLOCK; i++) to.q[i] = 4 + (q[i] >> 2 * (part % 4) & 3) + (b[i] >> part & 1) * 4;
  for (int h = 0; h < 2; h++) {
    int j = 2 * part + h;
    int low = b[96 + j % 8] >> (j < 8 ? 0 : 4) & 15, high = b[104 + j % 4] >> 2 * (j / 4) & 3;
    to.d[h] = half_at(b + 108) * (float)((low | high << 4) - 32), to.m[h] = 0;
  }
}
inline void q4_k(const uint8_t* b, int part, Part& to) {
  const uint8_t* q = b + 16 + part / 2 * 32;
  for (int i = 0; i < BLOCK; i++) to.q[i] = q[i] >> 4 * (part % 2) & 15;
  int s, m;
  six_bits(b + 4, part, s, m);
  same(to, half_at(b) * s, -(half_at(b + 2) * m));
}
inline void q5_k(const uint8_t* b, int part, Part& to) {
  const uint8_t* q = b + 48 + part / 2 * 32;
  for (int i = 0; i < BLOCK; i++) to.q[i] = (q[i] >> 4 * (part % 2) & 15) | (b[16 + i] >> part & 1) << 4;
  int s, m;
  six_bits(b + 4, part, s, m);
  same(to, half_at(b) * s, -(half_at(b + 2) * m));
}
inline void q6_k(const uint8_t* b, int part, Part& to) {
  const uint8_t *low = b + part / 4 * 64 + part % 2 * 32, *high = b + 128 + part / 4 * 32;
  for (int i = 0; i < BLOCK; i++)
    to.q[i] = ((low[i] >> (part % 4 < 2 ? 0 : 4) & 15) | (high[i] >> 2 * (part % 4) & 3) << 4) + 96;
  for (int h = 0; h < 2; h++) to.d[h] = half_at(b + 208) * (int8_t)b[192 + 2 * part + h], to.m[h] = 0;
}

// By GGML's numbers.
inline const Format* format(int id) {
  static const Format q40{32, 18, 0, q4_0}, q41{32, 20, MINIMA, q4_1}, q50{32, 22, BITS8, q5_0},
      q51{32, 24, BITS8 | MINIMA, q5_1}, q80{32, 34, BITS8, q8_0}, q2k{256, 84, HALVES | MINIMA, q2_k},
      q3k{256, 110, HALVES, q3_k}, q4k{256, 144, MINIMA, q4_k}, q5k{256, 176, BITS8 | MINIMA, q5_k},
      q6k{256, 210, BITS8 | HALVES, q6_k};
  switch (id) {
    case 2: return &q40;
    case 3: return &q41;
    case 6: return &q50;
    case 7: return &q51;
    case 8: return &q80;
    case 10: return &q2k;
    case 11: return &q3k;
    case 12: return &q4k;
    case 13: return &q5k;
    case 14: return &q6k;
  }
  return nullptr;
}

// Rows of blocks to tiles `apart` bytes apart; false where a scale is no half-precision number.
inline bool pack(const Format& from, const uint8_t* rows, int count, int inputs, uint8_t* tiles, int64_t apart) {
  const int parts = inputs / BLOCK, in_block = from.weights / BLOCK, store = from.store;
  const int64_t stride = (int64_t)inputs / from.weights * from.bytes;
  const int tables = 1 + !!(store & MINIMA), halves = 1 + !!(store & HALVES);
  bool sound = true;
  Part part;
  for (int row = 0; row < count; row++) {
    uint8_t* to = tiles + row / LANES * apart;
    for (int p = 0; p < parts; p++, to += block_bytes(store)) {
      uint8_t* numbers = to + row % LANES * 4;
      half* scales = (half*)(to + numbers_bytes(store)) + row % LANES;
      from.unpack(rows + row * stride + p / in_block * from.bytes, p % in_block, part);
      if (!(store & BITS8))
        for (int i = 0; i < 16; i++) part.q[i] |= part.q[i + 16] << 4;
      for (int v = 0; v < (store & BITS8 ? 8 : 4); v++) memcpy(numbers + VECTOR * v, part.q + 4 * v, 4);
      for (int table = 0; table < tables; table++)
        for (int h = 0; h < halves; h++, scales += LANES) {
          *scales = to_half(table ? part.m[h] : part.d[h]);
          sound &= (*scales & 0x7c00) != 0x7c00;
        }
    }
  }
  return sound;
}

}  // namespace qkv
