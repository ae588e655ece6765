/* The operators of the library, and how ONNX Runtime sees them. */
#ifndef PMPD_REGISTRY_H
#define PMPD_REGISTRY_H

#include "operator.h"

/* An operator as it is registered: ONNX Runtime hands the address of the first member to the operator's functions. */
struct pmpd_registered {
  OrtCustomOp custom;
  const struct pmpd_op *op;
  const struct pmpd_settings *settings;
};

extern const struct pmpd_op *const pmpd_ops[];
enum { PMPD_OP_COUNT = 4 };

struct pmpd_registered pmpd_register(const struct pmpd_op *op, const struct pmpd_settings *settings);

#endif
