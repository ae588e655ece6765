/* The operator pmpd::GroupQueryAttention: qkv[1, M, (H + 2 G) D], past_key and past_value[1, G, C, D],
 * last_position[1], total, cos and sin[P, pairs] → Y[1, M, H D], present_key and present_value[1, G, C, D].
 * Checks its inputs, chooses a kernel, and shares heads and queries among the session's own threads. */
#include "attention.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "operator.h"

enum {
  CACHE_BITS = 16,
  /* Into how many parts work is shared, if there are as many: few heads must not leave threads idle. With one token,
   * every part reads the keys and values of its head again, so that a head is only split where there are few; parts of
   * a prompt read them again in any case, and later ones take longer. */
  PARTS_OF_ONE = 8,
  PARTS_OF_MANY = 32,
};

enum { QKV, PAST_KEY, PAST_VALUE, LAST_POSITION, TOTAL, COS, SIN };

static const struct pmpd_value INPUTS[] = {
    [QKV] = {"qkv", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 0},
    [PAST_KEY] = {"past_key", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, 0},
    [PAST_VALUE] = {"past_value", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, 0},
    [LAST_POSITION] = {"last_position", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, 0},
    [TOTAL] = {"total", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, 0}, /* the portable body reads it; the kernels do not */
    [COS] = {"cos", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 0},
    [SIN] = {"sin", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 0},
};
static const struct pmpd_value OUTPUTS[] = {
    {"Y", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 0},
    {"present_key", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, 0},
    {"present_value", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, 0},
};

/* A node. */
struct attention {
  struct pmpd_operator operator;
  int32_t heads, kv_heads; /* H, G */
  float scale, softcap;    /* softcap 0: none */
  int32_t window;          /* positions that a query sees, its own included */
};

/* One call of the operator. */
struct call {
  const struct pmpd_attention *kernel;
  const float *qkv, *cos, *sin;
  const void *past_key, *past_value;
  void *present_key, *present_value, *y;
  float scale, softcap;
  int32_t window, heads, kv_heads, dim, pairs, m, past, capacity;
  int32_t queries; /* of a key/value head: M H / G */
  int32_t parts, part_queries; /* how the queries of a head are shared */
  atomic_int no_memory;
};

/* Of tokens and tables, what a kernel counts in 32 bits. */
static int too_many(int64_t a, int64_t b) { return a > INT32_MAX || a * b > INT32_MAX; }

/* The attention for heads of `dim` elements and `queries` queries that share a key; NULL if there is none. */
static const struct pmpd_attention *choose(uint32_t features, int32_t dim, int64_t queries) {
  for (size_t i = 0; i < pmpd_attention_count; i++) {
    const struct pmpd_attention *kernel = &pmpd_attentions[i];
    const int enough = kernel->queries <= queries || kernel->queries == 1;
    if (enough && kernel->dim == dim && (kernel->features & ~features) == 0) return kernel;
  }
  return NULL;
}

/* Is this the first of pmpd_attentions for heads of its size? */
static int is_new_dim(size_t i) {
  size_t first = 0;
  while (pmpd_attentions[first].dim != pmpd_attentions[i].dim) first++;
  return first == i;
}

static OrtStatus *refuse_dim(const struct pmpd_operator *operator, int32_t dim) {
  char dims[256] = "none";
  size_t length = 0;
  for (size_t i = 0; i < pmpd_attention_count && length < sizeof dims; i++)
    if (is_new_dim(i))
      length += (size_t)snprintf(dims + length, sizeof dims - length, length ? ", %d" : "%d", pmpd_attentions[i].dim);
  return pmpd_refuse(operator,
                     "no kernel for heads of %d elements, this library has those for %s: export the model again, or "
                     "run it without kernels",
                     dim, dims);
}

/* Read and check all inputs, and make the outputs. */
static OrtStatus *open_call(const struct attention *attention, OrtKernelContext *context,
                                    struct call *call) {
  const struct pmpd_operator *operator = &attention->operator;
  const long long H = attention->heads, G = attention->kv_heads;
  struct pmpd_tensor qkv, key, value, last, cos, sin;
  TRY(pmpd_read_input(operator, context, QKV, &qkv));
  TRY(pmpd_read_input(operator, context, PAST_KEY, &key));
  TRY(pmpd_read_input(operator, context, PAST_VALUE, &value));
  TRY(pmpd_read_input(operator, context, LAST_POSITION, &last));
  TRY(pmpd_read_input(operator, context, COS, &cos));
  TRY(pmpd_read_input(operator, context, SIN, &sin));

  if (key.rank != 4 || key.shape[0] != 1 || key.shape[1] != G || key.shape[3] % 16 || !key.shape[3] ||
      too_many(key.shape[2], 16) || too_many(key.shape[3], 2))
    return pmpd_refuse_shape(operator, PAST_KEY, &key, "[1, %lld, capacity, a multiple of 16]", G);
  const long long C = key.shape[2], D = key.shape[3];
  if (value.rank != 4 || memcmp(value.shape, key.shape, 4 * sizeof *key.shape))
    return pmpd_refuse_shape(operator, PAST_VALUE, &value, "[1, %lld, %lld, %lld], as past_key", G, C, D);
  if (qkv.rank != 3 || qkv.shape[0] != 1 || qkv.shape[2] != (H + 2 * G) * D || too_many(qkv.shape[1], qkv.shape[2]))
    return pmpd_refuse_shape(operator, QKV, &qkv, "[1, tokens, %lld] for %lld + 2 * %lld heads of %lld elements",
                             (H + 2 * G) * D, H, G, D);
  if (last.rank != 1 || last.shape[0] != 1) return pmpd_refuse_shape(operator, LAST_POSITION, &last, "[1]");
  if (cos.rank != 2 || cos.shape[1] % 8 || 2 * cos.shape[1] > D || too_many(cos.shape[0], cos.shape[1]))
    return pmpd_refuse_shape(operator, COS, &cos, "[positions, a multiple of 8 up to %lld]", D / 2);
  const long long P = cos.shape[0], pairs = cos.shape[1], M = qkv.shape[1];
  if (sin.rank != 2 || memcmp(sin.shape, cos.shape, 2 * sizeof *cos.shape))
    return pmpd_refuse_shape(operator, SIN, &sin, "[%lld, %lld], as cos", P, pairs);
  const long long past = *(const int32_t *)last.data + 1LL - M;
  if (past < 0)
    return pmpd_refuse(operator, "last_position is %lld, less than %lld new tokens take", past + M - 1, M);
  if (past + M > C || past + M > P)
    return pmpd_refuse(operator, "%lld positions and %lld new ones, more than %s %lld", past, M,
                       past + M > C ? "the capacity of the cache," : "the rows of cos and sin,", C < P ? C : P);
  const int32_t queries = (int32_t)(M * (H / G));
  const struct pmpd_attention *kernel = choose(operator->settings->features, (int32_t)D, queries);
  if (!kernel) return refuse_dim(operator, (int32_t)D);
  /* Parts are whole blocks of the queries that the kernel takes together. */
  const int32_t blocks = (queries + kernel->queries - 1) / kernel->queries;
  const int32_t wanted = ((M > 1 ? PARTS_OF_MANY : PARTS_OF_ONE) + (int32_t)G - 1) / (int32_t)G;
  const int32_t part_blocks = wanted < blocks ? (blocks + wanted - 1) / wanted : 1;
  const int32_t part_queries = part_blocks * kernel->queries;

  *call = (struct call){
      .kernel = kernel,
      .qkv = qkv.data,
      .cos = cos.data,
      .sin = sin.data,
      .past_key = key.data,
      .past_value = value.data,
      .scale = attention->scale,
      .softcap = attention->softcap,
      .window = attention->window,
      .heads = (int32_t)H,
      .kv_heads = (int32_t)G,
      .dim = (int32_t)D,
      .pairs = (int32_t)pairs,
      .m = (int32_t)M,
      .past = (int32_t)past,
      .capacity = (int32_t)C,
      .queries = queries,
      .parts = queries ? (queries + part_queries - 1) / part_queries : 1,
      .part_queries = part_queries,
  };
  TRY(pmpd_make_output(operator, context, 0, (const int64_t[]){1, M, H * D}, 3, &call->y));
  TRY(pmpd_make_output(operator, context, 1, key.shape, 4, &call->present_key));
  return pmpd_make_output(operator, context, 2, key.shape, 4, &call->present_value);
}

/* Past and present are one memory where both are bound to it. */
static void carry_over(const void *past, void *present, size_t offset, size_t size) {
  if (past != present) memcpy((char *)present + offset, (const char *)past + offset, size);
}

/* Write the cache of a key/value head. */
static void append(void *data, size_t head) {
  struct call *call = data;
  const size_t cache_bytes = (size_t)call->capacity * (size_t)call->dim * (CACHE_BITS / 8);
  carry_over(call->past_key, call->present_key, head * cache_bytes, cache_bytes);
  carry_over(call->past_value, call->present_value, head * cache_bytes, cache_bytes);
  call->kernel->append(call->qkv, call->present_key, call->present_value, call->cos, call->sin, call->m, call->past,
                       call->capacity, call->heads, call->kv_heads, call->pairs, (int32_t)head, (int32_t)head + 1);
}

/* Attention of a part of the queries of a key/value head. */
static void attend(void *data, size_t part) {
  struct call *call = data;
  const int32_t head = (int32_t)part / call->parts, begin = (int32_t)part % call->parts * call->part_queries;
  const int32_t left = call->queries - begin;
  const size_t floats = PMPD_ATTENTION_SCRATCH(call->kernel, call->past + call->m);
  float *scratch = aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64);
  const int limited = call->window < call->past + call->m || call->softcap > 0;
  pmpd_attend_fn *const kernel = limited ? call->kernel->attend_limited : call->kernel->attend;
  if (scratch)
    kernel(call->qkv, call->present_key, call->present_value, call->cos, call->sin, call->y, scratch, call->scale,
           call->softcap, call->window, call->past, call->capacity, call->heads, call->kv_heads, call->pairs, head,
           begin, begin + (left < call->part_queries ? left : call->part_queries));
  else
    atomic_store_explicit(&call->no_memory, 1, memory_order_relaxed);
  free(scratch);
}

static void append_and_attend(void *data, size_t head) {
  append(data, head);
  attend(data, head);
}

static OrtStatus *run(const OrtApi *api, const OrtKernelContext *context, struct call *call) {
  const size_t heads = (size_t)call->kv_heads;
  if (call->parts <= 1) return api->KernelContext_ParallelFor(context, append_and_attend, heads, 0, call);
  if (call->m == 1 && call->past_key == call->present_key) /* a few numbers a head: not worth waking threads for */
    for (size_t head = 0; head < heads; head++) append(call, head);
  else
    TRY(api->KernelContext_ParallelFor(context, append, heads, 0, call));
  return api->KernelContext_ParallelFor(context, attend, heads * (size_t)call->parts, 0, call);
}

static OrtStatus *compute(struct pmpd_operator *operator, OrtKernelContext *context, struct pmpd_ran *ran) {
  const OrtApi *api = operator->settings->api;
  struct call call;
  TRY(open_call((const struct attention *)operator, context, &call));
  TRY(run(api, context, &call));
  if (call.no_memory) return pmpd_no_memory(api);
  *ran = (struct pmpd_ran){
      .kernel = call.kernel->name,
      .bits = CACHE_BITS,
      .n = call.heads * call.dim,
      .k = call.dim,
  };
  return NULL;
}

/* Release the status of reading an optional attribute: was there one? */
static int is_present(const OrtApi *api, OrtStatus *status) {
  api->ReleaseStatus(status);
  return !status;
}

static OrtStatus *create(struct pmpd_operator *operator, const OrtKernelInfo *info) {
  const OrtApi *api = operator->settings->api;
  struct attention *attention = (struct attention *)operator;
  int64_t heads, kv_heads, window;
  TRY(api->KernelInfoGetAttribute_int64(info, "num_heads", &heads));
  TRY(api->KernelInfoGetAttribute_int64(info, "kv_num_heads", &kv_heads));
  TRY(api->KernelInfoGetAttribute_float(info, "scale", &attention->scale));
  if (kv_heads < 1 || heads < kv_heads || heads > INT32_MAX / 2 || heads % kv_heads)
    return pmpd_refuse(
        operator,
        "attributes num_heads %lld and kv_num_heads %lld, wanted positive numbers, the first a multiple of the second",
        (long long)heads, (long long)kv_heads);
  if (!is_present(api, api->KernelInfoGetAttribute_int64(info, "window", &window))) window = 0;
  if (!is_present(api, api->KernelInfoGetAttribute_float(info, "softcap", &attention->softcap))) attention->softcap = 0;
  if (window < 0) return pmpd_refuse(operator, "attribute window is %lld, wanted 0 or more", (long long)window);
  if (!(attention->softcap >= 0)) /* nor NaN */
    return pmpd_refuse(operator, "attribute softcap is %g, wanted 0 or more", (double)attention->softcap);
  attention->window = window == 0 || window > INT32_MAX ? INT32_MAX : (int32_t)window;
  attention->heads = (int32_t)heads;
  attention->kv_heads = (int32_t)kv_heads;
  return NULL;
}

static void list_kernels(struct pmpd_text *text, uint32_t features, const char **separator) {
  for (size_t i = 0; i < pmpd_attention_count; i++) {
    if (!is_new_dim(i)) continue;
    const int32_t dim = pmpd_attentions[i].dim;
    for (int many = 0; many <= 1; many++) {
      const struct pmpd_attention *kernel = choose(features, dim, many ? INT32_MAX : 1);
      pmpd_append(text, "%s{\"op\": \"GroupQueryAttention\", \"dim\": %d, \"rows\": \"%s\", \"kernel\": ", *separator,
                  dim, many ? "many" : "one");
      pmpd_append_string(text, kernel ? kernel->name : "");
      pmpd_append(text, "}");
      *separator = ", ";
    }
  }
}

const struct pmpd_op pmpd_attention_op = {
    .name = "GroupQueryAttention",
    .inputs = INPUTS,
    .outputs = OUTPUTS,
    .input_count = PMPD_COUNT(INPUTS),
    .output_count = PMPD_COUNT(OUTPUTS),
    .node_size = sizeof(struct attention),
    .create = create,
    .compute = compute,
    .list_kernels = list_kernels,
};
