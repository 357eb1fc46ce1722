// Many rows of x times codes in 16 bits, for units whose exact products of bytes take three
// instructions and more. Codes minus their zero are widened once for all rows: even and odd columns
// of each block, next to each other in the lanes of their outputs.

typedef int16_t Wide __attribute__((vector_size(VB)));

// Sums of two products each.
ACK_INLINE I two_products(Wide a, Wide b) {
#if VB == 32
  return (I)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  return ((I)a << 16 >> 16) * ((I)b << 16 >> 16) + ((I)a >> 16) * ((I)b >> 16);
#endif
}

// A segment of a tile.
struct Widened {
  Wide even[SEGMENT / 4][NV], odd[SEGMENT / 4][NV];
  I products[NV];  // minus those of each even column and the odd one behind it, summed
};

template <int B, bool PAIRS>
ACK_INLINE void widen(Tile &t, int64_t s, Widened &to) {
  const uint8_t *w = t.segment<B>(s);
  const int count = t.supers(s);
  each<NV>([&](auto i) ACK_LAMBDA {
    const I zero = t.zero(s, i.value);
    const Wide zeros = (Wide)(zero | zero << 16);
    I products = {};
    for (int sb = 0; sb < count; sb++) {
      Planes<B> planes;
      planes.read(w + sb * 64 * B, i.value);
      each<BLOCKS>([&](auto j) ACK_LAMBDA {
        const U q = planes.codes(j.value);
        const Wide even = (Wide)(q & 0x00FF00FFu) - zeros;
        const Wide odd = (Wide)(q >> 8 & 0x00FF00FFu) - zeros;
        to.even[sb * BLOCKS + j.value][i.value] = even, to.odd[sb * BLOCKS + j.value][i.value] = odd;
        if (PAIRS) products -= two_products(even, odd);
      });
    }
    to.products[i.value] = products;
  });
}

constexpr int WIDE_ROWS = 4;  // their sums are half of 16 registers

// What a row of x adds to the sums of a tile in one block. PAIRS: with w0 x0 + w1 x1 =
// (w0 + x1)(w1 + x0) - w0 w1 - x0 x1 (S. Winograd, IEEE Trans. Comput. C-17, 1968) a multiplication
// gives two products, not one.
template <bool PAIRS>
ACK_INLINE void wide_row(const Wide (&even)[NV], const Wide (&odd)[NV], const uint32_t *x,
                         I (&sums)[NV]) {
#if VB == 32
  // Scheduled by hand: as GCC orders them these instructions take half as long again on Zen 3.
  Wide first, second, a, b;
  if (PAIRS) {
    asm("vpbroadcastd %[x0], %[first]\n\tvpbroadcastd %[x1], %[second]\n\t"
        "vpaddw %[first], %[even0], %[a]\n\tvpaddw %[second], %[odd0], %[b]\n\t"
        "vpmaddwd %[a], %[b], %[a]\n\tvpaddd %[a], %[sum0], %[sum0]\n\t"
        "vpaddw %[first], %[even1], %[first]\n\tvpaddw %[second], %[odd1], %[second]\n\t"
        "vpmaddwd %[first], %[second], %[first]\n\tvpaddd %[first], %[sum1], %[sum1]"
        : [sum0] "+x"(sums[0]), [sum1] "+x"(sums[1]), [first] "=&x"(first), [second] "=&x"(second),
          [a] "=&x"(a), [b] "=&x"(b)
        : [even0] "x"(even[0]), [odd0] "x"(odd[0]), [even1] "x"(even[1]), [odd1] "x"(odd[1]),
          [x0] "m"(x[0]), [x1] "m"(x[1]));
  } else {
    asm("vpbroadcastd %[x0], %[first]\n\tvpbroadcastd %[x1], %[second]\n\t"
        "vpmaddwd %[first], %[even0], %[a]\n\tvpmaddwd %[second], %[odd0], %[b]\n\t"
        "vpaddd %[a], %[b], %[a]\n\tvpaddd %[a], %[sum0], %[sum0]\n\t"
        "vpmaddwd %[first], %[even1], %[first]\n\tvpmaddwd %[second], %[odd1], %[second]\n\t"
        "vpaddd %[first], %[second], %[first]\n\tvpaddd %[first], %[sum1], %[sum1]"
        : [sum0] "+x"(sums[0]), [sum1] "+x"(sums[1]), [first] "=&x"(first), [second] "=&x"(second),
          [a] "=&x"(a), [b] "=&x"(b)
        : [even0] "x"(even[0]), [odd0] "x"(odd[0]), [even1] "x"(even[1]), [odd1] "x"(odd[1]),
          [x0] "m"(x[0]), [x1] "m"(x[1]));
  }
#else
  const Wide first = (Wide)(U{} + x[0]), second = (Wide)(U{} + x[1]);
  each<NV>([&](auto i) ACK_LAMBDA {
    const Wide e = even[i.value], o = odd[i.value];
    if (PAIRS) sums[i.value] += two_products(e + first, o + second);
    else sums[i.value] += two_products(e, first) + two_products(o, second);
  });
#endif
}

// A segment of `batches` batches of x, whose first words are at `x`, times that of a tile.
template <bool PAIRS>
ACK_FLATTEN void wide_segment(const Widened &w, int supers, const uint32_t *x, int64_t words,
                              const float *scales, const int32_t *sums, int64_t segments, int rows,
                              int64_t batches, const F (&scale)[NV], F (*y)[NV]) {
  for (int64_t b = 0; b < batches; b++) {
    for (int m = 0; m < rows; m += WIDE_ROWS, y += WIDE_ROWS) {
      I acc[WIDE_ROWS][NV] = {};
      if (PAIRS)
        each<WIDE_ROWS>([&](auto r) ACK_LAMBDA {
          each<NV>([&](auto i) ACK_LAMBDA {
            acc[r.value][i.value] = w.products[i.value] - sums[m + r.value];
          });
        });
      const uint32_t *xs = x + 2 * m;
      for (int j = 0; j < supers * BLOCKS; j++, xs += 2 * rows)
        each<WIDE_ROWS>([&](auto r) ACK_LAMBDA {
          wide_row<PAIRS>(w.even[j], w.odd[j], xs + 2 * r.value, acc[r.value]);
        });
      each<WIDE_ROWS>([&](auto r) ACK_LAMBDA {
        const F xscale = splat(scales[m + r.value]);
        each<NV>([&](auto i) ACK_LAMBDA {
          const F dot = __builtin_convertvector(acc[r.value][i.value], F);
          y[r.value][i.value] += dot * (scale[i.value] * xscale);
        });
      });
    }
    x += words * rows, scales += segments * rows, sums += segments * rows;
  }
}

// `batches` times `rows` rows from `row` on times one tile.
template <int B, bool PAIRS>
ACK_FLATTEN void wide_tile(const Weights &w, const Activations &x, int64_t row, int64_t batches,
                           int rows, int64_t tile, const Output &out) {
  Tile t;
  t.open(w, tile);
  F y[BATCHES * BATCH][NV] = {};
  Widened wide;
  const int64_t words = w.width / 2;
  for (int64_t s = 0; s < w.segments; s++) {
    widen<B, PAIRS>(t, s, wide);
    t.fetch({s, s + 1}, 1, 0, 1);
    F scale[NV];
    for (int i = 0; i < NV; i++) scale[i] = t.scale(s, i);
    const int64_t side = row * w.segments + s * rows;
    const uint32_t *xs = (const uint32_t *)x.data + row * words + s * w.segment / 2 * rows;
    wide_segment<PAIRS>(wide, t.supers(s), xs, words, x.scales + side,
                        (const int32_t *)x.sums + side, w.segments, rows, batches, scale, y);
  }
  for (int64_t m = 0; m < batches * rows; m++) store(w, out, tile, row + m, y[m]);
}

// Those rows times tiles, where their x is in 16 bits; whether it is.
template <int B>
bool wide_product(const Weights &w, const Activations &x, int64_t row, int64_t batches, int rows,
                  int64_t begin, int64_t end, const Output &out) {
  if constexpr (WIDE && B < 16) {
    if (x.mode == WIDE_A16 && rows > MOST_DIGITS) {
      for (int64_t t = begin; t < end; t++) wide_tile<B, false>(w, x, row, batches, rows, t, out);
      return true;
    }
    if constexpr (B >= WIDE) {
      if (x.mode == WIDE_A8 && rows == BATCH) {
        for (int64_t t = begin; t < end; t++) wide_tile<B, true>(w, x, row, batches, rows, t, out);
        return true;
      }
    }
  }
  return false;
}
