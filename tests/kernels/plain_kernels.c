/* Kernels for tests, of 3, 4 and 6 bits: plain loops that are right; tests replace lines of them. */
#include <math.h>
#include <string.h>

#include "attention.h"
#include "matmul.h"

static float from_half(uint16_t half) {
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  const float value = exponent ? ldexpf((float)(mantissa + 1024), exponent - 25) : ldexpf((float)mantissa, -24);
  return half >> 15 ? -value : value;
}

void pmpd_any(const uint8_t *planes, int64_t plane_bytes, const uint16_t *codebook, const float *x, float *y,
              int64_t ldy, int32_t bits, int32_t groups, int32_t group_bytes, int32_t k, int32_t lines, int32_t m,
              int32_t begin, int32_t end) {
  for (int32_t row = begin; row < end; row++) {
    for (int32_t i = 0; i < m; i++) y[i * ldy + row] = 0;
    for (int32_t column = 0; column < k; column++) {
      const int32_t byte = column / 8;
      int64_t entry = (int64_t)row * groups + byte / group_bytes;
      for (int32_t plane = 0; plane < bits; plane++)
        entry = entry << 1 | (planes[plane * plane_bytes + (int64_t)row * lines * 64 + byte] >> column % 8 & 1);
      const float weight = from_half(codebook[entry]);
      for (int32_t i = 0; i < m; i++) y[i * ldy + row] += weight * x[(int64_t)i * k + column];
    }
  }
}

/* The first k of 512 * lines floats of a row are the activations; int8 rounds 32 columns to 1/127 of the largest. */
static void pack(const float *x, void *packed, float *scale, float *sum, int32_t k, int32_t lines, int32_t begin,
                 int32_t end) {
  (void)scale, (void)sum;
  for (int32_t i = begin; i < end; i++) {
    float *to = (float *)packed + (int64_t)i * lines * 512;
    memset(to, 0, (size_t)lines * 512 * sizeof *to);
    memcpy(to, x + (int64_t)i * k, (size_t)k * sizeof *to);
  }
}

static void pack_int8(const float *x, void *packed, float *scale, float *sum, int32_t k, int32_t lines, int32_t begin,
                      int32_t end) {
  pack(x, packed, scale, sum, k, lines, begin, end);
  for (int32_t i = begin; i < end; i++) {
    float *row = (float *)packed + (int64_t)i * lines * 512;
    sum[i] = 0;
    for (int32_t group = 0; group < lines * 512; group += 32) {
      float largest = 0;
      for (int32_t column = group; column < group + 32; column++) largest = fmaxf(largest, fabsf(row[column]));
      for (int32_t column = group; column < group + 32; column++) {
        row[column] = rintf(row[column] * (127 / fmaxf(largest, 1e-30f))) * (largest / 127);
        sum[i] += row[column];
      }
    }
  }
}

/* Weights are offset + step * table[code]; of exact kernels the offset is 0 and the step 1. */
struct table {
  float offset, step, values[256];
};

static void make_table(struct table *table, const uint16_t *codebook, int32_t bits, int32_t levels) {
  float low = INFINITY, high = -INFINITY;
  for (int32_t code = 0; code < 1 << bits; code++) {
    low = fminf(low, table->values[code] = from_half(codebook[code]));
    high = fmaxf(high, table->values[code]);
  }
  table->offset = 0, table->step = 1;
  if (!levels) return;
  table->offset = low, table->step = fmaxf(high - low, 1e-30f) / (float)(levels - 1);
  for (int32_t code = 0; code < 1 << bits; code++)
    table->values[code] = floorf((table->values[code] - low) / table->step + 0.5f);
}

static void multiply(const uint8_t *planes, int64_t plane_bytes, const uint16_t *codebook, const float *x,
                     const float *sum, float *y, int64_t ldy, int32_t bits, int32_t levels, int32_t lines, int32_t m,
                     int32_t begin, int32_t end) {
  struct table table;
  for (int32_t row = begin; row < end; row++) {
    make_table(&table, codebook + ((int64_t)row << bits), bits, levels);
    for (int32_t i = 0; i < m; i++) y[i * ldy + row] = levels ? table.offset * sum[i] : 0;
    for (int32_t column = 0; column < lines * 512; column++) {
      uint32_t code = 0;
      for (int32_t plane = 0; plane < bits; plane++)
        code = code << 1 | (planes[plane * plane_bytes + (int64_t)row * lines * 64 + column / 8] >> column % 8 & 1);
      const float weight = table.step * table.values[code];
      for (int32_t i = 0; i < m; i++) y[i * ldy + row] += weight * x[(int64_t)i * lines * 512 + column];
    }
  }
}

#define MATMUL(p, accuracy, levels)                                                                                  \
  static void matmul_##accuracy##_##p(const uint8_t *planes, int64_t plane_bytes, const uint16_t *codebook,           \
                                      const void *packed, const float *scale, const float *sum, float *y,             \
                                      int64_t ldy, uint8_t *scratch, int32_t lines, int32_t m, int32_t begin,         \
                                      int32_t end) {                                                                  \
    (void)scale, (void)scratch;                                                                                       \
    multiply(planes, plane_bytes, codebook, packed, sum, y, ldy, p, levels, lines, m, begin, end);                    \
  }
#define BOTH(p) MATMUL(p, exact, 0) MATMUL(p, int8, 256)
BOTH(3)
BOTH(4)
BOTH(6)

#define KERNELS(p)                                                                  \
  {"plain_exact_" #p, 0, p, PMPD_EXACT, 1, 4, 1, 64, 0, pack, matmul_exact_##p},       \
      {"plain_one_int8_" #p, 0, p, PMPD_INT8, 0, 4, 1, 64, 0, pack_int8, matmul_int8_##p}, \
      {"plain_int8_" #p, 0, p, PMPD_INT8, 1, 4, 1, 64, 0, pack_int8, matmul_int8_##p}
const struct pmpd_kernel pmpd_kernels[] = {KERNELS(3), KERNELS(4), KERNELS(6)};
const size_t pmpd_kernel_count = sizeof pmpd_kernels / sizeof *pmpd_kernels;
const char pmpd_any_name[] = "pmpd_any";

static uint16_t to_half(float x) {
  const uint16_t sign = signbit(x) ? 0x8000 : 0;
  int exponent;
  frexpf(x, &exponent);
  const int step = (exponent > -13 ? exponent : -13) - 11; /* of the last bit */
  const int count = (int)rintf(ldexpf(fabsf(x), -step));   /* below 1024 for subnormal numbers */
  return (uint16_t)(sign | (count ? ((step + 24) << 10) + count : 0));
}

static void rotate(const float *x, const float *cos, const float *sin, int32_t dim, int32_t pairs, float *to) {
  memcpy(to, x, (size_t)dim * sizeof *to);
  for (int32_t i = 0; i < pairs; i++) {
    to[i] = x[i] * cos[i] - x[pairs + i] * sin[i];
    to[pairs + i] = x[pairs + i] * cos[i] + x[i] * sin[i];
  }
}

/* A softmax whose sums are scaled again whenever a score is greater than all before it, over positions [begin, end). */
static void attend(const float *query, const uint16_t *keys, const uint16_t *values, float *y, float scale,
                   float softcap, int32_t dim, int32_t begin, int32_t end) {
  float greatest = -INFINITY, total = 0;
  memset(y, 0, (size_t)dim * sizeof *y);
  for (int32_t position = begin; position < end; position++) {
    float score = 0;
    for (int32_t i = 0; i < dim; i++) score += query[i] * from_half(keys[position * dim + i]) * scale;
    if (softcap > 0) score = softcap * tanhf(score / softcap);
    const float least = fmaxf(score, greatest), old = expf(greatest - least), weight = expf(score - least);
    for (int32_t i = 0; i < dim; i++) y[i] = y[i] * old + weight * from_half(values[position * dim + i]);
    total = total * old + weight;
    greatest = least;
  }
  for (int32_t i = 0; i < dim; i++) y[i] /= total;
}

enum { MAX_DIM = 64 };

static void append_dim(int32_t dim, const float *qkv, uint16_t *keys, uint16_t *values, const float *cos,
                       const float *sin, int32_t m, int32_t past, int32_t capacity, int32_t heads, int32_t kv_heads,
                       int32_t pairs, int32_t begin, int32_t end) {
  float rotated[MAX_DIM];
  for (int32_t head = begin; head < end; head++)
    for (int32_t token = 0; token < m; token++) {
      const float *key = qkv + ((int64_t)token * (heads + 2 * kv_heads) + heads + head) * dim;
      const float *value = key + kv_heads * dim;
      const int64_t place = past + token, at = ((int64_t)head * capacity + place) * dim;
      rotate(key, cos + place * pairs, sin + place * pairs, dim, pairs, rotated);
      for (int32_t i = 0; i < dim; i++) {
        keys[at + i] = to_half(rotated[i]);
        values[at + i] = to_half(value[i]);
      }
    }
}

static void attend_dim(int32_t dim, const float *qkv, const uint16_t *keys, const uint16_t *values, const float *cos,
                       const float *sin, float *y, float *rotated, float scale, float softcap, int32_t window,
                       int32_t past, int32_t capacity, int32_t heads, int32_t kv_heads, int32_t pairs, int32_t kv_head,
                       int32_t begin, int32_t end) {
  const int32_t group = heads / kv_heads;
  keys += (int64_t)kv_head * capacity * dim;
  values += (int64_t)kv_head * capacity * dim;
  for (int32_t query = begin; query < end; query++) {
    const int32_t token = query / group, head = kv_head * group + query % group, place = past + token;
    const float *row = qkv + ((int64_t)token * (heads + 2 * kv_heads) + head) * dim;
    rotate(row, cos + place * pairs, sin + place * pairs, dim, pairs, rotated);
    attend(rotated, keys, values, y + ((int64_t)token * heads + head) * dim, scale, softcap, dim,
           place >= window ? (int32_t)(place + 1 - window) : 0, place + 1);
  }
}

#define ATTENTION(dim)                                                                                                \
  static void append_##dim(const float *qkv, uint16_t *keys, uint16_t *values, const float *cos, const float *sin,     \
                           int32_t m, int32_t past, int32_t capacity, int32_t heads, int32_t kv_heads, int32_t pairs,  \
                           int32_t begin, int32_t end) {                                                               \
    append_dim(dim, qkv, keys, values, cos, sin, m, past, capacity, heads, kv_heads, pairs, begin, end);               \
  }                                                                                                                    \
  static void attend_##dim(const float *qkv, const uint16_t *keys, const uint16_t *values, const float *cos,           \
                           const float *sin, float *y, float *scratch, float scale, float softcap, int32_t window,     \
                           int32_t past, int32_t capacity, int32_t heads, int32_t kv_heads, int32_t pairs,             \
                           int32_t kv_head, int32_t begin, int32_t end) {                                              \
    attend_dim(dim, qkv, keys, values, cos, sin, y, scratch, scale, softcap, window, past, capacity, heads, kv_heads,  \
               pairs, kv_head, begin, end);                                                                            \
  }
ATTENTION(16)
ATTENTION(64)

const struct pmpd_attention pmpd_attentions[] = {{"plain_attention_16", 0, 16, 1, append_16, attend_16, attend_16},
                                                 {"plain_attention_64", 0, 64, 1, append_64, attend_64, attend_64}};
const size_t pmpd_attention_count = sizeof pmpd_attentions / sizeof *pmpd_attentions;
