#include "dispatch.h"

#include <stdlib.h>
#include <string.h>

#include "cpu.h"

static const struct pmpd_kernel *first_fit(uint32_t features, int accuracy, int many, int bits) {
  for (size_t i = 0; i < pmpd_kernel_count; i++) {
    const struct pmpd_kernel *kernel = &pmpd_kernels[i];
    if (kernel->bits == bits && kernel->accuracy == accuracy && kernel->many == many &&
        (kernel->features & ~features) == 0)
      return kernel;
  }
  return NULL;
}

struct pmpd_choice pmpd_choose(uint32_t features) {
  struct pmpd_choice choice;
  /* Exact first, and many before one: each falls back on those before it. */
  for (int bits = 1; bits <= 8; bits++)
    for (int accuracy = PMPD_EXACT; accuracy <= PMPD_INT8; accuracy++)
      for (int many = 1; many >= 0; many--) {
        const struct pmpd_kernel *kernel = first_fit(features, accuracy, many, bits);
        if (!kernel && !many) kernel = first_fit(features, accuracy, 1, bits);
        if (!kernel && accuracy == PMPD_INT8) kernel = choice.kernels[PMPD_EXACT][many][bits - 1];
        choice.kernels[accuracy][many][bits - 1] = kernel;
      }
  return choice;
}

const struct pmpd_attention *pmpd_choose_attention(uint32_t features, int32_t dim, int64_t queries) {
  for (size_t i = 0; i < pmpd_attention_count; i++) {
    const struct pmpd_attention *kernel = &pmpd_attentions[i];
    const int enough = kernel->queries <= queries || kernel->queries == 1;
    if (enough && kernel->dim == dim && (kernel->features & ~features) == 0) return kernel;
  }
  return NULL;
}

int pmpd_is_new_dim(size_t i) {
  size_t first = 0;
  while (pmpd_attentions[first].dim != pmpd_attentions[i].dim) first++;
  return first == i;
}

int pmpd_highest_level(void) {
  const char *name = getenv("PMPD_MAX_ISA");
  int level = pmpd_level_count - 1;
  if (name && *name)
    while (level >= 0 && strcmp(name, pmpd_levels[level].name)) level--;
  return level;
}

uint32_t pmpd_features(int level) {
  uint32_t allowed = 0;
  for (int i = 0; i <= level; i++) allowed |= pmpd_levels[i].feature;
  return pmpd_cpu_features() & allowed;
}

const char *pmpd_kernel_name(const struct pmpd_kernel *kernel) { return kernel ? kernel->name : pmpd_any_name; }
