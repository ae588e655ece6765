/* The operator pmpd::GroupQueryAttention: qkv[1, M, (H + 2 G) D], past_key and past_value[1, G, C, D],
 * last_position[1], total, cos and sin[P, pairs] → Y[1, M, H D], present_key and present_value[1, G, C, D].
 * Checks what it is given, chooses a kernel, and shares the G heads of the cache out over the session's own threads. */
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "operator.h"

enum { CACHE_BITS = 16 };

struct attention {
  struct pmpd_operator operator;
  int32_t heads, kv_heads; /* H, G */
  float scale;
};

/* One call of the operator. */
struct call {
  const struct pmpd_attention *kernel;
  const float *qkv, *cos, *sin;
  const void *past_key, *past_value;
  void *present_key, *present_value, *y;
  float scale;
  int32_t heads, kv_heads, dim, pairs, m, past, capacity;
  atomic_int no_memory;
};

/* Of tokens and tables, what a kernel counts in 32 bits. */
static int too_many(int64_t a, int64_t b) { return a > INT32_MAX || a * b > INT32_MAX; }

static struct ort_status *refuse_dim(const struct pmpd_operator *operator, int32_t dim) {
  char dims[256] = "none";
  size_t length = 0;
  for (size_t i = 0; i < pmpd_attention_count && length < sizeof dims; i++)
    if (pmpd_is_new_dim(i))
      length += (size_t)snprintf(dims + length, sizeof dims - length, length ? ", %d" : "%d", pmpd_attentions[i].dim);
  return pmpd_refuse(operator,
                     "no kernel for heads of %d elements, this library has those for %s: export the model again, or "
                     "run it without kernels",
                     dim, dims);
}

/* Read and check all inputs, and make the outputs. */
static struct ort_status *open_call(const struct attention *attention, struct ort_kernel_context *context,
                                    struct call *call) {
  const struct pmpd_operator *operator = &attention->operator;
  const union ort_api *api = operator->settings->api;
  const long long H = attention->heads, G = attention->kv_heads;
  struct pmpd_tensor qkv, key, value, last, cos, sin;
  TRY(pmpd_read_input(api, context, 0, &qkv));
  TRY(pmpd_read_input(api, context, 1, &key));
  TRY(pmpd_read_input(api, context, 2, &value));
  TRY(pmpd_read_input(api, context, 3, &last));
  TRY(pmpd_read_input(api, context, 5, &cos));
  TRY(pmpd_read_input(api, context, 6, &sin));

  if (key.rank != 4 || key.shape[0] != 1 || key.shape[1] != G || key.shape[3] % 16 || !key.shape[3] ||
      too_many(key.shape[2], 16) || too_many(key.shape[3], 2))
    return pmpd_refuse_shape(operator, "past_key", &key, "[1, %lld, capacity, a multiple of 16]", G);
  const long long C = key.shape[2], D = key.shape[3];
  if (value.rank != 4 || memcmp(value.shape, key.shape, 4 * sizeof *key.shape))
    return pmpd_refuse_shape(operator, "past_value", &value, "[1, %lld, %lld, %lld], as past_key", G, C, D);
  if (qkv.rank != 3 || qkv.shape[0] != 1 || qkv.shape[2] != (H + 2 * G) * D || too_many(qkv.shape[1], qkv.shape[2]))
    return pmpd_refuse_shape(operator, "qkv", &qkv, "[1, tokens, %lld] for %lld + 2 * %lld heads of %lld elements",
                             (H + 2 * G) * D, H, G, D);
  if (last.rank != 1 || last.shape[0] != 1) return pmpd_refuse_shape(operator, "last_position", &last, "[1]");
  if (cos.rank != 2 || cos.shape[1] % 8 || 2 * cos.shape[1] > D || too_many(cos.shape[0], cos.shape[1]))
    return pmpd_refuse_shape(operator, "cos", &cos, "[positions, a multiple of 8 up to %lld]", D / 2);
  const long long P = cos.shape[0], pairs = cos.shape[1], M = qkv.shape[1];
  if (sin.rank != 2 || memcmp(sin.shape, cos.shape, 2 * sizeof *cos.shape))
    return pmpd_refuse_shape(operator, "sin", &sin, "[%lld, %lld], as cos", P, pairs);
  const long long past = *(const int32_t *)last.data + 1LL - M;
  if (past < 0)
    return pmpd_refuse(operator, "last_position is %lld, less than %lld new tokens take", past + M - 1, M);
  if (past + M > C || past + M > P)
    return pmpd_refuse(operator, "%lld positions and %lld new ones, more than %s %lld", past, M,
                       past + M > C ? "the capacity of the cache," : "the rows of cos and sin,", C < P ? C : P);
  const long long rows = M * (H / G);
  const struct pmpd_attention *kernel = pmpd_choose_attention(operator->settings->features, (int32_t)D, rows);
  if (!kernel) return refuse_dim(operator, (int32_t)D);

  *call = (struct call){
      .kernel = kernel,
      .qkv = qkv.data,
      .cos = cos.data,
      .sin = sin.data,
      .past_key = key.data,
      .past_value = value.data,
      .scale = attention->scale,
      .heads = (int32_t)H,
      .kv_heads = (int32_t)G,
      .dim = (int32_t)D,
      .pairs = (int32_t)pairs,
      .m = (int32_t)M,
      .past = (int32_t)past,
      .capacity = (int32_t)C,
  };
  TRY(pmpd_make_output(api, context, 0, (const int64_t[]){1, M, H * D}, 3, &call->y));
  TRY(pmpd_make_output(api, context, 1, key.shape, 4, &call->present_key));
  return pmpd_make_output(api, context, 2, key.shape, 4, &call->present_value);
}

/* Past and present are one memory where both are bound to it. */
static void carry_over(const void *past, void *present, size_t offset, size_t size) {
  if (past != present) memcpy((char *)present + offset, (const char *)past + offset, size);
}

static void attend(void *data, size_t head) {
  struct call *call = data;
  const size_t cache_bytes = (size_t)call->capacity * (size_t)call->dim * (CACHE_BITS / 8);
  carry_over(call->past_key, call->present_key, head * cache_bytes, cache_bytes);
  carry_over(call->past_value, call->present_value, head * cache_bytes, cache_bytes);
  const size_t floats = PMPD_ATTENTION_SCRATCH(call->kernel, call->past + call->m);
  float *scratch = aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64);
  if (scratch)
    call->kernel->attention(call->qkv, call->present_key, call->present_value, call->cos, call->sin, call->y, scratch,
                            call->scale, call->m, call->past, call->capacity, call->heads, call->kv_heads, call->pairs,
                            (int32_t)head, (int32_t)head + 1);
  else
    atomic_store_explicit(&call->no_memory, 1, memory_order_relaxed);
  free(scratch);
}

static struct ort_status *compute(void *data, struct ort_kernel_context *context) {
  struct attention *attention = data;
  const union ort_api *api = attention->operator.settings->api;
  const uint64_t start = pmpd_nanoseconds();
  struct call call;
  TRY(open_call(attention, context, &call));
  TRY(api->KernelContext_ParallelFor(context, attend, (size_t)call.kv_heads, 0, &call));
  if (call.no_memory) return pmpd_no_memory(api);
  pmpd_operator_ran(&attention->operator, call.kernel->name, CACHE_BITS, call.heads * call.dim, call.dim, start);
  return NULL;
}

static struct ort_status *create(const struct ort_custom_op *op, const union ort_api *api,
                                 const struct ort_kernel_info *info, void **kernel) {
  int64_t heads, kv_heads;
  float scale;
  void *made;
  TRY(api->KernelInfoGetAttribute_int64(info, "num_heads", &heads));
  TRY(api->KernelInfoGetAttribute_int64(info, "kv_num_heads", &kv_heads));
  TRY(api->KernelInfoGetAttribute_float(info, "scale", &scale));
  TRY(pmpd_operator_make(op, api, info, sizeof(struct attention), &made));
  struct attention *attention = made;
  if (kv_heads < 1 || heads < kv_heads || heads > INT32_MAX / 2 || heads % kv_heads) {
    struct ort_status *status = pmpd_refuse(
        made,
        "attributes num_heads %lld and kv_num_heads %lld, wanted positive numbers, the first a multiple of the second",
        (long long)heads, (long long)kv_heads);
    free(made);
    return status;
  }
  attention->heads = (int32_t)heads;
  attention->kv_heads = (int32_t)kv_heads;
  attention->scale = scale;
  pmpd_node_add(&attention->operator.node);
  *kernel = made;
  return NULL;
}

static const int INPUT_TYPES[] = {ORT_FLOAT, ORT_FLOAT16, ORT_FLOAT16, ORT_INT32, ORT_INT32, ORT_FLOAT, ORT_FLOAT};

static const char *name(const struct ort_custom_op *op) { return "GroupQueryAttention"; }
static const char *provider(const struct ort_custom_op *op) { return "CPUExecutionProvider"; }
static int input_type(const struct ort_custom_op *op, size_t index) { return INPUT_TYPES[index]; }
static size_t input_count(const struct ort_custom_op *op) { return 7; }
static int output_type(const struct ort_custom_op *op, size_t index) { return index ? ORT_FLOAT16 : ORT_FLOAT; }
static size_t output_count(const struct ort_custom_op *op) { return 3; }
static int required(const struct ort_custom_op *op, size_t index) { return ORT_REQUIRED; }
static int input_memory(const struct ort_custom_op *op, size_t index) { return 0; }
static int version(const struct ort_custom_op *op) { return 1; }

const struct ort_custom_op pmpd_group_query_attention = {
    .version = ORT_API_VERSION,
    .GetName = name,
    .GetExecutionProviderType = provider,
    .GetInputType = input_type,
    .GetInputTypeCount = input_count,
    .GetOutputType = output_type,
    .GetOutputTypeCount = output_count,
    .KernelDestroy = pmpd_operator_destroy,
    .GetInputCharacteristic = required,
    .GetOutputCharacteristic = required,
    .GetInputMemoryType = input_memory,
    .CreateKernelV2 = create,
    .KernelComputeV2 = compute,
    .GetStartVersion = version,
    .GetEndVersion = version,
};
