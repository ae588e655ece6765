/* The operator pmpd::BitplaneMatMul: X[..., M, K], planes[p, N, S], codebook[N, G, 2^p], bias[N]? → Y[..., M, N].
 * Chooses a kernel; what it shares with other products is in product.c. */
#include "product.h"

enum { X, PLANES, CODEBOOK, BIAS };

static const struct pmpd_value INPUTS[] = {
    [X] = {"X", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 0},
    [PLANES] = {"planes", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, 0},
    [CODEBOOK] = {"codebook", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, 0},
    [BIAS] = {"bias", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 1},
};
static const struct pmpd_value OUTPUTS[] = {{"Y", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 0}};

struct matmul {
  struct pmpd_operator operator;
  struct pmpd_choices choices;
};

static const struct pmpd_kernel *first_fit(uint32_t features, int accuracy, int many, int bits) {
  for (size_t i = 0; i < pmpd_kernel_count; i++) {
    const struct pmpd_kernel *kernel = &pmpd_kernels[i];
    if (kernel->bits == bits && kernel->accuracy == accuracy && kernel->many == many &&
        (kernel->features & ~features) == 0)
      return kernel;
  }
  return NULL;
}

const struct pmpd_kernel *pmpd_choose_matmul(uint32_t features, int accuracy, int many, int bits) {
  const struct pmpd_kernel *kernel = first_fit(features, accuracy, many, bits);
  if (!kernel && !many) kernel = first_fit(features, accuracy, 1, bits);
  if (!kernel && accuracy == PMPD_INT8) kernel = pmpd_choose_matmul(features, PMPD_EXACT, many, bits);
  return kernel;
}

static OrtStatus *compute(struct pmpd_operator *operator, OrtKernelContext *context, struct pmpd_ran *ran) {
  struct pmpd_product product;
  TRY(pmpd_product_open(operator, context, BIAS, &((const struct matmul *)operator)->choices, &product));
  TRY(pmpd_product_run(operator, context, &product));
  *ran = (struct pmpd_ran){
      .kernel = pmpd_kernel_name(product.kernel),
      .bits = product.bits,
      .n = product.n,
      .k = product.k,
      .finished = (uint64_t)product.n,
  };
  return NULL;
}

static OrtStatus *create(struct pmpd_operator *operator, const OrtKernelInfo *info) {
  return pmpd_product_create(operator, info, &((struct matmul *)operator)->choices);
}

static void list_kernels(struct pmpd_text *text, uint32_t features, const char **separator) {
  for (int accuracy = PMPD_EXACT; accuracy <= PMPD_INT8; accuracy++)
    for (int many = 0; many <= 1; many++)
      for (int bits = 1; bits <= 8; bits++) {
        pmpd_append(text,
                    "%s{\"op\": \"BitplaneMatMul\", \"bits\": %d, \"accuracy\": \"%s\", \"rows\": \"%s\", "
                    "\"kernel\": ",
                    *separator, bits, accuracy == PMPD_INT8 ? "int8" : "exact", many ? "many" : "one");
        pmpd_append_string(text, pmpd_kernel_name(pmpd_choose_matmul(features, accuracy, many, bits)));
        pmpd_append(text, "}");
        *separator = ", ";
      }
}

const struct pmpd_op pmpd_matmul_op = {
    .name = "BitplaneMatMul",
    .inputs = INPUTS,
    .outputs = OUTPUTS,
    .input_count = PMPD_COUNT(INPUTS),
    .output_count = PMPD_COUNT(OUTPUTS),
    .node_size = sizeof(struct matmul),
    .create = create,
    .compute = compute,
    .list_kernels = list_kernels,
};
