// Which instruction set runs, and what is checked before it does.
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.h"

#if defined(_WIN32)
#define ACK_API extern "C" __declspec(dllexport)
#else
#define ACK_API extern "C" __attribute__((visibility("default")))
#endif

namespace ack {

extern const Isa avx512bf16, avx512vnni, avx2vnni, avx2, neon, portable;

namespace {

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
[[maybe_unused]] bool has_avx2vnni() {
  unsigned a = 0, b, c, d;
  return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
[[maybe_unused]] bool has_avx512vnni() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}
[[maybe_unused]] bool has_avx512bf16() {
  return has_avx512vnni() && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
}
#endif
#if defined(__aarch64__)
[[maybe_unused]] bool has_neon() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#else
  return true;  // every 64-bit Apple chip
#endif
}
#endif

constexpr int MOST = 8;

struct Usable {
  const Isa *isa[MOST];
  int count = 0;
  char names[128] = "";

  void add(const Isa &one) {
    if (count) strcat(names, ",");
    strcat(names, one.name);
    isa[count++] = &one;
  }

  Usable() {
#ifdef ACK_HAVE_AVX512BF16
    if (has_avx512bf16()) add(avx512bf16);
#endif
#ifdef ACK_HAVE_AVX512VNNI
    if (has_avx512vnni()) add(avx512vnni);
#endif
#ifdef ACK_HAVE_AVX2VNNI
    if (has_avx2vnni()) add(avx2vnni);
#endif
#ifdef ACK_HAVE_AVX2
    if (has_avx2()) add(avx2);
#endif
#ifdef ACK_HAVE_NEON
    if (has_neon()) add(neon);
#endif
    add(portable);
  }

  const Isa *find(const char *name) const {
    for (int i = 0; i < count; i++)
      if (!strcmp(isa[i]->name, name)) return isa[i];
    return nullptr;
  }
};

const Usable usable;  // made when the library is loaded

const Isa *first_choice() {
  const char *wanted = getenv("AUTOCOMPRESS_ISA");
  return wanted && *wanted ? usable.find(wanted) : usable.isa[0];
}

const Isa *chosen = first_choice();  // null: the environment names one that cannot run here

bool is_code(int32_t bits) {
  return bits == 2 || bits == 3 || bits == 4 || bits == 5 || bits == 6 || bits == 8;
}

int32_t gcd(int32_t a, int32_t b) { return b ? gcd(b, a % b) : a; }

int32_t check_sparse(const Weights &w) {
  const ack_matrix &m = w.m;
  const int64_t elements = w.tiles * ROWS * w.width, bytes = m.bits / 8;
  if (m.pattern == ACK_FULL) return m.masks || m.offsets ? ACK_BAD_FORMAT : ACK_OK;
  if ((m.bits != 8 && m.bits != 16) || m.zeros) return ACK_BAD_FORMAT;
  if (!m.masks || m.masks_bytes < elements / 8) return ACK_SHORT_BUFFER;
  if (m.pattern == ACK_2OF4) return m.offsets ? ACK_BAD_FORMAT : ACK_OK;
  const int64_t *offsets = (const int64_t *)m.offsets;
  if (!offsets || m.offsets_bytes < (w.tiles + 1) * 8) return ACK_SHORT_BUFFER;
  // What a tile reads is bound by its masks; offsets that leave the buffer are found here.
  for (int64_t t = 0; t < w.tiles; t++)
    if (offsets[t] < 0 || offsets[t] > offsets[t + 1]) return ACK_BAD_INDEX;
  if (offsets[w.tiles] * bytes + ACK_TAIL > m.values_bytes) return ACK_SHORT_BUFFER;
  return ACK_OK;
}

}  // namespace

const Isa &current_isa() { return chosen ? *chosen : portable; }

int32_t make_weights(const ack_matrix &m, Weights *w) {
  const int64_t most = 0x7fffffff;
  if (m.n < 1 || m.k < 1 || m.n > most || m.k > most) return ACK_BAD_SHAPE;
  if (!is_code(m.bits) && m.bits != 16) return ACK_BAD_FORMAT;
  if (m.pattern < ACK_FULL || m.pattern > ACK_2OF4 || m.reserved) return ACK_BAD_FORMAT;
  w->m = m;
  w->width = ceil_div(m.k, SUPER) * SUPER;
  w->tiles = ceil_div(m.n, ROWS);
  w->groups = 0, w->per_group = 1, w->segment = SEGMENT;
  if (is_code(m.bits)) {
    if (m.group < SUPER || m.group % SUPER) return ACK_BAD_FORMAT;
    w->segment = gcd(m.group, SEGMENT);
    w->per_group = m.group / w->segment;
    w->groups = ceil_div(m.k, m.group);
    const int64_t scales = w->tiles * ROWS * w->groups;
    if (!m.scales || m.scales_bytes < 2 * scales) return ACK_SHORT_BUFFER;
    if (m.zeros && m.zeros_bytes < scales) return ACK_SHORT_BUFFER;
  }
  w->segments = ceil_div(w->width, w->segment);
  const int64_t elements = w->tiles * ROWS * w->width;
  // Unsigned: the largest shape takes 2^63 bytes.
  const uint64_t dense = (uint64_t)elements / 8 * (uint64_t)m.bits;
  const uint64_t needed = m.pattern == ACK_FULL   ? dense
                          : m.pattern == ACK_2OF4 ? dense / 2 + ACK_TAIL
                                                  : ACK_TAIL;
  if (!m.values || m.values_bytes < 0 || (uint64_t)m.values_bytes < needed) return ACK_SHORT_BUFFER;
  return check_sparse(*w);
}

int32_t layout_mode(const Isa &isa, const Weights &w, int32_t mode, int64_t m) {
  if (mode == ACK_A8 && w.m.bits == 16) mode = ACK_A16;
  if (isa.wide && w.m.bits != 16) {
    if (mode == ACK_A16) return WIDE_A16;
    if (mode == ACK_A8 && w.m.bits >= isa.wide && m >= BATCH) return WIDE_A8;
  }
  return mode == ACK_A16 && !isa.bf16 ? ACK_A32 : mode;
}

bool same_layout(const Isa &isa, const Weights &a, const Weights &b, int32_t mode, int64_t m) {
  return a.m.k == b.m.k && a.segment == b.segment && (a.m.bits == 16) == (b.m.bits == 16) &&
         layout_mode(isa, a, mode, m) == layout_mode(isa, b, mode, m);
}

void *aligned_memory(int64_t bytes) {  // to be released by free()
  void *memory = nullptr;
#if defined(_WIN32)
  return malloc((size_t)bytes);  // vectors are loaded without asking for alignment
#else
  return posix_memalign(&memory, 64, (size_t)bytes) ? nullptr : memory;
#endif
}

int64_t activation_bytes(const Weights &w, int32_t mode, int64_t m) {
  return ceil_div(m * w.width * element_bytes(mode), 64) * 64 + 2 * ceil_div(m * w.segments * 4, 64) * 64;
}

Activations place(void *memory, const Weights &w, int32_t mode, int64_t m, bool exact) {
  const int64_t side = ceil_div(m * w.segments * 4, 64) * 64;
  char *end = (char *)memory + activation_bytes(w, mode, m);
  return {memory, (float *)(end - 2 * side), (float *)(end - side), mode, exact};
}

}  // namespace ack

using namespace ack;

ACK_API int32_t ack_abi(void) { return ACK_ABI; }

ACK_API const char *ack_isa(void) { return chosen ? chosen->name : ""; }

ACK_API const char *ack_isas(void) { return usable.names; }

ACK_API int32_t ack_select_isa(const char *name) {
  const Isa *found = name ? usable.find(name) : nullptr;
  if (!found) return ACK_BAD_FORMAT;
  chosen = found;
  return ACK_OK;
}

ACK_API int32_t ack_huge_pages(void *address, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = 2 << 20;
  const uintptr_t begin = ((uintptr_t)address + page - 1) / page * page;
  const uintptr_t end = ((uintptr_t)address + (uintptr_t)bytes) / page * page;
  return begin < end ? madvise((void *)begin, end - begin, MADV_HUGEPAGE) : 0;
#else
  (void)address, (void)bytes;
  return 0;
#endif
}
