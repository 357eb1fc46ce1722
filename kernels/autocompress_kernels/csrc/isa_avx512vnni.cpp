// AVX-512 with VNNI, without BF16 (Cascade Lake, Ice Lake).
#include <immintrin.h>

#include "kernels.h"

namespace ack {
namespace {
#define VB 64
#include "vectors.h"

ACK_INLINE F half(const uint16_t *from) {
  return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
}

template <int B>
struct Dot {
  static constexpr int CHUNK = 8, BIAS = 0, CHAINS = 4;
  typedef I Partial;
  static ACK_INLINE I begin(I acc) { return acc; }
  static ACK_INLINE I add(I acc, U code, uint32_t x) {
    return (I)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)code, _mm512_set1_epi32((int)x));
  }
  static ACK_INLINE I end(I, I part) { return part; }
};

constexpr bool HAS_BF16 = false;

ACK_INLINE const uint8_t *expand8(uint8_t *block, const uint8_t *values, uint64_t mask) {
  return scatter8(block, values, mask);
}

ACK_INLINE const uint8_t *expand16(uint8_t *block, const uint8_t *values, uint32_t mask) {
  return scatter16(block, values, mask);
}

#include "isa.h"
#include "elementwise.h"
}  // namespace

extern const Isa avx512vnni;
const Isa avx512vnni = {"avx512vnni", HAS_BF16, prepare, tiles, norm, gated, attend};
}  // namespace ack
