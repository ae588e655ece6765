/* What the processor and the operating system allow, in the bits of kernels.h. */
#ifndef PMPD_CPU_H
#define PMPD_CPU_H

#include <stddef.h>
#include <stdint.h>

/* A step of the instruction set: its name in PMPD_MAX_ISA, and the feature it adds to the steps before it. */
struct pmpd_level {
  const char *name;
  uint32_t feature;
};

enum { PMPD_MAX_LEVELS = 8 };

/* This architecture's steps, least first. */
extern const struct pmpd_level pmpd_levels[];
extern const int pmpd_level_count;

uint32_t pmpd_cpu_features(void);

#endif
