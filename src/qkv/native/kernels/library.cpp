// What Python calls, by ctypes.
#include "blocks.h"
#include "engine.h"
#include "sample.h"

using qkv::Call, qkv::Engine, qkv::Op, qkv::Program, qkv::Scored;

namespace {
template <class Each>
void every(Engine* engine, const Scored& scores, Each each) {
  constexpr int64_t ALONE = 1 << 17;  // so many scores are read sooner than another thread is called
  engine->every(scores.blocks(), scores.rows * scores.width < ALONE, each);
}
}  // namespace

extern "C" {
int qkv_op_bytes() { return sizeof(Op); }
int qkv_call_bytes() { return sizeof(Call); }

Engine* qkv_engine(int threads) { return new Engine(threads); }
void qkv_engine_free(Engine* engine) { delete engine; }

Program* qkv_program(const Op* ops, int count, const int32_t* widths, int buffers, int wide_cache) {
  auto* program = new Program{{ops, ops + count}, {widths, widths + buffers}, wide_cache != 0};
  for (const Op& op : program->ops) {
    program->widest = std::max(program->widest, op.inputs);
    program->most = std::max(program->most, op.choices);
  }
  program->widest = (program->widest + 63) / 64 * 64;
  return program;
}
void qkv_program_free(Program* program) { delete program; }

int qkv_run(Engine* engine, const Program* program, const Call* call) {  // 0, or 1 where memory is short
  try {
    engine->run(*program, *call);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

// Of each block of `size` scores the largest, and Σ e^{(x − m)/T}.
void qkv_maxima(Engine* engine, const float* x, int64_t rows, int64_t width, int64_t size, float* out) {
  const Scored scores{x, rows, width, size};
  every(engine, scores, [&](int64_t k) { out[k] = maximum(scores, k); });
}
void qkv_sums(Engine* engine, const float* x, int64_t rows, int64_t width, int64_t size, const float* m, float T,
              float* out) {
  const Scored scores{x, rows, width, size};
  every(engine, scores, [&](int64_t k) { out[k] = mass(scores, k, m, T); });
}

// The k largest of each row, by the maxima of its blocks.
void qkv_largest(Engine* engine, const float* x, int64_t rows, int64_t width, int64_t size, const float* maxima, int k,
                 float* values, int64_t* places) {
  const Scored scores{x, rows, width, size}, whole{x, rows, width, width};
  every(engine, whole, [&](int64_t row) { k_largest(scores, row, maxima, k, values + row * k, places + row * k); });
}

// From page to page, of each run of their bytes the first parts[k].
void qkv_copy(Engine* engine, const uint8_t* const* from, uint8_t* const* to, const int64_t* parts, int64_t pages,
              int64_t runs, int64_t run) {
  engine->every(pages * runs, pages == 1, [&](int64_t k) {
    const int64_t page = k / runs, at = k % runs * run;
    memcpy(to[page] + at, from[page] + at, parts[page]);
  });
}

// How a block format is kept in tiles; −1 for one that is not known.
int qkv_store(int format) {
  const qkv::Format* found = qkv::format(format);
  return found ? found->store : -1;
}

int qkv_pack(int format, const uint8_t* rows, int count, int inputs, uint8_t* tiles, int64_t apart) {
  return qkv::pack(*qkv::format(format), rows, count, inputs, tiles, apart);
}

int qkv_lanes() { return qkv::LANES; }

int64_t qkv_tile_bytes(int store, int64_t inputs) { return qkv::tile_bytes(store, inputs); }
}
