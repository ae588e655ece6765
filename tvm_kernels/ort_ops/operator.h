/* What an operator of the library is made of, and what all of them share: reading inputs, refusing, statistics. */
#ifndef PMPD_OPERATOR_H
#define PMPD_OPERATOR_H

#include <onnxruntime_c_api.h>

#include "report.h"

/* The version of ONNX Runtime that added the newest entry used here, KernelContext_ParallelFor. */
enum { PMPD_ORT_API_VERSION = 17 };

enum { PMPD_MAX_RANK = 8 };

/* What the sessions of a registration have in common. */
struct pmpd_settings {
  const OrtApi *api;
  const char *session; /* the tag under which nodes are reported */
  int accuracy;        /* PMPD_EXACT or PMPD_INT8 */
  uint32_t features;   /* that kernels may use */
};

struct pmpd_operator;

/* An input or output. */
struct pmpd_value {
  const char *name;
  ONNXTensorElementDataType type;
  int optional;
};

/* A kind of operator: a row of the table in registry.c. */
struct pmpd_op {
  const char *name;
  const struct pmpd_value *inputs, *outputs;
  size_t input_count, output_count;
  size_t node_size; /* bytes of a node's structure: a struct pmpd_operator and what follows, which is 0 at first */
  /* Read and check a node's attributes. */
  OrtStatus *(*create)(struct pmpd_operator *operator, const OrtKernelInfo *info);
  /* Run a node once. */
  OrtStatus *(*compute)(struct pmpd_operator *operator, OrtKernelContext *context, struct pmpd_ran *ran);
  /* Append what would run on a processor with these features, as entries of "kernels" in pmpd_ops_info. Each comes
   * after *separator, which is ", " from then on. */
  void (*list_kernels)(struct pmpd_text *text, uint32_t features, const char **separator);
};

/* The operator of one node of a graph: the first member of the node's structure. */
struct pmpd_operator {
  struct pmpd_node node;
  const struct pmpd_op *op;
  const struct pmpd_settings *settings;
};

struct pmpd_tensor {
  void *data;
  size_t rank;
  int64_t shape[PMPD_MAX_RANK]; /* the first axes, if there are more */
  int present;
};

/* Read an input; one of another element type than the table's is refused, as ONNX Runtime does not compare initializers
 * that replace those of the graph. */
OrtStatus *pmpd_read_input(const struct pmpd_operator *operator, const OrtKernelContext *context, size_t index,
                           struct pmpd_tensor *tensor);
OrtStatus *pmpd_make_output(const struct pmpd_operator *operator, OrtKernelContext *context, size_t index,
                            const int64_t *shape, size_t rank, void **data);

/* An invalid argument, by the node's name. */
__attribute__((format(printf, 2, 3))) OrtStatus *pmpd_refuse(const struct pmpd_operator *operator, const char *format,
                                                             ...);
__attribute__((format(printf, 4, 5))) OrtStatus *pmpd_refuse_shape(const struct pmpd_operator *operator, size_t index,
                                                                   const struct pmpd_tensor *tensor,
                                                                   const char *wanted, ...);
OrtStatus *pmpd_no_memory(const OrtApi *api);

/* Return the status of an expression from the function, unless all is well. */
#define TRY(expression)                 \
  do {                                  \
    OrtStatus *status_ = (expression);  \
    if (status_) return status_;        \
  } while (0)

#define PMPD_COUNT(array) (sizeof(array) / sizeof *(array))

#endif
