// Any machine: vector extensions of GCC and Clang, 16 bytes wide.
#include "kernels.h"

namespace ack {
namespace {
#define VB 16
#include "vectors.h"

ACK_INLINE F half(const uint16_t *from) {
  // The exponent is 112 too small after the shift, also of subnormal numbers.
  U word;
  for (int l = 0; l < LANES; l++) word[l] = from[l];
  F size = (F)((word & 0x7FFFu) << 13) * 0x1p112f;
  return (F)((U)size | (word & 0x8000u) << 16);
}

typedef int16_t S __attribute__((vector_size(VB)));

// Even and odd bytes in 16-bit lanes; CHUNK products of 127 * (2^B - 1) fit into 16 bits.
template <int B>
struct Dot {
  static constexpr int CHUNK = B <= 5 ? 8 : B == 6 ? 4 : 1;
  static constexpr int BIAS = 0, CHAINS = 1;
  struct Partial {
    S even, odd;
  };
  static ACK_INLINE Partial begin(I) { return {S{}, S{}}; }
  static ACK_INLINE Partial add(Partial part, U code, uint32_t x) {
    const uint32_t x0 = (uint16_t)(int8_t)x, x1 = (uint16_t)(int8_t)(x >> 8);
    const uint32_t x2 = (uint16_t)(int8_t)(x >> 16), x3 = (uint16_t)(int8_t)(x >> 24);
    part.even += (S)(code & 0x00FF00FFu) * (S)(U{} + (x0 | x2 << 16));
    part.odd += (S)(code >> 8 & 0x00FF00FFu) * (S)(U{} + (x1 | x3 << 16));
    return part;
  }
  static ACK_INLINE I end(I acc, Partial part) {
    const I even = (I)part.even, odd = (I)part.odd;
    return acc + (even << 16 >> 16) + (even >> 16) + (odd << 16 >> 16) + (odd >> 16);
  }
};

constexpr bool HAS_BF16 = false;
constexpr int WIDE = 0;

#include "scatter.h"
#include "isa.h"
#include "elementwise.h"
}  // namespace

extern const Isa portable;
const Isa portable = {"portable", HAS_BF16, WIDE, prepare, tiles, norm, gated, attend};
}  // namespace ack
