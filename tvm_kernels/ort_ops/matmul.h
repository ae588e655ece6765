/* Kernels of BitplaneMatMul. TVM makes the functions; ops/matmul/kernel.py writes the table.
 *
 * Symbols are those of runtime/format/bitplanes.py: planes uint8 [p, N, S] with S = 64 * lines, codebook float16
 * [N, G, 2^p]. A kernel reads activations in a special order, which its `pack` function writes once per call of the operator.
 */
#ifndef PMPD_MATMUL_H
#define PMPD_MATMUL_H

#include <stddef.h>
#include <stdint.h>

enum { PMPD_EXACT = 0, PMPD_INT8 = 1 };

/* Lay out rows [begin, end) of x float32 [M, k].
 * packed: M rows of 512 * lines elements, int8 or float32; scale: M rows of 16 * lines; sum: M.
 * A row with NaN or infinity gives results that are NaN or infinite, at either accuracy. */
typedef void pmpd_pack_fn(const float *x, void *packed, float *scale, float *sum, int32_t k, int32_t lines,
                          int32_t begin, int32_t end);

/* y[i * ldy + n] = sum over k of x[i, k] * W[n, k], for i in [0, m) and rows n in [begin, end). There is at least one
 * row: row `begin` is read unconditionally. G must be 1. plane_bytes = N * S. scratch: private to the call,
 * `scratch_bytes` bytes, aligned to 64. */
typedef void pmpd_matmul_fn(const uint8_t *planes, int64_t plane_bytes, const uint16_t *codebook, const void *packed,
                            const float *scale, const float *sum, float *y, int64_t ldy, uint8_t *scratch,
                            int32_t lines, int32_t m, int32_t begin, int32_t end);

struct pmpd_kernel {
  const char *name;
  uint32_t features;     /* of cpu.h, that the processor must have */
  uint8_t bits;          /* p */
  uint8_t accuracy;      /* PMPD_EXACT or PMPD_INT8 */
  uint8_t many;          /* 0: one row of activations; 1: any number */
  uint8_t element_bytes; /* of packed activations: 4 or 1 */
  int32_t rows;          /* outputs computed together: chunks are multiples of it */
  int32_t chunk;         /* outputs that a thread computes at a time, tuned */
  int64_t scratch_bytes;
  pmpd_pack_fn *pack;
  pmpd_matmul_fn *matmul;
};

/* Best first: the first that fits the processor, p, accuracy and M is taken. */
extern const struct pmpd_kernel pmpd_kernels[];
extern const size_t pmpd_kernel_count;

/* Any p and any number of groups, in plain floats: what runs where no kernel above fits (G > 1).
 * x float32 [M, k] in its natural order; group_bytes: bytes of a plane's row that share a codebook. */
typedef void pmpd_any_fn(const uint8_t *planes, int64_t plane_bytes, const uint16_t *codebook, const float *x, float *y,
                         int64_t ldy, int32_t bits, int32_t groups, int32_t group_bytes, int32_t k, int32_t lines,
                         int32_t m, int32_t begin, int32_t end);
extern const char pmpd_any_name[];
pmpd_any_fn pmpd_any;

/* The kernel that a processor with these features runs, for one row of activations or many; NULL where only pmpd_any
 * does it. Where no int8 kernel fits, an exact one stands in; a kernel for many rows stands in for one made for one. */
const struct pmpd_kernel *pmpd_choose_matmul(uint32_t features, int accuracy, int many, int bits);

#endif
