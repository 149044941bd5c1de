// What a program is: records, executed one after the other on every row of a call. A row is a token to be computed:
// (token, position, slot), whichever text it belongs to and whether its text is read or written.
#pragma once
#include <cstdint>

namespace qkv {

enum Kind : int32_t { EMBED, NORM, LINEAR, KEYS, ATTEND, ROUTE, ADD, CONVOLVE, SCAN, RECALL, FEATURE, DECAY, MIX };
enum Norm : int32_t { NO_NORM, RMS, LAYER, TANH, AFFINE };
enum Rule : int32_t { STEP, SUM, MEAN, DELTA, EXPONENTIAL, BONUS };  // how a memory is written and read
enum Feature : int32_t { POINTWISE, POSITIVE, SOFTMAX, UNIT };       // what queries and keys go through
enum Act : int32_t { IDENTITY, RELU, GELU, GELU_TANH, SILU, TANH_ACT, SIGMOID, SOFTPLUS, SOFTCAP };

// Buffers are numbered; each holds so many floats for every row. The first two are the caller's.
enum Buffer : int32_t { INPUT, OUTPUT };

struct Op {
  Kind kind;
  int32_t in, out, residual;  // buffers; residual −1 is none
  int32_t in_at, out_at;      // where in a row they begin
  int32_t inputs, outputs;
  int32_t store;  // how the weight is kept: see tiles.h
  Norm norm;
  Act act;
  int32_t gated;                       // tiles come in pairs: act(gate) and what it multiplies
  int32_t heads, groups, head_width;   // of queries; of keys and values
  int32_t turned;                      // how many values of a head are rotated
  int32_t behind, ahead;               // how far a query sees
  int32_t experts, choices, routes;    // how many; how many a row goes to; the buffer that says which
  int32_t weighted, normalise;         // see `experts` and `route`
  int32_t taps, states;                // of a convolution; numbers that a channel, or a head, remembers
  int32_t steps, keys, gate, gate_at;  // buffers that a memory reads besides `in`; gate −1 is none
  int32_t memory;                      // 1: keys and values are the memory's, not the text's own
  int32_t table_rows;                  // positions for which there are tables
  Rule rule;
  Feature feature;
  int32_t shares, writes;              // decays of a head, 1 or `states`; the buffer that says how much is written
  float eps, key_eps, scale, softcap;  // eps is a DyT's α too, of which queries and keys have one each
  float most, least;                   // that a token may replace; that an answer is divided by
  int64_t keys_at, values_at;          // bytes from the beginning of a page
  int64_t state_at;                    // bytes from the beginning of a text's state
  const uint8_t* weight;
  const float *bias, *norm_weight, *norm_bias;
  const float *cos, *sin;              // table_rows × turned / 2
  const float *position, *segment;     // tables that an embedding adds
  const float* distance;               // heads × (2 table_rows + 64): what a score gains at key − query + table_rows
  const float *decay, *skip;           // of a memory: A, and what its input adds to its output
  const float *query_weight, *query_bias, *key_weight, *key_bias;  // norms of queries and of keys
};

constexpr int PAGE = 64;  // positions in a page

// Where keys and values stand: page n of a text is at address[table[text × stride + n]].
struct Cache {
  uint8_t* const* address;
  const int32_t* table;
  int32_t stride;
  const int32_t* lengths;  // of each text, this call included

  uint8_t* page(int text, int n) const { return address[table[(int64_t)text * stride + n]]; }
};

struct Call {
  int32_t rows;
  const int32_t *tokens, *positions, *slots;
  const int32_t* segments;   // of each row, or none
  const int32_t* memory_of;  // which memory each slot reads, or none
  const float* input;        // none for a program that begins with tokens
  float* output;
  uint8_t* const* states;    // of each slot, or none
  Cache text, memory;
};

}  // namespace qkv
