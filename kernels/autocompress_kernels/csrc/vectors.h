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

// Makes the compiler hold v in a register where there are 32 of them.
ACK_INLINE void keep(U &v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#else
  (void)v;
#endif
}

ACK_INLINE F splat(float value) { return F{} + value; }

// Without an instruction for it: the kept elements of a block go to their places one by one.
ACK_INLINE const uint8_t *scatter8(uint8_t *block, const uint8_t *values, uint64_t mask) {
  __builtin_memset(block, 128, 64);
  for (; mask; mask &= mask - 1) block[__builtin_ctzll(mask)] = *values++;
  return values;
}

ACK_INLINE const uint8_t *scatter16(uint8_t *block, const uint8_t *values, uint32_t mask) {
  __builtin_memset(block, 0, 64);
  for (; mask; mask &= mask - 1, values += 2)
    __builtin_memcpy(block + 2 * __builtin_ctz(mask), values, 2);
  return values;
}
