/* Packed-weight matrix kernels: a plain C ABI, no Python and no torch.
 *
 * Layout ("tiles"), the same for every instruction set. N rows (outputs) are padded to tiles of 16,
 * K columns (inputs) to superblocks of 32. A superblock of b-bit codes is 64*b bytes: 8 blocks of
 * 16 rows x 4 columns, byte 4*r + j of a block being row r, column j. Codes are split into planes
 * stored one after the other, lowest bits first:
 *   4-bit plane, 4 x 64 bytes: vector v holds block 2v in the low nibbles, block 2v+1 in the high;
 *   2-bit plane, 2 x 64 bytes: vector v holds blocks 4v .. 4v+3 at bits 0, 2, 4, 6;
 *   1-bit plane, 1 x 64 bytes: block j at bit j.
 * 2 = {2}, 3 = {2,1}, 4 = {4}, 5 = {4,1}, 6 = {4,2}, 8 = the blocks themselves.
 * Superblocks of a tile follow each other, then the next tile. 16-bit weights (bf16) are blocks of
 * 16 rows x 2 columns, 64 bytes, 16 blocks to a superblock.
 * scales: fp16 [N/16][groups][16], zeros: uint8 of the same shape; weight = scale * (code - zero),
 * zero = 2^(b-1) where there are no zeros. 16-bit weights have neither.
 *
 * Sparse patterns keep only some elements of each block, in order, and one bit each in `masks`
 * (uint64 per 16 x 4 block of 8-bit codes, uint32 per 16 x 2 block of bf16; bit = byte or element
 * index in the block). `offsets` int64 [N/16 + 1] is where a tile's values begin, in elements; 2:4
 * keeps exactly half of every 16 x 4 elements, so it needs none. `values` must have ACK_TAIL readable bytes
 * behind the last element.
 */
#ifndef AUTOCOMPRESS_KERNELS_H
#define AUTOCOMPRESS_KERNELS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define ACK_ABI 2
#define ACK_TAIL 64

enum ack_type { ACK_F32 = 0, ACK_BF16 = 1 };                       /* of x and y */
enum ack_mode { ACK_A8 = 0, ACK_A16 = 1, ACK_A32 = 2 };            /* of activations inside */
enum ack_pattern { ACK_FULL = 0, ACK_BITMASK = 1, ACK_2OF4 = 2 };

enum ack_error {
  ACK_OK = 0,
  ACK_BAD_SHAPE = 1,    /* n, k, m or a leading dimension out of range */
  ACK_BAD_FORMAT = 2,   /* bits, group, pattern, mode or type unknown or not combined */
  ACK_SHORT_BUFFER = 3, /* a buffer is smaller than the shape needs */
  ACK_NO_MEMORY = 4,
  ACK_BAD_INDEX = 5     /* a gathered row or a sparse offset out of range */
};

typedef struct ack_matrix {
  int64_t n, k;      /* logical outputs and inputs, each 1 .. 2^31-1 */
  int32_t bits;      /* 2, 3, 4, 5, 6, 8: codes; 16: bf16 values */
  int32_t group;     /* inputs per scale, a multiple of 32; >= k means one group; unused at 16 bits */
  int32_t pattern;   /* ack_pattern; sparse ones take 8 or 16 bits */
  int32_t reserved;  /* 0 */
  const void *values;
  int64_t values_bytes;
  const void *scales;
  int64_t scales_bytes;
  const void *zeros; /* or NULL: symmetric */
  int64_t zeros_bytes;
  const void *masks; /* or NULL: not sparse */
  int64_t masks_bytes;
  const void *offsets; /* or NULL: not bitmask */
  int64_t offsets_bytes;
} ack_matrix;

/* torch_parallel_for of torch's stable C shim, or NULL to run on the calling thread. */
typedef int32_t (*ack_parallel_for)(int64_t begin, int64_t end, int64_t grain,
                                    void (*body)(int64_t begin, int64_t end, void *context),
                                    void *context);

int32_t ack_abi(void);
const char *ack_isa(void);            /* path in use: avx512bf16, avx512vnni, avx2vnni, avx2, neon, portable */
int32_t ack_select_isa(const char *); /* for tests; 0, or ACK_BAD_FORMAT when it cannot run here */
const char *ack_isas(void);           /* all that can run here, best first, separated by commas */

/* y[m][n] (+)= x[m][k] W^T + bias.  Leading dimensions in elements; bias fp32 [n] or NULL. */
int32_t ack_linear(const ack_matrix *w, int32_t mode, int64_t m, const void *x, int32_t x_type,
                   int64_t ldx, const float *bias, void *y, int32_t y_type, int64_t ldy,
                   int32_t accumulate, ack_parallel_for parallel, int32_t threads);

/* The same for `count` matrices that read one x, each with its bias (or NULL) and its contiguous
 * y[m][n]: x is made ready once, and threads share all of the work. */
enum { ACK_MOST_MATRICES = 8 };
int32_t ack_linears(const ack_matrix *w, int32_t count, int32_t mode, int64_t m, const void *x,
                    int32_t x_type, int64_t ldx, const float *const *biases, void *const *ys,
                    int32_t y_type, ack_parallel_for parallel, int32_t threads);

/* Whether two buffers hold the same bytes. */
int32_t ack_equal(const void *a, const void *b, int64_t bytes);

/* Rows `rows[0..count)` (or begin .. begin+count-1 when rows is NULL) as dense y[count][k]. */
int32_t ack_rows(const ack_matrix *w, const int64_t *rows, int64_t begin, int64_t count, void *y,
                 int32_t y_type, int64_t ldy, ack_parallel_for parallel, int32_t threads);

/* Bytes that `values` needs for a full (not sparse) matrix, padding included. */
int64_t ack_values_bytes(int64_t n, int64_t k, int32_t bits);

/* codes uint8 [n][k] -> values. bits 2 .. 8. */
int32_t ack_pack_codes(const uint8_t *codes, int64_t n, int64_t k, int32_t bits, uint8_t *values,
                       int64_t values_bytes);
/* bf16 [n][k] (bit patterns) -> values. */
int32_t ack_pack_bf16(const uint16_t *weights, int64_t n, int64_t k, uint8_t *values,
                      int64_t values_bytes);
/* Sparse: keep [n][k] is 1 where kept. codes uint8 or bf16 by `bits` (8 or 16). values must have
 * room for all kept elements and ACK_TAIL bytes; masks and offsets as described above. */
int32_t ack_pack_sparse(const void *elements, const uint8_t *keep, int64_t n, int64_t k,
                        int32_t bits, int32_t pattern, uint8_t *values, int64_t values_bytes,
                        uint8_t *masks, int64_t masks_bytes, int64_t *offsets);

/* A whole decoder of the Llama family: RMS norms, rotary positions (half rotated), grouped-query
 * attention, a gated SiLU MLP. Everything between the matrices is computed in fp32, keys and values
 * are kept as bf16. Pointers must stay valid until ack_llama_close. A block whose o has no rows has
 * no attention, and keeps no keys and values; one whose down has none has no MLP. */
typedef struct ack_llama_block {
  ack_matrix q, k, v, o, gate, up, down;
  const float *q_bias, *k_bias, *v_bias, *o_bias; /* or NULL */
  const float *input_norm, *post_norm;            /* [hidden] */
  const float *q_norm, *k_norm;                   /* [head_dim], or NULL: none */
} ack_llama_block;

typedef struct ack_llama {
  int64_t blocks, heads, kv_heads, head_dim; /* head_dim a multiple of 16, heads of kv_heads */
  int64_t capacity;                          /* positions */
  ack_matrix embedding, head;                /* vocab x hidden */
  const float *final_norm;                   /* [hidden] */
  const float *cosine, *sine;                /* [capacity][head_dim / 2] */
  const ack_llama_block *block;              /* [blocks] */
  float epsilon;                             /* of the norms */
  int32_t mode;                              /* ack_mode */
} ack_llama;

/* NULL, with the reason in *error, where shapes do not fit together. */
void *ack_llama_open(const ack_llama *, int32_t *error);
void ack_llama_close(void *);
/* Tokens at positions position .. position + count - 1; those before must have been seen.
 * logits fp32 [vocab] of the last token, or NULL. One call at a time on one handle. */
int32_t ack_llama_step(void *, const int64_t *tokens, int64_t count, int64_t position,
                       float *logits, ack_parallel_for parallel, int32_t threads);

/* The sum of the 8-byte words of [address, address + bytes), modulo 2^64: as fast as memory is
 * read. For benchmarks. */
int64_t ack_read(const void *address, int64_t bytes, ack_parallel_for parallel, int32_t threads);

/* Asks for huge pages behind [address, address + bytes); 0 where that worked. */
int32_t ack_huge_pages(void *address, int64_t bytes);

#ifdef __cplusplus
}
#endif
#endif
