// Runs programs: every thread goes through the same records and takes its share of each; they meet after each record.
#pragma once
#include <mutex>
#include <vector>

#include "attention.h"
#include "experts.h"
#include "memory.h"
#include "norm.h"
#include "program.h"
#include "scratch.h"
#include "threads.h"
#include "tiles.h"

namespace qkv {

struct Program {
  std::vector<Op> ops;
  std::vector<int> widths;  // of the buffers
  bool wide_cache;          // floats, not halves
  int widest = 0;           // the largest `inputs` of a product
  int most = 1;             // experts that a row goes to
};

struct Task {  // consecutive rows that read one cache
  int row, rows, text;
};

class Engine {
 public:
  explicit Engine(int threads)
      : pool_(threads), own_(threads), next_{std::vector<Counter>(threads), std::vector<Counter>(threads)} {}

  void run(const Program& program, const Call& call) {
    std::lock_guard<std::mutex> one(mutex_);
    program_ = &program, call_ = &call;
    prepare();
    pool_.run([this](int t) { perform(t); });
  }

  // each(k) for every k < n, dealt out evenly; what is `few` is done sooner than another thread is called.
  template <class Each>
  void every(int64_t n, bool few, Each each) {
    if (few) {
      for (int64_t k = 0; k < n; k++) each(k);
      return;
    }
    std::lock_guard<std::mutex> one(mutex_);
    pool_.run([&](int t) {
      for (int64_t k = n * t / pool_.threads(); k < n * (t + 1) / pool_.threads(); k++) each(k);
      pool_.barrier.wait();
    });
  }

 private:
  struct Own {  // what a thread has to itself
    Scratch row, plain, q, blocks, scores, queries;
    Routed routed;
  };

  Pool pool_;
  std::vector<Own> own_;
  std::vector<Counter> next_[2];  // of each thread's share, the next piece: of this record, and of the one after it
  std::mutex mutex_;
  std::vector<Scratch> buffers_;
  std::vector<float*> buffer_;
  Scratch q_, blocks_;
  std::vector<Task> tasks_[2], runs_;
  int longest_ = 0;
  const Program* program_ = nullptr;
  const Call* call_ = nullptr;

  // All records. When the last barrier opens, the caller may free the program before this thread goes on: from there on
  // nothing but what is its own may be read.
  void perform(int t) {
    const Op* ops = program_->ops.data();
    const int count = program_->ops.size();
    deal(t, 0, pieces(ops[0]));
    pool_.barrier.wait();
    for (int i = 0; i < count; i++) {
      if (i + 1 < count) deal(t, (i + 1) % 2, pieces(ops[i + 1]));  // so that no record begins with a wait
      execute(ops[i], t, i % 2);
      const Op* next = i + 1 < count ? next_product(ops + i + 1, ops + count) : nullptr;
      if (!next) {
        pool_.barrier.wait();
        continue;
      }
      const int64_t bytes = tile_bytes(next->store, next->inputs) * (next->gated ? 2 : 1);
      const int64_t n = units(*next), threads = pool_.threads(), from = n * t / threads, to = n * (t + 1) / threads;
      pool_.barrier.wait(next->weight + from * bytes, std::min<int64_t>((to - from) * bytes, WAITING));
    }
  }

  static constexpr int64_t WAITING = 65536;  // bytes of weights that a waiting thread reads ahead

  static const Op* next_product(const Op* op, const Op* end) {
    while (op < end && (op->kind != LINEAR || op->experts)) op++;
    return op < end ? op : nullptr;
  }

  void prepare() {
    const int rows = call_->rows;
    if (buffers_.size() < program_->widths.size()) buffers_.resize(program_->widths.size());
    buffer_.clear();
    for (size_t b = 0; b < program_->widths.size(); b++)
      buffer_.push_back(b == INPUT    ? const_cast<float*>(call_->input)  // which no record writes to
                        : b == OUTPUT ? call_->output
                                      : buffers_[b].as<float>((size_t)rows * program_->widths[b]));
    const size_t most = (size_t)rows * program_->most;
    q_.as<float>(most * program_->widest);  // or the floats themselves, for dense weights
    blocks_.as<Block>(most * program_->widest / BLOCK);
    longest_ = 0;
    for (int memory = 0; memory < 2; memory++) group(memory);
    runs_.clear();
    for (int row = 0; call_->states && row < rows; row++) {
      if (runs_.empty() || runs_.back().text != call_->slots[row]) runs_.push_back({row, 0, call_->slots[row]});
      runs_.back().rows++;
    }
    for (auto& own : own_) {
      own.row.as<float>(program_->widest);
      own.plain.as<float>(program_->widest);
      own.q.as<int8_t>(Dot<true>::BYTES / 4 * program_->widest);
      own.blocks.as<Block>(program_->widest / BLOCK);
      own.scores.as<float>((size_t)QUERIES * (longest_ + 2 * PAGE));
    }
  }

  // Cut the rows into tasks.
  void group(int memory) {
    auto& tasks = tasks_[memory];
    const Cache& cache = memory ? call_->memory : call_->text;
    tasks.clear();
    if (!cache.lengths || (memory && !call_->memory_of)) return;
    for (int row = 0; row < call_->rows; row++) {
      int text = memory ? call_->memory_of[call_->slots[row]] : call_->slots[row];
      if (tasks.empty() || tasks.back().text != text || tasks.back().rows >= QUERIES) tasks.push_back({row, 0, text});
      tasks.back().rows++;
      longest_ = std::max(longest_, cache.lengths[text]);
    }
  }

  // --- shares ---

  // Rows, dealt out evenly.
  template <class Each>
  void rows(int t, Each each) {
    const int64_t n = call_->rows, threads = pool_.threads();
    for (int row = n * t / threads; row < n * (t + 1) / threads; row++) each(row);
  }

  // How many pieces of work a record is, if they are handed out one by one.
  int pieces(const Op& op) const {
    switch (op.kind) {
      case LINEAR: return op.experts ? 0 : units(op);
      case ATTEND: return tasks_[op.memory].size() * (op.heads / together(op));
      case CONVOLVE:
      case SCAN: return runs_.size() * blocks(op.inputs);
      case RECALL: return runs_.size() * op.heads;
      default: return 0;
    }
  }

  static int blocks(int n) { return (n + LANES - 1) / LANES; }

  static int units(const Op& op) { return op.gated ? blocks(op.outputs / 2) : blocks(op.outputs); }

  // How many heads of a group one thread reads the keys for: all, unless other threads would have nothing to do.
  int together(const Op& op) const {
    int heads = op.heads / op.groups;
    while (heads % 2 == 0 && (int)tasks_[op.memory].size() * (op.heads / heads) < pool_.threads()) heads /= 2;
    return heads;
  }

  void deal(int t, int turn, int n) {
    next_[turn][t].value.store(n * (int64_t)t / pool_.threads(), std::memory_order_relaxed);
  }

  // 0…n, `step` at a time: a thread takes its own share first, then helps the others with theirs.
  template <class Some>
  void shares(int t, int turn, int n, int step, Some some) {
    const int64_t threads = pool_.threads();
    for (int k = 0; k < threads; k++) {
      const int owner = (t + k) % threads, end = n * (int64_t)(owner + 1) / threads;
      auto& next = next_[turn][owner].value;
      for (;;) {
        const int from = next.fetch_add(step, std::memory_order_relaxed);
        if (from >= end) break;
        some(from, std::min(from + step, end));
      }
    }
  }

  float* at(int buffer, int row, int offset = 0) const {
    return buffer_[buffer] + (int64_t)row * program_->widths[buffer] + offset;
  }

  // --- records ---

  void execute(const Op& op, int t, int turn) {
    switch (op.kind) {
      case EMBED: return rows(t, [&](int row) { embed(op, row); });
      case NORM: return rows(t, [&](int row) { norm(op, row, own_[t]); });
      case LINEAR: return op.experts ? experts(op, t) : linear(op, t, turn);
      case KEYS: return keys(op, t);
      case ATTEND: return attention(op, t, turn);
      case ROUTE: return rows(t, [&](int row) { route(op, at(op.in, row), at(op.out, row)); });
      case ADD: return rows(t, [&](int row) { add(op, row); });
      case CONVOLVE: return convolution(op, t, turn);
      case SCAN: return selective(op, t, turn);
      case RECALL: return recalled(op, t, turn);
      case FEATURE: return features(op, t);
      case DECAY: return decays(op, t);
      case MIX: return rows(t, [&](int row) { mix(op, row); });
    }
  }

  static void copy(const float* from, float* to, int n) { memcpy(to, from, n * sizeof(float)); }

  // E[token] × scale + position + segment
  void embed(const Op& op, int row) {
    float* x = at(op.out, row);
    matrix_row(op.store, op.weight, op.outputs, call_->tokens[row], x);
    const float* position = op.position ? op.position + (int64_t)call_->positions[row] * op.outputs : nullptr;
    const int segment = call_->segments ? call_->segments[row] : 0;
    const float* added = op.segment ? op.segment + (int64_t)segment * op.outputs : nullptr;
    vectors(op.outputs, [&](int i, int n) {
      F v = load(x + i, n) * op.scale;
      if (position) v += load(position + i, n);
      if (added) v += load(added + i, n);
      store(x + i, v, n);
    });
  }

  // norm(in) + residual
  void norm(const Op& op, int row, Own& own) {
    float* y = at(op.out, row, op.out_at);
    const float* x = at(op.in, row, op.in_at);
    if (op.residual < 0) return norm_row(op.norm, x, op.inputs, op.eps, op.norm_weight, op.norm_bias, y);
    float* normed = own.row.as<float>(op.inputs);
    norm_row(op.norm, x, op.inputs, op.eps, op.norm_weight, op.norm_bias, normed);
    const float* residual = at(op.residual, row);
    vectors(op.inputs, [&](int i, int n) { store(y + i, load(residual + i, n) + load(normed + i, n), n); });
  }

  struct Operand {  // rows as a product reads them: packed, or floats or pairs of bfloats
    Activations packed;
    float* plain;
  };

  // Row `to` of a product's operand: normalised, scaled, and kept as the weights are.
  void read(const Op& op, int row, int offset, const Operand& operand, int64_t to, Scratch& passing) {
    const float* x = at(op.in, row, op.in_at + offset);
    float* plain = operand.plain + to * columns(op.store, op.inputs) * words(op.store);
    if (op.norm || op.scale != 1) {
      float* normed = op.store == FLOAT ? plain : passing.as<float>(op.inputs);
      if (op.norm) norm_row(op.norm, x, op.inputs, op.eps, op.norm_weight, op.norm_bias, normed);
      if (op.scale != 1) {
        const float* from = op.norm ? normed : x;
        vectors(op.inputs, [&](int i, int n) { store(normed + i, load(from + i, n) * op.scale, n); });
      }
      x = normed;
    }
    if (!dense(op.store)) quantise(x, operand.packed.row(to));
    else if (op.store == BFLOAT) round_row(x, op.inputs, plain);
    else if (x != plain) copy(x, plain, op.inputs);
  }

  void linear(const Op& op, int t, int turn) {
    const int rows = call_->rows;
    Own& own = own_[t];
    Operand x = rows == 1 ? own_operand(op, own) : operand(op);
    if (rows == 1) {  // each thread reads the row for itself, sooner than it could wait for another
      read(op, 0, 0, x, 0, own.row);
    } else {
      this->rows(t, [&](int row) { read(op, row, 0, x, row, own.row); });
      pool_.barrier.wait();
    }
    const int64_t bytes = tile_bytes(op.store, op.inputs) * (op.gated ? 2 : 1);
    const int64_t step = std::max<int64_t>(1, rows == 1 ? 20480 / bytes : 65536 / bytes / 2 * 2);  // tiles go in pairs
    shares(t, turn, units(op), step, [&](int from, int to) {
      products(op, op.weight, x, 0, rows, from, to, [](int row) { return Place{row, 0, 1}; });
    });
  }

  // Each row to the experts that were chosen for it. The first product gives what each choice made, side by side; the
  // second (`weighted`) reads them so, and weighs what it makes.
  void experts(const Op& op, int t) {
    Routed& routed = own_[t].routed;  // each thread sorts for itself, sooner than it could wait for another
    routed.sort(call_->rows, op.experts, op.choices, [&](int row) { return at(op.routes, row); });
    const int pairs = routed.pairs.size(), threads = pool_.threads(), count = units(op);
    const int64_t bytes = tile_bytes(op.store, op.inputs) * count * (op.gated ? 2 : 1);
    const int wide = op.gated ? op.outputs / 2 : op.outputs;
    Operand x = operand(op);
    for (int p = (int64_t)pairs * t / threads; p < (int64_t)pairs * (t + 1) / threads; p++) {
      const Pair pair = routed.pairs[p];
      read(op, pair.row, op.weighted ? pair.choice * op.inputs : 0, x, p, own_[t].row);
    }
    pool_.barrier.wait();
    for (int e = 0; e < op.experts; e++) {
      const int from = routed.from[e], to = routed.from[e + 1];
      if (from == to) continue;
      products(op, op.weight + e * bytes, x, from, to, count * t / threads, count * (t + 1) / threads, [&](int p) {
        const Pair pair = routed.pairs[p];
        return Place{pair.row, pair.choice * wide, op.weighted ? at(op.routes, pair.row)[op.choices + pair.choice] : 1};
      });
    }
  }

  struct Place {  // where a row of results goes, and what it is multiplied with
    int row, at;
    float weight;
  };

  Operand operand(const Op& op) {
    void* rows = q_.reserve(0);
    return {{(int8_t*)rows, (Block*)blocks_.reserve(0), op.inputs, op.store}, (float*)rows};
  }

  static Operand own_operand(const Op& op, Own& own) {
    return {{own.q.as<int8_t>(0), own.blocks.as<Block>(op.inputs / BLOCK), op.inputs, op.store},
            own.plain.as<float>(op.inputs)};
  }

  // Units from…to of a product with rows first…last, 16 rows at a time so that they stay in the first cache.
  template <class Where>
  void products(const Op& op, const uint8_t* weight, const Operand& x, int first, int last, int from, int to,
                Where where) {
    float out[TILES][ROWS * LANES];
    const int unit = op.gated ? 2 : 1, step = dense(op.store) ? TILES : 2;
    const int64_t bytes = tile_bytes(op.store, op.inputs);
    for (int row = first; row < last; row += ROWS) {
      const int rows = std::min(ROWS, last - row);
      for (int tile = from * unit; tile < to * unit; tile += step) {
        const int tiles = std::min(step, to * unit - tile);
        const uint8_t* w = weight + tile * bytes;
        const int wide = columns(op.store, op.inputs);
        const float* some = x.plain + (int64_t)row * wide * words(op.store);
        if (op.store == FLOAT) dense_tiles<FLOAT>(w, tiles, some, wide, rows, out[0]);
        else if (op.store == BFLOAT) dense_tiles<BFLOAT>(w, tiles, some, wide, rows, out[0]);
        else packed_tiles(op.store, w, tiles, bytes, x.packed.row(row), rows, out[0], row == first);
        for (int i = 0; i < tiles; i += unit) finish(op, tile + i, row, rows, out[i], out[i + unit - 1], where);
      }
    }
  }

  // y = (act(x + bias) (× the other + its bias)) × weight + residual, for rows of a tile
  template <class Where>
  void finish(const Op& op, int tile, int first, int rows, const float* x, const float* other, Where where) {
    const int column = LANES * (op.gated ? tile / 2 : tile);
    const int n = (op.gated ? op.outputs / 2 : op.outputs) - column;
    const F bias = op.bias ? load(op.bias + tile * LANES) : F{};
    const F other_bias = op.bias && op.gated ? load(op.bias + (tile + 1) * LANES) : F{};
    const Rows out = rows_of(op.out, 0, op.out_at + column), added = rows_of(op.residual, 0, column);
    for (int r = 0; r < rows; r++) {
      const Place place = where(first + r);
      F y = load(x + LANES * r) + bias;
      if (op.act) y = activated(op.act, y, op.softcap);
      if (op.gated) y *= load(other + LANES * r) + other_bias;
      if (op.weighted) y *= place.weight;
      if (op.residual >= 0) y += load(added.row(place.row), n);
      store(out.row(place.row) + place.at, y, n);
    }
  }

  // residual + what each choice made
  void add(const Op& op, int row) {
    const float *from = op.residual < 0 ? nullptr : at(op.residual, row), *made = at(op.in, row);
    float* to = at(op.out, row);
    vectors(op.inputs, [&](int i, int n) {
      F x = load(made + i, n);
      for (int c = 1; c < op.choices; c++) x += load(made + c * op.inputs + i, n);
      store(to + i, from ? load(from + i, n) + x : x, n);
    });
  }

  // Norms and rotation of queries and keys; keys and values into the cache.
  void keys(const Op& op, int t) {
    const int64_t heads = op.heads + 2 * op.groups, all = call_->rows * heads, threads = pool_.threads();
    for (int64_t k = all * t / threads; k < all * (t + 1) / threads; k++) {
      const int row = k / heads, head = k % heads;
      float* x = at(op.in, row, head * op.head_width);
      if (program_->wide_cache) write_head<float>(op, *call_, row, head, x);
      else write_head<half>(op, *call_, row, head, x);
    }
  }

  void attention(const Op& op, int t, int turn) {
    const auto& tasks = tasks_[op.memory];
    const Cache& cache = op.memory ? call_->memory : call_->text;
    const int share = op.heads / op.groups, per = together(op), parts = op.heads / per;
    float* scores = own_[t].scores.as<float>(0);
    Query* queries = own_[t].queries.as<Query>(QUERIES * share);
    shares(t, turn, pieces(op), 1, [&](int k, int) {
      const Task& task = tasks[k / parts];
      const int head = k % parts * per, length = cache.lengths[task.text];
      int n = 0;
      for (int row = task.row; row < task.row + task.rows; row++)
        for (int h = head; h < head + per; h++) {
          const int position = call_->positions[row];
          Query& query = queries[n++];
          query = {at(op.in, row, h * op.head_width), at(op.out, row, h * op.head_width), nullptr, 0, length};
          if (op.memory) continue;
          query.from = position - std::min(position, op.behind);
          query.to = std::min<int64_t>(length, (int64_t)position + op.ahead + 1);
          if (op.distance) query.distance = op.distance + h * (2LL * op.table_rows + 64) + op.table_rows - position;
        }
      const int group = head / share, stride = longest_ + 2 * PAGE;
      if (program_->wide_cache) attend_all<float>(op, cache, task.text, group, queries, n, scores, stride);
      else attend_all<half>(op, cache, task.text, group, queries, n, scores, stride);
    });
  }

  // --- mixers with a memory ---

  Rows rows_of(int buffer, int row, int offset = 0) const {
    return {buffer < 0 ? nullptr : at(buffer, row, offset), buffer < 0 ? 0 : program_->widths[buffer]};
  }

  float* held(const Op& op, const Task& run) const { return (float*)(call_->states[run.text] + op.state_at); }

  void convolution(const Op& op, int t, int turn) {
    const int parts = blocks(op.inputs);
    shares(t, turn, pieces(op), 8, [&](int from, int to) {
      for (int k = from; k < to; k++) {
        const Task& run = runs_[k / parts];
        const int channel = k % parts * LANES;
        convolve(op, rows_of(op.in, run.row, op.in_at), rows_of(op.out, run.row, op.out_at), run.rows, channel,
                 op.inputs - channel, held(op, run));
      }
    });
  }

  void selective(const Op& op, int t, int turn) {
    const int parts = blocks(op.inputs);
    shares(t, turn, pieces(op), 1, [&](int k, int) {
      const Task& run = runs_[k / parts];
      const int channel = k % parts * LANES;
      scan(op, rows_of(op.in, run.row), rows_of(op.steps, run.row), rows_of(op.keys, run.row),
           rows_of(op.gate, run.row, op.gate_at), rows_of(op.out, run.row), run.rows, channel, op.inputs - channel,
           held(op, run));
    });
  }

  void recalled(const Op& op, int t, int turn) {
    shares(t, turn, pieces(op), 1, [&](int k, int) {
      const Task& run = runs_[k / op.heads];
      Recall{op, rows_of(op.in, run.row), rows_of(op.steps, run.row), rows_of(op.writes, run.row),
             rows_of(op.gate, run.row, op.gate_at), rows_of(op.out, run.row), run.rows, k % op.heads, held(op, run)}
          .all();
    });
  }

  // Parts of rows, dealt out evenly.
  template <class Each>
  void parts(int t, int n, Each each) {
    const int64_t all = (int64_t)call_->rows * n, threads = pool_.threads();
    for (int64_t k = all * t / threads; k < all * (t + 1) / threads; k++) each(k / n, k % n);
  }

  void features(const Op& op, int t) {
    parts(t, op.heads, [&](int row, int head) {
      feature(op, at(op.in, row, op.in_at + head * op.head_width), call_->positions[row]);
    });
  }

  // residual + in ⊙ keys, for parts of `in` that stand side by side
  void mix(const Op& op, int row) {
    for (int part = 0; part < op.groups; part++) {
      const float *x = at(op.in, row, part * op.inputs), *by = at(op.keys, row);
      float* y = at(op.out, row, part * op.inputs);
      vectors(op.inputs, [&](int i, int n) {
        const F added = op.residual < 0 ? F{} : load(at(op.residual, row, i), n);
        store(y + i, fma(load(x + i, n), load(by + i, n), added), n);
      });
    }
  }

  void decays(const Op& op, int t) {
    parts(t, op.groups, [&](int row, int group) {
      const int offset = op.in_at + group * op.shares;
      decay(op, at(op.in, row, offset), at(op.steps, row), rows_of(op.keys, row, offset).first, group);
    });
  }
};

}  // namespace qkv
