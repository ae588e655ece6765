/* The operator pmpd::BitplaneGather: ids[...], planes[p, N, S], codebook[N, G, 2^p] → Y[..., K].
 * Checks its inputs and ids, and unpacks the rows; the session's threads share those of a prompt. There are no kernels
 * to choose from: a row is a few kilobytes, and reading it takes as long as unpacking it.
 *
 * Symbols are those of runtime/format/bitplanes.py. Targets are little-endian. */
#include <string.h>

#include "operator.h"

enum {
  LINE_COLUMNS = 512,      /* columns whose bits fill a line of 64 bytes */
  PART_ELEMENTS = 1 << 16, /* columns that a thread unpacks at a time: some 60 us */
};

enum { IDS, PLANES, CODEBOOK };

static const char KERNEL[] = "gather_rows";
static const struct pmpd_value INPUTS[] = {
    [IDS] = {"ids", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, 0},
    [PLANES] = {"planes", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, 0},
    [CODEBOOK] = {"codebook", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, 0},
};
static const struct pmpd_value OUTPUTS[] = {{"Y", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 0}};

/* A node. */
struct gather {
  struct pmpd_operator operator;
  int32_t k;
};

/* One call of the operator. */
struct call {
  const int64_t *ids;
  const uint8_t *planes;
  const uint16_t *codebook;
  float *y;
  int64_t count, n, row_stride, groups, group_bytes;
  int32_t bits, k;
  int64_t step; /* ids that a thread takes at a time */
};

/* Read and check all inputs, and make the output. */
static OrtStatus *open_call(const struct gather *gather, OrtKernelContext *context, struct call *call) {
  const struct pmpd_operator *operator = &gather->operator;
  const int32_t k = gather->k, lines = (k + LINE_COLUMNS - 1) / LINE_COLUMNS;
  struct pmpd_tensor ids, planes, codebook;
  TRY(pmpd_read_input(operator, context, IDS, &ids));
  TRY(pmpd_read_input(operator, context, PLANES, &planes));
  TRY(pmpd_read_input(operator, context, CODEBOOK, &codebook));

  if (ids.rank >= PMPD_MAX_RANK)
    return pmpd_refuse_shape(operator, IDS, &ids, "up to %d axes", PMPD_MAX_RANK - 1);
  if (planes.rank != 3 || planes.shape[0] < 1 || planes.shape[0] > 8 || planes.shape[2] != 64 * (int64_t)lines)
    return pmpd_refuse_shape(operator, PLANES, &planes, "[1 to 8, N, %lld] for K = %d", 64LL * lines, k);
  const int64_t bits = planes.shape[0], n = planes.shape[1], row_bytes = (k + 7) / 8;
  if (codebook.rank != 3 || codebook.shape[0] != n || codebook.shape[1] < 1 || codebook.shape[2] != 1 << bits)
    return pmpd_refuse_shape(operator, CODEBOOK, &codebook, "[%lld, groups, %d] for %lld planes of %lld rows",
                             (long long)n, 1 << bits, (long long)bits, (long long)n);
  int64_t count = 1;
  for (size_t i = 0; i < ids.rank; i++) count *= ids.shape[i];
  const int64_t *id = ids.data;
  for (int64_t i = 0; i < count; i++)
    if (id[i] < -n || id[i] >= n)
      return pmpd_refuse(operator, "id %lld is out of range, there are %lld rows", (long long)id[i], (long long)n);

  ids.shape[ids.rank] = k;
  void *y;
  TRY(pmpd_make_output(operator, context, 0, ids.shape, ids.rank + 1, &y));
  *call = (struct call){
      .ids = id,
      .planes = planes.data,
      .codebook = codebook.data,
      .y = y,
      .count = count,
      .n = n,
      .row_stride = planes.shape[2],
      .groups = codebook.shape[1],
      .group_bytes = (row_bytes + codebook.shape[1] - 1) / codebook.shape[1],
      .bits = (int32_t)bits,
      .k = k,
      .step = 1 + PART_ELEMENTS / k,
  };
  return NULL;
}

static float from_half(uint16_t half) {
  /* The exponent of a half is biased by 15, that of a float by 127; subnormal halves become right by the product. */
  const uint32_t magnitude = (half & 0x7fffu) << 13, sign = (half & 0x8000u) << 16;
  float value;
  memcpy(&value, &magnitude, sizeof value);
  value *= 0x1p112f;
  uint32_t word;
  memcpy(&word, &value, sizeof word);
  if ((half & 0x7c00u) == 0x7c00u) word = magnitude | 0x7f800000u; /* infinity or NaN */
  word |= sign;
  memcpy(&value, &word, sizeof value);
  return value;
}

/* Spread the bits of a byte over eight bytes, bit j as 0 or 1 in byte j. */
static uint64_t spread(uint8_t byte) {
  const uint64_t chosen = (byte * 0x0101010101010101u) & 0x8040201008040201u;
  return (chosen + 0x7f7f7f7f7f7f7f7fu) >> 7 & 0x0101010101010101u;
}

static void unpack_row(const struct call *call, int64_t id, float *y) {
  const int64_t row = id < 0 ? id + call->n : id, levels = (int64_t)1 << call->bits;
  const int64_t row_bytes = (call->k + 7) / 8, plane_bytes = call->n * call->row_stride;
  const uint8_t *planes = call->planes + row * call->row_stride;
  const uint16_t *codebook = call->codebook + row * call->groups * levels;
  float values[256];
  int64_t group_end = 0;
  for (int64_t byte = 0; byte < row_bytes; byte++) {
    if (byte == group_end) {
      group_end += call->group_bytes;
      for (int64_t i = 0; i < levels; i++) values[i] = from_half(codebook[i]);
      codebook += levels;
    }
    uint64_t word = 0;
    for (int32_t plane = 0; plane < call->bits; plane++) word = word << 1 | spread(planes[plane * plane_bytes + byte]);
    uint8_t codes[8];
    memcpy(codes, &word, sizeof codes);
    const int64_t left = call->k - 8 * byte;
    for (int64_t i = 0; i < (left < 8 ? left : 8); i++) y[8 * byte + i] = values[codes[i]];
  }
}

static void unpack_part(void *data, size_t part) {
  const struct call *call = data;
  const int64_t begin = (int64_t)part * call->step, end = begin + call->step;
  for (int64_t i = begin; i < (end < call->count ? end : call->count); i++)
    unpack_row(call, call->ids[i], call->y + i * call->k);
}

static OrtStatus *compute(struct pmpd_operator *operator, OrtKernelContext *context, struct pmpd_ran *ran) {
  struct call call;
  TRY(open_call((const struct gather *)operator, context, &call));
  const size_t parts = (size_t)((call.count + call.step - 1) / call.step);
  if (parts > 1)
    TRY(operator->settings->api->KernelContext_ParallelFor(context, unpack_part, parts, 0, &call));
  else
    unpack_part(&call, 0);
  *ran = (struct pmpd_ran){
      .kernel = KERNEL,
      .bits = call.bits,
      .n = call.n > INT32_MAX ? INT32_MAX : (int32_t)call.n,
      .k = call.k,
  };
  return NULL;
}

static OrtStatus *create(struct pmpd_operator *operator, const OrtKernelInfo *info) {
  struct gather *gather = (struct gather *)operator;
  int64_t k;
  TRY(operator->settings->api->KernelInfoGetAttribute_int64(info, "K", &k));
  if (k < 1 || k > INT32_MAX - LINE_COLUMNS)
    return pmpd_refuse(operator, "attribute K is %lld, wanted a positive 32-bit number", (long long)k);
  gather->k = operator->node.k = (int32_t)k;
  return NULL;
}

static void list_kernels(struct pmpd_text *text, uint32_t features, const char **separator) {
  pmpd_append(text, "%s{\"op\": \"BitplaneGather\", \"kernel\": \"%s\"}", *separator, KERNEL);
  *separator = ", ";
}

const struct pmpd_op pmpd_gather_op = {
    .name = "BitplaneGather",
    .inputs = INPUTS,
    .outputs = OUTPUTS,
    .input_count = PMPD_COUNT(INPUTS),
    .output_count = PMPD_COUNT(OUTPUTS),
    .node_size = sizeof(struct gather),
    .create = create,
    .compute = compute,
    .list_kernels = list_kernels,
};
