// Every kernel against double precision, without Python: for address sanitizers, valgrind and
// emulated processors.
//
//   g++ -std=c++17 kernels/check/check.cpp LIBRARY -o check        (or the sources, instrumented)
//   ./check CASES [SEED]       exits with 1 where an error is above its limit
//
// All buffers have exactly the size the kernels may touch, so a read past the end is found.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../autocompress_kernels/csrc/autocompress_kernels.h"

namespace {

using Bytes = std::vector<uint8_t>;
std::mt19937 rng;
int below(int most) { return (int)(rng() % (unsigned)most); }

uint16_t to_bf16(float value) {
  uint32_t word;
  memcpy(&word, &value, 4);
  return (uint16_t)((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

float from_bf16(uint16_t bits) {
  const uint32_t word = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &word, 4);
  return value;
}

// fp16 of a power of two times 1 + fraction / 1024.
uint16_t half(int exponent, int fraction) { return (uint16_t)((exponent + 15) << 10 | fraction); }
float from_half(uint16_t h) { return ldexpf(1 + (h & 1023) / 1024.0f, (h >> 10) - 15); }

struct Case {
  int64_t n, k, m;
  int bits, group, pattern;
  bool zeros;
  std::vector<double> dense;
  Bytes values, scales, offsets, masks, zero_points;
  ack_matrix matrix;
};

void draw_format(Case &c) {
  const int bits[] = {2, 3, 4, 5, 6, 8, 16};
  const int groups[] = {32, 64, 96, 128, 256, 1024};
  c.n = 1 + below(70), c.k = 1 + below(below(4) ? 200 : 1100), c.m = 1 + below(33);
  c.bits = bits[below(7)], c.group = groups[below(6)];
  c.pattern = c.bits >= 8 ? below(3) : ACK_FULL;
  c.zeros = c.bits < 16 && c.pattern == ACK_FULL && below(2);
}

void require(int32_t code, const char *what) {
  if (code) printf("%s failed with code %d\n", what, code), exit(1);
}

bool kept(const Case &c, int64_t column, std::vector<int> &quad) {
  if (c.pattern == ACK_FULL) return true;
  if (c.pattern == ACK_BITMASK) return below(2);
  if (column % 4 == 0) {  // which two of the next four
    const int first = below(4);
    quad = {first, (first + 1 + below(3)) % 4};
  }
  const int at = (int)(column % 4);
  // Behind the last whole four, the padding decides: it keeps its own first two columns.
  const int64_t tail = c.k / 4 * 4;
  if (column >= tail) return c.k - tail <= 2 || at < 2;
  return at == quad[0] || at == quad[1];
}

void draw(Case &c) {
  draw_format(c);
  const int64_t tiles = (c.n + 15) / 16, width = (c.k + 31) / 32 * 32;
  const int64_t groups = (c.k + c.group - 1) / c.group, cells = tiles * groups * 16;
  std::vector<uint16_t> scales(c.bits < 16 ? cells : 0);
  for (auto &s : scales) s = half(-6 + below(3), below(1024));
  c.zero_points.resize(c.zeros ? cells : 0);
  // Within the middle half, as in real weights: were all of a row's weights of one sign, rounding
  // errors of x, of any sign, would be measured against sums of products that cancel.
  for (auto &z : c.zero_points) z = (uint8_t)((1 << c.bits) / 4 + below(1 << (c.bits - 1)));
  c.scales.resize(scales.size() * 2);
  memcpy(c.scales.data(), scales.data(), c.scales.size());
  Bytes codes(c.n * c.k), keep(c.n * c.k);
  std::vector<uint16_t> elements(c.n * c.k);
  c.dense.assign(c.n * c.k, 0);
  std::vector<int> quad;
  for (int64_t r = 0; r < c.n; r++)
    for (int64_t i = 0; i < c.k; i++) {
      const int64_t at = r * c.k + i, cell = (r / 16 * groups + i / c.group) * 16 + r % 16;
      codes[at] = (uint8_t)below(c.bits == 16 ? 256 : 1 << c.bits);
      elements[at] = to_bf16((codes[at] - 128) / 64.0f);
      keep[at] = kept(c, i, quad);
      if (!keep[at]) continue;
      const int zero = c.zeros ? c.zero_points[cell] : 1 << (c.bits - 1);
      c.dense[at] = c.bits == 16 ? from_bf16(elements[at])
                                 : from_half(scales[cell]) * (double)(codes[at] - zero);
    }
  const void *source = c.bits == 16 ? (const void *)elements.data() : codes.data();
  if (c.pattern == ACK_FULL) {
    c.values.resize(ack_values_bytes(c.n, c.k, c.bits));
    require(c.bits == 16 ? ack_pack_bf16(elements.data(), c.n, c.k, c.values.data(), c.values.size())
                         : ack_pack_codes(codes.data(), c.n, c.k, c.bits, c.values.data(),
                                          c.values.size()),
            "packing");
  } else {
    int64_t count = tiles * 16 * width / 2;
    if (c.pattern == ACK_BITMASK) {
      count = 0;
      for (uint8_t one : keep) count += one;
      c.offsets.resize((tiles + 1) * 8);
    }
    c.values.resize(count * c.bits / 8 + ACK_TAIL);
    c.masks.resize(tiles * 16 * width / 8);
    require(ack_pack_sparse(source, keep.data(), c.n, c.k, c.bits, c.pattern, c.values.data(),
                            c.values.size(), c.masks.data(), c.masks.size(),
                            c.offsets.empty() ? nullptr : (int64_t *)c.offsets.data()),
            "sparse packing");
  }
  auto part = [](Bytes &b) { return b.empty() ? nullptr : b.data(); };
  auto size = [](Bytes &b) { return (int64_t)b.size(); };
  c.matrix = {c.n, c.k, c.bits, c.group, c.pattern, 0, part(c.values), size(c.values),
              part(c.scales), size(c.scales), part(c.zero_points), size(c.zero_points),
              part(c.masks), size(c.masks), part(c.offsets), size(c.offsets)};
}

// Relative error (Frobenius) of y = x W^T + bias. Activations are uniform in -1 ... 1.
double error_of(Case &c, int mode) {
  std::vector<float> x(c.m * c.k), y(c.m * c.n), bias(c.n);
  for (auto &v : x) v = below(20001) / 10000.0f - 1;
  for (auto &v : bias) v = below(100) / 100.0f;
  require(ack_linear(&c.matrix, mode, c.m, x.data(), ACK_F32, c.k, bias.data(), y.data(), ACK_F32,
                     c.n, 0, nullptr, 1),
          "linear");
  double wrong = 0, size = 0;
  for (int64_t m = 0; m < c.m; m++)
    for (int64_t r = 0; r < c.n; r++) {
      double sum = 0, squares = 0;
      for (int64_t i = 0; i < c.k; i++) {
        const double product = c.dense[r * c.k + i] * x[m * c.k + i];
        sum += product, squares += product * product;
      }
      const double gap = sum + bias[r] - y[m * c.n + r];
      wrong += gap * gap;
      size += squares;  // what the square of the sum is on average: no luck of cancellation
    }
  return size > 0 ? sqrt(wrong / size) : sqrt(wrong);
}

double rows_error(Case &c) {
  std::vector<float> y(c.n * c.k);
  require(ack_rows(&c.matrix, nullptr, 0, c.n, y.data(), ACK_F32, c.k, nullptr, 1), "rows");
  double worst = 0;
  for (size_t i = 0; i < y.size(); i++) worst = fmax(worst, fabs(y[i] - c.dense[i]));
  return worst;
}

}  // namespace

int main(int count, char **arguments) {
  const int cases = count > 1 ? atoi(arguments[1]) : 1000;
  const unsigned seed = count > 2 ? (unsigned)atoi(arguments[2]) : 0;
  const double limits[] = {6e-3, 3e-3, 1e-5};
  const char *modes[] = {"a8", "a16", "a32"};
  int bad = 0;
  char names[128];
  strncpy(names, ack_isas(), sizeof names - 1);
  for (char *isa = strtok(names, ","); isa; isa = strtok(nullptr, ",")) {
    rng.seed(seed);
    require(ack_select_isa(isa), "selecting");
    double worst[3] = {}, rows = 0;
    for (int i = 0; i < cases; i++) {
      Case c;
      draw(c);
      rows = fmax(rows, rows_error(c));
      for (int mode = 0; mode < 3; mode++) {
        const double error = error_of(c, mode);
        if (mode != ACK_A8 || c.n * c.m >= 64) worst[mode] = fmax(worst[mode], error);
        // int8 errors are random: the limit holds for a mean over many outputs, not for a few.
        const double slack = mode == ACK_A8 && c.n * c.m < 64 ? 1.7 : 1;
        if (error <= slack * limits[mode]) continue;
        bad++;
        printf("%s %s: error %.2e at n=%d k=%d m=%d bits=%d group=%d pattern=%d zeros=%d\n", isa,
               modes[mode], error, (int)c.n, (int)c.k, (int)c.m, c.bits, c.group, c.pattern,
               c.zeros);
      }
    }
    printf("%s: %d cases, worst error a8 %.2e, a16 %.2e, a32 %.2e, rows %.1e\n", isa, cases,
           worst[0], worst[1], worst[2], rows);
    bad += rows > 1e-6;
  }
  return bad != 0;
}
