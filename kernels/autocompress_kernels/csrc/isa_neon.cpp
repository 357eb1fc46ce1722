// 64-bit Arm with the dot-product instructions.
#include <arm_neon.h>

#include "kernels.h"

namespace ack {
namespace {
#define VB 16
#include "vectors.h"

ACK_INLINE F half(const uint16_t *from) {
  return (F)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)));
}

// sdot takes signed bytes: codes of 8 bits are taken minus 128.
template <int B>
struct Dot {
  static constexpr int CHUNK = 8, BIAS = B == 8 ? 128 : 0, CHAINS = 8;
  typedef I Partial;
  static ACK_INLINE I begin(I acc) { return acc; }
  static ACK_INLINE I add(I acc, U code, uint32_t x) {
    if (B == 8) code ^= 0x80808080u;
    return (I)vdotq_s32((int32x4_t)acc, (int8x16_t)code, (int8x16_t)vdupq_n_u32(x));
  }
  static ACK_INLINE I end(I, I part) { return part; }
};

constexpr bool HAS_BF16 = false;
constexpr int WIDE = 0;

#include "scatter.h"
#include "isa.h"
#include "elementwise.h"
}  // namespace

extern const Isa neon;
const Isa neon = {"neon", HAS_BF16, WIDE, prepare, tiles, norm, gated, attend};
}  // namespace ack
