#define _POSIX_C_SOURCE 200809L

#include "operator.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

struct ort_status *pmpd_operator_make(const struct ort_custom_op *op, const union ort_api *api,
                                      const struct ort_kernel_info *info, size_t size, void **made) {
  size_t name = 0;
  TRY(api->KernelInfo_GetNodeName(info, NULL, &name));
  struct pmpd_operator *operator = calloc(1, size + name);
  if (!operator) return pmpd_no_memory(api);
  operator->settings = ((const struct pmpd_op *)op)->settings;
  operator->node.op = op->GetName(op);
  operator->node.session = operator->settings->session;
  operator->node.name = (char *)operator + size;
  struct ort_status *status = api->KernelInfo_GetNodeName(info, operator->node.name, &name);
  if (status)
    free(operator);
  else
    *made = operator;
  return status;
}

void pmpd_operator_destroy(void *operator) {
  pmpd_node_remove(operator);
  free(operator);
}

uint64_t pmpd_nanoseconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void pmpd_operator_ran(struct pmpd_operator *operator, const char *kernel, int32_t bits, int32_t n, int32_t k,
                       uint64_t start) {
  struct pmpd_node *node = &operator->node;
  atomic_store_explicit(&node->bits, bits, memory_order_relaxed);
  atomic_store_explicit(&node->n, n, memory_order_relaxed);
  atomic_store_explicit(&node->k, k, memory_order_relaxed);
  atomic_store_explicit(&node->kernel, kernel, memory_order_relaxed);
  atomic_fetch_add_explicit(&node->calls, 1, memory_order_relaxed);
  atomic_fetch_add_explicit(&node->nanoseconds, pmpd_nanoseconds() - start, memory_order_relaxed);
}

struct ort_status *pmpd_read_input(const union ort_api *api, const struct ort_kernel_context *context, size_t index,
                                   struct pmpd_tensor *tensor) {
  const struct ort_value *value;
  struct ort_shape *shape;
  TRY(api->KernelContext_GetInput(context, index, &value));
  tensor->given = value != NULL;
  if (!value) return NULL;
  TRY(api->GetTensorTypeAndShape(value, &shape));
  struct ort_status *status = api->GetDimensionsCount(shape, &tensor->rank);
  if (!status)
    status = api->GetDimensions(shape, tensor->shape, tensor->rank < PMPD_MAX_RANK ? tensor->rank : PMPD_MAX_RANK);
  api->ReleaseTensorTypeAndShapeInfo(shape);
  return status ? status : api->GetTensorMutableData((struct ort_value *)value, &tensor->data);
}

struct ort_status *pmpd_make_output(const union ort_api *api, struct ort_kernel_context *context, size_t index,
                                    const int64_t *shape, size_t rank, void **data) {
  struct ort_value *value;
  TRY(api->KernelContext_GetOutput(context, index, shape, rank, &value));
  return api->GetTensorMutableData(value, data);
}

struct ort_status *pmpd_refuse(const struct pmpd_operator *operator, const char *format, ...) {
  char message[1024];
  const int start = snprintf(message, sizeof message, "%s '%.256s': ", operator->node.op, operator->node.name);
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

struct ort_status *pmpd_refuse_shape(const struct pmpd_operator *operator, const char *input,
                                     const struct pmpd_tensor *tensor, const char *wanted_format, ...) {
  char found[256], wanted[256];
  write_shape(tensor, found, sizeof found);
  va_list arguments;
  va_start(arguments, wanted_format);
  vsnprintf(wanted, sizeof wanted, wanted_format, arguments);
  va_end(arguments);
  return pmpd_refuse(operator, "input %s has shape %s, wanted %s", input, found, wanted);
}

struct ort_status *pmpd_no_memory(const union ort_api *api) {
  return api->CreateStatus(ORT_FAIL, "no memory for an operator of pmpd");
}
