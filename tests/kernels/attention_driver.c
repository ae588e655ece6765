/* Runs compiled attention on cases from standard input and writes y, keys and values to standard output, for every
 * processor that this program was linked for. Every array ends where a page without access begins: reading or writing
 * on ends the program. 0xFF is what y and scratch memory hold before a call: NaN. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "cpu.h"
#include "attention.h"

/* As attention_cases.py writes it; qkv, keys, values, cos and sin follow. */
struct header {
  char kernel[64];
  float scale, softcap;
  int32_t window, dim, m, past, capacity, heads, kv_heads, rows, pairs, begin, end;
};

enum { LACKS_FEATURES = 77, ARRAYS = 7 }; /* the first is an exit code */

static struct {
  void *pages;
  size_t size;
} arrays[ARRAYS];
static int used;

static void *array(size_t size) {
  const size_t page = (size_t)sysconf(_SC_PAGESIZE), pages = (size / page + 1) * page;
  uint8_t *all = mmap(NULL, pages + page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED || mprotect(all, pages, PROT_READ | PROT_WRITE)) exit(2);
  arrays[used].pages = all;
  arrays[used++].size = pages + page;
  return memset(all + pages - size, 0xFF, size);
}

static void *input(size_t size) {
  void *data = array(size);
  if (size && fread(data, size, 1, stdin) != 1) exit(3);
  return data;
}

static void run(const struct header *h) {
  const struct pmpd_attention *kernel = NULL;
  for (size_t i = 0; i < pmpd_attention_count; i++)
    if (!strcmp(pmpd_attentions[i].name, h->kernel)) kernel = &pmpd_attentions[i];
  if (!kernel || kernel->dim != h->dim) exit(4);
  if (kernel->features & ~pmpd_cpu_features()) exit(LACKS_FEATURES);
  const size_t m = (size_t)h->m, dim = (size_t)h->dim, heads = (size_t)h->heads, kv_heads = (size_t)h->kv_heads;
  const size_t cache = kv_heads * (size_t)h->capacity * dim * 2, angles = (size_t)h->rows * (size_t)h->pairs * 4;
  const float *qkv = input(m * (heads + 2 * kv_heads) * dim * 4);
  uint16_t *keys = input(cache), *values = input(cache);
  const float *cos = input(angles), *sin = input(angles);
  float *y = array(m * heads * dim * 4);
  float *scratch = array(PMPD_ATTENTION_SCRATCH(kernel, h->past + h->m) * 4);
  kernel->append(qkv, keys, values, cos, sin, h->m, h->past, h->capacity, h->heads, h->kv_heads, h->pairs, h->begin,
                 h->end);
  /* In two parts, as the operator may do it. */
  const int32_t queries = h->m * (h->heads / h->kv_heads), middle = queries / 2 / kernel->queries * kernel->queries;
  const int limited = h->window < h->past + h->m || h->softcap > 0;
  pmpd_attend_fn *const attend = limited ? kernel->attend_limited : kernel->attend;
  for (int32_t head = h->begin; head < h->end; head++) {
    attend(qkv, keys, values, cos, sin, y, scratch, h->scale, h->softcap, h->window, h->past, h->capacity,
                   h->heads, h->kv_heads, h->pairs, head, middle, queries);
    if (middle)
      attend(qkv, keys, values, cos, sin, y, scratch, h->scale, h->softcap, h->window, h->past, h->capacity,
                     h->heads, h->kv_heads, h->pairs, head, 0, middle);
  }
  fwrite(y, 4, m * heads * dim, stdout);
  fwrite(keys, 1, cache, stdout);
  fwrite(values, 1, cache, stdout);
  while (used--) munmap(arrays[used].pages, arrays[used].size);
  used = 0;
}

int main(void) {
  struct header header;
  while (fread(&header, sizeof header, 1, stdin) == 1) run(&header);
  return fflush(stdout) ? 1 : 0;
}
