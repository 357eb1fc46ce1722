// A decoder of the Llama family, one parallel region per step: workers meet at spinning barriers
// instead of leaving and entering a region for every product.
#include <math.h>
#include <stdlib.h>
#include <string.h>
#if defined(__linux__) || defined(__APPLE__)
#include <sched.h>
#endif

#include "kernels.h"

#if defined(_WIN32)
#define ACK_API extern "C" __declspec(dllexport)
#else
#define ACK_API extern "C" __attribute__((visibility("default")))
#endif

namespace ack {
namespace {

constexpr int64_t CHUNK = 64;  // most tokens at once
enum { Q, K, V, O, GATE, UP, DOWN, MATRICES };

struct Block {
  Weights w[MATRICES];
  const ack_llama_block *given;
  bool attends, feeds;
  uint16_t *keys, *values;  // [kv_heads][capacity / 16][dim][16], [kv_heads][capacity][dim]
};

struct Llama {
  ack_llama given;
  Weights embedding, head;
  Block *blocks;
  int64_t hidden, ffn, room;  // room: capacity, padded to 16
  float *x, *normed, *q, *k, *v, *mixed, *gate, *up, *scores;
  char *slots[3];             // activations
  void *memory;
};

struct Barrier {
  int32_t waiting = 0, turn = 0;

  void wait(int32_t workers) {
    if (workers == 1) return;
    const int32_t mine = __atomic_load_n(&turn, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&waiting, 1, __ATOMIC_ACQ_REL) == workers) {
      __atomic_store_n(&waiting, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&turn, mine + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int64_t spins = 0; __atomic_load_n(&turn, __ATOMIC_ACQUIRE) == mine; spins++) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
#if defined(__linux__) || defined(__APPLE__)
      if (spins > 20000) sched_yield();  // another process has our core
#endif
    }
  }
};

struct Step {
  Llama &l;
  const Isa &isa;
  const int64_t *tokens;
  int64_t m, position;
  float *logits;
  int32_t workers;
  Barrier barrier;

  void meet() { barrier.wait(workers); }

  // Calls each_batch(row, rows) for this worker's batches of rows.
  template <class Body>
  void batches(int32_t worker, Body each_batch) {
    for (int64_t row = 0, turn = 0; row < m; turn++) {
      const int rows = rows_together(m - row);
      if (turn % workers == worker) each_batch(row, rows);
      row += rows;
    }
  }

  // Activations of `count` matrices that read the same input, shared where their layouts agree.
  struct Inputs {
    Activations a[3];
    bool own[3];
  };

  Inputs inputs(const Weights *w, int count, int64_t rows) {
    Inputs in = {};
    for (int j = 0; j < count; j++) {
      int same = 0;
      while (same < j && !(in.own[same] && same_layout(isa, w[same], w[j], l.given.mode, rows)))
        same++;
      in.own[j] = same == j;
      const int32_t mode = layout_mode(isa, w[j], l.given.mode, rows);
      in.a[j] = in.own[j] ? place(l.slots[j], w[j], mode, rows, l.given.mode == ACK_A32)
                          : in.a[same];
    }
    return in;
  }

  void prepare(const Inputs &in, const Weights *w, int count, const float *x, int64_t ld,
               int64_t row, int rows) {
    for (int j = 0; j < count; j++)
      if (in.own[j]) isa.prepare(w[j], in.a[j], x, ACK_F32, ld, row, rows);
  }

  void multiply(int32_t worker, const Weights &w, const Activations &a, int64_t rows, float *y,
                const float *bias, bool accumulate) {
    const Output out = {y, w.m.n, bias, ACK_F32, accumulate};
    isa.tiles(w, a, rows, w.tiles * worker / workers, w.tiles * (worker + 1) / workers, out);
  }

  void rotate(float *head, int64_t at) {
    const int64_t half = l.given.head_dim / 2;
    const float *c = l.given.cosine + at * half, *s = l.given.sine + at * half;
    for (int64_t i = 0; i < half; i++) {
      const float a = head[i], b = head[i + half];
      head[i] = a * c[i] - b * s[i];
      head[i + half] = b * c[i] + a * s[i];
    }
  }

  void append(Block &b, int64_t head, int64_t token) {
    const int64_t dim = l.given.head_dim, kv = l.given.kv_heads, at = position + token;
    float *key = l.k + (token * kv + head) * dim;
    const float *value = l.v + (token * kv + head) * dim;
    if (b.given->k_norm) isa.norm(key, b.given->k_norm, dim, l.given.epsilon, key);
    rotate(key, at);
    uint16_t *keys = b.keys + head * l.room * dim + at / 16 * 16 * dim + at % 16;
    uint16_t *values = b.values + (head * l.room + at) * dim;
    for (int64_t d = 0; d < dim; d++) keys[16 * d] = to_bf16(key[d]), values[d] = to_bf16(value[d]);
  }

  // Each worker has its own key-value heads, from rotation to the mixed values.
  void attention(int32_t worker, Block &b) {
    const int64_t dim = l.given.head_dim, kv = l.given.kv_heads, each = l.given.heads / kv;
    const float scale = 1.0f / sqrtf((float)dim);
    float *scores = l.scores + worker * l.room;
    for (int64_t head = worker; head < kv; head += workers) {
      for (int64_t t = 0; t < m; t++) append(b, head, t);
      for (int64_t t = 0; t < m; t++) {
        for (int64_t h = head * each; h < (head + 1) * each; h++) {
          float *query = l.q + (t * l.given.heads + h) * dim;
          if (b.given->q_norm) isa.norm(query, b.given->q_norm, dim, l.given.epsilon, query);
          rotate(query, position + t);
          isa.attend(query, b.keys + head * l.room * dim, b.values + head * l.room * dim,
                     position + t + 1, dim, scale, scores,
                     l.mixed + (t * l.given.heads + h) * dim);
        }
      }
    }
  }

  void norm_rows(const float *weight, int64_t row, int rows) {
    for (int64_t r = row; r < row + rows; r++)
      isa.norm(l.x + r * l.hidden, weight, l.hidden, l.given.epsilon, l.normed + r * l.hidden);
  }

  void attend(int32_t worker, Block &b) {
    const Inputs qkv = inputs(b.w + Q, 3, m), out = inputs(b.w + O, 1, m);
    const int64_t mixed = b.w[O].m.k;
    batches(worker, [&](int64_t row, int rows) {
      norm_rows(b.given->input_norm, row, rows);
      prepare(qkv, b.w + Q, 3, l.normed, l.hidden, row, rows);
    });
    meet();
    multiply(worker, b.w[Q], qkv.a[0], m, l.q, b.given->q_bias, false);
    multiply(worker, b.w[K], qkv.a[1], m, l.k, b.given->k_bias, false);
    multiply(worker, b.w[V], qkv.a[2], m, l.v, b.given->v_bias, false);
    meet();
    attention(worker, b);
    meet();
    batches(worker, [&](int64_t row, int rows) {
      prepare(out, b.w + O, 1, l.mixed, mixed, row, rows);
    });
    meet();
    multiply(worker, b.w[O], out.a[0], m, l.x, b.given->o_bias, true);
    meet();
  }

  void feed_forward(int32_t worker, Block &b) {
    const Inputs wide = inputs(b.w + GATE, 2, m), down = inputs(b.w + DOWN, 1, m);
    batches(worker, [&](int64_t row, int rows) {
      norm_rows(b.given->post_norm, row, rows);
      prepare(wide, b.w + GATE, 2, l.normed, l.hidden, row, rows);
    });
    meet();
    multiply(worker, b.w[GATE], wide.a[0], m, l.gate, nullptr, false);
    multiply(worker, b.w[UP], wide.a[1], m, l.up, nullptr, false);
    meet();
    batches(worker, [&](int64_t row, int rows) {
      isa.gated(l.gate + row * l.ffn, l.up + row * l.ffn, rows * l.ffn, l.gate + row * l.ffn);
      prepare(down, b.w + DOWN, 1, l.gate, l.ffn, row, rows);
    });
    meet();
    multiply(worker, b.w[DOWN], down.a[0], m, l.x, nullptr, true);
    meet();
  }

  void run(int32_t worker) {
    if (worker == 0)
      ack_rows(&l.embedding.m, tokens, 0, m, l.x, ACK_F32, l.hidden, nullptr, 1);
    meet();
    for (int64_t b = 0; b < l.given.blocks; b++) {
      if (l.blocks[b].attends) attend(worker, l.blocks[b]);
      if (l.blocks[b].feeds) feed_forward(worker, l.blocks[b]);
    }
    if (!logits) return;
    const Inputs last = inputs(&l.head, 1, 1);
    if (worker == 0) {
      norm_rows(l.given.final_norm, m - 1, 1);
      prepare(last, &l.head, 1, l.normed + (m - 1) * l.hidden, l.hidden, 0, 1);
    }
    meet();
    multiply(worker, l.head, last.a[0], 1, logits, nullptr, false);
  }
};

void run_worker(int64_t begin, int64_t end, void *context) {
  Step &step = *(Step *)context;
  if (end - begin == 1) return step.run((int32_t)begin);
  if (begin != 0) return;  // fewer threads than asked for: one does it all
  step.workers = 1;
  step.run(0);
}

int32_t check(const Llama &l) {
  const ack_llama &g = l.given;
  const int64_t q = g.heads * g.head_dim, kv = g.kv_heads * g.head_dim;
  const int64_t rows[MATRICES] = {q, kv, kv, l.hidden, l.ffn, l.ffn, l.hidden};
  const int64_t width[MATRICES] = {l.hidden, l.hidden, l.hidden, q, l.hidden, l.hidden, l.ffn};
  for (int64_t b = 0; b < g.blocks; b++) {
    const Block &block = l.blocks[b];
    for (int j = 0; j < MATRICES; j++)
      if ((j < GATE ? block.attends : block.feeds) &&
          (block.w[j].m.n != rows[j] || block.w[j].m.k != width[j]))
        return ACK_BAD_SHAPE;
    if ((block.attends && !block.given->input_norm) || (block.feeds && !block.given->post_norm))
      return ACK_SHORT_BUFFER;
  }
  if (l.embedding.m.k != l.hidden || l.head.m.k != l.hidden || l.head.m.n != l.embedding.m.n)
    return ACK_BAD_SHAPE;
  return g.final_norm && g.cosine && g.sine ? ACK_OK : ACK_SHORT_BUFFER;
}

int32_t read_matrices(Llama &l) {
  const ack_llama &g = l.given;
  if (int32_t error = make_weights(g.embedding, &l.embedding)) return error;
  if (int32_t error = make_weights(g.head, &l.head)) return error;
  for (int64_t b = 0; b < g.blocks; b++) {
    const ack_llama_block &from = g.block[b];
    const ack_matrix *m[MATRICES] = {&from.q, &from.k,  &from.v,   &from.o,
                                     &from.gate, &from.up, &from.down};
    Block &to = l.blocks[b];
    to.given = &from;
    to.attends = from.o.n != 0, to.feeds = from.down.n != 0;
    for (int j = 0; j < MATRICES; j++) {
      if (j < GATE ? !to.attends : !to.feeds) continue;
      if (int32_t error = make_weights(*m[j], &to.w[j])) return error;
    }
    if (to.feeds && !l.ffn) l.ffn = to.w[GATE].m.n;
  }
  l.hidden = l.embedding.m.k;
  return check(l);
}

constexpr int32_t MOST_WORKERS = 256;

bool reserve(Llama &l) {
  const ack_llama &g = l.given;
  const int64_t q = g.heads * g.head_dim, kv = g.kv_heads * g.head_dim;
  const int64_t widest = l.ffn > q ? (l.ffn > l.hidden ? l.ffn : l.hidden) : q > l.hidden ? q : l.hidden;
  l.room = ceil_div(g.capacity, 16) * 16;
  const int64_t slot = CHUNK * (widest + 64) * 5 + 4096;  // the largest layout: floats and a side
  float **buffers[] = {&l.x, &l.normed, &l.q, &l.k, &l.v, &l.mixed, &l.gate, &l.up, &l.scores};
  const int64_t floats[] = {CHUNK * l.hidden, CHUNK * l.hidden, CHUNK * q,     CHUNK * kv, CHUNK * kv,
                            CHUNK * q,        CHUNK * l.ffn,    CHUNK * l.ffn, MOST_WORKERS * l.room};
  const int64_t cache = ceil_div(kv * l.room * 2, 64) * 64;
  int64_t attending = 0;
  for (int64_t b = 0; b < g.blocks; b++) attending += l.blocks[b].attends;
  int64_t total = 3 * ceil_div(slot, 64) * 64 + 2 * attending * cache;
  for (int64_t count : floats) total += ceil_div(count * 4, 64) * 64;
  char *at = (char *)(l.memory = aligned_memory(total));
  if (!at) return false;
  memset(at, 0, (size_t)total);  // keys behind the last position are read: as zeros, never as NaN
  for (int i = 0; i < 9; i++) {
    *buffers[i] = (float *)at;
    at += ceil_div(floats[i] * 4, 64) * 64;
  }
  for (char *&one : l.slots) one = at, at += ceil_div(slot, 64) * 64;
  for (int64_t b = 0; b < g.blocks; b++) {
    if (!l.blocks[b].attends) continue;
    l.blocks[b].keys = (uint16_t *)at, at += cache;
    l.blocks[b].values = (uint16_t *)at, at += cache;
  }
  return true;
}

}  // namespace
}  // namespace ack

using namespace ack;

ACK_API void ack_llama_close(void *handle) {
  Llama *l = (Llama *)handle;
  if (!l) return;
  free(l->memory);
  free(l->blocks);
  free(l);
}

ACK_API void *ack_llama_open(const ack_llama *given, int32_t *error) {
  const ack_llama &g = *given;
  *error = ACK_BAD_SHAPE;
  if (g.blocks < 1 || g.heads < 1 || g.kv_heads < 1 || g.heads % g.kv_heads || g.head_dim < 16 ||
      g.head_dim % 16 || g.capacity < 1 || !g.block)
    return nullptr;
  if (g.mode < ACK_A8 || g.mode > ACK_A32) return *error = ACK_BAD_FORMAT, nullptr;
  Llama *l = (Llama *)calloc(1, sizeof(Llama));
  Block *blocks = (Block *)calloc((size_t)g.blocks, sizeof(Block));
  *error = ACK_NO_MEMORY;
  if (l) l->given = g, l->blocks = blocks;
  if (l && blocks && !(*error = read_matrices(*l)) && !reserve(*l)) *error = ACK_NO_MEMORY;
  if (l && blocks && *error == ACK_OK) return l;
  if (!l) free(blocks);
  ack_llama_close(l);
  return nullptr;
}

ACK_API int32_t ack_llama_step(void *handle, const int64_t *tokens, int64_t count, int64_t position,
                               float *logits, ack_parallel_for parallel, int32_t threads) {
  if (!handle || !tokens) return ACK_SHORT_BUFFER;
  Llama &l = *(Llama *)handle;
  if (count < 1 || position < 0 || position > l.given.capacity - count) return ACK_BAD_SHAPE;
  for (int64_t i = 0; i < count; i++)
    if (tokens[i] < 0 || tokens[i] >= l.embedding.m.n) return ACK_BAD_INDEX;
  const Isa &isa = current_isa();
  const int32_t workers = !parallel || threads < 1 ? 1 : threads < MOST_WORKERS ? threads : MOST_WORKERS;
  for (int64_t done = 0; done < count; done += CHUNK) {
    const int64_t m = count - done < CHUNK ? count - done : CHUNK;
    float *wanted = done + m == count ? logits : nullptr;
    Step step = {l, isa, tokens + done, m, position + done, wanted, workers, {}};
    if (workers == 1 || parallel(0, workers, 1, run_worker, &step) != 0) {
      step.workers = 1;
      step.run(0);
    }
  }
  return ACK_OK;
}
