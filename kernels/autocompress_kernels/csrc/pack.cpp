// Between rows of elements and the layout of autocompress_kernels.h. Plain loops: packing happens
// once, and reading rows back is for embeddings and for products that BLAS does.
#include <string.h>

#include "kernels.h"

#if defined(_WIN32)
#define ACK_API extern "C" __declspec(dllexport)
#else
#define ACK_API extern "C" __attribute__((visibility("default")))
#endif

namespace ack {
namespace {

// The four codes of block j at `row`, which points at the row's bytes in the first plane.
uint32_t four_codes(const uint8_t *row, int bits, int j) {
  uint32_t word, code = 0;
  if (bits == 8) {
    memcpy(&code, row + 64 * j, 4);
    return code;
  }
  if (bits & 4) {
    memcpy(&word, row + 64 * (j / 2), 4);
    code = word >> 4 * (j % 2) & 0x0F0F0F0Fu;
    row += 256;
  }
  if (bits & 2) {
    memcpy(&word, row + 64 * (j / 4), 4);
    code |= (word >> 2 * (j % 4) & 0x03030303u) << (bits & 4);
    row += 128;
  }
  if (bits & 1) {
    memcpy(&word, row, 4);
    code |= (word >> j & 0x01010101u) << (bits & 6);
  }
  return code;
}

void add_code(uint8_t *super, int bits, int j, int byte, uint8_t code) {
  if (bits == 8) {
    super[64 * j + byte] = code;
    return;
  }
  if (bits & 4) {
    super[64 * (j / 2) + byte] |= (uint8_t)((code & 15) << 4 * (j % 2));
    super += 256;
  }
  if (bits & 2) {
    super[64 * (j / 4) + byte] |= (uint8_t)((code >> (bits & 4) & 3) << 2 * (j % 4));
    super += 128;
  }
  if (bits & 1) super[byte] |= (uint8_t)((code >> (bits & 6) & 1) << j);
}

float from_half(uint16_t half) {
  const uint32_t word = (half & 0x7FFFu) << 13;
  float size;
  memcpy(&size, &word, 4);
  size *= 0x1p112f;
  return half & 0x8000 ? -size : size;
}

struct RowReader {
  const Weights &w;
  int64_t tile = 0;
  int r = 0;
  int64_t value = 0;  // sparse: element index of the block at hand
  const uint8_t *mask = nullptr;

  void start(int64_t row) {
    tile = row / ROWS, r = (int)(row % ROWS);
    if (w.m.pattern == ACK_FULL) return;
    const int64_t wide = w.width * ROWS;
    mask = (const uint8_t *)w.m.masks + tile * wide / 8;
    value = w.m.pattern == ACK_BITMASK ? ((const int64_t *)w.m.offsets)[tile] : tile * wide / 2;
  }

  // Elements of this row in the next block of `each` columns: absent ones are `missing`.
  void sparse(uint16_t *to, int each, uint16_t missing) {
    uint64_t bits = 0;
    memcpy(&bits, mask, each * 2);
    for (int j = 0; j < each; j++) {
      const int bit = each * r + j;
      const int64_t at = value + __builtin_popcountll(bits & (((uint64_t)1 << bit) - 1));
      to[j] = missing;
      if (!(bits >> bit & 1)) continue;
      if (w.m.bits == 8)
        to[j] = ((const uint8_t *)w.m.values)[at];
      else
        memcpy(to + j, (const uint8_t *)w.m.values + 2 * at, 2);
    }
    mask += each * 2;
    value += __builtin_popcountll(bits);
  }

  void super(int64_t s, uint16_t *to) {  // SUPER elements: codes, or bf16
    const int bits = w.m.bits;
    if (w.m.pattern != ACK_FULL) {
      const int each = bits == 8 ? 4 : 2;
      for (int b = 0; b < SUPER / each; b++) sparse(to + b * each, each, bits == 8 ? 128 : 0);
      return;
    }
    const uint8_t *from = (const uint8_t *)w.m.values + (tile * w.width + s * SUPER) * ROWS * bits / 8;
    if (bits == 16) {
      for (int b = 0; b < 16; b++) memcpy(to + 2 * b, from + 64 * b + 4 * r, 4);
      return;
    }
    for (int b = 0; b < BLOCKS; b++) {
      const uint32_t four = four_codes(from + 4 * r, bits, b);
      for (int j = 0; j < 4; j++) to[4 * b + j] = (uint16_t)(four >> 8 * j & 0xFF);
    }
  }
};

void read_row(const Weights &w, int64_t row, void *y, int32_t type) {
  RowReader reader{w};
  reader.start(row);
  const uint16_t *scales = (const uint16_t *)w.m.scales;
  const uint8_t *zeros = (const uint8_t *)w.m.zeros;
  for (int64_t s = 0; s < w.width / SUPER; s++) {
    uint16_t elements[SUPER];
    reader.super(s, elements);
    float scale = 0, zero = 0;
    if (w.m.bits != 16) {
      const int64_t at = (reader.tile * w.groups + s * SUPER / w.m.group) * ROWS + reader.r;
      scale = from_half(scales[at]);
      zero = zeros ? (float)zeros[at] : (float)(1 << (w.m.bits - 1));
    }
    const int64_t left = w.m.k - s * SUPER;
    for (int i = 0; i < SUPER && i < left; i++) {
      const float v = w.m.bits == 16 ? from_bf16(elements[i]) : scale * ((float)elements[i] - zero);
      if (type == ACK_F32)
        ((float *)y)[s * SUPER + i] = v;
      else
        ((uint16_t *)y)[s * SUPER + i] = to_bf16(v);
    }
  }
}

struct RowsCall {
  const Weights *w;
  const int64_t *rows;
  int64_t begin, ld;
  void *y;
  int32_t type;
};

void read_rows(int64_t begin, int64_t end, void *context) {
  const RowsCall &c = *(const RowsCall *)context;
  for (int64_t i = begin; i < end; i++) {
    const int64_t row = c.rows ? c.rows[i] : c.begin + i;
    read_row(*c.w, row, (uint8_t *)c.y + i * c.ld * (c.type == ACK_F32 ? 4 : 2), c.type);
  }
}

}  // namespace
}  // namespace ack

using namespace ack;

ACK_API int32_t ack_rows(const ack_matrix *matrix, const int64_t *rows, int64_t begin,
                         int64_t count, void *y, int32_t y_type, int64_t ldy,
                         ack_parallel_for parallel, int32_t threads) {
  Weights w;
  if (!matrix) return ACK_BAD_SHAPE;
  if (int32_t error = make_weights(*matrix, &w)) return error;
  if (y_type != ACK_F32 && y_type != ACK_BF16) return ACK_BAD_FORMAT;
  if (count < 0 || ldy < w.m.k) return ACK_BAD_SHAPE;
  if (rows) {
    for (int64_t i = 0; i < count; i++)
      if (rows[i] < 0 || rows[i] >= w.m.n) return ACK_BAD_INDEX;
  } else if (begin < 0 || begin > w.m.n - count) {
    return ACK_BAD_INDEX;
  }
  if (count && !y) return ACK_SHORT_BUFFER;
  RowsCall call = {&w, rows, begin, ldy, y, y_type};
  const int64_t grain = 1 + (1 << 15) / w.width;
  if (!parallel || threads <= 1 || count <= grain || parallel(0, count, grain, read_rows, &call))
    read_rows(0, count, &call);
  return ACK_OK;
}

ACK_API int64_t ack_values_bytes(int64_t n, int64_t k, int32_t bits) {
  return ceil_div(n, ROWS) * ROWS * ceil_div(k, SUPER) * SUPER * bits / 8;
}

ACK_API int32_t ack_pack_codes(const uint8_t *codes, int64_t n, int64_t k, int32_t bits,
                               uint8_t *values, int64_t values_bytes) {
  if (n < 1 || k < 1) return ACK_BAD_SHAPE;
  if (bits < 2 || bits > 8 || bits == 7) return ACK_BAD_FORMAT;
  if (!codes || !values || values_bytes < ack_values_bytes(n, k, bits)) return ACK_SHORT_BUFFER;
  memset(values, 0, (size_t)ack_values_bytes(n, k, bits));
  const int64_t supers = ceil_div(k, SUPER);
  for (int64_t row = 0; row < n; row++) {
    uint8_t *tile = values + row / ROWS * supers * 64 * bits;
    for (int64_t c = 0; c < k; c++) {
      const int inner = (int)(c % SUPER), byte = (int)(4 * (row % ROWS)) + inner % 4;
      add_code(tile + c / SUPER * 64 * bits, bits, inner / 4, byte, codes[row * k + c]);
    }
  }
  return ACK_OK;
}

ACK_API int32_t ack_pack_bf16(const uint16_t *weights, int64_t n, int64_t k, uint8_t *values,
                              int64_t values_bytes) {
  if (n < 1 || k < 1) return ACK_BAD_SHAPE;
  if (!weights || !values || values_bytes < ack_values_bytes(n, k, 16)) return ACK_SHORT_BUFFER;
  memset(values, 0, (size_t)ack_values_bytes(n, k, 16));
  const int64_t width = ceil_div(k, SUPER) * SUPER;
  for (int64_t row = 0; row < n; row++) {
    uint8_t *tile = values + row / ROWS * width * ROWS * 2;
    for (int64_t c = 0; c < k; c++)
      memcpy(tile + c / 2 * 64 + 4 * (row % ROWS) + 2 * (c % 2), weights + row * k + c, 2);
  }
  return ACK_OK;
}

ACK_API int32_t ack_pack_sparse(const void *elements, const uint8_t *keep, int64_t n, int64_t k,
                                int32_t bits, int32_t pattern, uint8_t *values,
                                int64_t values_bytes, uint8_t *masks, int64_t masks_bytes,
                                int64_t *offsets) {
  if (n < 1 || k < 1) return ACK_BAD_SHAPE;
  if ((bits != 8 && bits != 16) || (pattern != ACK_BITMASK && pattern != ACK_2OF4))
    return ACK_BAD_FORMAT;
  const int64_t width = ceil_div(k, SUPER) * SUPER, tiles = ceil_div(n, ROWS);
  const int each = bits == 8 ? 4 : 2, size = bits / 8;
  if (!elements || !keep || !values || !masks || masks_bytes < tiles * ROWS * width / 8 ||
      (pattern == ACK_BITMASK && !offsets))
    return ACK_SHORT_BUFFER;
  const uint8_t *from = (const uint8_t *)elements;
  int64_t used = 0;  // elements
  for (int64_t t = 0; t < tiles; t++) {
    if (offsets) offsets[t] = used;
    for (int64_t b = 0; b < width / each; b++) {
      uint64_t mask = 0;
      for (int bit = 0; bit < ROWS * each; bit++) {
        const int64_t row = t * ROWS + bit / each, c = b * each + bit % each;
        const bool inside = row < n && c < k;
        // 2:4 keeps half of every four columns: padding keeps the first two, as zeros.
        const bool padding = !inside && pattern == ACK_2OF4 && c % 4 < 2;
        if (!(inside ? keep[row * k + c] != 0 : padding)) continue;
        if ((used + 1) * size + ACK_TAIL > values_bytes) return ACK_SHORT_BUFFER;
        if (inside)
          memcpy(values + used * size, from + (row * k + c) * size, size);
        else
          memset(values + used * size, bits == 8 ? 128 : 0, size);
        mask |= (uint64_t)1 << bit;
        used++;
      }
      const int64_t columns = (b + 1) * each;
      if (pattern == ACK_2OF4 && columns % 4 == 0 && used != (t * width + columns) * ROWS / 2)
        return ACK_BAD_FORMAT;
      memcpy(masks + (t * width + b * each) * ROWS / 8, &mask, 2 * each);
    }
  }
  if (offsets) offsets[tiles] = used;
  memset(values + used * size, 0, ACK_TAIL);
  return ACK_OK;
}
