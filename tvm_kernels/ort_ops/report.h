/* What ran: the nodes of every session, and the exported functions that tell of them. */
#ifndef PMPD_REPORT_H
#define PMPD_REPORT_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#define PMPD_EXPORT __attribute__((visibility("default")))

/* One node of a graph. The counters are of all its calls, from any thread. */
struct pmpd_node {
  const char *op; /* the operator's name */
  char *name;
  const char *session; /* the tag of its session */
  _Atomic int32_t bits, n, k;
  _Atomic(const char *) kernel; /* what ran last; NULL before the first call */
  _Atomic uint64_t calls, nanoseconds, finished;
  struct pmpd_node *next;
};

void pmpd_node_add(struct pmpd_node *node);
void pmpd_node_remove(struct pmpd_node *node);
/* What one call did; see pmpd_ops_report. */
struct pmpd_ran {
  const char *kernel;
  int32_t bits, n, k;
  uint64_t finished;
};

/* Count a call. */
void pmpd_node_ran(struct pmpd_node *node, const struct pmpd_ran *ran, uint64_t nanoseconds);

/* A text that is written into a buffer; what does not fit is only counted. */
struct pmpd_text {
  char *bytes;
  size_t size, length;
};

__attribute__((format(printf, 2, 3))) void pmpd_append(struct pmpd_text *text, const char *format, ...);
/* Append a JSON string. */
void pmpd_append_string(struct pmpd_text *text, const char *string);

/* The functions below give JSON and not structures: bundles hold libraries of older versions, and JSON may grow.
 *
 * An object: "version", "target", "features" of this machine within PMPD_MAX_ISA, and "kernels", what would run: an
 * object each of "op" and "kernel", of BitplaneMatMul also "rows", "bits" and "accuracy", of GroupQueryAttention "rows"
 * and "dim", the elements of a head. "rows" is "one" or "many": of activations, or queries that share a key. The text is
 * the library's; NULL where PMPD_MAX_ISA names no level, or memory is exhausted. */
PMPD_EXPORT const char *pmpd_ops_info(void);

/* Write a list of the session's nodes: "name", "op", "bits", "n", "k", "kernel" (null before the first call), "calls",
 * "nanoseconds", "finished". Bits, n and k are p, N and K of BitplaneMatMul, BitplaneLogits and BitplaneGather; of
 * GroupQueryAttention they are the bits of a cached number, the columns of Y and the elements of a head. "finished" are
 * the rows of weights that the first two read all planes of, over all calls; of BitplaneLogits that may be few. Like
 * snprintf: at most size bytes, the final zero included; returns the length of the whole text. */
PMPD_EXPORT size_t pmpd_ops_report(const char *session, char *buffer, size_t size);

/* Zero the calls, nanoseconds and finished rows of the session's nodes. */
PMPD_EXPORT void pmpd_ops_reset(const char *session);

#endif
