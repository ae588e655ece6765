/* What the operator library knows of a compiled kernel. TVM makes the functions; `compile.py` writes the table.
 *
 * Symbols are those of runtime/format/bitplanes.py: planes uint8 [p, N, S] with S = 64 * lines, codebook float16 [N, G, 2^p].
 * A kernel reads activations in an order of its own, which its `pack` function writes once per call of the operator.
 */
#ifndef PMPD_KERNELS_H
#define PMPD_KERNELS_H

#include <stddef.h>
#include <stdint.h>

/* What a kernel asks of the processor, as bits of `pmpd_kernel.features`. */
enum {
  PMPD_AVX2 = 1 << 0,        /* all of x86-64-v3: a compiler may use any of it */
  PMPD_AVX_VNNI = 1 << 1,    /* 256-bit VNNI in the VEX encoding */
  PMPD_AVX512 = 1 << 2,      /* all of x86-64-v4: AVX-512 F, BW, CD, DQ, VL on top of it */
  PMPD_AVX512_VNNI = 1 << 3,
  PMPD_AVX512_VBMI = 1 << 4,
  PMPD_NEON = 1 << 5,
  PMPD_DOTPROD = 1 << 6,
};

enum { PMPD_EXACT = 0, PMPD_INT8 = 1 };

/* Lay out rows [begin, end) of x float32 [M, k].
 * packed: M rows of 512 * lines elements, int8 or float32; scale: M rows of 16 * lines; sum: M. */
typedef void (*pmpd_pack_fn)(const float *x, void *packed, float *scale, float *sum, int32_t k, int32_t lines,
                             int32_t begin, int32_t end);

/* y[i * ldy + n] = sum over k of x[i, k] * W[n, k], for i in [0, m) and rows n in [begin, end), one at least: a kernel
 * reads row `begin` unasked. G must be 1. plane_bytes = N * S. scratch: private to the call, `scratch_bytes + lines *
 * scratch_bytes_per_line` bytes, aligned to 64. */
typedef void (*pmpd_matmul_fn)(const uint8_t *planes, int64_t plane_bytes, const uint16_t *codebook, const void *packed,
                               const float *scale, const float *sum, float *y, int64_t ldy, uint8_t *scratch,
                               int32_t lines, int32_t m, int32_t begin, int32_t end);

struct pmpd_kernel {
  const char *name;
  uint32_t features;
  uint8_t bits;          /* p */
  uint8_t accuracy;      /* PMPD_EXACT or PMPD_INT8 */
  uint8_t many;          /* 0: one row of activations; 1: any number */
  uint8_t element_bytes; /* of packed activations: 4 or 1 */
  int32_t rows;          /* outputs computed together: chunks are multiples of it */
  int32_t chunk;         /* outputs given to a thread at a time, tuned */
  int64_t scratch_bytes, scratch_bytes_per_line;
  pmpd_pack_fn pack;
  pmpd_matmul_fn matmul;
};

/* The best first: the first that fits the processor, p, accuracy and M is taken. */
extern const struct pmpd_kernel pmpd_kernels[];
extern const size_t pmpd_kernel_count;

/* Any p and any number of groups, in plain floats: what runs where no kernel above fits (G > 1).
 * x float32 [M, k] in its natural order; group_bytes: bytes of a plane's row that share a codebook. */
extern const char pmpd_any_name[];
void pmpd_any(const uint8_t *planes, int64_t plane_bytes, const uint16_t *codebook, const float *x, float *y,
              int64_t ldy, int32_t bits, int32_t groups, int32_t group_bytes, int32_t k, int32_t lines, int32_t m,
              int32_t begin, int32_t end);

/* Attention of m new tokens over a cache of `past` positions, for key/value heads [begin, end).
 * qkv: float32 [m, (heads + 2 * kv_heads) * dim]; keys, values: float16 [kv_heads, capacity, dim], extended in place by
 * the m positions that follow `past`; what is too large for float16 becomes infinity, or its largest number in the
 * portable kernel. cos, sin: float32 [positions, pairs]: element i < pairs of queries and keys is rotated with element
 * pairs + i; pairs is a multiple of 8. y: float32 [m, heads * dim].
 * scratch: private to the call, PMPD_ATTENTION_SCRATCH floats. heads is a multiple of kv_heads, dim one of 16. */
typedef void (*pmpd_attention_fn)(const float *qkv, uint16_t *keys, uint16_t *values, const float *cos,
                                  const float *sin, float *y, float *scratch, float scale, int32_t m, int32_t past,
                                  int32_t capacity, int32_t heads, int32_t kv_heads, int32_t pairs, int32_t begin,
                                  int32_t end);

struct pmpd_attention {
  const char *name;
  uint32_t features;
  int32_t dim;     /* elements of a head */
  int32_t queries; /* taken together: 1 serves a single token best where every head has its own keys */
  pmpd_attention_fn attention;
};

/* Floats of scratch memory for `positions` = past + m. */
#define PMPD_ATTENTION_SCRATCH(kernel, positions) \
  ((size_t)(kernel)->queries * (size_t)((kernel)->dim + (positions) + 16))

/* By instruction set, the best first; of one set and dim those with more queries come first. */
extern const struct pmpd_attention pmpd_attentions[];
extern const size_t pmpd_attention_count;

#endif
