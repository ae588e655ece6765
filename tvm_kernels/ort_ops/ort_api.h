/* The few entries of ONNX Runtime's C API that the operator library uses, declared by hand.
 *
 * The API is a table of function pointers that only ever grows, so the position of an entry never changes. A function
 * that returns a status returns NULL when all is well; whoever holds a status must pass it on or release it.
 */
#ifndef PMPD_ORT_API_H
#define PMPD_ORT_API_H

#include <stddef.h>
#include <stdint.h>

/* The version of ONNX Runtime that added the youngest entry used here, KernelContext_ParallelFor. */
enum { ORT_API_VERSION = 17 };

enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };
enum { ORT_FLOAT = 1, ORT_UINT8 = 2, ORT_INT32 = 6, ORT_FLOAT16 = 10 };
enum { ORT_REQUIRED = 0, ORT_OPTIONAL = 1 };

struct ort_status;
struct ort_value;
struct ort_shape;
struct ort_session_options;
struct ort_domain;
struct ort_kernel_info;
struct ort_kernel_context;
struct ort_custom_op;

/* An entry, at its position in the table. */
#define ORT_AT(position, ...)                 \
  struct {                                    \
    void (*before_##position[position])(void); \
    __VA_ARGS__;                              \
  }

union ort_api {
  struct ort_status *(*CreateStatus)(int code, const char *message); /* position 0 */
  ORT_AT(26, struct ort_status *(*CreateCustomOpDomain)(const char *name, struct ort_domain **out));
  ORT_AT(27, struct ort_status *(*CustomOpDomain_Add)(struct ort_domain *, const struct ort_custom_op *));
  ORT_AT(28, struct ort_status *(*AddCustomOpDomain)(struct ort_session_options *, struct ort_domain *));
  ORT_AT(51, struct ort_status *(*GetTensorMutableData)(struct ort_value *, void **out));
  ORT_AT(61, struct ort_status *(*GetDimensionsCount)(const struct ort_shape *, size_t *out));
  ORT_AT(62, struct ort_status *(*GetDimensions)(const struct ort_shape *, int64_t *out, size_t rank));
  ORT_AT(65, struct ort_status *(*GetTensorTypeAndShape)(const struct ort_value *, struct ort_shape **out));
  ORT_AT(85, struct ort_status *(*KernelInfoGetAttribute_float)(const struct ort_kernel_info *, const char *name,
                                                                float *out));
  ORT_AT(86, struct ort_status *(*KernelInfoGetAttribute_int64)(const struct ort_kernel_info *, const char *name,
                                                                int64_t *out));
  ORT_AT(90, struct ort_status *(*KernelContext_GetInput)(const struct ort_kernel_context *, size_t index,
                                                          const struct ort_value **out));
  ORT_AT(91, struct ort_status *(*KernelContext_GetOutput)(struct ort_kernel_context *, size_t index,
                                                           const int64_t *dimensions, size_t rank,
                                                           struct ort_value **out));
  ORT_AT(99, void (*ReleaseTensorTypeAndShapeInfo)(struct ort_shape *));
  /* With a NULL text, these set *size to the bytes needed, the final zero included. */
  ORT_AT(237, struct ort_status *(*HasSessionConfigEntry)(const struct ort_session_options *, const char *key,
                                                          int *out));
  ORT_AT(238, struct ort_status *(*GetSessionConfigEntry)(const struct ort_session_options *, const char *key,
                                                          char *text, size_t *size));
  ORT_AT(244, struct ort_status *(*KernelInfo_GetNodeName)(const struct ort_kernel_info *, char *text, size_t *size));
  /* Calls fn(data, i) for each i below total on the session's threads; 0 batches: a free thread takes the next i. */
  ORT_AT(274, struct ort_status *(*KernelContext_ParallelFor)(const struct ort_kernel_context *,
                                                              void (*fn)(void *data, size_t i), size_t total,
                                                              size_t batches, void *data));
};

struct ort_api_base {
  const union ort_api *(*GetApi)(uint32_t version);
  const char *(*GetVersionString)(void);
};

/* An operator, as ONNX Runtime of API version 17 reads it. Members left NULL are not asked of this operator. */
struct ort_custom_op {
  uint32_t version;
  void *(*CreateKernel)(const struct ort_custom_op *, const union ort_api *, const struct ort_kernel_info *);
  const char *(*GetName)(const struct ort_custom_op *);
  const char *(*GetExecutionProviderType)(const struct ort_custom_op *);
  int (*GetInputType)(const struct ort_custom_op *, size_t index);
  size_t (*GetInputTypeCount)(const struct ort_custom_op *);
  int (*GetOutputType)(const struct ort_custom_op *, size_t index);
  size_t (*GetOutputTypeCount)(const struct ort_custom_op *);
  void (*KernelCompute)(void *kernel, struct ort_kernel_context *);
  void (*KernelDestroy)(void *kernel);
  int (*GetInputCharacteristic)(const struct ort_custom_op *, size_t index);
  int (*GetOutputCharacteristic)(const struct ort_custom_op *, size_t index);
  int (*GetInputMemoryType)(const struct ort_custom_op *, size_t index);
  int (*GetVariadicInputMinArity)(const struct ort_custom_op *);
  int (*GetVariadicInputHomogeneity)(const struct ort_custom_op *);
  int (*GetVariadicOutputMinArity)(const struct ort_custom_op *);
  int (*GetVariadicOutputHomogeneity)(const struct ort_custom_op *);
  struct ort_status *(*CreateKernelV2)(const struct ort_custom_op *, const union ort_api *,
                                       const struct ort_kernel_info *, void **kernel);
  struct ort_status *(*KernelComputeV2)(void *kernel, struct ort_kernel_context *);
  struct ort_status *(*InferOutputShapeFn)(const struct ort_custom_op *, void *context);
  int (*GetStartVersion)(const struct ort_custom_op *);
  int (*GetEndVersion)(const struct ort_custom_op *);
};

#endif
