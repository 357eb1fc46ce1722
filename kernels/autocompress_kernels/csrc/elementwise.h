// What a decoder computes between its matrices, in fp32. Included by every isa_*.cpp after isa.h.

ACK_INLINE float sum_of(F v) {
  float total = 0;
  for (int l = 0; l < LANES; l++) total += v[l];
  return total;
}

ACK_INLINE float most_of(F v) {
  float most = v[0];
  for (int l = 1; l < LANES; l++) most = v[l] > most ? v[l] : most;
  return most;
}

ACK_INLINE F read(const float *from) {
  F v;
  __builtin_memcpy(&v, from, VB);
  return v;
}

ACK_INLINE void write(float *to, F v) { __builtin_memcpy(to, &v, VB); }

ACK_INLINE F read_bf16(const uint16_t *from) {
  typedef uint16_t H __attribute__((vector_size(VB / 2)));
  H v;
  __builtin_memcpy(&v, from, VB / 2);
  return (F)(__builtin_convertvector(v, U) << 16);
}

ACK_INLINE F larger(F a, F b) { return a > b ? a : b; }

// exp to 2 units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes).
ACK_INLINE F exponential(F x) {
  x = larger(x, splat(-87.0f));
  x = x < 88.0f ? x : splat(88.0f);
  const F shifted = x * 1.44269504088896f + 12582912.0f;  // 1.5 * 2^23: rounds
  const F n = shifted - 12582912.0f;
  const F r = x - n * 0.693359375f + n * 2.12194440e-4f;
  F p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const F value = p * r * r + r + 1.0f;
  return (F)((I)value + ((I)shifted << 23));
}

void norm(const float *x, const float *weight, int64_t n, float epsilon, float *out) {
  F squares = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) squares += read(x + i) * read(x + i);
  float total = sum_of(squares);
  for (; i < n; i++) total += x[i] * x[i];
  const float factor = 1.0f / __builtin_sqrtf(total / (float)n + epsilon);
  for (i = 0; i + LANES <= n; i += LANES) write(out + i, read(x + i) * factor * read(weight + i));
  for (; i < n; i++) out[i] = x[i] * factor * weight[i];
}

void gated(const float *gate, const float *up, int64_t n, float *out) {
  for (int64_t i = 0; i < n; i += LANES) {
    const int64_t count = n - i < LANES ? n - i : LANES;
    float g[LANES] = {}, u[LANES] = {};
    __builtin_memcpy(g, gate + i, count * 4);
    __builtin_memcpy(u, up + i, count * 4);
    const F value = read(g);
    write(g, value / (1.0f + exponential(-value)) * read(u));
    __builtin_memcpy(out + i, g, count * 4);
  }
}

void attend(const float *query, const uint16_t *keys, const uint16_t *values, int64_t count,
            int64_t dim, float scale, float *scores, float *out) {
  F most = splat(-3e38f);
  for (int64_t t = 0; t < count; t += ROWS) {
    F dots[NV] = {};
    const uint16_t *key = keys + t * dim;
    for (int64_t d = 0; d < dim; d++, key += ROWS)
      each<NV>([&](auto i) ACK_LAMBDA { dots[i.value] += query[d] * read_bf16(key + LANES * i.value); });
    each<NV>([&](auto i) ACK_LAMBDA {
      write(scores + t + LANES * i.value, dots[i.value] * scale);
    });
    for (int64_t r = count - t; r < ROWS; r++) scores[t + r] = -3e38f;  // beyond the last position
    each<NV>([&](auto i) ACK_LAMBDA { most = larger(most, read(scores + t + LANES * i.value)); });
  }
  const float top = most_of(most);
  F sums = {};
  for (int64_t t = 0; t < count; t += LANES) {
    const F weight = exponential(read(scores + t) - top);
    write(scores + t, weight);
    sums += weight;
  }
  const float inverse = 1.0f / sum_of(sums);  // padding adds exp(-87): nothing
  constexpr int WIDE = 64 / LANES;
  for (int64_t d0 = 0; d0 < dim; d0 += 64) {
    const int parts = (int)((dim - d0 < 64 ? dim - d0 : 64) / LANES);
    F acc[WIDE] = {};
    if (parts == WIDE) {
      for (int64_t t = 0; t < count; t++)
        each<WIDE>([&](auto i) ACK_LAMBDA {
          acc[i.value] += scores[t] * read_bf16(values + t * dim + d0 + LANES * i.value);
        });
    } else {
      for (int64_t t = 0; t < count; t++)
        for (int i = 0; i < parts; i++)
          acc[i] += scores[t] * read_bf16(values + t * dim + d0 + LANES * i);
    }
    for (int i = 0; i < parts; i++) write(out + d0 + LANES * i, acc[i] * inverse);
  }
}
