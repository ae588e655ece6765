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
  _Atomic uint64_t calls, nanoseconds;
  struct pmpd_node *next;
};

void pmpd_node_add(struct pmpd_node *node);
void pmpd_node_remove(struct pmpd_node *node);

/* JSON object: "version", "target", "features" of this machine within PMPD_MAX_ISA, and "kernels", what would run: an
 * object each of "op", "rows" and "kernel", and of BitplaneMatMul "bits" and "accuracy", of GroupQueryAttention "dim",
 * the elements of a head. "rows" is "one" or "many": of activations, or queries that share a key. The text is the
 * library's, and NULL where PMPD_MAX_ISA names no level. */
PMPD_EXPORT const char *pmpd_ops_info(void);

/* Write a JSON list of the session's nodes: "name", "op", "bits", "n", "k", "kernel" (null before the first call),
 * "calls", "nanoseconds". Bits, n and k are p, N and K of BitplaneMatMul; of GroupQueryAttention they are the bits of a
 * cached number, the columns of Y and the elements of a head. Like snprintf: at most size bytes, the final zero
 * included; returns the length of the whole text. */
PMPD_EXPORT size_t pmpd_ops_report(const char *session, char *buffer, size_t size);

/* Zero the calls and nanoseconds of the session's nodes. */
PMPD_EXPORT void pmpd_ops_reset(const char *session);

#endif
