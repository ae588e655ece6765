/* Kernels of GroupQueryAttention. TVM makes the functions; ops/attention/kernel.py writes the table. */
#ifndef PMPD_ATTENTION_H
#define PMPD_ATTENTION_H

#include <stddef.h>
#include <stdint.h>

/* The m new tokens follow `past` positions of the cache. qkv: float32 [m, (heads + 2 * kv_heads) * dim]; keys, values:
 * float16 [kv_heads, capacity, dim]; cos, sin: float32 [positions, pairs]. Element i < pairs of queries and keys is
 * rotated with element pairs + i; pairs is a multiple of 8, dim one of 16, heads one of kv_heads. */

/* Write the keys and values of the new tokens to the cache, for key/value heads [begin, end). What is too large for
 * float16 becomes infinity. */
typedef void pmpd_append_fn(const float *qkv, uint16_t *keys, uint16_t *values, const float *cos, const float *sin,
                            int32_t m, int32_t past, int32_t capacity, int32_t heads, int32_t kv_heads, int32_t pairs,
                            int32_t begin, int32_t end);

/* Attention of the queries of one key/value head over the cache, new tokens included. Queries [begin, end) are numbered
 * by token, then by head: query `token * heads / kv_heads + i` is of head `kv_head * heads / kv_heads + i`.
 * A query sees `window` positions, its own the last of them. Scores s become softcap * tanh(s / softcap) unless softcap
 * is 0. y: float32 [m, heads * dim]. scratch: private to the call, PMPD_ATTENTION_SCRATCH floats. */
typedef void pmpd_attend_fn(const float *qkv, const uint16_t *keys, const uint16_t *values, const float *cos,
                            const float *sin, float *y, float *scratch, float scale, float softcap, int32_t window,
                            int32_t past, int32_t capacity, int32_t heads, int32_t kv_heads, int32_t pairs,
                            int32_t kv_head, int32_t begin, int32_t end);

struct pmpd_attention {
  const char *name;
  uint32_t features; /* of cpu.h, that the processor must have */
  int32_t dim;       /* elements of a head */
  int32_t queries;   /* taken together: 1 serves a single token best where every head has its own keys */
  pmpd_append_fn *append;
  pmpd_attend_fn *attend; /* has no regard to window and softcap */
  pmpd_attend_fn *attend_limited;
};

/* Floats of scratch memory for `positions` = past + m. */
#define PMPD_ATTENTION_SCRATCH(kernel, positions) \
  ((size_t)(kernel)->queries * (size_t)((kernel)->dim + (positions) + 16))

/* By instruction set, the best first; of one set and dim those with more queries come first. */
extern const struct pmpd_attention pmpd_attentions[];
extern const size_t pmpd_attention_count;

#endif
