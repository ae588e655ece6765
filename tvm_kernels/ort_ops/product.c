#include "product.h"

#include <stdlib.h>

enum {
  ANY_CHUNK = 16,          /* rows of weights that pmpd_any does at a time */
  PACK_ELEMENTS = 1 << 14, /* activations that a thread packs at a time */
};

enum { X, PLANES, CODEBOOK };

const char *pmpd_kernel_name(const struct pmpd_kernel *kernel) { return kernel ? kernel->name : pmpd_any_name; }

OrtStatus *pmpd_product_create(struct pmpd_operator *operator, const OrtKernelInfo *info,
                               struct pmpd_choices *choices) {
  const struct pmpd_settings *settings = operator->settings;
  int64_t k;
  TRY(settings->api->KernelInfoGetAttribute_int64(info, "K", &k));
  if (k < 1 || k > INT32_MAX - PMPD_LINE_COLUMNS)
    return pmpd_refuse(operator, "attribute K is %lld, wanted a positive 32-bit number", (long long)k);
  operator->node.k = (int32_t)k;
  for (int many = 0; many <= 1; many++)
    for (int bits = 1; bits <= 8; bits++)
      choices->kernels[many][bits - 1] = pmpd_choose_matmul(settings->features, settings->accuracy, many, bits);
  return NULL;
}

OrtStatus *pmpd_product_open(const struct pmpd_operator *operator, OrtKernelContext *context, size_t bias_index,
                             const struct pmpd_choices *choices, struct pmpd_product *product) {
  const int32_t k = operator->node.k, lines = (k + PMPD_LINE_COLUMNS - 1) / PMPD_LINE_COLUMNS;
  struct pmpd_tensor x, planes, codebook, bias;
  TRY(pmpd_read_input(operator, context, X, &x));
  TRY(pmpd_read_input(operator, context, PLANES, &planes));
  TRY(pmpd_read_input(operator, context, CODEBOOK, &codebook));
  TRY(pmpd_read_input(operator, context, bias_index, &bias));

  if (x.rank < 1 || x.rank > PMPD_MAX_RANK || x.shape[x.rank - 1] != k)
    return pmpd_refuse_shape(operator, X, &x, "[..., %d] of up to %d axes", k, PMPD_MAX_RANK);
  if (planes.rank != 3 || planes.shape[0] < 1 || planes.shape[0] > 8 || planes.shape[2] != 64 * (int64_t)lines)
    return pmpd_refuse_shape(operator, PLANES, &planes, "[1 to 8, N, %lld] for K = %d", 64LL * lines, k);
  const int64_t bits = planes.shape[0], n = planes.shape[1];
  if (codebook.rank != 3 || codebook.shape[0] != n || codebook.shape[1] < 1 || codebook.shape[2] != 1 << bits)
    return pmpd_refuse_shape(operator, CODEBOOK, &codebook, "[%lld, groups, %d] for %lld planes of %lld rows",
                        (long long)n, 1 << bits, (long long)bits, (long long)n);
  if (bias.present && (bias.rank != 1 || bias.shape[0] != n))
    return pmpd_refuse_shape(operator, bias_index, &bias, "[%lld]", (long long)n);
  int64_t m = 1;
  for (size_t i = 0; i + 1 < x.rank; i++) m *= x.shape[i];
  if (m > INT32_MAX || n > INT32_MAX || codebook.shape[1] > INT32_MAX)
    return pmpd_refuse(operator, "%lld rows of X, %lld of the weights and %lld groups; %d are the most", (long long)m,
                  (long long)n, (long long)codebook.shape[1], INT32_MAX);

  x.shape[x.rank - 1] = n;
  void *y;
  TRY(pmpd_make_output(operator, context, 0, x.shape, x.rank, &y));
  *product = (struct pmpd_product){
      .x = x.data,
      .bias = bias.present ? bias.data : NULL,
      .planes = planes.data,
      .codebook = codebook.data,
      .y = y,
      .bits = (int32_t)bits,
      .groups = (int32_t)codebook.shape[1],
      .n = (int32_t)n,
      .k = k,
      .m = (int32_t)m,
      .lines = lines,
      .plane_bytes = n * 64 * lines,
  };
  if (product->groups == 1) product->kernel = choices->kernels[m > 1][bits - 1];
  return NULL;
}

/* The work that threads share at the moment: `step` items of `total` at a time. */
struct shared {
  pmpd_part_fn *part;
  void *data;
  int32_t total, step;
};

static void do_part(void *data, size_t i) {
  const struct shared *shared = data;
  const int32_t begin = (int32_t)i * shared->step, left = shared->total - begin;
  shared->part(shared->data, begin, begin + (left < shared->step ? left : shared->step));
}

/* ONNX Runtime gives each thread a contiguous stretch; threads that finish early take from the others' stretches. So
 * threads stream through memory, and none waits long. */
OrtStatus *pmpd_share(const struct pmpd_operator *operator, const OrtKernelContext *context, pmpd_part_fn *part,
                      void *data, int32_t total, int32_t step) {
  struct shared shared = {part, data, total, step};
  const size_t parts = ((size_t)total + (size_t)step - 1) / (size_t)step;
  if (parts > 1) return operator->settings->api->KernelContext_ParallelFor(context, do_part, parts, 0, &shared);
  do_part(&shared, 0);
  return NULL;
}

static void add_bias(const struct pmpd_product *product, int32_t begin, int32_t end) {
  if (!product->bias) return;
  for (int32_t row = 0; row < product->m; row++) {
    float *y = product->y + (int64_t)row * product->n;
    for (int32_t i = begin; i < end; i++) y[i] += product->bias[i];
  }
}

static void pack(void *data, int32_t begin, int32_t end) {
  const struct pmpd_product *product = data;
  product->kernel->pack(product->x, product->packed, product->scale, product->sum, product->k, product->lines, begin,
                        end);
}

OrtStatus *pmpd_product_pack(const struct pmpd_operator *operator, const OrtKernelContext *context,
                             struct pmpd_product *product) {
  const size_t m = (size_t)product->m, lines = (size_t)product->lines;
  const size_t packed = m * lines * PMPD_LINE_COLUMNS * product->kernel->element_bytes, scale = m * lines * 64;
  const size_t sum = (m * sizeof(float) + 63) / 64 * 64;
  uint8_t *memory = aligned_alloc(64, packed + scale + sum);
  if (!memory) return pmpd_refuse(operator, "no memory for %zu bytes", packed + scale + sum);
  product->packed = product->memory = memory;
  product->scale = (float *)(memory + packed);
  product->sum = (float *)(memory + packed + scale);
  OrtStatus *status = pmpd_share(operator, context, pack, product, product->m, 1 + PACK_ELEMENTS / product->k);
  if (status) free(memory);
  return status;
}

void pmpd_product_rows(const struct pmpd_product *product, int32_t begin, int32_t end) {
  /* On the stack, which only this thread uses and which is in its nearest cache. */
  uint8_t memory[product->kernel->scratch_bytes + 63];
  uint8_t *scratch = memory + (-(uintptr_t)memory & 63);
  product->kernel->matmul(product->planes, product->plane_bytes, product->codebook, product->packed, product->scale,
                          product->sum, product->y, product->n, scratch, product->lines, product->m, begin, end);
  add_bias(product, begin, end);
}

static void multiply(void *data, int32_t begin, int32_t end) { pmpd_product_rows(data, begin, end); }

static void multiply_any(void *data, int32_t begin, int32_t end) {
  const struct pmpd_product *product = data;
  const int32_t row_bytes = (product->k + 7) / 8; /* group_size of runtime/bitplanes.py, in bytes */
  pmpd_any(product->planes, product->plane_bytes, product->codebook, product->x, product->y, product->n, product->bits,
           product->groups, (row_bytes + product->groups - 1) / product->groups, product->k, product->lines,
           product->m, begin, end);
  add_bias(product, begin, end);
}

OrtStatus *pmpd_product_run(const struct pmpd_operator *operator, const OrtKernelContext *context,
                            struct pmpd_product *product) {
  const struct pmpd_kernel *kernel = product->kernel;
  if (!product->m || !product->n) return NULL;
  if (!kernel) return pmpd_share(operator, context, multiply_any, product, product->n, ANY_CHUNK);
  if (kernel->scratch_bytes > PMPD_MAX_SCRATCH)
    return pmpd_refuse(operator, "%s wants %lld bytes of scratch memory, more than %d", kernel->name,
                  (long long)kernel->scratch_bytes, PMPD_MAX_SCRATCH);
  TRY(pmpd_product_pack(operator, context, product));
  OrtStatus *status = pmpd_share(operator, context, multiply, product, product->n, kernel->chunk);
  free(product->memory);
  return status;
}
