// The kernels, written once over vectors of VB bytes. An isa_*.cpp defines, in `namespace ack {
// namespace {`, VB and the macro-free primitives listed below, then includes this file.
//
//   typedef ... U, I, F            VB bytes of uint32, int32, float lanes (vectors.h)
//   F half(const uint16_t *)       fp16 to float, one vector
//   Dot<B>                         CHUNK, BIAS, CHAINS, Partial, begin, add, end: u8 codes x s8
//   constexpr bool HAS_BF16; F dot_bf16(F, U, uint32_t)
//   const uint8_t *expand8(uint8_t *block, const uint8_t *values, uint64_t mask)
//   const uint8_t *expand16(uint8_t *block, const uint8_t *values, uint32_t mask)

// One vector of every plane of a superblock, in registers: GCC would load them for each use.
template <int B, bool KEEP = true>
struct Planes {
  U plane[B];

  ACK_INLINE void read(const uint8_t *super, int i) {
    each<B>([&](auto p) ACK_LAMBDA {
      plane[p.value] = load(super + 64 * p.value + VB * i);
      if (B < 8 && KEEP) keep(plane[p.value]);
    });
  }

  // Codes of block j, one per byte.
  ACK_INLINE U codes(int j) const {
    if (B == 8) return plane[j];
    U code = {};
    if (B & 4) code = (j % 2 ? plane[j / 2] >> 4 : plane[j / 2]) & 0x0F0F0F0Fu;
    if (B & 2) {
      const int from = 2 * (j % 4), to = B & 4;
      const U v = plane[(B & 4) + j / 4];
      code |= (from > to ? v >> (from - to) : v << (to - from)) & (0x03030303u << to);
    }
    if (B & 1) {
      const int to = B & 6;
      const U v = plane[B - 1];
      code |= (j > to ? v >> (j - to) : v << (to - j)) & (0x01010101u << to);
    }
    return code;
  }
};

// Segments of a row.
struct Span {
  int64_t from, to;
};

// Where a tile's values begin; where its masks do, too, both move on as segments are expanded.
struct Kept {
  const uint8_t *values, *masks;
};

// A tile's weights, segment by segment; sparse ones are expanded into a buffer.
struct Tile {
  const Weights *weights;
  Kept kept;
  const uint16_t *scales;
  const uint8_t *zeros;
  alignas(64) uint8_t buffer[SEGMENT * ROWS * 2];

  ACK_INLINE void open(const Weights &w, int64_t tile) {
    const ack_matrix &m = w.m;
    weights = &w;
    const int64_t element = m.bits == 16 ? 2 : 1, wide = w.width * ROWS;
    kept.values = (const uint8_t *)m.values;
    kept.masks = nullptr;
    if (m.pattern == ACK_FULL) {
      kept.values += tile * wide * m.bits / 8;
    } else {
      kept.masks = (const uint8_t *)m.masks + tile * wide / 8;
      kept.values += element * (m.pattern == ACK_BITMASK ? ((const int64_t *)m.offsets)[tile]
                                                    : tile * wide / 2);
    }
    scales = (const uint16_t *)m.scales + tile * w.groups * ROWS;
    zeros = m.zeros ? (const uint8_t *)m.zeros + tile * w.groups * ROWS : nullptr;
  }

  ACK_INLINE int supers(int64_t s) const {
    const int64_t left = weights->width - s * weights->segment;
    return (int)((left < weights->segment ? left : weights->segment) / SUPER);
  }

  // Superblocks of segment s; segments must be asked for in order.
  ACK_INLINE const uint8_t *segment(int64_t s) {
    if (!kept.masks) return kept.values + s * weights->segment * ROWS * weights->m.bits / 8;
    const int count = supers(s);
    if (weights->m.bits == 16) {
      for (int b = 0; b < count * 16; b++, kept.masks += 4) {
        uint32_t mask;
        __builtin_memcpy(&mask, kept.masks, 4);
        kept.values = expand16(buffer + 64 * b, kept.values, mask);
      }
    } else {
      for (int b = 0; b < count * 8; b++, kept.masks += 8) {
        uint64_t mask;
        __builtin_memcpy(&mask, kept.masks, 8);
        kept.values = expand8(buffer + 64 * b, kept.values, mask);
      }
    }
    return buffer;
  }

  // Asks for one of `parts` parts of what the tile `ahead` of this one has in a span.
  ACK_INLINE void fetch(Span span, int64_t ahead, int64_t part, int64_t parts) const {
    if (kept.masks) return;
    const int64_t row = ROWS * weights->m.bits / 8;
    const int64_t inputs = (span.to - span.from) * weights->segment;
    const int64_t from = ahead * weights->width + span.from * weights->segment;
    const uint8_t *next = kept.values + (from + inputs * part / parts) * row;
    for (int64_t at = 0; at < inputs / parts * row; at += 64) __builtin_prefetch(next + at, 0, 2);
  }

  ACK_INLINE F scale(int64_t s, int i) const {
    return half(scales + s / weights->per_group * ROWS + i * LANES);
  }

  ACK_INLINE I zero(int64_t s, int i) const {
    if (!zeros) return I{} + (1 << (weights->m.bits - 1));
    I z;
    for (int l = 0; l < LANES; l++) z[l] = zeros[s / weights->per_group * ROWS + i * LANES + l];
    return z;
  }
};

// Vectors of a block that are worked on at once: what the registers hold beside MT rows.
template <int MT, int TB>
struct Split {
  static constexpr int ALL = NV * TB, FIT = TB * BATCH / MT, IB = ALL < FIT ? ALL : FIT;
};

// TB tiles at once, so that each value of x is loaded once for all of them.
template <int B, int MT, int TB>
ACK_FLATTEN void tile_a8(Tile (&t)[TB], Span span, const uint32_t *x, const float *xscale,
                         const int32_t *xsum, F (&y)[TB][MT][NV]) {
  typedef Dot<B> D;
  constexpr int IB = Split<MT, TB>::IB, A = D::CHAINS / (MT * IB) > 1 ? D::CHAINS / (MT * IB) : 1;
  for (int64_t s = span.from; s < span.to; s++) {
    const uint8_t *w[TB];
    each<TB>([&](auto n) ACK_LAMBDA { w[n.value] = t[n.value].segment(s); });
    const int count = t[0].supers(s);
    for (int i0 = 0; i0 < NV * TB; i0 += IB) {
      I acc[A][MT][IB] = {};
      each<IB>([&](auto i) ACK_LAMBDA {
        const I zero = t[(i0 + i.value) / NV].zero(s, (i0 + i.value) % NV) - D::BIAS;
        each<MT>([&](auto m) ACK_LAMBDA { acc[0][m.value][i.value] = -zero * xsum[m.value]; });
      });
      const uint32_t *xs = x;
      for (int sb = 0; sb < count; sb++, xs += BLOCKS * MT) {
        if (B <= 3 && MT <= 2 && i0 == 0)
          ACK_REPEAT(B, p, __builtin_prefetch(w[0] + sb * 64 * B + AHEAD + 64 * p));
        Planes<B, (TB == 1)> planes[IB];
        each<IB>([&](auto i) ACK_LAMBDA {
          planes[i.value].read(w[(i0 + i.value) / NV] + sb * 64 * B, (i0 + i.value) % NV);
        });
        each<BLOCKS / D::CHUNK>([&](auto c) ACK_LAMBDA {
          typename D::Partial part[A][MT][IB];
          for (int a = 0; a < A; a++)
            for (int m = 0; m < MT; m++)
              for (int i = 0; i < IB; i++) part[a][m][i] = D::begin(acc[a][m][i]);
          each<D::CHUNK>([&](auto jj) ACK_LAMBDA {
            constexpr int j = c.value * D::CHUNK + jj.value;
            U q[IB];
            each<IB>([&](auto i) ACK_LAMBDA { q[i.value] = planes[i.value].codes(j); });
            each<MT>([&](auto m) ACK_LAMBDA {
              each<IB>([&](auto i) ACK_LAMBDA {
                auto &p = part[j % A][m.value][i.value];
                p = D::add(p, q[i.value], xs[j * MT + m.value]);
              });
            });
          });
          for (int a = 0; a < A; a++)
            for (int m = 0; m < MT; m++)
              for (int i = 0; i < IB; i++) acc[a][m][i] = D::end(acc[a][m][i], part[a][m][i]);
        });
      }
      each<IB>([&](auto i) ACK_LAMBDA {
        Tile &tile = t[(i0 + i.value) / NV];
        const int lane = (i0 + i.value) % NV;
        const F scale = tile.scale(s, lane);
        each<MT>([&](auto m) ACK_LAMBDA {
          I sum = acc[0][m.value][i.value];
          for (int a = 1; a < A; a++) sum += acc[a][m.value][i.value];
          const F dot = __builtin_convertvector(sum, F);
          y[(i0 + i.value) / NV][m.value][lane] += dot * (scale * xscale[m.value]);
        });
      });
    }
    x += count * BLOCKS * MT, xscale += MT, xsum += MT;
  }
}

// bf16 activations: bf16 with the bits 0x4300 | q is exactly 128 + q for q < 128, and 0x4500 | q is
// 2048 + 16 q for q < 16, so codes become bf16 by one `or`; the offsets leave with the zero.
template <int B, int MT>
ACK_FLATTEN void tile_a16(Tile &t, Span span, const uint32_t *x, const float *xsum,
                          F (&y)[MT][NV]) {
  constexpr float OFFSET = B == 8 ? 2048 + 128 : 128;
  constexpr int A = 4 / MT > 1 ? 4 / MT : 1;
  for (int64_t s = span.from; s < span.to; s++) {
    const uint8_t *w = t.segment(s);
    const int count = t.supers(s);
    for (int i = 0; i < NV; i++) {
      F acc[A][MT] = {};
      const uint32_t *xs = x;
      for (int sb = 0; sb < count; sb++, xs += 2 * BLOCKS * MT) {
        const uint8_t *super = w + sb * 64 * B;
        if (MT <= 2 && i == 0) ACK_REPEAT(B, p, __builtin_prefetch(super + AHEAD + 64 * p));
        Planes<B> planes;
        planes.read(super, i);
        each<BLOCKS>([&](auto jj) ACK_LAMBDA {
          constexpr int j = jj.value, a = 2 * j % A, b = (2 * j + 1) % A;
          const U q = planes.codes(j);
          constexpr uint32_t mask = B == 8 ? 0x000F000Fu : 0x00FF00FFu;
          U even = (q & mask) | 0x43004300u, odd = (q >> 8 & mask) | 0x43004300u;
          each<MT>([&](auto m) ACK_LAMBDA {
            const uint32_t *pair = xs + 2 * (j * MT + m.value);
            acc[a][m.value] = dot_bf16(acc[a][m.value], even, pair[0]);
            acc[b][m.value] = dot_bf16(acc[b][m.value], odd, pair[1]);
          });
          if (B == 8) {
            U high_even = (q >> 4 & mask) | 0x45004500u, high_odd = (q >> 12 & mask) | 0x45004500u;
            each<MT>([&](auto m) ACK_LAMBDA {
              const uint32_t *pair = xs + 2 * (j * MT + m.value);
              acc[a][m.value] = dot_bf16(acc[a][m.value], high_even, pair[0]);
              acc[b][m.value] = dot_bf16(acc[b][m.value], high_odd, pair[1]);
            });
          }
        });
      }
      F scale = t.scale(s, i), zero = __builtin_convertvector(t.zero(s, i), F) + OFFSET;
      each<MT>([&](auto m) ACK_LAMBDA {
        F sum = acc[0][m.value];
        for (int a = 1; a < A; a++) sum += acc[a][m.value];
        y[m.value][i] += (sum - zero * xsum[m.value]) * scale;
      });
    }
    x += count * 2 * BLOCKS * MT, xsum += MT;
  }
}

template <int B, int MT>
ACK_FLATTEN void tile_a32(Tile &t, Span span, const float *x, F (&y)[MT][NV]) {
  constexpr int A = 4 / MT > 1 ? 4 / MT : 1;
  for (int64_t s = span.from; s < span.to; s++) {
    const uint8_t *w = t.segment(s);
    const int count = t.supers(s);
    for (int i = 0; i < NV; i++) {
      F acc[A][MT] = {};
      F scale = t.scale(s, i), zero = __builtin_convertvector(t.zero(s, i), F);
      const float *xs = x;
      for (int sb = 0; sb < count; sb++, xs += SUPER * MT) {
        Planes<B> planes;
        planes.read(w + sb * 64 * B, i);
        each<BLOCKS>([&](auto j) ACK_LAMBDA {
          const U q = planes.codes(j.value);
          each<4>([&](auto k) ACK_LAMBDA {
            F weight = __builtin_convertvector((I)(q >> (8 * k.value) & 0xFFu), F) - zero;
            each<MT>([&](auto m) ACK_LAMBDA {
              acc[k.value % A][m.value] += weight * xs[(4 * j.value + k.value) * MT + m.value];
            });
          });
        });
      }
      each<MT>([&](auto m) ACK_LAMBDA {
        F sum = acc[0][m.value];
        for (int a = 1; a < A; a++) sum += acc[a][m.value];
        y[m.value][i] += sum * scale;
      });
    }
    x += count * SUPER * MT;
  }
}

// bf16 weights; pairs of bf16 activations, or floats where EXACT.
template <int MT, bool PAIRS>
ACK_FLATTEN void tile_dense(Tile &t, Span span, const void *data, F (&y)[MT][NV]) {
  constexpr int A = 4 / MT > 1 ? 4 / MT : 1;
  const uint32_t *pairs = (const uint32_t *)data;
  const float *x = (const float *)data;
  for (int64_t s = span.from; s < span.to; s++) {
    const uint8_t *w = t.segment(s);
    const int count = t.supers(s);
    for (int i = 0; i < NV; i++) {
      F acc[A][MT] = {};
      for (int sb = 0; sb < count; sb++) {
        const uint8_t *super = w + sb * 1024;
        if (MT <= 2 && i == 0) ACK_REPEAT(16, p, __builtin_prefetch(super + AHEAD + 64 * p));
        each<16>([&](auto jj) ACK_LAMBDA {
          constexpr int j = jj.value;
          U v = load(super + 64 * j + VB * i);
          if constexpr (PAIRS) {
            each<MT>([&](auto m) ACK_LAMBDA {
              F &sum = acc[j % A][m.value];
              sum = dot_bf16(sum, v, pairs[(sb * 16 + j) * MT + m.value]);
            });
          } else {
            F even = (F)(v << 16), odd = (F)(v & 0xFFFF0000u);
            const float *pair = x + (sb * 16 + j) * 2 * MT;
            each<MT>([&](auto m) ACK_LAMBDA {
              acc[j % A][m.value] += even * pair[m.value];
              acc[(j + 1) % A][m.value] += odd * pair[MT + m.value];
            });
          }
        });
      }
      each<MT>([&](auto m) ACK_LAMBDA {
        for (int a = 0; a < A; a++) y[m.value][i] += acc[a][m.value];
      });
    }
    pairs += count * 16 * MT, x += count * SUPER * MT;
  }
}

inline void store(const Weights &w, const Output &out, int64_t tile, int64_t row, const F *y) {
  float values[ROWS];
  __builtin_memcpy(values, y, sizeof values);
  const int64_t first = tile * ROWS, left = w.m.n - first;
  const int count = (int)(left < ROWS ? left : ROWS);
  if (out.bias)
    for (int r = 0; r < count; r++) values[r] += out.bias[first + r];
  const int64_t at = row * out.ld + first;
  if (out.type == ACK_F32) {
    float *to = (float *)out.y + at;
    for (int r = 0; r < count; r++) to[r] = out.accumulate ? to[r] + values[r] : values[r];
  } else {
    uint16_t *to = (uint16_t *)out.y + at;
    for (int r = 0; r < count; r++)
      to[r] = to_bf16(out.accumulate ? from_bf16(to[r]) + values[r] : values[r]);
  }
}

// One batch of rows times a span of TB tiles, in the mode of x.
template <int B, int MT, int TB>
void multiply(Tile (&t)[TB], Span span, const Activations &x, int64_t row, F (&y)[TB][MT][NV]) {
  const Weights &w = *t[0].weights;
  const int64_t at = row * w.width + span.from * w.segment * MT;
  const int64_t side = row * w.segments + span.from * MT;
  const uint32_t *words = (const uint32_t *)x.data;
  if constexpr (B < 16) {
    if (x.mode == ACK_A8)
      return tile_a8<B, MT, TB>(t, span, words + at / 4, x.scales + side,
                                (const int32_t *)x.sums + side, y);
  }
  for (int n = 0; n < TB; n++) {
    if constexpr (HAS_BF16) {
      if (x.mode == ACK_A16) {
        if constexpr (B == 16) tile_dense<MT, true>(t[n], span, words + at / 2, y[n]);
        else tile_a16<B, MT>(t[n], span, words + at / 2, x.sums + side, y[n]);
        continue;
      }
    }
    if constexpr (B == 16) tile_dense<MT, false>(t[n], span, words + at, y[n]);
    else tile_a32<B, MT>(t[n], span, (const float *)x.data + at, y[n]);
  }
}

// `batches` times MT rows from `row` on times TB tiles from `tile` on.
template <int B, int MT, int TB>
void product(const Weights &w, const Activations &x, int64_t row, int64_t batches, int64_t tile,
             const Output &out) {
  Tile t[TB];
  F y[MT < BATCH ? 1 : BATCHES][TB][MT][NV] = {};
  for (int n = 0; n < TB; n++) t[n].open(w, tile + n);
  const int64_t step = MT < BATCH ? w.segments : batches > 1 ? 4 : 2;  // measured on Zen 4
  for (Span span = {0, 0}; span.to < w.segments; span.from = span.to) {
    span.to = w.segments - span.from < step ? w.segments : span.from + step;
    Kept start[TB];
    for (int n = 0; n < TB; n++) start[n] = t[n].kept;
    for (int64_t b = 0; b < batches; b++) {
      for (int n = 0; n < TB; n++) {
        t[n].kept = start[n];
        if (MT == BATCH) t[n].fetch(span, TB, b, batches);
      }
      multiply<B, MT, TB>(t, span, x, row + b * MT, y[b]);
    }
  }
  for (int64_t b = 0; b < batches; b++)
    for (int n = 0; n < TB; n++)
      for (int r = 0; r < MT; r++) store(w, out, tile + n, row + b * MT + r, y[b][n][r]);
}

template <int B>
void tiles_of(const Weights &w, const Activations &x, int64_t m, int64_t begin, int64_t end,
              const Output &out) {
  int64_t row = 0;
  for (int64_t batches; (batches = (m - row) / BATCH) > 0; row += batches * BATCH) {
    if (batches > BATCHES) batches = BATCHES;
    int64_t tile = begin;
    for (; tile + TILES <= end; tile += TILES)
      product<B, BATCH, TILES>(w, x, row, batches, tile, out);
    for (; tile < end; tile++) product<B, BATCH, 1>(w, x, row, batches, tile, out);
  }
  for (int rows; row < m; row += rows) {
    rows = rows_together(m - row);
    for (int64_t tile = begin; tile < end; tile++) {
      if (rows == 4) product<B, 4, 1>(w, x, row, 1, tile, out);
      else if (rows == 2) product<B, 2, 1>(w, x, row, 1, tile, out);
      else product<B, 1, 1>(w, x, row, 1, tile, out);
    }
  }
}

void tiles(const Weights &w, const Activations &x, int64_t m, int64_t begin, int64_t end,
           const Output &out) {
  switch (w.m.bits) {
    case 2: return tiles_of<2>(w, x, m, begin, end, out);
    case 3: return tiles_of<3>(w, x, m, begin, end, out);
    case 4: return tiles_of<4>(w, x, m, begin, end, out);
    case 5: return tiles_of<5>(w, x, m, begin, end, out);
    case 6: return tiles_of<6>(w, x, m, begin, end, out);
    case 8: return tiles_of<8>(w, x, m, begin, end, out);
    default: return tiles_of<16>(w, x, m, begin, end, out);
  }
}

// One row of x: to float, then to what the mode reads, into its place in the batch.
struct Row {
  alignas(64) float value[SEGMENT];
  alignas(64) int8_t small[SEGMENT];
};

inline void read_segment(Row &r, const void *x, int32_t type, int64_t at, int count, int padded) {
  if (type == ACK_F32) {
    __builtin_memcpy(r.value, (const float *)x + at, count * sizeof(float));
  } else {
    const uint16_t *from = (const uint16_t *)x + at;
    uint32_t *to = (uint32_t *)r.value;
    for (int i = 0; i < count; i++) to[i] = (uint32_t)from[i] << 16;
  }
  for (int i = count; i < padded; i++) r.value[i] = 0;
}

inline void prepare_a8(Row &r, uint8_t *to, int rows, int padded, float *scale, float *sum) {
  const int32_t *bits = (const int32_t *)r.value;
  int32_t most = 0;  // as integers, absolute values are ordered as floats are, NaN on top
  for (int i = 0; i < padded; i++) {
    const int32_t size = bits[i] & 0x7fffffff;
    most = size > most ? size : most;
  }
  float largest;
  __builtin_memcpy(&largest, &most, 4);
  const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
  int32_t total = 0;
  for (int i = 0; i < padded; i++) {
    const float shifted = r.value[i] * inverse + 12582912.0f;  // 1.5 * 2^23: rounds, low byte is q
    int32_t word;
    __builtin_memcpy(&word, &shifted, 4);
    r.small[i] = (int8_t)word;
    total += (int8_t)word;
  }
  for (int i = 0; i < padded / 4; i++) __builtin_memcpy(to + 4 * rows * i, r.small + 4 * i, 4);
  *scale = largest / 127.0f;
  *(int32_t *)sum = total;
}

inline void prepare_a16(Row &r, uint8_t *to, int rows, int padded, bool blocks, float *sum) {
  uint16_t rounded[SEGMENT];
  float total = 0;
  for (int i = 0; i < padded; i++) rounded[i] = to_bf16(r.value[i]), total += from_bf16(rounded[i]);
  *sum = total;
  if (!blocks) {
    for (int i = 0; i < padded / 2; i++) __builtin_memcpy(to + 4 * rows * i, rounded + 2 * i, 4);
    return;
  }
  for (int i = 0; i < padded; i += 4) {
    const uint16_t four[4] = {rounded[i], rounded[i + 2], rounded[i + 1], rounded[i + 3]};
    __builtin_memcpy(to + 2 * rows * i, four, 8);
  }
}

void prepare(const Weights &w, const Activations &a, const void *x, int32_t type, int64_t ld,
             int64_t row, int rows) {
  const int64_t element = a.mode == ACK_A8 ? 1 : a.mode == ACK_A16 ? 2 : 4;
  const int unit = a.mode == ACK_A8 ? 4 : a.mode == ACK_A32 ? 4 : w.m.bits == 16 ? 4 : 8;
  Row r;
  for (int m = 0; m < rows; m++) {
    uint8_t *to = (uint8_t *)a.data + row * w.width * element + m * unit;
    for (int64_t s = 0; s < w.segments; s++) {
      const int64_t at = s * w.segment, left = w.m.k - at;
      const int count = (int)(left < w.segment ? left : w.segment);
      const int padded = (count + SUPER - 1) / SUPER * SUPER;
      read_segment(r, x, type, (row + m) * ld + at, count, padded);
      float *scale = a.scales + row * w.segments + s * rows + m;
      float *sum = a.sums + row * w.segments + s * rows + m;
      uint8_t *here = to + at * element * rows;
      if (a.mode == ACK_A8) {
        prepare_a8(r, here, rows, padded, scale, sum);
      } else if (a.mode == ACK_A16) {
        prepare_a16(r, here, rows, padded, w.m.bits != 16, sum);
      } else {
        for (int i = 0; i < padded; i++) {
          const float value = a.exact ? r.value[i] : from_bf16(to_bf16(r.value[i]));
          __builtin_memcpy(here + 4 * rows * i, &value, 4);
        }
      }
    }
  }
}
