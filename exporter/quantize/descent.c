/* The inner loops of `descent.py`, for a few rows of one layer. Rows are independent, so results do not depend on which
 * rows are worked on together. R rows, K columns, L parent codes, P precisions; arrays are row-major and contiguous. */

#include <stdint.h>
#include <string.h>

/* Of a tile of H. A tile of 256 KB stays in the second cache, a line's sums in registers. */
enum { TALL = 512, WIDE = 128, LANES = 16 };

typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4)));

/* Sort columns [n] by code: `order` [n] lists those of code c from ends[c] to ends[c + 1]. */
static void sort_by_code(const uint8_t *codes, int64_t n, int64_t L, uint16_t *order, uint16_t *ends) {
  uint16_t next[257] = {0};
  for (int64_t j = 0; j < n; j++) next[codes[j] + 1]++;
  for (int64_t c = 0; c < L; c++) next[c + 1] += next[c];
  memcpy(ends, next, sizeof(uint16_t) * (L + 1));
  for (int64_t j = 0; j < n; j++) order[next[codes[j]]++] = (uint16_t)j;
}

/* Add n lines of a tile to sum [WIDE]. */
static void add_lines(float *sum, const float *tile, const uint16_t *lines, int64_t n) {
  Lanes total[WIDE / LANES];
  memcpy(total, sum, sizeof total);
  for (int64_t i = 0; i < n; i++) {
    const Lanes *line = (const Lanes *)(tile + lines[i] * WIDE);
    for (int v = 0; v < WIDE / LANES; v++) total[v] += line[v];
  }
  memcpy(sum, total, sizeof total);
}

/* sums[r][a][k] = sum of H[j][k] over the columns j of code a, of each row r.
 * gram[r][a][b] = sum of sums[r][a][k] over the columns k of code b.
 * codes [R][K]; H [K][K]; sums [R][L][W], where W is K rounded up to WIDE; gram [R][L][L].
 *
 * H is read tile by tile. A tile stays in the cache while all rows add up its lines by code, in registers. */
void pmpd_sums(const uint8_t *codes, const float *H, float *sums, double *gram, int64_t R, int64_t K, int64_t L) {
  static _Thread_local float tile[TALL * WIDE];
  int64_t W = (K + WIDE - 1) / WIDE * WIDE;
  memset(sums, 0, sizeof(float) * R * L * W);
  memset(gram, 0, sizeof(double) * R * L * L);
  for (int64_t left = 0; left < K; left += WIDE) {
    int64_t wide = K - left < WIDE ? K - left : WIDE;
    for (int64_t top = 0; top < K; top += TALL) {
      int64_t tall = K - top < TALL ? K - top : TALL;
      for (int64_t j = 0; j < tall; j++) memcpy(tile + j * WIDE, H + (top + j) * K + left, sizeof(float) * wide);
      for (int64_t r = 0; r < R; r++) {
        uint16_t order[TALL], ends[257];
        sort_by_code(codes + r * K + top, tall, L, order, ends);
        for (int64_t a = 0; a < L; a++)
          add_lines(sums + (r * L + a) * W + left, tile, order + ends[a], ends[a + 1] - ends[a]);
      }
    }
    for (int64_t r = 0; r < R; r++)
      for (int64_t a = 0; a < L; a++) {
        const float *sum = sums + (r * L + a) * W + left;
        double *row = gram + (r * L + a) * L;
        for (int64_t k = 0; k < wide; k++) row[codes[r * K + left + k]] += sum[k];
      }
  }
}

static float dot(const float *a, const float *b, int64_t n) {
  float lanes[8] = {0}, sum = 0;
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int v = 0; v < 8; v++) lanes[v] += a[i + v] * b[i + v];
  for (; i < n; i++) sum += a[i] * b[i];
  for (int v = 0; v < 8; v++) sum += lanes[v];
  return sum;
}

/* One pass of coordinate descent over the columns: each weight takes the parent code of least loss, all others fixed.
 * codes [R][K], changed; H [K][K]; values [P][R][L], what each parent code stands for at each precision;
 * weight [P][R], of the precisions' losses; gradient [P][R][K] = H (w' - w), kept up to date.
 * Rows that matter to each other: between [R][R], what a row's gradient takes of another's, zeros on the diagonal;
 * before [P][R][K], the gradient that already has all of it. Both are NULL if rows are independent.
 * Returns how many codes have changed. */
int64_t pmpd_descend(uint8_t *codes, const float *H, const float *values, const float *weight, float *gradient,
                     const float *between, const float *before, int64_t P, int64_t R, int64_t K, int64_t L) {
  int64_t changes = 0;
  float change[P * R]; /* of each row's gradient in this column, since `before` */
  for (int64_t j = 0; j < K; j++) {
    for (int64_t s = 0; between && s < P * R; s++) change[s] = gradient[s * K + j] - before[s * K + j];
    for (int64_t r = 0; r < R; r++) {
      const float *h = H + j * K;
      uint8_t now = codes[r * K + j], best = now;
      float rise[256]; /* of the loss, for each code */
      for (int64_t c = 0; c < L; c++) rise[c] = 0;
      for (int64_t p = 0; p < P; p++) {
        const float *value = values + (p * R + r) * L;
        float slope = gradient[(p * R + r) * K + j], current = value[now], lambda = weight[p * R + r];
        if (between) slope += dot(between + r * R, change + p * R, R);
        for (int64_t c = 0; c < L; c++) {
          float step = value[c] - current;
          rise[c] += lambda * step * (2 * slope + h[j] * step);
        }
      }
      for (int64_t c = 0; c < L; c++)
        if (rise[c] < rise[best]) best = (uint8_t)c;
      if (best == now) continue;
      codes[r * K + j] = best;
      changes++;
      for (int64_t p = 0; p < P; p++) {
        const float *value = values + (p * R + r) * L;
        float step = value[best] - value[now], *g = gradient + (p * R + r) * K;
        if (step == 0) continue;
        for (int64_t k = 0; k < K; k++) g[k] += step * h[k];
        if (between) change[p * R + r] = g[j] - before[(p * R + r) * K + j];
      }
    }
  }
  return changes;
}
