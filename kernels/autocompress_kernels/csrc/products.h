// Rows of x times tiles, in each mode: A8, A16, A32, and bf16 weights.

// Vectors of a block that are worked on at once: what the registers hold beside MT rows.
template <int MT, int TB>
struct Split {
  static constexpr int ALL = NV * TB, FIT = TB * BATCH / MT, IB = ALL < FIT ? ALL : FIT;
};

// TB tiles at once, so that each value of x is loaded once for all of them. x is int8, or float32 in
// D digits, each of which is multiplied like a row of int8 (activations.h).
template <int B, int MT, int TB, int D = 1>
ACK_FLATTEN void tile_a8(Tile (&t)[TB], Span span, const uint32_t *x, const float *xscale,
                         const int32_t *xsum, F (&y)[TB][MT][NV]) {
  typedef Dot<B> P;
  constexpr int R = MT * D, IB = Split<MT, TB>::IB;
  constexpr int A = P::CHAINS / (R * IB) > 1 ? P::CHAINS / (R * IB) : 1;
  constexpr bool WHOLE = P::CHUNK > BLOCKS;  // a segment's products fit into one partial sum
  for (int64_t s = span.from; s < span.to; s++) {
    const uint8_t *w[TB];
    each<TB>([&](auto n) ACK_LAMBDA { w[n.value] = t[n.value].template segment<B>(s); });
    const int count = t[0].supers(s);
    for (int i0 = 0; i0 < NV * TB; i0 += IB) {
      I acc[A][R][IB] = {};
      if constexpr (D == 1) {
        each<IB>([&](auto i) ACK_LAMBDA {
          const I zero = t[(i0 + i.value) / NV].zero(s, (i0 + i.value) % NV) - P::BIAS;
          each<MT>([&](auto m) ACK_LAMBDA { acc[0][m.value][i.value] = -zero * xsum[m.value]; });
        });
      }
      const uint32_t *xs = x;
      typename P::Partial part[A][R][IB];
      auto begin = [&]() ACK_LAMBDA {
        for (int a = 0; a < A; a++)
          for (int r = 0; r < R; r++)
            for (int i = 0; i < IB; i++) part[a][r][i] = P::begin(acc[a][r][i]);
      };
      auto end = [&]() ACK_LAMBDA {
        for (int a = 0; a < A; a++)
          for (int r = 0; r < R; r++)
            for (int i = 0; i < IB; i++) acc[a][r][i] = P::end(acc[a][r][i], part[a][r][i]);
      };
      if (WHOLE) begin();
      for (int sb = 0; sb < count; sb++, xs += BLOCKS * R) {
        if (B <= 5 && MT <= 2 && i0 == 0)
          ACK_REPEAT(B, p, __builtin_prefetch(w[0] + sb * 64 * B + AHEAD + 64 * p, 0, B == 5 ? 2 : 3));
        Planes<B, (TB == 1)> planes[IB];
        each<IB>([&](auto i) ACK_LAMBDA {
          planes[i.value].read(w[(i0 + i.value) / NV] + sb * 64 * B, (i0 + i.value) % NV);
        });
        constexpr int CHUNK = WHOLE ? BLOCKS : P::CHUNK;
        each<BLOCKS / CHUNK>([&](auto c) ACK_LAMBDA {
          if (!WHOLE) begin();
          each<CHUNK>([&](auto jj) ACK_LAMBDA {
            constexpr int j = c.value * CHUNK + jj.value;
            U q[IB];
            each<IB>([&](auto i) ACK_LAMBDA { q[i.value] = planes[i.value].codes(j); });
            each<R>([&](auto r) ACK_LAMBDA {
              each<IB>([&](auto i) ACK_LAMBDA {
                auto &p = part[j % A][r.value][i.value];
                p = P::add(p, q[i.value], xs[j * R + r.value]);
              });
            });
          });
          if (!WHOLE) end();
        });
      }
      if (WHOLE) end();
      each<IB>([&](auto i) ACK_LAMBDA {
        Tile &tile = t[(i0 + i.value) / NV];
        const int lane = (i0 + i.value) % NV;
        const F scale = tile.scale(s, lane);
        F zero = {};
        if (D > 1) zero = __builtin_convertvector(tile.zero(s, lane) - P::BIAS, F);
        each<MT>([&](auto m) ACK_LAMBDA {
          F dot = {};
          each<D>([&](auto d) ACK_LAMBDA {
            I sum = acc[0][m.value * D + d.value][i.value];
            for (int a = 1; a < A; a++) sum += acc[a][m.value * D + d.value][i.value];
            const F digit = __builtin_convertvector(sum, F);
            dot = d.value ? dot * (float)DIGIT + digit : digit;
          });
          if (D > 1) dot -= zero * (float)xsum[m.value];
          y[(i0 + i.value) / NV][m.value][lane] += dot * (scale * xscale[m.value]);
        });
      });
    }
    x += count * BLOCKS * R, xscale += MT, xsum += MT;
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
    const uint8_t *w = t.segment<B>(s);
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
    const uint8_t *w = t.segment<B>(s);
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

// bf16 weights; pairs of bf16 activations, or floats where not PAIRS.
template <int MT, bool PAIRS>
ACK_FLATTEN void tile_dense(Tile &t, Span span, const void *data, F (&y)[MT][NV]) {
  constexpr int A = 4 / MT > 1 ? 4 / MT : 1;
  constexpr int IB = MT <= 2 ? NV < 2 ? NV : 2 : 1;  // vectors of a block that share a value of x
  const uint32_t *pairs = (const uint32_t *)data;
  const float *x = (const float *)data;
  for (int64_t s = span.from; s < span.to; s++) {
    const uint8_t *w = t.segment<16>(s);
    const int count = t.supers(s);
    for (int i0 = 0; i0 < NV; i0 += IB) {
      F acc[A][MT][IB] = {};
      for (int sb = 0; sb < count; sb++) {
        const uint8_t *super = w + sb * 1024;
        if (MT <= 2 && i0 == 0) ACK_REPEAT(16, p, __builtin_prefetch(super + AHEAD + 64 * p));
        each<16>([&](auto jj) ACK_LAMBDA {
          constexpr int j = jj.value;
          each<IB>([&](auto ii) ACK_LAMBDA {
            constexpr int i = ii.value;
            U v = load(super + 64 * j + VB * (i0 + i));
            if constexpr (PAIRS) {
              each<MT>([&](auto m) ACK_LAMBDA {
                F &sum = acc[j % A][m.value][i];
                sum = dot_bf16(sum, v, pairs[(sb * 16 + j) * MT + m.value]);
              });
            } else {
              F even = (F)(v << 16), odd = (F)(v & 0xFFFF0000u);
              const float *pair = x + (sb * 16 + j) * 2 * MT;
              each<MT>([&](auto m) ACK_LAMBDA {
                acc[j % A][m.value][i] += even * pair[m.value];
                acc[(j + 1) % A][m.value][i] += odd * pair[MT + m.value];
              });
            }
          });
        });
      }
      each<MT>([&](auto m) ACK_LAMBDA {
        each<IB>([&](auto i) ACK_LAMBDA {
          for (int a = 0; a < A; a++) y[m.value][i0 + i.value] += acc[a][m.value][i.value];
        });
      });
    }
    pairs += count * 16 * MT, x += count * SUPER * MT;
  }
}
