#include "operator.h"

#include <stdarg.h>
#include <stdio.h>

static const char *type_name(ONNXTensorElementDataType type) {
  static const char *const NAMES[] = {"undefined", "float32", "uint8",  "int8",    "uint16", "int16",
                                      "int32",     "int64",   "string", "bool",    "float16", "float64",
                                      "uint32",    "uint64",  "complex64", "complex128", "bfloat16"};
  return (size_t)type < PMPD_COUNT(NAMES) ? NAMES[type] : "another type";
}

OrtStatus *pmpd_read_input(const struct pmpd_operator *operator, const OrtKernelContext *context, size_t index,
                           struct pmpd_tensor *tensor) {
  const OrtApi *api = operator->settings->api;
  const struct pmpd_value *input = &operator->op->inputs[index];
  const OrtValue *value;
  OrtTensorTypeAndShapeInfo *info;
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  TRY(api->KernelContext_GetInput(context, index, &value));
  tensor->present = value != NULL;
  if (!value) return NULL;
  TRY(api->GetTensorTypeAndShape(value, &info));
  OrtStatus *status = api->GetTensorElementType(info, &type);
  if (!status) status = api->GetDimensionsCount(info, &tensor->rank);
  if (!status)
    status = api->GetDimensions(info, tensor->shape, tensor->rank < PMPD_MAX_RANK ? tensor->rank : PMPD_MAX_RANK);
  api->ReleaseTensorTypeAndShapeInfo(info);
  if (!status && type != input->type)
    status = pmpd_refuse(operator, "input %s is %s, wanted %s", input->name, type_name(type), type_name(input->type));
  return status ? status : api->GetTensorMutableData((OrtValue *)value, &tensor->data);
}

OrtStatus *pmpd_make_output(const struct pmpd_operator *operator, OrtKernelContext *context, size_t index,
                            const int64_t *shape, size_t rank, void **data) {
  const OrtApi *api = operator->settings->api;
  OrtValue *value;
  TRY(api->KernelContext_GetOutput(context, index, shape, rank, &value));
  return api->GetTensorMutableData(value, data);
}

OrtStatus *pmpd_refuse(const struct pmpd_operator *operator, const char *format, ...) {
  char message[1024];
  const int start = snprintf(message, sizeof message, "%s '%.256s': ", operator->op->name, operator->node.name);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message + start, sizeof message - (size_t)start, format, arguments);
  va_end(arguments);
  return operator->settings->api->CreateStatus(ORT_INVALID_ARGUMENT, message);
}

static void write_shape(const struct pmpd_tensor *tensor, char *text, size_t size) {
  size_t length = (size_t)snprintf(text, size, "[");
  for (size_t i = 0; i < tensor->rank && i < PMPD_MAX_RANK; i++)
    length += (size_t)snprintf(text + length, size - length, i ? ", %lld" : "%lld", (long long)tensor->shape[i]);
  snprintf(text + length, size - length, tensor->rank > PMPD_MAX_RANK ? ", ...]" : "]");
}

OrtStatus *pmpd_refuse_shape(const struct pmpd_operator *operator, size_t index, const struct pmpd_tensor *tensor,
                             const char *wanted_format, ...) {
  char actual[256], wanted[256];
  write_shape(tensor, actual, sizeof actual);
  va_list arguments;
  va_start(arguments, wanted_format);
  vsnprintf(wanted, sizeof wanted, wanted_format, arguments);
  va_end(arguments);
  return pmpd_refuse(operator, "input %s has shape %s, wanted %s", operator->op->inputs[index].name, actual, wanted);
}

OrtStatus *pmpd_no_memory(const OrtApi *api) { return api->CreateStatus(ORT_FAIL, "no memory for an operator of pmpd"); }
