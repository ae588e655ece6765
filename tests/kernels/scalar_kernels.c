/* Kernels for tests as matmul.h wants them, in plain C; each gives NaN if what it was promised does not hold.
 *
 * There is an exact one per precision for one row of activations and one for many, except: 7 bits have none for one,
 * and 8 bits none at all. int8 kernels are exact ones under another name: at 3 bits for many rows only, at 4 bits for
 * one row, first one that needs what no machine of the architecture has, then one that needs what most have. */
#include "attention.h"
#include "cpu.h"
#include "matmul.h"

enum { ROWS = 4, CHUNK = 12, SCRATCH = 100 };

const char pmpd_any_name[] = "any_scalar";
__attribute__((visibility("default"))) int stray(void) { return 1; }

static float from_half(uint16_t half) {
  const float sign = half >> 15 ? -1.0f : 1.0f, fraction = (float)(half & 1023);
  const int exponent = half >> 10 & 31;
  float power = 0x1p-24f;
  for (int i = 1; i < exponent; i++) power *= 2;
  return sign * power * (exponent ? 1024 + fraction : fraction);
}

static float weight(const uint8_t *planes, int64_t plane_bytes, const uint16_t *codebook, int32_t bits, int32_t groups,
                    int32_t group_bytes, int32_t lines, int32_t n, int32_t column) {
  int32_t code = 0;
  for (int32_t i = 0; i < bits; i++)
    code = code << 1 | (planes[i * plane_bytes + (int64_t)n * lines * 64 + column / 8] >> (column % 8) & 1);
  return from_half(codebook[(((int64_t)n * groups + column / 8 / group_bytes) << bits) + code]);
}

void pmpd_any(const uint8_t *planes, int64_t plane_bytes, const uint16_t *codebook, const float *x, float *y,
              int64_t ldy, int32_t bits, int32_t groups, int32_t group_bytes, int32_t k, int32_t lines, int32_t m,
              int32_t begin, int32_t end) {
  for (int32_t i = 0; i < m; i++)
    for (int32_t n = begin; n < end; n++) {
      double sum = 0;
      for (int32_t column = 0; column < k; column++)
        sum += (double)x[(int64_t)i * k + column] *
               weight(planes, plane_bytes, codebook, bits, groups, group_bytes, lines, n, column);
      y[i * ldy + n] = (float)sum;
    }
}

/* Columns in reverse. */
static void reverse(const float *x, void *packed, float *scale, float *sum, int32_t k, int32_t lines, int32_t begin,
                    int32_t end) {
  const int32_t columns = 512 * lines;
  for (int32_t i = begin; i < end; i++) {
    float *row = (float *)packed + (int64_t)i * columns;
    for (int32_t column = 0; column < columns; column++)
      row[columns - 1 - column] = column < k ? x[(int64_t)i * k + column] : 0;
    for (int32_t part = 0; part < 16 * lines; part++) scale[(int64_t)i * 16 * lines + part] = (float)(i + part);
    sum[i] = (float)i;
  }
}

static void multiply(int32_t bits, const uint8_t *planes, int64_t plane_bytes, const uint16_t *codebook,
                     const void *packed, const float *scale, const float *sum, float *y, int64_t ldy, uint8_t *scratch,
                     int32_t lines, int32_t m, int32_t begin, int32_t end) {
  const int32_t columns = 512 * lines;
  int promised = begin % ROWS == 0 && end - begin <= CHUNK && begin < end && (uintptr_t)scratch % 64 == 0 &&
                 (uintptr_t)packed % 64 == 0;
  for (int32_t i = 0; i < SCRATCH; i++) scratch[i] = (uint8_t)(begin + i);
  for (int32_t i = 0; i < m; i++) {
    const float *row = (const float *)packed + (int64_t)i * columns, *scales = scale + (int64_t)i * 16 * lines;
    promised &= sum[i] == (float)i && scales[0] == (float)i && scales[16 * lines - 1] == (float)(i + 16 * lines - 1);
    for (int32_t n = begin; n < end; n++) {
      double total = 0;
      for (int32_t column = 0; column < columns; column++)
        total += (double)row[columns - 1 - column] *
                 weight(planes, plane_bytes, codebook, bits, 1, columns, lines, n, column);
      y[i * ldy + n] = (float)total;
    }
  }
  for (int32_t i = 0; i < SCRATCH; i++) promised &= scratch[i] == (uint8_t)(begin + i);
  if (!promised) y[begin] = 0.0f / 0.0f;
}

#define MULTIPLY(p)                                                                                                \
  static void multiply_##p(const uint8_t *planes, int64_t plane_bytes, const uint16_t *codebook, const void *packed, \
                           const float *scale, const float *sum, float *y, int64_t ldy, uint8_t *scratch,          \
                           int32_t lines, int32_t m, int32_t begin, int32_t end) {                                 \
    multiply(p, planes, plane_bytes, codebook, packed, scale, sum, y, ldy, scratch, lines, m, begin, end);         \
  }
#define KERNEL(name, features, p, accuracy, many) \
  {name, features, p, accuracy, many, 4, ROWS, CHUNK, SCRATCH, reverse, multiply_##p}
#define EXACT(p) KERNEL("exact_" #p "_one", 0, p, PMPD_EXACT, 0), KERNEL("exact_" #p "_many", 0, p, PMPD_EXACT, 1)

MULTIPLY(1) MULTIPLY(2) MULTIPLY(3) MULTIPLY(4) MULTIPLY(5) MULTIPLY(6) MULTIPLY(7)

#ifdef __x86_64__
enum { OTHERS = PMPD_dotprod, COMMON = PMPD_avx2 };
#else
enum { OTHERS = PMPD_avx2, COMMON = PMPD_neon };
#endif

const struct pmpd_kernel pmpd_kernels[] = {
    KERNEL("int8_4_one_others", OTHERS, 4, PMPD_INT8, 0),
    KERNEL("int8_4_one", COMMON, 4, PMPD_INT8, 0),
    KERNEL("int8_3_many", 0, 3, PMPD_INT8, 1),
    EXACT(1), EXACT(2), EXACT(3), EXACT(4), EXACT(5), EXACT(6),
    KERNEL("exact_7_many", 0, 7, PMPD_EXACT, 1),
};
const size_t pmpd_kernel_count = sizeof pmpd_kernels / sizeof *pmpd_kernels;

/* And none for attention. */
const struct pmpd_attention pmpd_attentions[] = {{0}};
const size_t pmpd_attention_count = 0;
