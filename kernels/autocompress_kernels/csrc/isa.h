// The kernels, written once over vectors of VB bytes. An isa_*.cpp defines, in `namespace ack {
// namespace {`, VB and the macro-free primitives listed below, then includes this file.
//
//   typedef ... U, I, F            VB bytes of uint32, int32, float lanes (vectors.h)
//   F half(const uint16_t *)       fp16 to float, one vector
//   Dot<B>                         CHUNK, BIAS, CHAINS, Partial, begin, add, end: u8 codes x s8
//   constexpr bool HAS_BF16; F dot_bf16(F, U, uint32_t)
//   constexpr int WIDE             fewest bits of codes that wide.h multiplies; 0: no digits either
//   const uint8_t *expand8(uint8_t *block, const uint8_t *values, const uint8_t *masks)
//   const uint8_t *expand16(uint8_t *block, const uint8_t *values, const uint8_t *masks)

#include "tile.h"
#include "products.h"
#include "activations.h"
#include "wide.h"

// One batch of rows times a span of TB tiles, in the mode of x.
template <int B, int MT, int TB>
void multiply(Tile (&t)[TB], Span span, const Activations &x, int64_t row, F (&y)[TB][MT][NV]) {
  const Weights &w = *t[0].weights;
  const int64_t in = span.from * w.segment * MT, at = row * w.width + in;
  const int64_t side = row * w.segments + span.from * MT;
  const uint32_t *words = (const uint32_t *)x.data;
  if constexpr (B < 16) {
    const uint32_t *first = words + row * w.width * element_bytes(x.mode) / 4;
    const float *scales = x.scales + side;
    const int32_t *sums = (const int32_t *)x.sums + side;
    if (x.mode == ACK_A8 || x.mode == WIDE_A8)
      return tile_a8<B, MT, TB>(t, span, first + in / 4, scales, sums, y);
    if constexpr (WIDE && MT <= MOST_DIGITS) {
      if (x.mode == ACK_A32)
        return tile_a8<B, MT, TB, 3>(t, span, first + 3 * in / 4, scales, sums, y);
      return tile_a8<B, MT, TB, 2>(t, span, first + 2 * in / 4, scales, sums, y);
    }
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
    if (wide_product<B>(w, x, row, batches, BATCH, begin, end, out)) continue;
    int64_t tile = begin;
    for (; tile + TILES <= end; tile += TILES)
      product<B, BATCH, TILES>(w, x, row, batches, tile, out);
    for (; tile < end; tile++) product<B, BATCH, 1>(w, x, row, batches, tile, out);
  }
  for (int rows; row < m; row += rows) {
    rows = rows_together(m - row);
    if (wide_product<B>(w, x, row, 1, rows, begin, end, out)) continue;
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
