/* The operator and the settings it runs under: what pmpd_ops.c registers and bitplane_matmul.c implements. */
#ifndef PMPD_OPERATOR_H
#define PMPD_OPERATOR_H

#include "dispatch.h"
#include "ort_api.h"

/* What the sessions of a registration have in common. */
struct pmpd_settings {
  struct ort_custom_op op; /* the first member: ONNX Runtime hands its address to the operator's functions */
  const union ort_api *api;
  const char *session; /* the tag under which nodes are reported */
  int accuracy;
  struct pmpd_choice choice;
};

extern const struct ort_custom_op pmpd_bitplane_matmul;

struct ort_status *pmpd_no_memory(const union ort_api *api);

/* Return the status of an expression from the function, unless all is well. */
#define TRY(expression)                        \
  do {                                         \
    struct ort_status *status_ = (expression); \
    if (status_) return status_;               \
  } while (0)

#endif
