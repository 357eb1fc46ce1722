// What a tile keeps, read for the kernels: codes of a block, expanded segments, scales, zeros; and
// where its outputs go.

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

#if VB == 32
// 3 bits with AVX2: a shuffle spreads four bits of the 1-bit plane to where the 2-bit plane has
// room, for two blocks at once. 29 instructions for eight blocks instead of 37.
template <bool KEEP>
struct Planes<3, KEEP> {
  U two[2], one[2];

  ACK_INLINE void read(const uint8_t *super, int i) {
    const U v = load(super + 128 + VB * i);
    two[0] = load(super + VB * i), two[1] = load(super + 64 + VB * i);
    one[0] = v & 0x0F0F0F0Fu, one[1] = v >> 4 & 0x0F0F0F0Fu;
  }

  // Bits 0 and 2 of a nibble, or 1 and 3, at bits 2 and 6.
  static ACK_INLINE U spread(U nibble, int odd) {
    typedef char V __attribute__((vector_size(16)));
    const V even = {0, 4, 0, 4, 64, 68, 64, 68, 0, 4, 0, 4, 64, 68, 64, 68};
    const V other = {0, 0, 4, 4, 0, 0, 4, 4, 64, 64, 68, 68, 64, 64, 68, 68};
    const __m256i table = _mm256_broadcastsi128_si256((__m128i)(odd ? other : even));
    return (U)_mm256_shuffle_epi8(table, (__m256i)nibble);
  }

  ACK_INLINE U codes(int j) const {
    const int plane = j / 4, odd = j % 2;
    const U pair = ((odd ? two[plane] >> 2 : two[plane]) & 0x33333333u) | spread(one[plane], odd);
    return (j % 4 > 1 ? pair >> 4 : pair) & 0x07070707u;
  }
};
#endif

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
  template <int B>
  ACK_INLINE const uint8_t *segment(int64_t s) {
    if (B < 8 || !kept.masks) return kept.values + s * weights->segment * (ROWS * B / 8);
    const int count = supers(s);
    Kept at = kept;  // in registers: a store into the buffer might change what is in memory
    if (B == 16) {
      for (int b = 0; b < count * 16; b++, at.masks += 4)
        at.values = expand16(buffer + 64 * b, at.values, at.masks);
    } else {
      for (int b = 0; b < count * 8; b++, at.masks += 8)
        at.values = expand8(buffer + 64 * b, at.values, at.masks);
    }
    kept = at;
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

  // Where segment s has its scales and zeros. One group per segment is common, and 2 bits take 1.2
  // times as long with a division.
  ACK_INLINE int64_t group(int64_t s) const {
    return (weights->per_group == 1 ? s : s / weights->per_group) * ROWS;
  }

  ACK_INLINE F scale(int64_t s, int i) const { return half(scales + group(s) + i * LANES); }

  ACK_INLINE I zero(int64_t s, int i) const {
    if (!zeros) return I{} + (1 << (weights->m.bits - 1));
    return bytes(zeros + group(s) + i * LANES);
  }
};

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
