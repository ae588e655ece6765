/* Measuring instruments, linked into an operator library only to measure its kernels (`measure.py`). */
#include <string.h>

#include "matmul.h"

#define EXPORT __attribute__((visibility("default")))

EXPORT const struct pmpd_kernel *pmpd_ops_kernel(const char *name) {
  for (size_t i = 0; i < pmpd_kernel_count; i++)
    if (!strcmp(pmpd_kernels[i].name, name)) return &pmpd_kernels[i];
  return NULL;
}

EXPORT void pmpd_ops_pack(const struct pmpd_kernel *kernel, const float *x, void *packed, float *scale, float *sum,
                          int32_t k, int32_t lines, int32_t m) {
  kernel->pack(x, packed, scale, sum, k, lines, 0, m);
}

/* Rows [begin, end), if any, of each of the matrices [n, 512 * lines], which are stored contiguously. */
EXPORT void pmpd_ops_sweep(const struct pmpd_kernel *kernel, const uint8_t *planes, const uint16_t *codebook,
                           const void *packed, const float *scale, const float *sum, float *y, int32_t n,
                           int32_t lines, int32_t m, int32_t copies, int32_t begin, int32_t end) {
  if (begin == end) return; /* kernels need at least one row */
  uint8_t memory[kernel->scratch_bytes + 63];
  uint8_t *scratch = memory + (-(uintptr_t)memory & 63);
  const int64_t plane_bytes = (int64_t)n * lines * 64;
  for (int32_t i = 0; i < copies; i++)
    kernel->matmul(planes + i * kernel->bits * plane_bytes, plane_bytes, codebook + ((int64_t)i * n << kernel->bits),
                   packed, scale, sum, y, n, scratch, lines, m, begin, end);
}

/* Read whole cache lines as fast as the machine can: enough sums that none waits for another. */
EXPORT uint64_t pmpd_ops_read(const uint8_t *data, int64_t bytes) {
  typedef uint64_t line __attribute__((vector_size(64)));
  const line *next = (const line *)data;
  line sums[4] = {{0}};
  for (int64_t i = 0; i + 4 <= bytes / 64; i += 4)
    for (int j = 0; j < 4; j++) sums[j] ^= next[i + j];
  sums[0] ^= sums[1] ^ sums[2] ^ sums[3];
  uint64_t all = 0;
  for (int i = 0; i < 8; i++) all ^= sums[0][i];
  return all;
}
