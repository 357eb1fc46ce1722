// AVX-512 with VNNI, without BF16 (Cascade Lake, Ice Lake).
#include <immintrin.h>

#include "kernels.h"

namespace ack {
namespace {
#include "avx512.h"
constexpr bool HAS_BF16 = false;
constexpr int WIDE = 0;

#include "expand.h"
#include "isa.h"
#include "elementwise.h"
}  // namespace

extern const Isa avx512vnni;
const Isa avx512vnni = {"avx512vnni", HAS_BF16, WIDE, prepare, tiles, norm, gated, attend};
}  // namespace ack
