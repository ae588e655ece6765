/* The operator pmpd::BitplaneMatMul: X[..., M, K], planes[p, N, S], codebook[N, G, 2^p], bias[N]? → Y[..., M, N].
 * Checks what it is given, chooses a kernel, and shares the work out over the session's own threads. */
#define _POSIX_C_SOURCE 200809L

#include "operator.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "report.h"

enum {
  MAX_RANK = 8,
  LINE_COLUMNS = 512,      /* columns whose bits fill a line of 64 bytes */
  ANY_CHUNK = 16,          /* rows of weights given to pmpd_any at a time */
  PACK_ELEMENTS = 1 << 14, /* activations given to a thread at a time */
  MAX_SCRATCH = 1 << 19,   /* bytes, on the stack */
};

/* The operator of one node of a graph. */
struct operator {
  struct pmpd_node node;
  const struct pmpd_settings *settings;
};

struct tensor {
  void *data;
  size_t rank;
  int64_t shape[MAX_RANK];
  int given;
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

__attribute__((format(printf, 2, 3))) static struct ort_status *refuse(const struct operator *operator,
                                                                       const char *format, ...) {
  char message[1024];
  const int start = snprintf(message, sizeof message, "BitplaneMatMul '%.256s': ", operator->node.name);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message + start, sizeof message - (size_t)start, format, arguments);
  va_end(arguments);
  return operator->settings->api->CreateStatus(ORT_INVALID_ARGUMENT, message);
}

static void write_shape(const struct tensor *tensor, char *text, size_t size) {
  size_t length = (size_t)snprintf(text, size, "[");
  for (size_t i = 0; i < tensor->rank && i < MAX_RANK; i++)
    length += (size_t)snprintf(text + length, size - length, i ? ", %lld" : "%lld", (long long)tensor->shape[i]);
  snprintf(text + length, size - length, tensor->rank > MAX_RANK ? ", ...]" : "]");
}

__attribute__((format(printf, 4, 5))) static struct ort_status *refuse_shape(const struct operator *operator,
                                                                             const char *input,
                                                                             const struct tensor *tensor,
                                                                             const char *wanted_format, ...) {
  char found[256], wanted[256];
  write_shape(tensor, found, sizeof found);
  va_list arguments;
  va_start(arguments, wanted_format);
  vsnprintf(wanted, sizeof wanted, wanted_format, arguments);
  va_end(arguments);
  return refuse(operator, "input %s has shape %s, wanted %s", input, found, wanted);
}

static struct ort_status *read_input(const union ort_api *api, const struct ort_kernel_context *context, size_t index,
                                     struct tensor *tensor) {
  const struct ort_value *value;
  struct ort_shape *shape;
  TRY(api->KernelContext_GetInput(context, index, &value));
  tensor->given = value != NULL;
  if (!value) return NULL;
  TRY(api->GetTensorTypeAndShape(value, &shape));
  struct ort_status *status = api->GetDimensionsCount(shape, &tensor->rank);
  if (!status) status = api->GetDimensions(shape, tensor->shape, tensor->rank < MAX_RANK ? tensor->rank : MAX_RANK);
  api->ReleaseTensorTypeAndShapeInfo(shape);
  return status ? status : api->GetTensorMutableData((struct ort_value *)value, &tensor->data);
}

/* Read and check all inputs, and make the output. */
static struct ort_status *open_call(const struct operator *operator, struct ort_kernel_context *context,
                                    struct call *call) {
  const union ort_api *api = operator->settings->api;
  const int32_t k = operator->node.k, lines = (k + LINE_COLUMNS - 1) / LINE_COLUMNS;
  struct tensor x, planes, codebook, bias;
  TRY(read_input(api, context, 0, &x));
  TRY(read_input(api, context, 1, &planes));
  TRY(read_input(api, context, 2, &codebook));
  TRY(read_input(api, context, 3, &bias));

  if (x.rank < 1 || x.rank > MAX_RANK || x.shape[x.rank - 1] != k)
    return refuse_shape(operator, "X", &x, "[..., %d] of up to %d axes", k, MAX_RANK);
  if (planes.rank != 3 || planes.shape[0] < 1 || planes.shape[0] > 8 || planes.shape[2] != 64 * (int64_t)lines)
    return refuse_shape(operator, "planes", &planes, "[1 to 8, N, %lld] for K = %d", 64LL * lines, k);
  const int64_t bits = planes.shape[0], n = planes.shape[1];
  if (codebook.rank != 3 || codebook.shape[0] != n || codebook.shape[1] < 1 || codebook.shape[2] != 1 << bits)
    return refuse_shape(operator, "codebook", &codebook, "[%lld, groups, %d] for %lld planes of %lld rows",
                        (long long)n, 1 << bits, (long long)bits, (long long)n);
  if (bias.given && (bias.rank != 1 || bias.shape[0] != n))
    return refuse_shape(operator, "bias", &bias, "[%lld]", (long long)n);
  int64_t m = 1;
  for (size_t i = 0; i + 1 < x.rank; i++) m *= x.shape[i];
  if (m > INT32_MAX || n > INT32_MAX || codebook.shape[1] > INT32_MAX)
    return refuse(operator, "%lld rows of X, %lld of the weights and %lld groups; %d are the most", (long long)m,
                  (long long)n, (long long)codebook.shape[1], INT32_MAX);

  x.shape[x.rank - 1] = n;
  struct ort_value *y;
  void *y_data;
  TRY(api->KernelContext_GetOutput(context, 0, x.shape, x.rank, &y));
  TRY(api->GetTensorMutableData(y, &y_data));
  *call = (struct call){
      .x = x.data,
      .bias = bias.given ? bias.data : NULL,
      .planes = planes.data,
      .codebook = codebook.data,
      .y = y_data,
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

/* Do all of a job on the session's threads. ONNX Runtime gives each a stretch of its own, from which those that have
 * finished theirs may take: threads stream through memory, and none waits long. */
static struct ort_status *share(const struct operator *operator, const struct ort_kernel_context *context,
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

static struct ort_status *run_kernel(const struct operator *operator, const struct ort_kernel_context *context,
                                     struct call *call) {
  const struct pmpd_kernel *kernel = call->kernel;
  if (scratch_bytes(call) > MAX_SCRATCH)
    return refuse(operator, "%s wants %lld bytes of scratch memory, more than %d", kernel->name,
                  (long long)scratch_bytes(call), MAX_SCRATCH);
  const size_t m = (size_t)call->m, lines = (size_t)call->lines;
  const size_t packed = m * lines * LINE_COLUMNS * kernel->element_bytes, scale = m * lines * 64;
  const size_t sum = (m * sizeof(float) + 63) / 64 * 64;
  uint8_t *memory = aligned_alloc(64, packed + scale + sum);
  if (!memory) return refuse(operator, "no memory for %zu bytes", packed + scale + sum);
  call->packed = memory;
  call->scale = (float *)(memory + packed);
  call->sum = (float *)(memory + packed + scale);
  struct ort_status *status = share(operator, context, call, pack, call->m, 1 + PACK_ELEMENTS / call->k);
  if (!status) status = share(operator, context, call, multiply, call->n, kernel->chunk);
  free(memory);
  return status;
}

static uint64_t nanoseconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static struct ort_status *compute(void *data, struct ort_kernel_context *context) {
  struct operator *operator = data;
  struct pmpd_node *node = &operator->node;
  const uint64_t start = nanoseconds();
  struct call call;
  TRY(open_call(operator, context, &call));
  if (call.m && call.n)
    TRY(call.kernel ? run_kernel(operator, context, &call)
                    : share(operator, context, &call, multiply_any, call.n, ANY_CHUNK));
  atomic_store_explicit(&node->bits, call.bits, memory_order_relaxed);
  atomic_store_explicit(&node->n, call.n, memory_order_relaxed);
  atomic_store_explicit(&node->kernel, pmpd_kernel_name(call.kernel), memory_order_relaxed);
  atomic_fetch_add_explicit(&node->calls, 1, memory_order_relaxed);
  atomic_fetch_add_explicit(&node->nanoseconds, nanoseconds() - start, memory_order_relaxed);
  return NULL;
}

static struct ort_status *create(const struct ort_custom_op *op, const union ort_api *api,
                                 const struct ort_kernel_info *info, void **kernel) {
  int64_t k;
  size_t size = 0;
  TRY(api->KernelInfoGetAttribute_int64(info, "K", &k));
  TRY(api->KernelInfo_GetNodeName(info, NULL, &size));
  struct operator *operator = calloc(1, sizeof *operator + size);
  if (!operator) return pmpd_no_memory(api);
  operator->settings = (const struct pmpd_settings *)op;
  operator->node.session = operator->settings->session;
  operator->node.name = (char *)(operator + 1);
  struct ort_status *status = api->KernelInfo_GetNodeName(info, operator->node.name, &size);
  if (!status && (k < 1 || k > INT32_MAX - LINE_COLUMNS))
    status = refuse(operator, "attribute K is %lld, wanted a positive 32-bit number", (long long)k);
  if (status) {
    free(operator);
    return status;
  }
  operator->node.k = (int32_t)k;
  pmpd_node_add(&operator->node);
  *kernel = operator;
  return NULL;
}

static void destroy(void *kernel) {
  struct operator *operator = kernel;
  pmpd_node_remove(&operator->node);
  free(operator);
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
    .KernelDestroy = destroy,
    .GetInputCharacteristic = input_kind,
    .GetOutputCharacteristic = output_kind,
    .GetInputMemoryType = input_memory,
    .CreateKernelV2 = create,
    .KernelComputeV2 = compute,
    .GetStartVersion = version,
    .GetEndVersion = version,
};
