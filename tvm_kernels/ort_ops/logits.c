/* The operator pmpd::BitplaneLogits: the product of BitplaneMatMul, of which only what can matter is finished.
 *
 * X[..., M, K], planes[P, N, S], codebook[N, 1, 2^P], coarse_codebook[N, 1, 2^c], basis[D, K], bound[B, N], margin[1],
 * bias[N]? → Y[..., M, N].
 *
 * One row of activations is first multiplied with the first c planes of all rows. What the other planes may change of
 * row n is at most the sum over the groups g of reach[g] * bound[g, n]: reach is the norm of the activations in
 * direction group g of the basis, and in the last group of what the basis leaves (Cauchy-Schwarz in each group). Group
 * g < B - 1 has the directions 4^(g - 1) to 4^g - 1; bound is made with everything that rounding does
 * (exporter/bundle/coarse.py). Rows that can come within `margin` of the greatest result are then computed from all
 * planes, by the same kernel as BitplaneMatMul's, bit for bit. An infinite margin asks for the whole product. */
#include <float.h>
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "product.h"

enum { X, PLANES, CODEBOOK, COARSE_CODEBOOK, BASIS, BOUND, MARGIN, BIAS };
enum { GROUP = 32 /* activations that share an 8-bit scale */, MAX_GROUPS = 8, SUMS = 8 };

static const struct pmpd_value INPUTS[] = {
    [X] = {"X", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 0},
    [PLANES] = {"planes", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, 0},
    [CODEBOOK] = {"codebook", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, 0},
    [COARSE_CODEBOOK] = {"coarse_codebook", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, 0},
    [BASIS] = {"basis", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 0},
    [BOUND] = {"bound", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, 0},
    [MARGIN] = {"margin", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 0},
    [BIAS] = {"bias", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 1},
};
static const struct pmpd_value OUTPUTS[] = {{"Y", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 0}};

struct logits {
  struct pmpd_operator operator;
  struct pmpd_choices choices;
};

/* One call of the operator. */
struct search {
  struct pmpd_product fine, coarse;
  const float *basis;
  const uint16_t *bound;
  int32_t directions, groups, chunk;
  float margin, reach[MAX_GROUPS];
  float *upper;         /* of each row; infinite where it is not a number */
  struct best *best;    /* of each chunk */
  float threshold;
  atomic_llong finished; /* rows of weights */
};

/* What a chunk of coarse results says. */
struct best {
  float upper, lower; /* the greatest upper and lower limit */
  int32_t row;        /* of that lower limit */
};

/* Read and check the inputs that BitplaneMatMul does not have. */
static OrtStatus *open_search(const struct pmpd_operator *operator, OrtKernelContext *context,
                              const struct pmpd_choices *choices, struct search *search) {
  struct pmpd_tensor codebook, basis, bound, margin;
  const struct pmpd_product *fine = &search->fine;
  TRY(pmpd_read_input(operator, context, COARSE_CODEBOOK, &codebook));
  TRY(pmpd_read_input(operator, context, BASIS, &basis));
  TRY(pmpd_read_input(operator, context, BOUND, &bound));
  TRY(pmpd_read_input(operator, context, MARGIN, &margin));
  int32_t bits = 1;
  while (bits < fine->bits && codebook.rank == 3 && codebook.shape[2] != 1 << bits) bits++;
  if (codebook.rank != 3 || codebook.shape[0] != fine->n || codebook.shape[1] != fine->groups || bits >= fine->bits)
    return pmpd_refuse_shape(operator, COARSE_CODEBOOK, &codebook, "[%d, %d, 2^c] with c below %d", fine->n,
                             fine->groups, fine->bits);
  if (basis.rank != 2 || basis.shape[1] != fine->k || basis.shape[0] < 1 || basis.shape[0] > INT32_MAX)
    return pmpd_refuse_shape(operator, BASIS, &basis, "[directions, %d]", fine->k);
  int32_t groups = 2;
  for (int64_t directions = 1; directions < basis.shape[0]; directions *= 4) groups++;
  if (groups > MAX_GROUPS || bound.rank != 2 || bound.shape[0] != groups || bound.shape[1] != fine->n)
    return pmpd_refuse_shape(operator, BOUND, &bound, "[%d, %d] for %lld directions (%d groups are the most)", groups,
                             fine->n, (long long)basis.shape[0], MAX_GROUPS);
  if (margin.rank > 1 || (margin.rank == 1 && margin.shape[0] != 1))
    return pmpd_refuse_shape(operator, MARGIN, &margin, "[1]");
  search->basis = basis.data;
  search->directions = (int32_t)basis.shape[0];
  search->bound = bound.data;
  search->groups = groups;
  search->margin = *(const float *)margin.data;
  search->coarse = *fine;
  search->coarse.codebook = codebook.data;
  search->coarse.bits = bits;
  search->coarse.kernel = fine->groups == 1 ? choices->kernels[0][bits - 1] : NULL;
  return NULL;
}

/* Whether there is something to gain, and kernels of one kind to do it with. */
static int worth_it(const struct search *search) {
  const struct pmpd_kernel *fine = search->fine.kernel, *coarse = search->coarse.kernel;
  return search->fine.m == 1 && search->fine.n > 0 && search->margin < INFINITY && fine && coarse &&
         fine->pack == coarse->pack && fine->accuracy == coarse->accuracy &&
         fine->scratch_bytes <= PMPD_MAX_SCRATCH && coarse->scratch_bytes <= PMPD_MAX_SCRATCH && coarse->chunk % fine->rows == 0;
}

/* The activations as the kernels see them: 8-bit steps times a scale for every 32 of them, or as they are. */
static void seen_by_kernels(const struct search *search, double *x) {
  const struct pmpd_product *product = &search->fine;
  for (int32_t first = 0; first < product->k; first += GROUP) {
    const int32_t count = product->k - first < GROUP ? product->k - first : GROUP;
    const float *values = product->x + first;
    float largest = 0;
    for (int32_t i = 0; i < count; i++) largest = fabsf(values[i]) > largest ? fabsf(values[i]) : largest;
    const float scale = largest * (1 / 127.0f), inverse = 127.0f / (largest > 1e-30f ? largest : 1e-30f);
    for (int32_t i = 0; i < count; i++)
      x[first + i] = product->kernel->accuracy == PMPD_INT8 ? rint((double)(values[i] * inverse)) * scale : values[i];
  }
}

static double dot(const double *x, const float *direction, int32_t k) {
  double sums[SUMS] = {0}, total = 0;
  int32_t i = 0;
  for (; i + SUMS <= k; i += SUMS)
    for (int32_t j = 0; j < SUMS; j++) sums[j] += x[i + j] * direction[i + j];
  for (; i < k; i++) total += x[i] * direction[i];
  for (int32_t j = 0; j < SUMS; j++) total += sums[j];
  return total;
}

/* Compute the norm of the activations in each group of directions; memory: 2 k numbers. */
static void measure(struct search *search, double *memory) {
  const int32_t k = search->fine.k;
  double *x = memory, *rest = memory + k, square = 0;
  seen_by_kernels(search, x);
  for (int32_t i = 0; i < k; i++) rest[i] = x[i];
  int32_t group = 0;
  for (int32_t number = 0, end = 1; number < search->directions; number++) {
    const float *direction = search->basis + (int64_t)number * k;
    const double part = dot(x, direction, k);
    for (int32_t i = 0; i < k; i++) rest[i] -= part * direction[i];
    square += part * part;
    if (number + 1 < end && number + 1 < search->directions) continue;
    search->reach[group++] = (float)sqrt(square);
    square = 0;
    end *= 4;
  }
  for (int32_t i = 0; i < k; i++) square += rest[i] * rest[i];
  search->reach[group] = (float)sqrt(square);
  /* For the rounding of these numbers, and of the limits that are made of them in float32. */
  for (int32_t i = 0; i <= group; i++) search->reach[i] *= 1 + 1e-5f;
}

/* float16 to float32, of numbers that are not negative and finite. */
static float from_half(uint16_t half) {
  union {
    uint32_t bits;
    float value;
  } number = {(uint32_t)half << 13};
  return number.value * 0x1p112f;
}

/* Compute coarse results of a chunk, and their limits. */
static void look(void *data, int32_t begin, int32_t end) {
  struct search *search = data;
  const float *y = search->coarse.y;
  float *upper = search->upper;
  pmpd_product_rows(&search->coarse, begin, end);
  struct best best = {-INFINITY, -INFINITY, begin};
  for (int32_t i = begin; i < end; i++) upper[i] = 0; /* limits at first */
  for (int32_t group = 0; group < search->groups; group++) {
    const uint16_t *bound = search->bound + (int64_t)group * search->fine.n;
    const float reach = search->reach[group];
    for (int32_t i = begin; i < end; i++) upper[i] += reach * from_half(bound[i]);
  }
  for (int32_t i = begin; i < end; i++) {
    const float limit = upper[i] + 8 * FLT_EPSILON * fabsf(y[i]) + FLT_MIN; /* the bias is added to rounded numbers */
    const float lower = y[i] - limit;
    upper[i] = y[i] + limit;
    if (!(upper[i] < INFINITY)) upper[i] = INFINITY; /* NaN too */
    if (upper[i] > best.upper) best.upper = upper[i];
    if (lower > best.lower) {
      best.lower = lower;
      best.row = i;
    }
  }
  search->best[begin / search->chunk] = best;
}

/* Compute the outputs of [begin, end) that may matter from all planes. */
static void finish(void *data, int32_t begin, int32_t end) {
  struct search *search = data;
  if (search->best[begin / search->chunk].upper < search->threshold) return;
  const int32_t rows = search->fine.kernel->rows;
  int32_t first = -1, finished = 0; /* the first row of a stretch that matters */
  for (int32_t tile = begin; tile < end; tile += rows) {
    const int32_t stop = end - tile < rows ? end : tile + rows;
    int matters = 0;
    for (int32_t i = tile; i < stop; i++) matters |= !(search->upper[i] < search->threshold);
    if (matters && first < 0) first = tile;
    if (first >= 0 && (!matters || stop == end)) {
      const int32_t last = matters ? stop : tile;
      pmpd_product_rows(&search->fine, first, last);
      finished += last - first;
      first = -1;
    }
  }
  atomic_fetch_add_explicit(&search->finished, finished, memory_order_relaxed);
}

/* Set the threshold: the best result that is certain, less the margin. The best candidate is finished for it. */
static void set_threshold(struct search *search) {
  const int32_t n = search->fine.n, rows = search->fine.kernel->rows;
  struct best best = search->best[0];
  for (int32_t i = 1; i < (n + search->chunk - 1) / search->chunk; i++)
    if (search->best[i].lower > best.lower) best = search->best[i];
  const int32_t begin = best.row / rows * rows;
  pmpd_product_rows(&search->fine, begin, n - begin < rows ? n : begin + rows);
  const float result = search->fine.y[best.row];
  search->threshold = (result > best.lower ? result : best.lower) - (search->margin > 0 ? search->margin : 0);
}

static OrtStatus *run_search(const struct pmpd_operator *operator, const OrtKernelContext *context,
                             struct search *search) {
  const int32_t n = search->fine.n;
  search->chunk = search->coarse.kernel->chunk;
  const size_t chunks = ((size_t)n + (size_t)search->chunk - 1) / (size_t)search->chunk;
  double *memory = malloc(2 * (size_t)search->fine.k * sizeof *memory);
  search->upper = malloc((size_t)n * sizeof *search->upper);
  search->best = malloc(chunks * sizeof *search->best);
  OrtStatus *status = memory && search->upper && search->best ? NULL : pmpd_no_memory(operator->settings->api);
  if (!status) status = pmpd_product_pack(operator, context, &search->fine);
  if (!status) {
    search->coarse.packed = search->fine.packed;
    search->coarse.scale = search->fine.scale;
    search->coarse.sum = search->fine.sum;
    measure(search, memory);
    status = pmpd_share(operator, context, look, search, n, search->chunk);
    if (!status) {
      set_threshold(search);
      status = pmpd_share(operator, context, finish, search, n, search->chunk);
    }
    free(search->fine.memory);
  }
  free(memory);
  free(search->upper);
  free(search->best);
  return status;
}

static OrtStatus *compute(struct pmpd_operator *operator, OrtKernelContext *context, struct pmpd_ran *ran) {
  const struct pmpd_choices *choices = &((const struct logits *)operator)->choices;
  struct search search = {0};
  TRY(pmpd_product_open(operator, context, BIAS, choices, &search.fine));
  TRY(open_search(operator, context, choices, &search));
  const int coarse = worth_it(&search);
  TRY(coarse ? run_search(operator, context, &search) : pmpd_product_run(operator, context, &search.fine));
  *ran = (struct pmpd_ran){
      .kernel = pmpd_kernel_name(search.fine.kernel),
      .bits = search.fine.bits,
      .n = search.fine.n,
      .k = search.fine.k,
      .finished = (uint64_t)(coarse ? search.finished : search.fine.n),
  };
  return NULL;
}

static OrtStatus *create(struct pmpd_operator *operator, const OrtKernelInfo *info) {
  return pmpd_product_create(operator, info, &((struct logits *)operator)->choices);
}

/* Its kernels are those of BitplaneMatMul. */
static void list_kernels(struct pmpd_text *text, uint32_t features, const char **separator) {}

const struct pmpd_op pmpd_logits_op = {
    .name = "BitplaneLogits",
    .inputs = INPUTS,
    .outputs = OUTPUTS,
    .input_count = PMPD_COUNT(INPUTS),
    .output_count = PMPD_COUNT(OUTPUTS),
    .node_size = sizeof(struct logits),
    .create = create,
    .compute = compute,
    .list_kernels = list_kernels,
};
