// AVX2 with FMA and F16C.
#include <immintrin.h>

#include "kernels.h"

namespace ack {
namespace {
#define VB 32
#include "vectors.h"

ACK_INLINE F half(const uint16_t *from) {
  return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
}

// vpmaddubsw adds two products into 16 bits and saturates, so CHUNK blocks are added in 16 bits only
// as long as 2 * CHUNK * 127 * (2^B - 1) <= 32767; 16 are all of a segment. At 8 bits one block is
// too much: codes are taken minus 128, their absolute value as the unsigned operand and their sign
// moved to x.
template <int B>
struct Dot {
  static constexpr int CHUNK = B <= 3 ? 16 : B == 4 ? 8 : B == 5 ? 4 : B == 6 ? 2 : 1;
  static constexpr int BIAS = B == 8 ? 128 : 0, CHAINS = 1;
  typedef I Partial;
  static ACK_INLINE I begin(I) { return I{}; }
  static ACK_INLINE I add(I part, U code, uint32_t x) {
    __m256i c = (__m256i)code, four = _mm256_set1_epi32((int)x);
    if (B == 8) {
      c = _mm256_xor_si256(c, _mm256_set1_epi8((char)128));
      four = _mm256_sign_epi8(four, c);
      c = _mm256_abs_epi8(c);
    }
    __m256i sum = _mm256_add_epi16((__m256i)part, _mm256_maddubs_epi16(c, four));
    asm("" : "+x"(sum));  // GCC would add in a tree, whose branches do not fit into 16 registers
    return (I)sum;
  }
  static ACK_INLINE I end(I acc, I part) {
    return acc + (I)_mm256_madd_epi16((__m256i)part, _mm256_set1_epi16(1));
  }
};

constexpr bool HAS_BF16 = false;
constexpr int WIDE = 8;  // 5 and 6 bits are 10 to 20 % faster in bytes

#include "expand.h"
#include "isa.h"
#include "elementwise.h"
}  // namespace

extern const Isa avx2;
const Isa avx2 = {"avx2", HAS_BF16, WIDE, prepare, tiles, norm, gated, attend};
}  // namespace ack
