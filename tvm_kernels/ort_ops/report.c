#include "report.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "cpu.h"
#include "dispatch.h"

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

/* A text that grows; what does not fit is only counted. */
struct text {
  char *bytes;
  size_t size, length;
};

__attribute__((format(printf, 2, 3))) static void append(struct text *text, const char *format, ...) {
  const size_t room = text->length < text->size ? text->size - text->length : 0;
  va_list arguments;
  va_start(arguments, format);
  text->length += (size_t)vsnprintf(room ? text->bytes + text->length : NULL, room, format, arguments);
  va_end(arguments);
}

static void append_string(struct text *text, const char *string) {
  append(text, "\"");
  for (; *string; string++) {
    const unsigned char c = (unsigned char)*string;
    if (c == '"' || c == '\\')
      append(text, "\\%c", c);
    else
      append(text, c < ' ' ? "\\u%04x" : "%c", c);
  }
  append(text, "\"");
}

static void append_info(struct text *text, uint32_t features) {
  const char *separator = "";
  append(text, "{\"version\": \"" PMPD_VERSION "\", \"target\": \"" PMPD_TARGET "\", \"features\": [");
  for (int level = 0; level < pmpd_level_count; level++) {
    if (!(pmpd_levels[level].feature & features)) continue;
    append(text, "%s\"%s\"", separator, pmpd_levels[level].name);
    separator = ", ";
  }
  append(text, "], \"kernels\": [");
  const struct pmpd_choice choice = pmpd_choose(features);
  separator = "";
  for (int accuracy = PMPD_EXACT; accuracy <= PMPD_INT8; accuracy++)
    for (int many = 0; many <= 1; many++)
      for (int bits = 1; bits <= 8; bits++) {
        append(text,
               "%s{\"op\": \"BitplaneMatMul\", \"bits\": %d, \"accuracy\": \"%s\", \"rows\": \"%s\", \"kernel\": ",
               separator, bits, accuracy == PMPD_INT8 ? "int8" : "exact", many ? "many" : "one");
        append_string(text, pmpd_kernel_name(choice.kernels[accuracy][many][bits - 1]));
        append(text, "}");
        separator = ", ";
      }
  for (size_t i = 0; i < pmpd_attention_count; i++) {
    if (!pmpd_is_new_dim(i)) continue;
    const int32_t dim = pmpd_attentions[i].dim;
    for (int many = 0; many <= 1; many++) {
      const struct pmpd_attention *kernel = pmpd_choose_attention(features, dim, many ? INT32_MAX : 1);
      append(text, ", {\"op\": \"GroupQueryAttention\", \"dim\": %d, \"rows\": \"%s\", \"kernel\": ", dim,
             many ? "many" : "one");
      append_string(text, kernel ? kernel->name : "");
      append(text, "}");
    }
  }
  append(text, "]}");
}

const char *pmpd_ops_info(void) {
  /* A text once given is never written again: another thread may be reading it. */
  static char texts[PMPD_MAX_LEVELS][16384];
  const int level = pmpd_highest_level();
  if (level < 0) return NULL;
  struct text text = {texts[level], sizeof texts[level], 0};
  pthread_mutex_lock(&lock);
  if (!*texts[level]) append_info(&text, pmpd_features(level));
  pthread_mutex_unlock(&lock);
  return texts[level];
}

size_t pmpd_ops_report(const char *session, char *buffer, size_t size) {
  struct text text = {buffer, size, 0};
  const char *separator = "";
  append(&text, "[");
  pthread_mutex_lock(&lock);
  for (const struct pmpd_node *node = nodes; node; node = node->next) {
    if (strcmp(node->session, session)) continue;
    const char *kernel = atomic_load_explicit(&node->kernel, memory_order_relaxed);
    append(&text, "%s{\"name\": ", separator);
    append_string(&text, node->name);
    append(&text, ", \"op\": \"%s\", \"bits\": %d, \"n\": %d, \"k\": %d, \"kernel\": ", node->op, node->bits,
           node->n, node->k);
    kernel ? append_string(&text, kernel) : append(&text, "null");
    append(&text, ", \"calls\": %" PRIu64 ", \"nanoseconds\": %" PRIu64 "}", node->calls, node->nanoseconds);
    separator = ", ";
  }
  pthread_mutex_unlock(&lock);
  append(&text, "]");
  return text.length;
}

void pmpd_ops_reset(const char *session) {
  pthread_mutex_lock(&lock);
  for (struct pmpd_node *node = nodes; node; node = node->next)
    if (!strcmp(node->session, session)) node->calls = node->nanoseconds = 0;
  pthread_mutex_unlock(&lock);
}
