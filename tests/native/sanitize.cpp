// Programs of odd sizes, for the sanitizers: every record, every store, on one thread and on two, whose results must be
// the same bits. Whatever a program reads or writes is as large as it must be and no larger.
#include <cmath>
#include <cstdio>
#include <deque>
#include <random>

#include "library.cpp"

using namespace qkv;

namespace {

std::mt19937 source(1);
float number() { return std::uniform_real_distribution<float>(-0.5f, 0.5f)(source); }

std::deque<std::vector<float>> kept_floats;
std::deque<std::vector<uint8_t>> kept_bytes;

const float* floats(size_t n, float shift = 0) {
  auto& made = kept_floats.emplace_back(n);
  for (float& x : made) x = number() + shift;
  return made.data();
}

int tiles_of(int n) { return (n + LANES - 1) / LANES; }

const float* biases(int outputs) { return floats(LANES * tiles_of(outputs)); }

// Tiles of random numbers with small scales.
const uint8_t* tiles(int store, int inputs, int count) {
  const int64_t size = tile_bytes(store, inputs);
  auto& made = kept_bytes.emplace_back(size * count);
  for (auto& byte : made) byte = source();
  for (int t = 0; t < count; t++) {
    uint8_t* tile = made.data() + t * size;
    if (store == FLOAT) {
      for (int i = 0; i < LANES * inputs; i++) ((float*)tile)[i] = number();
    } else if (store == BFLOAT) {
      for (int i = 0; i < 2 * LANES * columns(store, inputs); i++) ((uint16_t*)tile)[i] = 0x3d00 | (source() & 0x80ff);
    } else {
      for (int b = 0; b < inputs / BLOCK; b++) {
        half* scales = (half*)(tile + b * block_bytes(store) + numbers_bytes(store));
        for (int i = 0; i < scales_bytes(store) / 2; i++) scales[i] = 0x1400 | (source() & 0x83ff);
      }
    }
  }
  return made.data();
}

struct Sizes {
  int store, width, heads, groups, head_width, hidden, inner;
  bool wide;
};

enum { STREAM = 2, QUERIES_AND, MIXED, HIDDEN, LOGITS, ROUTES, CHOSEN, EVERY, TURNED, STEPS, KEPT, BUFFERS };
constexpr int VOCABULARY = 37, EXPERTS = 5, CHOICES = 2, TAPS = 4, STATES = 3, KEY = 6, TEXTS = 3;

struct Made {  // a program, and how large pages and states are
  std::vector<Op> ops;
  std::vector<int32_t> widths = std::vector<int32_t>(BUFFERS);
  int64_t page = 0, memory_page = 0, state = 0;
};

Op record(Kind kind, int in, int out) {
  Op op{};
  op.kind = kind, op.in = in, op.out = out, op.residual = op.gate = -1, op.scale = 1;
  return op;
}

Op& product(Made& to, const Sizes& s, int in, int out, int inputs, int outputs, int residual = -1) {
  Op op = record(LINEAR, in, out);
  op.store = s.store, op.inputs = inputs, op.outputs = outputs, op.residual = residual;
  op.weight = tiles(s.store, inputs, tiles_of(outputs));
  op.bias = biases(outputs);
  to.widths[out] = std::max(to.widths[out], outputs);
  return to.ops.emplace_back(op);
}

void normed(Op& op, Norm kind) {
  op.norm = kind, op.eps = 1e-5f, op.norm_weight = floats(op.inputs, 1), op.norm_bias = floats(op.inputs);
}

int64_t cached(const Sizes& s, int64_t page, int64_t& keys, int64_t& values) {
  const int64_t one = s.wide ? 4 : 2, positions = (int64_t)s.groups * PAGE;
  keys = page, values = keys + positions * s.head_width * one;
  return values + positions * padded(s.head_width) * one;
}

Op heads(Kind kind, const Sizes& s, int in, int out) {
  Op op = record(kind, in, out);
  op.heads = s.heads, op.groups = s.groups, op.head_width = s.head_width, op.scale = 0.3f;
  return op;
}

void attention(Made& to, const Sizes& s, bool memory, int positions) {
  const int all = (s.heads + (memory ? 0 : 2 * s.groups)) * s.head_width;
  normed(product(to, s, STREAM, QUERIES_AND, s.width, all), RMS);
  Op keys = heads(KEYS, s, QUERIES_AND, 0), attend = heads(ATTEND, s, QUERIES_AND, MIXED);
  keys.norm = LAYER, keys.eps = 1e-5f;
  keys.query_weight = floats(s.head_width, 1), keys.query_bias = floats(s.head_width);
  keys.key_weight = floats(s.head_width, 1), keys.key_bias = floats(s.head_width);
  keys.memory = attend.memory = memory;
  if (memory) {
    keys.groups = 0;
    to.memory_page = cached(s, to.memory_page, attend.keys_at, attend.values_at);
  } else {
    to.page = cached(s, to.page, keys.keys_at, keys.values_at);
    attend.keys_at = keys.keys_at, attend.values_at = keys.values_at;
    keys.turned = s.head_width / 4 * 2;
    keys.cos = floats((size_t)positions * keys.turned / 2), keys.sin = floats((size_t)positions * keys.turned / 2);
    attend.behind = 40, attend.softcap = 3, attend.table_rows = positions;
    attend.distance = floats((size_t)s.heads * (2 * positions + 64));
  }
  to.widths[MIXED] = std::max(to.widths[MIXED], s.heads * s.head_width);
  to.ops.push_back(keys);
  to.ops.push_back(attend);
  product(to, s, MIXED, STREAM, s.heads * s.head_width, s.width, STREAM);
}

Op& gated(Made& to, const Sizes& s, int experts) {
  const int units = 2 * tiles_of(s.hidden);
  Op& op = product(to, s, STREAM, HIDDEN, s.width, 2 * s.hidden);
  op.gated = 1, op.act = SILU, op.bias = experts ? nullptr : floats(LANES * units);
  op.weight = tiles(s.store, s.width, units * std::max(1, experts));
  to.widths[HIDDEN] = CHOICES * s.hidden;
  normed(op, LAYER);
  return op;
}

void experts(Made& to, const Sizes& s) {
  product(to, s, STREAM, LOGITS, s.width, EXPERTS);
  Op route = record(ROUTE, LOGITS, ROUTES), add = record(ADD, CHOSEN, STREAM);
  route.inputs = EXPERTS, route.choices = add.choices = CHOICES, route.normalise = 1;
  to.widths[ROUTES] = 2 * CHOICES, to.widths[CHOSEN] = CHOICES * s.width;
  to.ops.push_back(route);
  auto routed = [](Op& op) { op.experts = EXPERTS, op.choices = CHOICES, op.routes = ROUTES; };
  routed(gated(to, s, EXPERTS));
  Op& down = product(to, s, HIDDEN, CHOSEN, s.hidden, s.width);
  down.weight = tiles(s.store, s.hidden, EXPERTS * tiles_of(s.width)), down.bias = nullptr, down.weighted = 1;
  routed(down);
  add.inputs = s.width, add.residual = STREAM;
  to.ops.push_back(add);
}

int64_t state(Made& to, int numbers) {
  const int64_t at = to.state;
  to.state += numbers * 4;
  return at;
}

void convolution(Made& to, int width, int taps) {
  Op op = record(CONVOLVE, EVERY, TURNED);
  op.inputs = width, op.taps = taps, op.act = SILU, op.bias = floats(width);
  op.weight = (const uint8_t*)floats((size_t)taps * width), op.state_at = state(to, width * (taps - 1));
  to.widths[TURNED] = std::max(to.widths[TURNED], width);
  to.ops.push_back(op);
}

void steps(Made& to, const Sizes& s, int in, int inputs, int outputs) {
  product(to, s, in, STEPS, inputs, outputs).act = SOFTPLUS;
}

void selective(Made& to, const Sizes& s) {
  normed(product(to, s, STREAM, EVERY, s.width, 2 * s.inner), RMS);
  convolution(to, s.inner, TAPS);
  steps(to, s, TURNED, s.inner, s.inner);
  product(to, s, TURNED, KEPT, s.inner, 2 * STATES);
  Op op = record(SCAN, TURNED, MIXED);
  op.inputs = s.inner, op.states = STATES, op.steps = STEPS, op.keys = KEPT, op.gate = EVERY, op.gate_at = s.inner;
  op.decay = floats((size_t)STATES * s.inner, -1), op.skip = floats(s.inner);
  op.state_at = state(to, STATES * s.inner);
  to.widths[MIXED] = std::max(to.widths[MIXED], s.inner);
  to.ops.push_back(op);
  product(to, s, MIXED, STREAM, s.inner, s.width, STREAM);
}

void recalled(Made& to, const Sizes& s) {
  const int inner = s.heads * s.head_width, all = inner + 2 * s.groups * KEY;
  product(to, s, STREAM, EVERY, s.width, all + inner);
  steps(to, s, STREAM, s.width, s.heads);
  convolution(to, all, 2);
  Op op = heads(RECALL, s, TURNED, MIXED);
  op.states = KEY, op.steps = STEPS, op.gate = EVERY, op.gate_at = all;
  op.decay = floats(s.heads, -1), op.skip = floats(s.heads);
  op.state_at = state(to, KEY * inner);
  to.ops.push_back(op);
  product(to, s, MIXED, STREAM, inner, s.width, STREAM);
}

// A memory of every rule: shares of each key channel or of a head, tied to the keys or not.
void remembered(Made& to, const Sizes& s, Rule rule, int shares, bool tied, int positions) {
  const int values = s.heads * s.head_width, keys = s.groups * KEY, all = values + 2 * keys;
  normed(product(to, s, STREAM, EVERY, s.width, all + values), RMS);
  normed(product(to, s, STREAM, STEPS, s.width, s.heads * shares), RMS);
  Op& writes = product(to, s, STREAM, KEPT, s.width, s.heads);
  normed(writes, RMS), writes.act = SIGMOID;
  to.widths[KEPT] = std::max(to.widths[KEPT], 2 * s.heads);
  Op decay = record(DECAY, tied ? EVERY : STEPS, 0);
  decay.in_at = tied ? values : 0, decay.heads = s.heads, decay.groups = tied ? s.groups : s.heads;
  decay.shares = shares, decay.steps = STEPS, decay.keys = tied ? EVERY : -1, decay.rule = rule, decay.most = 0.7f;
  decay.act = rule == BONUS ? IDENTITY : SOFTPLUS, decay.decay = tied ? nullptr : floats(s.heads, -1);
  to.ops.push_back(decay);
  Op map = record(FEATURE, EVERY, 0);
  map.in_at = values, map.heads = 2 * s.groups, map.head_width = KEY, map.act = SILU, map.eps = 1e-6f;
  map.feature = (Feature)(rule % 4), map.turned = 4;
  map.cos = floats((size_t)positions * 2), map.sin = floats((size_t)positions * 2);
  to.ops.push_back(map);
  Op op = heads(RECALL, s, EVERY, MIXED);
  op.states = KEY, op.rule = rule, op.shares = shares, op.steps = STEPS, op.writes = KEPT, op.most = op.least = 1;
  op.gate = EVERY, op.gate_at = all, op.act = SIGMOID, op.norm = LAYER, op.eps = 1e-5f;
  op.norm_weight = floats(values, 1), op.norm_bias = floats(values), op.skip = floats(s.heads * KEY);
  op.state_at = state(to, values * KEY + (rule == MEAN || rule == EXPONENTIAL ? s.heads * (KEY + 1) : 0));
  to.ops.push_back(op);
  Op mix = record(MIX, MIXED, MIXED);
  mix.keys = EVERY, mix.inputs = s.head_width, mix.groups = s.heads;
  to.ops.push_back(mix);
  product(to, s, MIXED, STREAM, values, s.width, STREAM);
}

Made text(const Sizes& s, int positions) {
  Made to;
  Op op = record(EMBED, 0, STREAM);
  op.store = s.store, op.outputs = s.width, op.scale = 1.7f;
  op.weight = tiles(s.store, s.width, tiles_of(VOCABULARY));
  op.position = floats((size_t)positions * s.width), op.segment = floats(2 * s.width);
  to.widths[STREAM] = s.width;
  to.ops.push_back(op);
  for (Norm kind : {TANH, AFFINE, LAYER}) {
    op = record(NORM, STREAM, STREAM), op.inputs = s.width;
    normed(op, kind);
    if (kind == AFFINE) op.residual = STREAM;
    to.ops.push_back(op);
  }
  attention(to, s, false, positions);
  attention(to, s, true, positions);
  gated(to, s, 0);
  product(to, s, HIDDEN, STREAM, s.hidden, s.width, STREAM).act = GELU;
  experts(to, s);
  selective(to, s);
  recalled(to, s);
  for (Rule rule : {SUM, MEAN, DELTA, EXPONENTIAL, BONUS})
    for (int shares : {1, KEY}) remembered(to, s, rule, shares, shares > 1 && rule == SUM, positions);
  op = record(NORM, STREAM, OUTPUT), op.inputs = to.widths[OUTPUT] = s.width;
  normed(op, RMS);
  to.ops.push_back(op);
  return to;
}

Made memories(const Sizes& s, const Made& reader) {
  Made to;
  to.widths[INPUT] = s.width;
  normed(product(to, s, INPUT, QUERIES_AND, s.width, 2 * s.groups * s.head_width), NO_NORM);
  for (const Op& one : reader.ops)
    if (one.kind == ATTEND && one.memory) {
      Op op = heads(KEYS, s, QUERIES_AND, 0);
      op.heads = 0, op.keys_at = one.keys_at, op.values_at = one.values_at;
      to.ops.push_back(op);
    }
  return to;
}

struct Texts {  // a cache
  std::vector<std::vector<uint8_t>> pages;
  std::vector<uint8_t*> address;
  std::vector<int32_t> table, lengths;
  int stride;

  Texts(int64_t page, int positions) : lengths(TEXTS), stride((positions + PAGE - 1) / PAGE) {
    for (int n = TEXTS * stride - 1; n >= 0; n--) {
      pages.emplace_back(page);
      table.push_back(n);
    }
    for (auto& one : pages) address.push_back(one.data());
  }
  Cache seen() const { return {address.data(), table.data(), stride, lengths.data()}; }
};

void free_program(Program* program) { qkv_program_free(program); }
using Owned = std::unique_ptr<Program, decltype(&free_program)>;

Owned built(const Made& made, bool wide) {
  return {qkv_program(made.ops.data(), made.ops.size(), made.widths.data(), made.widths.size(), wide), free_program};
}

struct Rows {  // so many new ones of each text
  std::vector<int32_t> tokens, positions, slots, segments;

  Rows(Texts& texts, const std::vector<int>& counts) {
    for (int text = 0; text < TEXTS; text++)
      for (int n = 0; n < counts[text]; n++) {
        const int position = texts.lengths[text]++;
        tokens.push_back((7 * position + text) % VOCABULARY), positions.push_back(position);
        slots.push_back(text), segments.push_back(position % 2);
      }
  }
};

// What texts become, fed in these pieces. Programs are freed as soon as they have run.
std::vector<float> fed(Engine* engine, const Sizes& s, const Made& made, const Made& reading, int positions,
                       const std::vector<std::vector<int>>& pieces) {
  Texts texts(made.page, positions), memory(made.memory_page, 2 * PAGE);
  source.seed(5);
  {
    Rows rows(memory, {3, 0, PAGE + 1});
    std::vector<float> input(rows.tokens.size() * s.width);
    for (float& x : input) x = number();
    Call call{};
    call.rows = rows.tokens.size(), call.positions = rows.positions.data(), call.slots = rows.slots.data();
    call.input = input.data(), call.text = memory.seen();
    if (qkv_run(engine, built(reading, s.wide).get(), &call)) abort();
  }
  std::vector<uint8_t> states(made.state * TEXTS);
  std::vector<uint8_t*> state;
  for (int text = 0; text < TEXTS; text++) state.push_back(states.data() + text * made.state);
  const std::vector<int32_t> memory_of = {2, 0, 1};
  std::vector<float> all;
  for (auto& piece : pieces) {
    Rows rows(texts, piece);
    std::vector<float> output(rows.tokens.size() * s.width);
    Call call{};
    call.rows = rows.tokens.size(), call.tokens = rows.tokens.data(), call.positions = rows.positions.data();
    call.slots = rows.slots.data(), call.segments = rows.segments.data(), call.memory_of = memory_of.data();
    call.output = output.data(), call.states = state.data(), call.text = texts.seen(), call.memory = memory.seen();
    if (qkv_run(engine, built(made, s.wide).get(), &call)) abort();
    for (size_t row = 0; row < rows.tokens.size(); row++)  // by texts, whatever the pieces
      if (rows.slots[row] == 1) all.insert(all.end(), &output[row * s.width], &output[row * s.width] + s.width);
    for (float x : output)
      if (!std::isfinite(x)) return {};
  }
  return all;
}

bool same(const Sizes& s, int positions, const std::vector<std::vector<std::vector<int>>>& ways) {
  const Made made = text(s, positions), reading = memories(s, made);
  std::vector<float> first;
  for (int threads : {1, 2}) {
    Engine* engine = qkv_engine(threads);
    for (auto& pieces : ways) {
      auto found = fed(engine, s, made, reading, positions, pieces);
      if (first.empty()) first = found;
      if (found.empty() || found != first) {
        printf("store %d on %d threads: %s\n", s.store, threads, found.empty() ? "no numbers" : "other numbers");
        return false;
      }
    }
    qkv_engine_free(engine);
  }
  kept_floats.clear(), kept_bytes.clear();
  return true;
}

// Blocks to tiles: rows of two blocks, the tiles in turn with another matrix's.
bool packed() {
  for (int id : {2, 3, 6, 7, 8, 10, 11, 12, 13, 14}) {
    const Format& from = *format(id);
    const int inputs = 2 * from.weights, rows = LANES + 3;
    std::vector<uint8_t> blocks((size_t)rows * 2 * from.bytes);
    for (auto& byte : blocks) byte = source() & 0xbb;  // no half of these is infinite
    const int64_t size = qkv_tile_bytes(qkv_store(id), inputs);
    std::vector<uint8_t> to(3 * size);
    qkv_pack(id, blocks.data(), rows, inputs, to.data(), 2 * size);
    std::vector<float> row(inputs);
    matrix_row(qkv_store(id), to.data(), inputs, 3, row.data());
    for (float x : row)
      if (!std::isfinite(x)) return false;
  }
  return qkv_store(99) == -1;
}

// Rows of scores.
bool looked() {
  for (int64_t width : {1, 63, 64, 70, 513, 1040}) {
    constexpr int64_t rows = 3;
    const float *x = floats(rows * width), *m = floats(rows, 1);
    std::vector<float> maxima[2], sums[2], values[2];
    std::vector<int64_t> places[2];
    const int k = std::min<int64_t>(width, 5);
    for (int threads : {1, 2}) {
      Engine engine(threads);
      auto &most = maxima[threads - 1], &sum = sums[threads - 1];
      most.resize(rows * ((width + 63) / 64)), sum.resize(rows * ((width + 511) / 512));
      qkv_maxima(&engine, x, rows, width, 64, most.data());
      qkv_sums(&engine, x, rows, width, 512, m, 0.7f, sum.data());
      values[threads - 1].resize(rows * k), places[threads - 1].resize(rows * k);
      qkv_largest(&engine, x, rows, width, 64, most.data(), k, values[threads - 1].data(), places[threads - 1].data());
    }
    if (maxima[0] == maxima[1] && sums[0] == sums[1] && values[0] == values[1] && places[0] == places[1]) continue;
    printf("scores of %d differ between one thread and two\n", (int)width);
    return false;
  }
  return true;
}

// The first parts of runs, from page to page, in memory that ends where they do.
bool copied() {
  for (int threads : {1, 2}) {
    Engine engine(threads);
    const std::vector<std::vector<uint8_t>> from = {{1, 2, 3, 4, 5, 6}, {7, 8, 9, 10, 11, 12}};
    std::vector<std::vector<uint8_t>> to(2, std::vector<uint8_t>(6));
    const uint8_t* old[] = {from[0].data(), from[1].data()};
    uint8_t* made[] = {to[0].data(), to[1].data()};
    const int64_t parts[] = {1, 3};
    qkv_copy(&engine, old, made, parts, 2, 2, 3);
    if (to[0] == std::vector<uint8_t>{1, 0, 0, 4, 0, 0} && to[1] == from[1]) continue;
    puts("pages are not copied");
    return false;
  }
  return true;
}

}  // namespace

int main() {
  if (!packed() || !looked() || !copied()) return 1;
  const std::vector<std::vector<std::vector<int>>> ways = {{{1, 71, 5}}, {{1, 1, 3}, {0, 61, 0}, {0, 1, 0}, {1, 8, 2}}};
  for (int store : {0, 1, 2, 3, 4, 5, 6, 7})
    if (!same({store, 96, 4, 2, 24, 64, 32, store % 2 == 0}, 80, ways)) return 1;
  for (int store : {(int)FLOAT, (int)BFLOAT})
    if (!same({store, 41, 6, 2, 5, 23, 19, store == FLOAT}, 80, ways)) return 1;
  // 1024 rows, so that what is between records ends where its memory ends.
  if (!same({FLOAT, 17, 2, 1, 5, 7, 3, true}, 500, {{{424, 500, 100}}})) return 1;
  if (!same({BITS8, 32, 2, 1, 16, 32, 32, false}, 500, {{{424, 500, 100}}})) return 1;
  puts("sound");
}
