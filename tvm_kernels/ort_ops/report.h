/* What ran: the nodes of every session, and the exported functions that tell of them. */
#ifndef PMPD_REPORT_H
#define PMPD_REPORT_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#define PMPD_EXPORT __attribute__((visibility("default")))

/* One node of a graph. The counters are of all its calls, from any thread. */
struct pmpd_node {
  char *name;
  const char *session; /* the tag of its session */
  int32_t k;
  _Atomic int32_t bits, n;
  _Atomic(const char *) kernel; /* what ran last; NULL before the first call */
  _Atomic uint64_t calls, nanoseconds;
  struct pmpd_node *next;
};

void pmpd_node_add(struct pmpd_node *node);
void pmpd_node_remove(struct pmpd_node *node);

/* JSON object: "version", "target", "features" of this machine within PMPD_MAX_ISA, and "kernels", what would run: an
 * object each of "bits", "accuracy", "rows" ("one" or "many") and "kernel". The text is the library's, and NULL where
 * PMPD_MAX_ISA names no level. */
PMPD_EXPORT const char *pmpd_ops_info(void);

/* Write a JSON list of the session's nodes: "name", "bits", "n", "k", "kernel" (null before the first call), "calls",
 * "nanoseconds". Like snprintf: at most size bytes, the final zero included; returns the length of the whole text. */
PMPD_EXPORT size_t pmpd_ops_report(const char *session, char *buffer, size_t size);

/* Zero the calls and nanoseconds of the session's nodes. */
PMPD_EXPORT void pmpd_ops_reset(const char *session);

#endif
