/* The inner loops of `descent.py`, for a few rows of one layer. Rows are independent, so results do not depend on which
 * rows are worked on together. R rows, K columns, L parent codes, P precisions; arrays are row-major and contiguous. */

#include <stdint.h>
#include <string.h>

enum { BLOCK = 256 };

/* gram[r][a][b] = sum of H[j][k] over the columns j of code a and k of code b, of each row r.
 * codes [R][K]; H [K][K]; gram [R][L][L]; sums [R][L][K] is scratch: rows of H added up by code. */
void pmpd_gram(const uint8_t *codes, const float *H, double *gram, float *sums, int64_t R, int64_t K, int64_t L) {
  memset(sums, 0, sizeof(float) * R * L * K);
  /* A block of columns at a time, whose sums stay in the cache. */
  for (int64_t start = 0; start < K; start += BLOCK) {
    int64_t end = start + BLOCK < K ? start + BLOCK : K;
    for (int64_t j = 0; j < K; j++)
      for (int64_t r = 0; r < R; r++) {
        float *sum = sums + (r * L + codes[r * K + j]) * K;
        const float *h = H + j * K;
        for (int64_t k = start; k < end; k++) sum[k] += h[k];
      }
  }
  memset(gram, 0, sizeof(double) * R * L * L);
  for (int64_t r = 0; r < R; r++)
    for (int64_t a = 0; a < L; a++) {
      double *row = gram + (r * L + a) * L;
      const float *sum = sums + (r * L + a) * K;
      for (int64_t k = 0; k < K; k++) row[codes[r * K + k]] += sum[k];
    }
}

/* One pass of coordinate descent over the columns: each weight takes the parent code of least loss, all others fixed.
 * codes [R][K], changed; H [K][K]; values [P][R][L], what each parent code stands for at each precision;
 * weight [P][R], of the precisions' losses; gradient [P][R][K] = H (w' - w), kept up to date.
 * Returns how many codes have changed. */
int64_t pmpd_descend(uint8_t *codes, const float *H, const float *values, const float *weight,
                                               float *gradient, int64_t P, int64_t R, int64_t K, int64_t L) {
  int64_t changes = 0;
  for (int64_t j = 0; j < K; j++)
    for (int64_t r = 0; r < R; r++) {
      const float *h = H + j * K;
      uint8_t now = codes[r * K + j], best = now;
      float rise[256]; /* of the loss, for each code */
      for (int64_t c = 0; c < L; c++) rise[c] = 0;
      for (int64_t p = 0; p < P; p++) {
        const float *value = values + (p * R + r) * L;
        float slope = 2 * gradient[(p * R + r) * K + j], current = value[now], lambda = weight[p * R + r];
        for (int64_t c = 0; c < L; c++) {
          float step = value[c] - current;
          rise[c] += lambda * step * (slope + h[j] * step);
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
      }
    }
  return changes;
}
