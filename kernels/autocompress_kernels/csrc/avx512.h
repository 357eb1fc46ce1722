// What the AVX-512 units share, inside their anonymous namespace.

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
