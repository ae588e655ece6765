/* The inner loops of `descent.py`, for a few rows of one layer. Rows are independent, so results do not depend on which
 * rows are worked on together. R rows, K columns, L parent codes, P precisions; arrays are row-major and contiguous. */

#include <math.h>
#include <stdint.h>
#include <string.h>

/* Of a tile of H. A tile of 256 KB stays in the second cache, a line's sums in registers. */
enum { TALL = 512, WIDE = 128, LANES = 16 };

/* Columns that the descent looks at together: a block of H of 16 KB stays in the first cache. A line is longer, so that
 * a column's places do not share a few lines of the cache. */
enum { BLOCK = 64, LINE = BLOCK + LANES };

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

/* Add n lines of a block, each times its step, to sum [BLOCK]. */
static void add_scaled_lines(float *sum, const float *block, const float *steps, const uint8_t *lines, int64_t n) {
  Lanes total[BLOCK / LANES];
  memcpy(total, sum, sizeof total);
  for (int64_t i = 0; i < n; i++) {
    const Lanes *line = (const Lanes *)(block + lines[i] * BLOCK);
    for (int v = 0; v < BLOCK / LANES; v++) total[v] += steps[i] * line[v];
  }
  memcpy(sum, total, sizeof total);
}

/* gram[a][codes[k]] += sums[a][k] for n columns k, of L codes a. */
static void add_by_code(double *gram, const float *sums, int64_t W, const uint8_t *codes, int64_t n, int64_t L) {
  enum { ROWS = 4 }; /* side by side, as an addition waits for the one before to the same place */
  int64_t a = 0;
  for (; a + ROWS <= L; a += ROWS)
    for (int64_t k = 0; k < n; k++)
      for (int64_t v = a; v < a + ROWS; v++) gram[v * L + codes[k]] += sums[v * W + k];
  for (; a < L; a++)
    for (int64_t k = 0; k < n; k++) gram[a * L + codes[k]] += sums[a * W + k];
}

/* sums[r][a][k] = sum of H[j][k] over the columns j of code a, of each row r.
 * gram[r][a][b] = sum of sums[r][a][k] over the columns k of code b.
 * codes [R][K]; H [K][K]; sums [R][L][W], where W is K rounded up to WIDE; gram [R][L][L].
 * Scratch: order [R][K]; ends [R][number of tiles of TALL][L + 1].
 *
 * H is read tile by tile. A tile stays in the cache while all rows add up its lines by code, in registers. */
void pmpd_sums(const uint8_t *codes, const float *H, float *sums, double *gram, uint16_t *order, uint16_t *ends,
               int64_t R, int64_t K, int64_t L) {
  static _Thread_local float tile[TALL * WIDE];
  int64_t W = (K + WIDE - 1) / WIDE * WIDE, T = (K + TALL - 1) / TALL;
  memset(sums, 0, sizeof(float) * R * L * W);
  memset(gram, 0, sizeof(double) * R * L * L);
  for (int64_t r = 0; r < R; r++)
    for (int64_t t = 0; t < T; t++) {
      int64_t top = t * TALL, tall = K - top < TALL ? K - top : TALL;
      sort_by_code(codes + r * K + top, tall, L, order + r * K + top, ends + (r * T + t) * (L + 1));
    }
  for (int64_t left = 0; left < K; left += WIDE) {
    int64_t wide = K - left < WIDE ? K - left : WIDE;
    for (int64_t t = 0; t < T; t++) {
      int64_t top = t * TALL, tall = K - top < TALL ? K - top : TALL;
      for (int64_t j = 0; j < tall; j++) memcpy(tile + j * WIDE, H + (top + j) * K + left, sizeof(float) * wide);
      for (int64_t r = 0; r < R; r++) {
        const uint16_t *lines = order + r * K + top, *end = ends + (r * T + t) * (L + 1);
        for (int64_t a = 0; a < L; a++)
          if (end[a] < end[a + 1]) add_lines(sums + (r * L + a) * W + left, tile, lines + end[a], end[a + 1] - end[a]);
      }
    }
    for (int64_t r = 0; r < R; r++)
      add_by_code(gram + r * L * L, sums + r * L * W + left, W, codes + r * K + left, wide, L);
  }
}

/* y [n] += a x [n]. */
static void add_scaled(float *y, float a, const float *x, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] += a * x[i];
}

/* Return the code of least rise [L and LANES times infinity], `now` if none is lower than its own. */
static uint8_t least(const float *rise, int64_t L, uint8_t now) {
  float lanes[LANES], lowest;
  memcpy(lanes, rise, sizeof lanes);
  for (int64_t c = LANES; c < L; c += LANES)
    for (int v = 0; v < LANES; v++) lanes[v] = rise[c + v] < lanes[v] ? rise[c + v] : lanes[v];
  lowest = lanes[0];
  for (int v = 1; v < LANES; v++) lowest = lanes[v] < lowest ? lanes[v] : lowest;
  if (!(lowest < rise[now])) return now;
  int32_t code = (int32_t)L;
  for (int32_t c = 0; c < L; c++) code = rise[c] == lowest && c < code ? c : code;
  return (uint8_t)code;
}

/* What a pass of `pmpd_descend` works on; S = P R lines of gradients. */
typedef struct {
  uint8_t *codes;                                    /* [R][K] */
  const float *H, *values, *weight;                  /* [K][K]; [P][R][L]; [P][R] */
  float *gradient;                                   /* [P][R][K] */
  const float *between, *before;                     /* [R][R]; [P][R][K] */
  float *steps;                                      /* [P][R][K]: by how much has changed what codes stand for, */
  uint8_t *places, *counts;                          /* [P][R][K]: where in its block of columns; [blocks][P][R] */
  int64_t P, R, K, L, last, changes;
} Pass;

/* Go through a block of columns, up to BLOCK of them. */
static void descend_block(Pass *pass, int64_t left, int64_t wide) {
  int64_t P = pass->P, R = pass->R, K = pass->K, L = pass->L, S = P * R;
  float local[S * LINE], before[S * LINE]; /* gradients of these columns */
  float others[S]; /* what each row's gradient in a column takes of what others have changed */
  float rise[256 + LANES]; /* of the loss, for each code */
  uint8_t *counts = pass->counts + left / BLOCK * S;
  memset(counts, 0, S);
  for (int64_t c = L; c < L + LANES; c++) rise[c] = INFINITY;
  for (int64_t s = 0; s < S; s++) memcpy(local + s * LINE, pass->gradient + s * K + left, sizeof(float) * wide);
  for (int64_t s = 0; pass->between && s < S; s++)
    memcpy(before + s * LINE, pass->before + s * K + left, sizeof(float) * wide);
  for (int64_t j = 0; j < wide; j++) {
    const float *h = pass->H + (left + j) * K + left;
    memset(others, 0, sizeof others);
    for (int64_t s = 0; pass->between && s < S; s++) {
      float change = local[s * LINE + j] - before[s * LINE + j];
      if (change != 0) add_scaled(others + s / R * R, change, pass->between + s % R * R, R);
    }
    for (int64_t r = 0; r < R; r++) {
      uint8_t *code = pass->codes + r * K + left + j, now = *code;
      for (int64_t c = 0; c < L; c++) rise[c] = 0;
      for (int64_t s = r; s < S; s += R) {
        const float *value = pass->values + s * L;
        float slope = local[s * LINE + j] + others[s], current = value[now];
        for (int64_t c = 0; c < L; c++) {
          float step = value[c] - current;
          rise[c] += pass->weight[s] * step * (2 * slope + h[j] * step);
        }
      }
      *code = least(rise, L, now);
      if (*code == now) continue;
      pass->changes++;
      for (int64_t s = r; s < S; s += R) {
        float step = pass->values[s * L + *code] - pass->values[s * L + now];
        if (step == 0) continue;
        add_scaled(local + s * LINE, step, h, wide);
        if (pass->between) add_scaled(others + s - r, step * h[j], pass->between + r * R, R);
        pass->steps[s * K + left + counts[s]] = step;
        pass->places[s * K + left + counts[s]++] = (uint8_t)j;
      }
    }
  }
  for (int64_t s = 0; s < S; s++) memcpy(pass->gradient + s * K + left, local + s * LINE, sizeof(float) * wide);
}

/* Tell the gradients of other columns what has changed in those from `left` to `right`. */
static void spread(Pass *pass, int64_t left, int64_t right, int64_t first, int64_t end) {
  int64_t K = pass->K, S = pass->P * pass->R;
  float tile[BLOCK * BLOCK] = {0}, line[BLOCK] = {0};
  for (int64_t to = first; to < end; to += BLOCK) {
    int64_t wide = end - to < BLOCK ? end - to : BLOCK;
    for (int64_t from = left; from < right; from += BLOCK) {
      int64_t tall = right - from < BLOCK ? right - from : BLOCK;
      const uint8_t *counts = pass->counts + from / BLOCK * S;
      for (int64_t j = 0; j < tall; j++) memcpy(tile + j * BLOCK, pass->H + (from + j) * K + to, sizeof(float) * wide);
      for (int64_t s = 0; s < S; s++) {
        if (!counts[s]) continue;
        float *gradient = pass->gradient + s * K + to, *sum = wide == BLOCK ? gradient : line;
        if (wide < BLOCK) memcpy(line, gradient, sizeof(float) * wide);
        add_scaled_lines(sum, tile, pass->steps + s * K + from, pass->places + s * K + from, counts[s]);
        if (wide < BLOCK) memcpy(gradient, line, sizeof(float) * wide);
      }
    }
  }
}

/* Go through some columns, half by half, so that what is worked on stays in the caches. */
static void descend(Pass *pass, int64_t left, int64_t right) {
  if (right - left <= BLOCK) {
    descend_block(pass, left, right - left);
    return;
  }
  int64_t blocks = (right - left + BLOCK - 1) / BLOCK, middle = left + blocks / 2 * BLOCK;
  descend(pass, left, middle);
  spread(pass, left, middle, middle, right);
  descend(pass, middle, right);
  if (!pass->last) spread(pass, middle, right, left, middle);
}

/* One pass of coordinate descent over the columns: each weight takes the parent code of least loss, all others fixed.
 * codes [R][K], changed; H [K][K]; values [P][R][L], what each parent code stands for at each precision;
 * weight [P][R], of the precisions' losses; gradient [P][R][K] = H (w' - w), kept up to date, in the last pass only as
 * far as it is needed itself.
 * Rows that matter to each other: between [R][R], what others' gradients take of a row's, zeros on the diagonal;
 * before [P][R][K], the gradient that already has all of it. Both are NULL if rows are independent.
 * Scratch: steps and places [P][R][K]; counts [K / BLOCK, rounded up][P][R].
 * Returns how many codes have changed. */
int64_t pmpd_descend(uint8_t *codes, const float *H, const float *values, const float *weight, float *gradient,
                     const float *between, const float *before, float *steps, uint8_t *places, uint8_t *counts,
                     int64_t P, int64_t R, int64_t K, int64_t L, int64_t last) {
  Pass pass = {codes, H, values, weight, gradient, between, before, steps, places, counts, P, R, K, L, last, 0};
  descend(&pass, 0, K);
  return pass.changes;
}
