/* Instruction sets: those that have kernels, and those that the processor and the operating system allow. */
#ifndef PMPD_CPU_H
#define PMPD_CPU_H

#include <stdint.h>

/* Features, as bits: PMPD_avx2 and so on. */
#define ISA(name, bit) PMPD_##name = 1 << (bit),
#define ISA_ALL
enum {
#include "isa.def"
};
#undef ISA_ALL
#undef ISA

/* A level of PMPD_MAX_ISA: its name, and the feature it adds to the levels before it. */
struct pmpd_level {
  const char *name;
  uint32_t feature;
};

/* This architecture's levels, lowest first; the first is `portable` and has no feature. */
extern const struct pmpd_level pmpd_levels[];
extern const int pmpd_level_count;

enum { PMPD_MAX_LEVELS = 8 };

/* What this processor and operating system have. */
uint32_t pmpd_cpu_features(void);

/* The number of the highest level that may be used: the one PMPD_MAX_ISA names, or the last; -1 if it names none. */
int pmpd_highest_level(void);

/* The features of this processor, up to a level. */
uint32_t pmpd_features(int level);

#endif
