// Sparse blocks with AVX2, eight elements at a time: their mask bits name a permutation.

// For each 8 mask bits: where in the kept elements each of the eight stands; 128: it is not kept.
// Those of bytes come twice, for the lower half of a vector and, behind 8 others, for the upper.
struct Permutations {
  alignas(64) uint8_t words[256][16];
  alignas(64) uint8_t bytes[2][256][8];
};

constexpr Permutations all_permutations() {
  Permutations p = {};
  for (int mask = 0; mask < 256; mask++) {
    uint8_t next = 0;
    for (int i = 0; i < 8; i++) {
      const bool kept = mask >> i & 1;
      p.bytes[0][mask][i] = kept ? next : 128;
      p.bytes[1][mask][i] = kept ? (uint8_t)(8 + next) : 128;
      p.words[mask][2 * i] = kept ? (uint8_t)(2 * next) : 128;
      p.words[mask][2 * i + 1] = kept ? (uint8_t)(2 * next + 1) : 128;
      next = (uint8_t)(next + kept);
    }
  }
  return p;
}

constexpr Permutations PERMUTATIONS = all_permutations();

ACK_INLINE __m128i two_halves(const void *low, const void *high) {
  const __m128i first = _mm_loadl_epi64((const __m128i *)low);
  return (__m128i)_mm_loadh_pd((__m128d)first, (const double *)high);
}

// 16 elements minus 128; those not kept are 0.
ACK_INLINE __m128i expand_bytes(const uint8_t *&values, const uint8_t *masks) {
  const uint64_t low = masks[0], high = masks[1];
  const uint8_t *behind = values + (uint64_t)__builtin_popcountll(low);
  const __m128i kept = two_halves(values, behind);
  const __m128i from = two_halves(PERMUTATIONS.bytes[0][low], PERMUTATIONS.bytes[1][high]);
  values = behind + (uint64_t)__builtin_popcountll(high);
  return _mm_shuffle_epi8(_mm_xor_si128(kept, _mm_set1_epi8((char)128)), from);
}

ACK_INLINE const uint8_t *expand8(uint8_t *block, const uint8_t *values, const uint8_t *masks) {
  for (int i = 0; i < 64; i += 32, masks += 4) {
    const __m128i low = expand_bytes(values, masks), high = expand_bytes(values, masks + 2);
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
    const __m256i codes = _mm256_xor_si256(both, _mm256_set1_epi8((char)128));
    _mm256_storeu_si256((__m256i *)(block + i), codes);
  }
  return values;
}

// 8 elements; `bits` are their mask times 16, which is where their permutation lies.
ACK_INLINE __m128i expand_words(const uint8_t *&values, uint64_t bits) {
  const __m128i kept = _mm_loadu_si128((const __m128i *)values);
  values += 2 * (uint64_t)__builtin_popcountll(bits);
  const uint8_t *from = PERMUTATIONS.words[0] + bits;
  return _mm_shuffle_epi8(kept, _mm_load_si128((const __m128i *)from));
}

ACK_INLINE const uint8_t *expand16(uint8_t *block, const uint8_t *values, const uint8_t *masks) {
  uint32_t mask;
  __builtin_memcpy(&mask, masks, 4);
  uint64_t bits = (uint64_t)mask << 4;
  for (int i = 0; i < 64; i += 32, bits >>= 16) {
    const __m128i low = expand_words(values, bits & 0xFF0);
    const __m128i high = expand_words(values, bits >> 8 & 0xFF0);
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
    _mm256_storeu_si256((__m256i *)(block + i), both);
  }
  return values;
}
