#include "report.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cpu.h"
#include "registry.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct pmpd_node *nodes; /* oldest first */

void pmpd_node_add(struct pmpd_node *node) {
  pthread_mutex_lock(&lock);
  struct pmpd_node **link = &nodes;
  while (*link) link = &(*link)->next;
  node->next = NULL;
  *link = node;
  pthread_mutex_unlock(&lock);
}

void pmpd_node_remove(struct pmpd_node *node) {
  pthread_mutex_lock(&lock);
  struct pmpd_node **link = &nodes;
  while (*link != node) link = &(*link)->next;
  *link = node->next;
  pthread_mutex_unlock(&lock);
}

void pmpd_node_ran(struct pmpd_node *node, const struct pmpd_ran *ran, uint64_t nanoseconds) {
  atomic_store_explicit(&node->bits, ran->bits, memory_order_relaxed);
  atomic_store_explicit(&node->n, ran->n, memory_order_relaxed);
  atomic_store_explicit(&node->k, ran->k, memory_order_relaxed);
  atomic_store_explicit(&node->kernel, ran->kernel, memory_order_relaxed);
  atomic_fetch_add_explicit(&node->finished, ran->finished, memory_order_relaxed);
  atomic_fetch_add_explicit(&node->calls, 1, memory_order_relaxed);
  atomic_fetch_add_explicit(&node->nanoseconds, nanoseconds, memory_order_relaxed);
}

void pmpd_append(struct pmpd_text *text, const char *format, ...) {
  const size_t room = text->length < text->size ? text->size - text->length : 0;
  va_list arguments;
  va_start(arguments, format);
  text->length += (size_t)vsnprintf(room ? text->bytes + text->length : NULL, room, format, arguments);
  va_end(arguments);
}

void pmpd_append_string(struct pmpd_text *text, const char *string) {
  pmpd_append(text, "\"");
  for (; *string; string++) {
    const unsigned char c = (unsigned char)*string;
    if (c == '"' || c == '\\')
      pmpd_append(text, "\\%c", c);
    else
      pmpd_append(text, c < ' ' ? "\\u%04x" : "%c", c);
  }
  pmpd_append(text, "\"");
}

static void append_info(struct pmpd_text *text, uint32_t features) {
  const char *separator = "";
  pmpd_append(text, "{\"version\": \"" PMPD_VERSION "\", \"target\": \"" PMPD_TARGET "\", \"features\": [");
  for (int level = 0; level < pmpd_level_count; level++) {
    if (!(pmpd_levels[level].feature & features)) continue;
    pmpd_append(text, "%s\"%s\"", separator, pmpd_levels[level].name);
    separator = ", ";
  }
  pmpd_append(text, "], \"kernels\": [");
  separator = "";
  for (size_t i = 0; i < PMPD_OP_COUNT; i++) pmpd_ops[i]->list_kernels(text, features, &separator);
  pmpd_append(text, "]}");
}

/* Return the text in newly allocated memory, or NULL. */
static char *make_info(uint32_t features) {
  struct pmpd_text text = {0};
  append_info(&text, features);
  text.size = text.length + 1;
  text.length = 0;
  text.bytes = malloc(text.size);
  if (text.bytes) append_info(&text, features);
  return text.bytes;
}

const char *pmpd_ops_info(void) {
  /* A text that was returned is never changed or freed: another thread may be reading it. */
  static char *texts[PMPD_MAX_LEVELS];
  const int level = pmpd_highest_level();
  if (level < 0) return NULL;
  pthread_mutex_lock(&lock);
  if (!texts[level]) texts[level] = make_info(pmpd_features(level));
  const char *text = texts[level];
  pthread_mutex_unlock(&lock);
  return text;
}

size_t pmpd_ops_report(const char *session, char *buffer, size_t size) {
  struct pmpd_text text = {buffer, size, 0};
  const char *separator = "";
  pmpd_append(&text, "[");
  pthread_mutex_lock(&lock);
  for (const struct pmpd_node *node = nodes; node; node = node->next) {
    if (strcmp(node->session, session)) continue;
    const char *kernel = atomic_load_explicit(&node->kernel, memory_order_relaxed);
    pmpd_append(&text, "%s{\"name\": ", separator);
    pmpd_append_string(&text, node->name);
    pmpd_append(&text, ", \"op\": \"%s\", \"bits\": %d, \"n\": %d, \"k\": %d, \"kernel\": ", node->op, node->bits,
                node->n, node->k);
    kernel ? pmpd_append_string(&text, kernel) : pmpd_append(&text, "null");
    pmpd_append(&text, ", \"calls\": %" PRIu64 ", \"nanoseconds\": %" PRIu64 ", \"finished\": %" PRIu64 "}", node->calls,
                node->nanoseconds, node->finished);
    separator = ", ";
  }
  pthread_mutex_unlock(&lock);
  pmpd_append(&text, "]");
  return text.length;
}

void pmpd_ops_reset(const char *session) {
  pthread_mutex_lock(&lock);
  for (struct pmpd_node *node = nodes; node; node = node->next)
    if (!strcmp(node->session, session)) node->calls = node->nanoseconds = node->finished = 0;
  pthread_mutex_unlock(&lock);
}
