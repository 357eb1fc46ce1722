// x as the kernels of a mode read it (Activations in kernels.h).

// One row of x: to float, then to what the mode reads, into its place in the batch.
struct Row {
  alignas(64) float value[SEGMENT];
  alignas(64) int8_t small[3][SEGMENT];  // one, or up to three digits of each
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

inline float largest_of(const Row &r, int padded) {
  const int32_t *bits = (const int32_t *)r.value;
  int32_t most = 0;  // as integers, absolute values are ordered as floats are, NaN on top
  for (int i = 0; i < padded; i++) {
    const int32_t size = bits[i] & 0x7fffffff;
    most = size > most ? size : most;
  }
  float largest;
  __builtin_memcpy(&largest, &most, 4);
  return largest;
}

inline void prepare_a8(Row &r, uint8_t *to, int rows, int padded, float *scale, float *sum) {
  const float largest = largest_of(r, padded);
  const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
  int32_t total = 0;
  for (int i = 0; i < padded; i++) {
    const float shifted = r.value[i] * inverse + 12582912.0f;  // 1.5 * 2^23: rounds, low byte is q
    int32_t word;
    __builtin_memcpy(&word, &shifted, 4);
    r.small[0][i] = (int8_t)word;
    total += (int8_t)word;
  }
  for (int i = 0; i < padded / 4; i++) __builtin_memcpy(to + 4 * rows * i, r.small[0] + 4 * i, 4);
  *scale = largest / 127.0f;
  *(int32_t *)sum = total;
}

// Digits, each int8: x = scale * (d[0] * DIGIT^(D-1) + ... + d[D-1]), to nearest, which is off by
// 2^-22 of the segment's largest at most with three of them and by 2^-15 with two.
template <int D>
inline void prepare_digits(Row &r, uint8_t *to, int rows, int padded, float *scale, float *sum) {
  constexpr float MOST = D == 3 ? 127.0f * DIGIT * DIGIT : 127.0f * DIGIT;
  const float largest = largest_of(r, padded);
  const float inverse = largest > 1e-30f ? MOST / largest : 0.0f;
  uint32_t total = 0;  // wraps where x is not finite
  for (int i = 0; i < padded; i++) {
    const float shifted = r.value[i] * inverse + 12582912.0f;  // as above
    int32_t word;
    __builtin_memcpy(&word, &shifted, 4);
    word = (int32_t)((uint32_t)word - 0x4B400000u);
    total += (uint32_t)word;
    for (int d = D - 1; d > 0; d--) {
      const int32_t digit = ((word + DIGIT / 2) & (DIGIT - 1)) - DIGIT / 2;
      r.small[d][i] = (int8_t)digit;
      word = (word - digit) / DIGIT;
    }
    r.small[0][i] = (int8_t)word;
  }
  for (int i = 0; i < padded; i += 4, to += 4 * D * rows)
    for (int d = 0; d < D; d++) __builtin_memcpy(to + 4 * d, r.small[d] + i, 4);
  *scale = largest / MOST;
  *(int32_t *)sum = (int32_t)total;
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

// Even and odd columns of each block in 16 bits, the largest of a segment as MOST. What comes first is
// added to (PAIRS, wide.h) or multiplied with the even columns of the weight.
template <bool PAIRS>
inline void prepare_wide(Row &r, uint8_t *to, int rows, int padded, float *scale, float *sum) {
  constexpr float MOST = PAIRS ? 127.0f : 32767.0f;
  const float largest = largest_of(r, padded);
  const float inverse = largest > 1e-30f ? MOST / largest : 0.0f;
  alignas(64) int16_t q[SEGMENT];
  for (int i = 0; i < padded; i++) {
    const float shifted = r.value[i] * inverse + 12582912.0f;  // as above, and the lower half is q
    int32_t word;
    __builtin_memcpy(&word, &shifted, 4);
    q[i] = (int16_t)word;
  }
  uint32_t products = 0;  // of each even column and the odd one behind it
  for (int i = 0; i < padded; i += 4, to += 8 * rows) {
    const int16_t pairs[2][2] = {{q[i], q[i + 2]}, {q[i + 1], q[i + 3]}};
    if (PAIRS) products += (uint32_t)(q[i] * q[i + 1] + q[i + 2] * q[i + 3]);
    __builtin_memcpy(to, pairs[PAIRS], 4);
    __builtin_memcpy(to + 4, pairs[!PAIRS], 4);
  }
  *scale = largest / MOST;
  *(int32_t *)sum = (int32_t)products;
}

// Digits of each input of a mode that is multiplied as int8: 0 where it is not.
inline int digits_of(const Weights &w, const Activations &a, int rows) {
  if (a.mode == ACK_A8) return 1;
  if (a.mode == WIDE_A8) return rows < BATCH;
  if (!WIDE || w.m.bits == 16 || rows > MOST_DIGITS) return 0;
  return a.mode == WIDE_A16 ? 2 : 3;
}

void prepare(const Weights &w, const Activations &a, const void *x, int32_t type, int64_t ld,
             int64_t row, int rows) {
  const int digits = digits_of(w, a, rows);
  const int64_t element = element_bytes(a.mode);
  const int64_t used = digits ? digits : element;  // bytes of each input
  const int unit = digits ? 4 * digits : a.mode == ACK_A32 || w.m.bits == 16 ? 4 : 8;
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
      uint8_t *here = to + at * used * rows;
      if (a.mode == WIDE_A16 || (a.mode == ACK_A32 && !a.exact))
        for (int i = 0; i < padded; i++) r.value[i] = from_bf16(to_bf16(r.value[i]));
      if (digits == 1) prepare_a8(r, here, rows, padded, scale, sum);
      else if (digits == 2) prepare_digits<2>(r, here, rows, padded, scale, sum);
      else if (digits == 3) prepare_digits<3>(r, here, rows, padded, scale, sum);
      else if (a.mode == WIDE_A8) prepare_wide<true>(r, here, rows, padded, scale, sum);
      else if (a.mode == WIDE_A16) prepare_wide<false>(r, here, rows, padded, scale, sum);
      else if (a.mode == ACK_A16) prepare_a16(r, here, rows, padded, w.m.bits != 16, sum);
      else for (int i = 0; i < padded; i++) __builtin_memcpy(here + 4 * rows * i, r.value + i, 4);
    }
  }
}
