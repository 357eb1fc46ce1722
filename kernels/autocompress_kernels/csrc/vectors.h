// Vectors of VB bytes and the helpers that unroll over them. Included by every isa_*.cpp inside its
// anonymous namespace, after VB is defined.

#define ACK_INLINE inline __attribute__((always_inline))
#define ACK_FLATTEN __attribute__((flatten, noinline))
#define ACK_LAMBDA __attribute__((always_inline))
#define ACK_REPEAT(count, name, statement) \
  for (int name = 0; name < (count); name++) statement

typedef uint32_t U __attribute__((vector_size(VB)));
typedef int32_t I __attribute__((vector_size(VB)));
typedef float F __attribute__((vector_size(VB)));

constexpr int NV = 64 / VB, LANES = VB / 4;
constexpr int TILES = VB == 64 ? 2 : 1;  // that share a value of x, where registers hold the sums
constexpr int64_t BATCHES = 4;           // batches of rows that share a tile's span
constexpr int AHEAD = 6400;              // bytes prefetched ahead; at 4096, lines share cache sets

constexpr int DIGIT = 128;               // base of a float's digits
constexpr int MOST_DIGITS = 2;           // rows that are split into them

template <int N>
struct Index {
  static constexpr int value = N;
};

// body(Index<0>{}) ... body(Index<N - 1>{}): a loop whose counter is a constant.
template <int N, int FROM = 0, class Body>
ACK_INLINE void each(Body &&body) {
  if constexpr (FROM < N) {
    body(Index<FROM>{});
    each<N, FROM + 1>(body);
  }
}

ACK_INLINE U load(const void *from) {
  U v;
  __builtin_memcpy(&v, from, VB);
  return v;
}

// LANES bytes, widened: GCC takes them one by one where it is left to convert the vector.
ACK_INLINE I bytes(const uint8_t *from) {
#if VB == 64
  return (I)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
#elif VB == 32
  return (I)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
#else
  typedef uint8_t Bytes __attribute__((vector_size(LANES)));
  Bytes few;
  __builtin_memcpy(&few, from, LANES);
  return __builtin_convertvector(few, I);
#endif
}

// Makes the compiler hold v in a register where there are 32 of them.
ACK_INLINE void keep(U &v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#else
  (void)v;
#endif
}

ACK_INLINE F splat(float value) { return F{} + value; }
