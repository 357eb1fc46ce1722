// AVX2 with AVX-VNNI (Alder Lake and later client CPUs).
#include <immintrin.h>

#include "kernels.h"

namespace ack {
namespace {
#define VB 32
#include "vectors.h"

ACK_INLINE F half(const uint16_t *from) {
  return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
}

template <int B>
struct Dot {
  static constexpr int CHUNK = 8, BIAS = 0, CHAINS = 4;
  typedef I Partial;
  static ACK_INLINE I begin(I acc) { return acc; }
  static ACK_INLINE I add(I acc, U code, uint32_t x) {
    return (I)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)code, _mm256_set1_epi32((int)x));
  }
  static ACK_INLINE I end(I, I part) { return part; }
};

constexpr bool HAS_BF16 = false;
constexpr int WIDE = 0;

#include "expand.h"
#include "isa.h"
#include "elementwise.h"
}  // namespace

extern const Isa avx2vnni;
const Isa avx2vnni = {"avx2vnni", HAS_BF16, WIDE, prepare, tiles, norm, gated, attend};
}  // namespace ack
