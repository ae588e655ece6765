/* The operator pmpd::BitplaneMatMul: X[..., M, K], planes[p, N, S], codebook[N, G, 2^p], bias[N]? → Y[..., M, N].
 * Checks its inputs, chooses a kernel, and shares the work among the session's own threads. */
#include "matmul.h"

#include <stdlib.h>

#include "operator.h"

enum {
  LINE_COLUMNS = 512,      /* columns whose bits fill a line of 64 bytes */
  ANY_CHUNK = 16,          /* rows of weights that pmpd_any does at a time */
  PACK_ELEMENTS = 1 << 14, /* activations that a thread packs at a time */
  MAX_SCRATCH = 1 << 19,   /* bytes, on the stack */
};

enum { X, PLANES, CODEBOOK, BIAS };

static const struct pmpd_value INPUTS[] = {
    [X] = {"X", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 0},
    [PLANES] = {"planes", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, 0},
    [CODEBOOK] = {"codebook", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, 0},
    [BIAS] = {"bias", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 1},
};
static const struct pmpd_value OUTPUTS[] = {{"Y", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 0}};

/* A node: the kernels for [0: one row of activations, 1: more][p - 1]; NULL: pmpd_any. */
struct matmul {
  struct pmpd_operator operator;
  int32_t k;
  const struct pmpd_kernel *kernels[2][8];
};

static const struct pmpd_kernel *first_fit(uint32_t features, int accuracy, int many, int bits) {
  for (size_t i = 0; i < pmpd_kernel_count; i++) {
    const struct pmpd_kernel *kernel = &pmpd_kernels[i];
    if (kernel->bits == bits && kernel->accuracy == accuracy && kernel->many == many &&
        (kernel->features & ~features) == 0)
      return kernel;
  }
  return NULL;
}

const struct pmpd_kernel *pmpd_choose_matmul(uint32_t features, int accuracy, int many, int bits) {
  const struct pmpd_kernel *kernel = first_fit(features, accuracy, many, bits);
  if (!kernel && !many) kernel = first_fit(features, accuracy, 1, bits);
  if (!kernel && accuracy == PMPD_INT8) kernel = pmpd_choose_matmul(features, PMPD_EXACT, many, bits);
  return kernel;
}

static const char *kernel_name(const struct pmpd_kernel *kernel) { return kernel ? kernel->name : pmpd_any_name; }

/* One call of the operator. */
struct call {
  const struct pmpd_kernel *kernel; /* NULL: pmpd_any */
  const float *x, *bias;
  const uint8_t *planes;
  const uint16_t *codebook;
  float *y;
  int32_t bits, groups, n, k, m, lines;
  int64_t plane_bytes;
  void *packed;
  float *scale, *sum;
  /* The work that threads share at the moment: `step` items of `total` at a time. */
  void (*part)(const struct call *, int32_t begin, int32_t end);
  int32_t total, step;
};

/* Read and check all inputs, and make the output. */
static OrtStatus *open_call(const struct matmul *matmul, OrtKernelContext *context, struct call *call) {
  const struct pmpd_operator *operator = &matmul->operator;
  const int32_t k = matmul->k, lines = (k + LINE_COLUMNS - 1) / LINE_COLUMNS;
  struct pmpd_tensor x, planes, codebook, bias;
  TRY(pmpd_read_input(operator, context, X, &x));
  TRY(pmpd_read_input(operator, context, PLANES, &planes));
  TRY(pmpd_read_input(operator, context, CODEBOOK, &codebook));
  TRY(pmpd_read_input(operator, context, BIAS, &bias));

  if (x.rank < 1 || x.rank > PMPD_MAX_RANK || x.shape[x.rank - 1] != k)
    return pmpd_refuse_shape(operator, X, &x, "[..., %d] of up to %d axes", k, PMPD_MAX_RANK);
  if (planes.rank != 3 || planes.shape[0] < 1 || planes.shape[0] > 8 || planes.shape[2] != 64 * (int64_t)lines)
    return pmpd_refuse_shape(operator, PLANES, &planes, "[1 to 8, N, %lld] for K = %d", 64LL * lines, k);
  const int64_t bits = planes.shape[0], n = planes.shape[1];
  if (codebook.rank != 3 || codebook.shape[0] != n || codebook.shape[1] < 1 || codebook.shape[2] != 1 << bits)
    return pmpd_refuse_shape(operator, CODEBOOK, &codebook, "[%lld, groups, %d] for %lld planes of %lld rows",
                        (long long)n, 1 << bits, (long long)bits, (long long)n);
  if (bias.present && (bias.rank != 1 || bias.shape[0] != n))
    return pmpd_refuse_shape(operator, BIAS, &bias, "[%lld]", (long long)n);
  int64_t m = 1;
  for (size_t i = 0; i + 1 < x.rank; i++) m *= x.shape[i];
  if (m > INT32_MAX || n > INT32_MAX || codebook.shape[1] > INT32_MAX)
    return pmpd_refuse(operator, "%lld rows of X, %lld of the weights and %lld groups; %d are the most", (long long)m,
                  (long long)n, (long long)codebook.shape[1], INT32_MAX);

  x.shape[x.rank - 1] = n;
  void *y;
  TRY(pmpd_make_output(operator, context, 0, x.shape, x.rank, &y));
  *call = (struct call){
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
  if (call->groups == 1) call->kernel = matmul->kernels[m > 1][bits - 1];
  return NULL;
}

static void add_bias(const struct call *call, int32_t begin, int32_t end) {
  if (!call->bias) return;
  for (int32_t row = 0; row < call->m; row++) {
    float *y = call->y + (int64_t)row * call->n;
    for (int32_t i = begin; i < end; i++) y[i] += call->bias[i];
  }
}

static void pack(const struct call *call, int32_t begin, int32_t end) {
  call->kernel->pack(call->x, call->packed, call->scale, call->sum, call->k, call->lines, begin, end);
}

static void multiply(const struct call *call, int32_t begin, int32_t end) {
  /* On the stack, which only this thread uses and which is in its nearest cache. */
  uint8_t memory[call->kernel->scratch_bytes + 63];
  uint8_t *scratch = memory + (-(uintptr_t)memory & 63);
  call->kernel->matmul(call->planes, call->plane_bytes, call->codebook, call->packed, call->scale, call->sum, call->y,
                       call->n, scratch, call->lines, call->m, begin, end);
  add_bias(call, begin, end);
}

static void multiply_any(const struct call *call, int32_t begin, int32_t end) {
  const int32_t row_bytes = (call->k + 7) / 8; /* group_size of runtime/bitplanes.py, in bytes */
  pmpd_any(call->planes, call->plane_bytes, call->codebook, call->x, call->y, call->n, call->bits, call->groups,
           (row_bytes + call->groups - 1) / call->groups, call->k, call->lines, call->m, begin, end);
  add_bias(call, begin, end);
}

static void do_part(void *data, size_t i) {
  const struct call *call = data;
  const int32_t begin = (int32_t)i * call->step, left = call->total - begin;
  call->part(call, begin, begin + (left < call->step ? left : call->step));
}

/* Do all of a job on the session's threads. ONNX Runtime gives each thread a contiguous stretch; threads that finish
 * early take from the others' stretches. So threads stream through memory, and none waits long. */
static OrtStatus *share(const struct pmpd_operator *operator, const OrtKernelContext *context,
                                struct call *call, void (*part)(const struct call *, int32_t begin, int32_t end),
                                int32_t total, int32_t step) {
  const size_t parts = ((size_t)total + (size_t)step - 1) / (size_t)step;
  call->part = part;
  call->total = total;
  call->step = step;
  if (parts > 1) return operator->settings->api->KernelContext_ParallelFor(context, do_part, parts, 0, call);
  do_part(call, 0);
  return NULL;
}

static OrtStatus *run_kernel(const struct pmpd_operator *operator, const OrtKernelContext *context,
                                     struct call *call) {
  const struct pmpd_kernel *kernel = call->kernel;
  if (kernel->scratch_bytes > MAX_SCRATCH)
    return pmpd_refuse(operator, "%s wants %lld bytes of scratch memory, more than %d", kernel->name,
                  (long long)kernel->scratch_bytes, MAX_SCRATCH);
  const size_t m = (size_t)call->m, lines = (size_t)call->lines;
  const size_t packed = m * lines * LINE_COLUMNS * kernel->element_bytes, scale = m * lines * 64;
  const size_t sum = (m * sizeof(float) + 63) / 64 * 64;
  uint8_t *memory = aligned_alloc(64, packed + scale + sum);
  if (!memory) return pmpd_refuse(operator, "no memory for %zu bytes", packed + scale + sum);
  call->packed = memory;
  call->scale = (float *)(memory + packed);
  call->sum = (float *)(memory + packed + scale);
  OrtStatus *status = share(operator, context, call, pack, call->m, 1 + PACK_ELEMENTS / call->k);
  if (!status) status = share(operator, context, call, multiply, call->n, kernel->chunk);
  free(memory);
  return status;
}

static OrtStatus *compute(struct pmpd_operator *operator, OrtKernelContext *context, struct pmpd_ran *ran) {
  struct call call;
  TRY(open_call((const struct matmul *)operator, context, &call));
  if (call.m && call.n)
    TRY(call.kernel ? run_kernel(operator, context, &call)
                    : share(operator, context, &call, multiply_any, call.n, ANY_CHUNK));
  *ran = (struct pmpd_ran){kernel_name(call.kernel), call.bits, call.n, call.k};
  return NULL;
}

static OrtStatus *create(struct pmpd_operator *operator, const OrtKernelInfo *info) {
  struct matmul *matmul = (struct matmul *)operator;
  const struct pmpd_settings *settings = operator->settings;
  int64_t k;
  TRY(settings->api->KernelInfoGetAttribute_int64(info, "K", &k));
  if (k < 1 || k > INT32_MAX - LINE_COLUMNS)
    return pmpd_refuse(operator, "attribute K is %lld, wanted a positive 32-bit number", (long long)k);
  matmul->k = operator->node.k = (int32_t)k;
  for (int many = 0; many <= 1; many++)
    for (int bits = 1; bits <= 8; bits++)
      matmul->kernels[many][bits - 1] = pmpd_choose_matmul(settings->features, settings->accuracy, many, bits);
  return NULL;
}

static void list_kernels(struct pmpd_text *text, uint32_t features, const char **separator) {
  for (int accuracy = PMPD_EXACT; accuracy <= PMPD_INT8; accuracy++)
    for (int many = 0; many <= 1; many++)
      for (int bits = 1; bits <= 8; bits++) {
        pmpd_append(text,
                    "%s{\"op\": \"BitplaneMatMul\", \"bits\": %d, \"accuracy\": \"%s\", \"rows\": \"%s\", "
                    "\"kernel\": ",
                    *separator, bits, accuracy == PMPD_INT8 ? "int8" : "exact", many ? "many" : "one");
        pmpd_append_string(text, kernel_name(pmpd_choose_matmul(features, accuracy, many, bits)));
        pmpd_append(text, "}");
        *separator = ", ";
      }
}

const struct pmpd_op pmpd_matmul_op = {
    .name = "BitplaneMatMul",
    .inputs = INPUTS,
    .outputs = OUTPUTS,
    .input_count = PMPD_COUNT(INPUTS),
    .output_count = PMPD_COUNT(OUTPUTS),
    .node_size = sizeof(struct matmul),
    .create = create,
    .compute = compute,
    .list_kernels = list_kernels,
};
