// Products of one x with one matrix or several, and how their work is shared by threads.
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

#if defined(_WIN32)
#define ACK_API extern "C" __declspec(dllexport)
#else
#define ACK_API extern "C" __attribute__((visibility("default")))
#endif

namespace ack {
namespace {

// One matrix of those that a call multiplies x with.
struct Product {
  Weights w;
  Activations x;
  Output out;
};

// The tiles of all products, one after the other, are shared by the workers.
struct Region {
  const Isa *isa;
  const Product *products;
  int64_t tiles, m, workers;
};

void work(int64_t begin, int64_t end, void *context) {
  const Region &r = *(const Region *)context;
  int64_t first = r.tiles * begin / r.workers, left = r.tiles * end / r.workers - first;
  for (const Product *p = r.products; left > 0; p++) {
    const int64_t count = p->w.tiles - first < left ? p->w.tiles - first : left;
    if (count > 0) r.isa->tiles(p->w, p->x, r.m, first, first + count, p->out), left -= count;
    first = first > p->w.tiles ? first - p->w.tiles : 0;
  }
}

struct Preparation {
  const Isa *isa;
  const Weights *w;
  const Activations *a;
  const void *x;
  int32_t type;
  int64_t ld, m;
};

void prepare_batches(int64_t begin, int64_t end, void *context) {
  const Preparation &p = *(const Preparation *)context;
  for (int64_t row = begin * BATCH; row < end * BATCH && row < p.m;) {
    const int rows = rows_together(p.m - row);
    p.isa->prepare(*p.w, *p.a, p.x, p.type, p.ld, row, rows);
    row += rows;
  }
}

// Bytes of weights for each thread; less is read sooner than another thread wakes. Not tuned.
constexpr int64_t WORTH_A_THREAD = 64 << 10;

void multiply(Region &region, int32_t count, ack_parallel_for parallel, int32_t threads) {
  int64_t bytes = 0;
  for (int32_t i = 0; i < count; i++) {
    const Weights &w = region.products[i].w;
    bytes += w.tiles * ROWS * w.width * w.m.bits / 8;
    region.tiles += w.tiles;
  }
  const int64_t most = bytes * ceil_div(region.m, BATCH) / WORTH_A_THREAD;
  region.workers = !parallel || most < 1 ? 1 : most < threads ? most : threads;
  if (region.workers <= 1 || parallel(0, region.workers, 1, work, &region) != 0) {
    region.workers = 1;
    work(0, 1, &region);
  }
}

void prepare_all(Preparation &p, ack_parallel_for parallel, int32_t threads) {
  const int64_t batches = ceil_div(p.m, BATCH);
  if (!parallel || threads <= 1 || batches < 4 || parallel(0, batches, 1, prepare_batches, &p) != 0)
    prepare_batches(0, batches, &p);
}

struct Input {
  int32_t mode, type;
  int64_t m, ld;
  const void *x;
};

bool is_type(int32_t type) { return type == ACK_F32 || type == ACK_BF16; }

int32_t check(const ack_matrix *matrices, Product *products, int32_t count, const Input &in) {
  for (int32_t i = 0; i < count; i++) {
    if (int32_t error = make_weights(matrices[i], &products[i].w)) return error;
    if (matrices[i].k != matrices[0].k) return ACK_BAD_SHAPE;
    if (!is_type(products[i].out.type)) return ACK_BAD_FORMAT;
    if (in.m && !products[i].out.y) return ACK_SHORT_BUFFER;
  }
  if (in.mode < ACK_A8 || in.mode > ACK_A32 || !is_type(in.type)) return ACK_BAD_FORMAT;
  if (in.m < 0 || in.m > 0x7fffffff || in.ld < matrices[0].k) return ACK_BAD_SHAPE;
  return in.m && !in.x ? ACK_SHORT_BUFFER : ACK_OK;
}

// The product before this one whose activations have the layout of this one's; itself: none.
int32_t sharing(const Isa &isa, const Product *products, int32_t i, const Input &in) {
  int32_t same = 0;
  while (same < i && !same_layout(isa, products[same].w, products[i].w, in.mode, in.m)) same++;
  return same;
}

// Every product's activations in one block of memory, prepared once per layout.
void *prepare_each(const Isa &isa, Product *products, int32_t count, const Input &in,
                   ack_parallel_for parallel, int32_t threads) {
  int64_t bytes = 0, starts[ACK_MOST_MATRICES];
  for (int32_t i = 0; i < count; i++) {
    const Weights &w = products[i].w;
    starts[i] = bytes;
    if (sharing(isa, products, i, in) == i)
      bytes += activation_bytes(w, layout_mode(isa, w, in.mode, in.m), in.m);
  }
  void *memory = aligned_memory(bytes);
  for (int32_t i = 0; memory && i < count; i++) {
    Product &p = products[i];
    const int32_t from = sharing(isa, products, i, in);
    const int32_t mode = layout_mode(isa, p.w, in.mode, in.m);
    p.x = from < i ? products[from].x
                   : place((char *)memory + starts[i], p.w, mode, in.m, in.mode == ACK_A32);
    if (from < i) continue;
    Preparation work = {&isa, &p.w, &p.x, in.x, in.type, in.ld, in.m};
    prepare_all(work, parallel, threads);
  }
  return memory;
}

// Products whose outputs are set, with matrices that are not checked yet.
int32_t run(const ack_matrix *matrices, Product *products, int32_t count, const Input &in,
            ack_parallel_for parallel, int32_t threads) {
  if (int32_t error = check(matrices, products, count, in)) return error;
  if (in.m == 0) return ACK_OK;
  const Isa &isa = current_isa();
  void *memory = prepare_each(isa, products, count, in, parallel, threads);
  if (!memory) return ACK_NO_MEMORY;
  Region region = {&isa, products, 0, in.m, 1};
  multiply(region, count, parallel, threads);
  free(memory);
  return ACK_OK;
}

}  // namespace
}  // namespace ack

using namespace ack;

ACK_API int32_t ack_linear(const ack_matrix *matrix, int32_t mode, int64_t m, const void *x,
                           int32_t x_type, int64_t ldx, const float *bias, void *y, int32_t y_type,
                           int64_t ldy, int32_t accumulate, ack_parallel_for parallel,
                           int32_t threads) {
  if (!matrix || ldy < matrix->n) return ACK_BAD_SHAPE;
  Product product = {};
  product.out = {y, ldy, bias, y_type, accumulate};
  return run(matrix, &product, 1, {mode, x_type, m, ldx, x}, parallel, threads);
}

ACK_API int32_t ack_linears(const ack_matrix *matrices, int32_t count, int32_t mode, int64_t m,
                            const void *x, int32_t x_type, int64_t ldx, const float *const *biases,
                            void *const *ys, int32_t y_type, ack_parallel_for parallel,
                            int32_t threads) {
  if (!matrices || count < 1 || count > ACK_MOST_MATRICES) return ACK_BAD_SHAPE;
  if (!biases || !ys) return ACK_SHORT_BUFFER;
  Product products[ACK_MOST_MATRICES] = {};
  for (int32_t i = 0; i < count; i++)
    products[i].out = {ys[i], matrices[i].n, biases[i], y_type, 0};
  return run(matrices, products, count, {mode, x_type, m, ldx, x}, parallel, threads);
}

ACK_API int32_t ack_equal(const void *a, const void *b, int64_t bytes) {
  return bytes >= 0 && memcmp(a, b, (size_t)bytes) == 0;
}
