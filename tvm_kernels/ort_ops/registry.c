#define _POSIX_C_SOURCE 200809L

#include "registry.h"

#include <time.h>

/* To add an operator, write its row in a file of its own and name it here. */
extern const struct pmpd_op pmpd_matmul_op, pmpd_logits_op, pmpd_attention_op, pmpd_gather_op;

const struct pmpd_op *const pmpd_ops[] = {&pmpd_matmul_op, &pmpd_logits_op, &pmpd_attention_op, &pmpd_gather_op};
_Static_assert(PMPD_COUNT(pmpd_ops) == PMPD_OP_COUNT, "PMPD_OP_COUNT is not the number of operators");

static uint64_t nanoseconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static const struct pmpd_op *op_of(const OrtCustomOp *custom) { return ((const struct pmpd_registered *)custom)->op; }

/* Make the structure of a node. */
static OrtStatus *create(const OrtCustomOp *custom, const OrtApi *api, const OrtKernelInfo *info, void **kernel) {
  const struct pmpd_op *op = op_of(custom);
  size_t name = 0;
  TRY(api->KernelInfo_GetNodeName(info, NULL, &name));
  struct pmpd_operator *operator = calloc(1, op->node_size + name);
  if (!operator) return pmpd_no_memory(api);
  operator->op = op;
  operator->settings = ((const struct pmpd_registered *)custom)->settings;
  operator->node.op = op->name;
  operator->node.session = operator->settings->session;
  operator->node.name = (char *)operator + op->node_size;
  OrtStatus *status = api->KernelInfo_GetNodeName(info, operator->node.name, &name);
  if (!status) status = op->create(operator, info);
  if (status) {
    free(operator);
    return status;
  }
  pmpd_node_add(&operator->node);
  *kernel = operator;
  return NULL;
}

static void destroy(void *kernel) {
  pmpd_node_remove(kernel);
  free(kernel);
}

static OrtStatus *compute(void *kernel, OrtKernelContext *context) {
  struct pmpd_operator *operator = kernel;
  struct pmpd_ran ran = {0};
  const uint64_t start = nanoseconds();
  TRY(operator->op->compute(operator, context, &ran));
  pmpd_node_ran(&operator->node, &ran, nanoseconds() - start);
  return NULL;
}

static OrtCustomOpInputOutputCharacteristic characteristic(const struct pmpd_value *value) {
  return value->optional ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
}

static const char *name(const OrtCustomOp *custom) { return op_of(custom)->name; }
static const char *provider(const OrtCustomOp *custom) { return "CPUExecutionProvider"; }
static size_t input_count(const OrtCustomOp *custom) { return op_of(custom)->input_count; }
static size_t output_count(const OrtCustomOp *custom) { return op_of(custom)->output_count; }
static ONNXTensorElementDataType input_type(const OrtCustomOp *custom, size_t i) { return op_of(custom)->inputs[i].type; }
static ONNXTensorElementDataType output_type(const OrtCustomOp *custom, size_t i) {
  return op_of(custom)->outputs[i].type;
}
static OrtCustomOpInputOutputCharacteristic input_kind(const OrtCustomOp *custom, size_t i) {
  return characteristic(&op_of(custom)->inputs[i]);
}
static OrtCustomOpInputOutputCharacteristic output_kind(const OrtCustomOp *custom, size_t i) {
  return characteristic(&op_of(custom)->outputs[i]);
}
static OrtMemType input_memory(const OrtCustomOp *custom, size_t i) { return OrtMemTypeDefault; }
static int version(const OrtCustomOp *custom) { return 1; }

struct pmpd_registered pmpd_register(const struct pmpd_op *op, const struct pmpd_settings *settings) {
  return (struct pmpd_registered){
      .custom =
          {
              .version = PMPD_ORT_API_VERSION,
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
          },
      .op = op,
      .settings = settings,
  };
}
