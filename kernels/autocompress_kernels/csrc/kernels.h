// What dispatch.cpp and the instruction sets share. No STL here or in any isa_*.cpp: an inline
// function of the library, compiled with AVX-512 and kept by the linker, would crash elsewhere.
#pragma once
#include "autocompress_kernels.h"

namespace ack {

constexpr int ROWS = 16;        // outputs per tile
constexpr int BLOCKS = 8;       // 16 x 4 blocks of codes per superblock
constexpr int SUPER = 32;       // inputs per superblock
constexpr int SEGMENT = 64;     // most inputs per activation scale, and between two changes of scale
constexpr int BATCH = 8;        // most rows of x that share an unpacked block

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of x taken together when `left` remain: 8, 4, 2 or 1.
inline int rows_together(int64_t left) { return left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1; }

// A matrix with what follows from its shape, checked.
struct Weights {
  ack_matrix m;
  int64_t width;        // k, padded to SUPER
  int64_t tiles;        // of ROWS outputs
  int64_t groups;       // scales per row
  int64_t segments;     // per row
  int32_t segment;      // inputs; divides the group
  int32_t per_group;    // segments
};

// x as the kernels of one mode read it. Rows are taken 8, 4, 2 or 1 at a time; a batch of R rows
// from row r begins at r * width elements and holds, next to each other for all its rows:
//   A8:  4 int8 of one block's columns          (scale and sum, an int32, per segment)
//   A16: 2 x 2 bf16, columns 0, 2 and 1, 3 of a block; 16-bit weights: columns 0, 1 (sum per segment)
//   A32: 1 float; where units are WIDE, one or two rows as 3 int8 digits of each float: 4 first digits
//        of one block's columns, then 4 second ... (scale and sum per segment)
// and where units are WIDE (wide.h), a scale and a sum per segment, codes only:
//   WIDE_A8:  as A8; batches of 8: 2 x 2 int16, columns 1, 3 and 0, 2 of a block
//   WIDE_A16: one or two rows as 2 int8 digits; more: 2 x 2 int16, columns 0, 2 and 1, 3
enum { WIDE_A8 = 3, WIDE_A16 = 4 };  // layouts beside those of ack_mode

struct Activations {
  void *data;
  float *scales;        // batch from row r: [segments][R] at r * segments
  float *sums;
  int32_t mode;         // of the layout, after the instruction set replaced modes it lacks
  bool exact;           // fp32 values, not rounded to bf16
};

struct Output {
  void *y;
  int64_t ld;
  const float *bias;    // or null
  int32_t type;
  int32_t accumulate;
};

struct Isa {
  const char *name;
  bool bf16;            // has bf16 dot products; without them A16 is computed as A32 of rounded x
  int32_t wide;         // fewest bits of codes that take WIDE_A8; 0: neither that nor WIDE_A16
  void (*prepare)(const Weights &, const Activations &, const void *x, int32_t type, int64_t ld,
                  int64_t row, int rows);
  void (*tiles)(const Weights &, const Activations &, int64_t m, int64_t begin, int64_t end,
                const Output &);
  // out[n] = x / rms(x) * weight
  void (*norm)(const float *x, const float *weight, int64_t n, float epsilon, float *out);
  // out[n] = silu(gate) * up
  void (*gated)(const float *gate, const float *up, int64_t n, float *out);
  // One head over `count` positions. keys: bf16 [count / 16][dim][16], values: bf16 [count][dim].
  void (*attend)(const float *query, const uint16_t *keys, const uint16_t *values, int64_t count,
                 int64_t dim, float scale, float *scores, float *out);
};

const Isa &current_isa();
int32_t make_weights(const ack_matrix &, Weights *);
int32_t layout_mode(const Isa &, const Weights &, int32_t mode, int64_t m);
bool same_layout(const Isa &, const Weights &, const Weights &, int32_t mode, int64_t m);

void *aligned_memory(int64_t bytes);  // 64-byte aligned, for free(); null where there is none

// Bytes of an input; an int8 may leave the second of two unused.
inline int64_t element_bytes(int32_t mode) {
  return mode == ACK_A8 ? 1 : mode == ACK_A32 ? 4 : 2;
}

// Bytes of the activations of m rows; data, scales and sums in this order.
int64_t activation_bytes(const Weights &, int32_t mode, int64_t m);
Activations place(void *memory, const Weights &, int32_t mode, int64_t m, bool exact);

inline float from_bf16(uint16_t bits) {
  uint32_t word = (uint32_t)bits << 16;
  float value;
  __builtin_memcpy(&value, &word, 4);
  return value;
}

inline uint16_t to_bf16(float value) {  // to nearest, ties to even; NaN stays NaN
  uint32_t word;
  __builtin_memcpy(&word, &value, 4);
  if ((word & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(word >> 16 | 0x40);
  return (uint16_t)((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

}  // namespace ack
