#include "cpu.h"

#include <stdlib.h>
#include <string.h>

#define ISA(name, bit) {#name, PMPD_##name},
const struct pmpd_level pmpd_levels[] = {
    {"portable", 0},
#include "isa.def"
};
#undef ISA

const int pmpd_level_count = sizeof pmpd_levels / sizeof *pmpd_levels;
_Static_assert(sizeof pmpd_levels / sizeof *pmpd_levels <= PMPD_MAX_LEVELS, "more levels than PMPD_MAX_LEVELS");

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

#if defined(__x86_64__)

#include <cpuid.h>

#define BIT(n) (UINT32_C(1) << (n))

/* A compiler may use all of x86-64-v3 in a function made for AVX2, and all of -v4 in one for AVX-512: the whole level
 * must be there. Positions are those of Intel's manual, CPUID and XCR0. */
static const uint32_t V3_1_ECX = BIT(0) | BIT(9) | BIT(12) | BIT(13)      /* SSE3, SSSE3, FMA, CMPXCHG16B */
                                 | BIT(19) | BIT(20) | BIT(22) | BIT(23)  /* SSE4.1, SSE4.2, MOVBE, POPCNT */
                                 | BIT(27) | BIT(28) | BIT(29);           /* OSXSAVE, AVX, F16C */
static const uint32_t V3_EXTENDED_1_ECX = BIT(0) | BIT(5);                /* LAHF, LZCNT */
static const uint32_t V3_7_EBX = BIT(3) | BIT(5) | BIT(8);                /* BMI1, AVX2, BMI2 */
static const uint32_t V4_7_EBX = BIT(16) | BIT(17) | BIT(28) | BIT(30) | BIT(31); /* AVX-512 F, DQ, CD, BW, VL */
static const uint32_t VBMI_7_ECX = BIT(1), VNNI_7_ECX = BIT(11), AVX_VNNI_71_EAX = BIT(4);
/* Registers that the operating system saves and restores: those of SSE and AVX; those and the masks and AVX-512's. */
static const uint32_t YMM_STATE = BIT(1) | BIT(2), ZMM_STATE = BIT(1) | BIT(2) | BIT(5) | BIT(6) | BIT(7);

static int all(uint32_t found, uint32_t wanted) { return (found & wanted) == wanted; }

uint32_t pmpd_cpu_features(void) {
  uint32_t eax, ebx, ecx, edx, state, high;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !all(ecx, V3_1_ECX)) return 0;
  __asm__("xgetbv" : "=a"(state), "=d"(high) : "c"(0));
  if (!all(state, YMM_STATE)) return 0;
  if (!__get_cpuid(0x80000001, &eax, &ebx, &ecx, &edx) || !all(ecx, V3_EXTENDED_1_ECX)) return 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !all(ebx, V3_7_EBX)) return 0;
  uint32_t features = PMPD_avx2;
  if (all(state, ZMM_STATE) && all(ebx, V4_7_EBX)) {
    features |= PMPD_avx512;
    if (all(ecx, VNNI_7_ECX)) features |= PMPD_avx512vnni;
    if (all(ecx, VBMI_7_ECX)) features |= PMPD_avx512vbmi;
  }
  /* Leaf 7 says in EAX how many further parts it has. */
  if (eax && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && all(eax, AVX_VNNI_71_EAX)) features |= PMPD_avxvnni;
  return features;
}

#elif defined(__aarch64__)

#include <sys/auxv.h>

uint32_t pmpd_cpu_features(void) {
  const unsigned long found = getauxval(AT_HWCAP); /* Linux: bit 1 is ASIMD, bit 20 ASIMDDP */
  return (found >> 1 & 1 ? PMPD_neon : 0) | (found >> 20 & 1 ? PMPD_dotprod : 0);
}

#else

uint32_t pmpd_cpu_features(void) { return 0; }

#endif
