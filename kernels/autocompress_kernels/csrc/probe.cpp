// How fast memory can be read: what the speed of every kernel is a fraction of.
#include <string.h>

#include "autocompress_kernels.h"

#if defined(_WIN32)
#define ACK_API extern "C" __declspec(dllexport)
#else
#define ACK_API extern "C" __attribute__((visibility("default")))
#endif

namespace {

typedef uint64_t Vector __attribute__((vector_size(16), may_alias));  // what every CPU has

constexpr int64_t LINE = 64;            // bytes of a cache line
constexpr int VECTORS = LINE / 16;      // in a line
constexpr int SUMS = 2 * VECTORS;       // at a time, none waiting for another: fit into registers
constexpr int64_t AHEAD = 32 * VECTORS;  // vectors asked for before they are read, as kernels do

uint64_t sum_of_bytes(const char *p, int64_t bytes) {  // words that are not whole end in zeros
  uint64_t sum = 0;
  for (; bytes > 0; p += 8, bytes -= 8) {
    uint64_t word = 0;
    memcpy(&word, p, bytes < 8 ? (size_t)bytes : 8);
    sum += word;
  }
  return sum;
}

uint64_t sum_of_lines(const Vector *p, int64_t lines) {
  Vector sums[SUMS] = {};
  const Vector *const end = p + lines * VECTORS;
  for (; end - p >= SUMS; p += SUMS) {
    __builtin_prefetch(p + AHEAD);
    __builtin_prefetch(p + AHEAD + VECTORS);
    for (int j = 0; j < SUMS; j++) sums[j] += p[j];
  }
  for (int j = 0; p < end; p++, j++) sums[j] += *p;
  uint64_t sum = 0;
  for (const Vector &part : sums) sum += part[0] + part[1];
  return sum;
}

struct Region {
  const char *begin;
  int64_t lines, workers;
  uint64_t sum;
};

void work(int64_t begin, int64_t end, void *context) {
  Region &r = *(Region *)context;
  const int64_t first = r.lines * begin / r.workers, last = r.lines * end / r.workers;
  const uint64_t sum = sum_of_lines((const Vector *)r.begin + first * VECTORS, last - first);
  __atomic_fetch_add(&r.sum, sum, __ATOMIC_RELAXED);
}

}  // namespace

// The sum of the 8-byte words of [address, address + bytes), modulo 2^64. `parallel` may be NULL.
ACK_API int64_t ack_read(const void *address, int64_t bytes, ack_parallel_for parallel,
                         int32_t threads) {
  if (!address || bytes < 1) return 0;
  const char *begin = (const char *)address, *end = begin + bytes;
  const int64_t head = -(intptr_t)begin & (LINE - 1);  // up to the first whole line
  if (head % 8 || head > bytes) return (int64_t)sum_of_bytes(begin, bytes);
  Region r = {begin + head, (bytes - head) / LINE, threads < 1 ? 1 : threads, 0};
  if (!parallel || r.workers == 1 || parallel(0, r.workers, 1, work, &r) != 0) {
    r.workers = 1, r.sum = 0;
    work(0, 1, &r);
  }
  const char *tail = r.begin + r.lines * LINE;
  return (int64_t)(r.sum + sum_of_bytes(begin, head) + sum_of_bytes(tail, end - tail));
}
