/* Which compiled kernel runs. */
#ifndef PMPD_DISPATCH_H
#define PMPD_DISPATCH_H

#include "kernels.h"

/* The kernel for [accuracy][0: one row of activations, 1: more][p - 1]; NULL where only pmpd_any does it. */
struct pmpd_choice {
  const struct pmpd_kernel *kernels[2][2][8];
};

/* Choose for a processor with these features. Where no int8 kernel fits, an exact one stands in; a kernel for many
 * rows of activations stands in for one made for a single row. */
struct pmpd_choice pmpd_choose(uint32_t features);

/* The attention for heads of `dim` elements and so many queries that share a key; NULL if there is none. */
const struct pmpd_attention *pmpd_choose_attention(uint32_t features, int32_t dim, int64_t queries);

/* Is this the first of pmpd_attentions for heads of its size? */
int pmpd_is_new_dim(size_t i);

/* The number in pmpd_levels of the highest step that may be used: PMPD_MAX_ISA, or the last; -1 if that names none. */
int pmpd_highest_level(void);

/* The features of this processor, up to a level. */
uint32_t pmpd_features(int level);

/* NULL is pmpd_any. */
const char *pmpd_kernel_name(const struct pmpd_kernel *kernel);

#endif
