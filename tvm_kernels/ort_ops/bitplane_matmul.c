/* The operator pmpd::BitplaneMatMul: X[..., M, K], planes[p, N, S], codebook[N, G, 2^p], bias[N]? → Y[..., M, N].
 * Checks what it is given, chooses a kernel, and shares the work out over the session's own threads. */
#include <stdlib.h>

#include "operator.h"

enum {
  LINE_COLUMNS = 512,      /* columns whose bits fill a line of 64 bytes */
  ANY_CHUNK = 16,          /* rows of weights given to pmpd_any at a time */
  PACK_ELEMENTS = 1 << 14, /* activations given to a thread at a time */
  MAX_SCRATCH = 1 << 19,   /* bytes, on the stack */
};

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
  /* What threads are sharing out at the moment: `step` items of `total` at a time. */
  void (*part)(const struct call *, int32_t begin, int32_t end);
  int32_t total, step;
};

/* Read and check all inputs, and make the output. */
static struct ort_status *open_call(const struct pmpd_operator *operator, struct ort_kernel_context *context,
                                    struct call *call) {
  const union ort_api *api = operator->settings->api;
  const int32_t k = operator->node.k, lines = (k + LINE_COLUMNS - 1) / LINE_COLUMNS;
  struct pmpd_tensor x, planes, codebook, bias;
  TRY(pmpd_read_input(api, context, 0, &x));
  TRY(pmpd_read_input(api, context, 1, &planes));
  TRY(pmpd_read_input(api, context, 2, &codebook));
  TRY(pmpd_read_input(api, context, 3, &bias));

  if (x.rank < 1 || x.rank > PMPD_MAX_RANK || x.shape[x.rank - 1] != k)
    return pmpd_refuse_shape(operator, "X", &x, "[..., %d] of up to %d axes", k, PMPD_MAX_RANK);
  if (planes.rank != 3 || planes.shape[0] < 1 || planes.shape[0] > 8 || planes.shape[2] != 64 * (int64_t)lines)
    return pmpd_refuse_shape(operator, "planes", &planes, "[1 to 8, N, %lld] for K = %d", 64LL * lines, k);
  const int64_t bits = planes.shape[0], n = planes.shape[1];
  if (codebook.rank != 3 || codebook.shape[0] != n || codebook.shape[1] < 1 || codebook.shape[2] != 1 << bits)
    return pmpd_refuse_shape(operator, "codebook", &codebook, "[%lld, groups, %d] for %lld planes of %lld rows",
                        (long long)n, 1 << bits, (long long)bits, (long long)n);
  if (bias.given && (bias.rank != 1 || bias.shape[0] != n))
    return pmpd_refuse_shape(operator, "bias", &bias, "[%lld]", (long long)n);
  int64_t m = 1;
  for (size_t i = 0; i + 1 < x.rank; i++) m *= x.shape[i];
  if (m > INT32_MAX || n > INT32_MAX || codebook.shape[1] > INT32_MAX)
    return pmpd_refuse(operator, "%lld rows of X, %lld of the weights and %lld groups; %d are the most", (long long)m,
                  (long long)n, (long long)codebook.shape[1], INT32_MAX);

  x.shape[x.rank - 1] = n;
  void *y;
  TRY(pmpd_make_output(api, context, 0, x.shape, x.rank, &y));
  *call = (struct call){
      .x = x.data,
      .bias = bias.given ? bias.data : NULL,
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
  if (call->groups == 1)
    call->kernel = operator->settings->choice.kernels[operator->settings->accuracy][m > 1][bits - 1];
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

static int64_t scratch_bytes(const struct call *call) {
  return call->kernel->scratch_bytes + call->lines * call->kernel->scratch_bytes_per_line;
}

static void multiply(const struct call *call, int32_t begin, int32_t end) {
  /* The stack is the thread's own and in its nearest cache. */
  uint8_t memory[scratch_bytes(call) + 63];
  uint8_t *scratch = memory + (-(uintptr_t)memory & 63);
  call->kernel->matmul(call->planes, call->plane_bytes, call->codebook, call->packed, call->scale, call->sum, call->y,
                       call->n, scratch, call->lines, call->m, begin, end);
  add_bias(call, begin, end);
}

static void multiply_any(const struct call *call, int32_t begin, int32_t end) {
  const int32_t row_bytes = (call->k + 7) / 8; /* group_size of runtime/format/bitplanes.py, in bytes */
  pmpd_any(call->planes, call->plane_bytes, call->codebook, call->x, call->y, call->n, call->bits, call->groups,
           (row_bytes + call->groups - 1) / call->groups, call->k, call->lines, call->m, begin, end);
  add_bias(call, begin, end);
}

static void do_part(void *data, size_t i) {
  const struct call *call = data;
  const int32_t begin = (int32_t)i * call->step, left = call->total - begin;
  call->part(call, begin, begin + (left < call->step ? left : call->step));
}

/* Do all of a job on the session's threads. ONNX Runtime gives each a stretch of its own, from which those that have
 * finished theirs may take: threads stream through memory, and none waits long. */
static struct ort_status *share(const struct pmpd_operator *operator, const struct ort_kernel_context *context,
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

static struct ort_status *run_kernel(const struct pmpd_operator *operator, const struct ort_kernel_context *context,
                                     struct call *call) {
  const struct pmpd_kernel *kernel = call->kernel;
  if (scratch_bytes(call) > MAX_SCRATCH)
    return pmpd_refuse(operator, "%s wants %lld bytes of scratch memory, more than %d", kernel->name,
                  (long long)scratch_bytes(call), MAX_SCRATCH);
  const size_t m = (size_t)call->m, lines = (size_t)call->lines;
  const size_t packed = m * lines * LINE_COLUMNS * kernel->element_bytes, scale = m * lines * 64;
  const size_t sum = (m * sizeof(float) + 63) / 64 * 64;
  uint8_t *memory = aligned_alloc(64, packed + scale + sum);
  if (!memory) return pmpd_refuse(operator, "no memory for %zu bytes", packed + scale + sum);
  call->packed = memory;
  call->scale = (float *)(memory + packed);
  call->sum = (float *)(memory + packed + scale);
  struct ort_status *status = share(operator, context, call, pack, call->m, 1 + PACK_ELEMENTS / call->k);
  if (!status) status = share(operator, context, call, multiply, call->n, kernel->chunk);
  free(memory);
  return status;
}

static struct ort_status *compute(void *data, struct ort_kernel_context *context) {
  struct pmpd_operator *operator = data;
  const uint64_t start = pmpd_nanoseconds();
  struct call call;
  TRY(open_call(operator, context, &call));
  if (call.m && call.n)
    TRY(call.kernel ? run_kernel(operator, context, &call)
                    : share(operator, context, &call, multiply_any, call.n, ANY_CHUNK));
  pmpd_operator_ran(operator, pmpd_kernel_name(call.kernel), call.bits, call.n, call.k, start);
  return NULL;
}

static struct ort_status *create(const struct ort_custom_op *op, const union ort_api *api,
                                 const struct ort_kernel_info *info, void **kernel) {
  int64_t k;
  void *made;
  TRY(api->KernelInfoGetAttribute_int64(info, "K", &k));
  TRY(pmpd_operator_make(op, api, info, sizeof(struct pmpd_operator), &made));
  struct pmpd_operator *operator = made;
  if (k < 1 || k > INT32_MAX - LINE_COLUMNS) {
    struct ort_status *status =
        pmpd_refuse(operator, "attribute K is %lld, wanted a positive 32-bit number", (long long)k);
    free(made);
    return status;
  }
  operator->node.k = (int32_t)k;
  pmpd_node_add(&operator->node);
  *kernel = made;
  return NULL;
}

static const int INPUT_TYPES[] = {ORT_FLOAT, ORT_UINT8, ORT_FLOAT16, ORT_FLOAT};

static const char *name(const struct ort_custom_op *op) { return "BitplaneMatMul"; }
static const char *provider(const struct ort_custom_op *op) { return "CPUExecutionProvider"; }
static int input_type(const struct ort_custom_op *op, size_t index) { return INPUT_TYPES[index]; }
static size_t input_count(const struct ort_custom_op *op) { return 4; }
static int output_type(const struct ort_custom_op *op, size_t index) { return ORT_FLOAT; }
static size_t output_count(const struct ort_custom_op *op) { return 1; }
static int input_kind(const struct ort_custom_op *op, size_t index) { return index < 3 ? ORT_REQUIRED : ORT_OPTIONAL; }
static int output_kind(const struct ort_custom_op *op, size_t index) { return ORT_REQUIRED; }
static int input_memory(const struct ort_custom_op *op, size_t index) { return 0; }
static int version(const struct ort_custom_op *op) { return 1; }

const struct ort_custom_op pmpd_bitplane_matmul = {
    .version = ORT_API_VERSION,
    .GetName = name,
    .GetExecutionProviderType = provider,
    .GetInputType = input_type,
    .GetInputTypeCount = input_count,
    .GetOutputType = output_type,
    .GetOutputTypeCount = output_count,
    .KernelDestroy = pmpd_operator_destroy,
    .GetInputCharacteristic = input_kind,
    .GetOutputCharacteristic = output_kind,
    .GetInputMemoryType = input_memory,
    .CreateKernelV2 = create,
    .KernelComputeV2 = compute,
    .GetStartVersion = version,
    .GetEndVersion = version,
};
