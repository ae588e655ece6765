/* What the operators of a session have in common: their settings, what ONNX Runtime says of a node, its statistics. */
#ifndef PMPD_OPERATOR_H
#define PMPD_OPERATOR_H

#include "dispatch.h"
#include "ort_api.h"
#include "report.h"

enum { PMPD_MAX_RANK = 8 };

struct pmpd_settings;

/* An operator as it is registered. */
struct pmpd_op {
  struct ort_custom_op op; /* the first member: ONNX Runtime hands its address to the operator's functions */
  const struct pmpd_settings *settings;
};

/* What the sessions of a registration have in common. */
struct pmpd_settings {
  struct pmpd_op matmul, attention;
  const union ort_api *api;
  const char *session; /* the tag under which nodes are reported */
  int accuracy;
  uint32_t features; /* that kernels may use */
  struct pmpd_choice choice;
};

extern const struct ort_custom_op pmpd_bitplane_matmul, pmpd_group_query_attention;

/* The operator of one node of a graph: the first member of what is kept of it. */
struct pmpd_operator {
  struct pmpd_node node;
  const struct pmpd_settings *settings;
};

struct pmpd_tensor {
  void *data;
  size_t rank;
  int64_t shape[PMPD_MAX_RANK]; /* the first axes, if there are more */
  int given;
};

/* Make what is kept of a node, `size` bytes of which the first are its operator and the others 0. Until it is given to
 * pmpd_node_add, free releases it; afterwards ONNX Runtime calls pmpd_operator_destroy. */
struct ort_status *pmpd_operator_make(const struct ort_custom_op *op, const union ort_api *api,
                                      const struct ort_kernel_info *info, size_t size, void **made);
void pmpd_operator_destroy(void *operator);

/* The time, and the end of a call that began at `start`. */
uint64_t pmpd_nanoseconds(void);
void pmpd_operator_ran(struct pmpd_operator *operator, const char *kernel, int32_t bits, int32_t n, int32_t k,
                       uint64_t start);

struct ort_status *pmpd_read_input(const union ort_api *api, const struct ort_kernel_context *context, size_t index,
                                   struct pmpd_tensor *tensor);
struct ort_status *pmpd_make_output(const union ort_api *api, struct ort_kernel_context *context, size_t index,
                                    const int64_t *shape, size_t rank, void **data);

/* An invalid argument, by the node's name. */
__attribute__((format(printf, 2, 3))) struct ort_status *pmpd_refuse(const struct pmpd_operator *operator,
                                                                     const char *format, ...);
__attribute__((format(printf, 4, 5))) struct ort_status *pmpd_refuse_shape(const struct pmpd_operator *operator,
                                                                           const char *input,
                                                                           const struct pmpd_tensor *tensor,
                                                                           const char *wanted, ...);
struct ort_status *pmpd_no_memory(const union ort_api *api);

/* Return the status of an expression from the function, unless all is well. */
#define TRY(expression)                        \
  do {                                         \
    struct ort_status *status_ = (expression); \
    if (status_) return status_;               \
  } while (0)

#endif
