/* A product with bit-planes as the operators share it: checked inputs, packed activations, work for threads. */
#ifndef PMPD_PRODUCT_H
#define PMPD_PRODUCT_H

#include "matmul.h"
#include "operator.h"

enum {
  PMPD_LINE_COLUMNS = 512,    /* columns whose bits fill a line of 64 bytes */
  PMPD_MAX_SCRATCH = 1 << 19, /* bytes that a kernel may have on the stack */
};

/* X[..., M, K] times planes[p, N, S] under codebook[N, G, 2^p], plus bias[N] if there is one, into y[..., M, N]. */
struct pmpd_product {
  const struct pmpd_kernel *kernel; /* NULL: pmpd_any */
  const float *x, *bias;
  const uint8_t *planes;
  const uint16_t *codebook;
  float *y;
  int32_t bits, groups, n, k, m, lines;
  int64_t plane_bytes;
  void *packed, *memory;
  float *scale, *sum;
};

/* The kernels of a node for [0: one row of activations, 1: more][p - 1]; NULL: pmpd_any. */
struct pmpd_choices {
  const struct pmpd_kernel *kernels[2][8];
};

const char *pmpd_kernel_name(const struct pmpd_kernel *kernel);

/* Read attribute K and choose kernels. */
OrtStatus *pmpd_product_create(struct pmpd_operator *operator, const OrtKernelInfo *info, struct pmpd_choices *choices);

/* Read and check inputs 0, 1, 2 and `bias`, and make the output. */
OrtStatus *pmpd_product_open(const struct pmpd_operator *operator, OrtKernelContext *context, size_t bias,
                             const struct pmpd_choices *choices, struct pmpd_product *product);

/* Lay out the activations for the product's kernel in new memory, `memory`, which the caller frees. */
OrtStatus *pmpd_product_pack(const struct pmpd_operator *operator, const OrtKernelContext *context,
                             struct pmpd_product *product);

/* Compute outputs [begin, end) with a kernel, from packed activations. */
void pmpd_product_rows(const struct pmpd_product *product, int32_t begin, int32_t end);

/* Compute all outputs, by a kernel or by pmpd_any. */
OrtStatus *pmpd_product_run(const struct pmpd_operator *operator, const OrtKernelContext *context,
                            struct pmpd_product *product);

/* Do `part` for items [begin, end) of `total`, `step` items at a time, on the session's threads. */
typedef void pmpd_part_fn(void *data, int32_t begin, int32_t end);
OrtStatus *pmpd_share(const struct pmpd_operator *operator, const OrtKernelContext *context, pmpd_part_fn *part,
                      void *data, int32_t total, int32_t step);

#endif
