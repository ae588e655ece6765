/* Runs compiled kernels on cases from standard input and writes their results to standard output, for every processor
 * that this program was linked for. Each buffer has a page without access on either side and 0xFF around it, inputs
 * are read-only: whatever a kernel reads or writes outside of what it was given ends the program with a line that says
 * so. 0xFF is also what outputs and scratch memory hold before a call: NaN, as float32. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "cpu.h"
#include "matmul.h"

/* As kernel_programs.py writes it; x, planes and codebook follow. */
struct header {
  char kernel[96];
  int32_t bits, groups, n, k, m, begin, end;
  int32_t slack, front; /* inputs and results lie `slack` elements from a page's end, or from its beginning */
};

struct area {
  const char *name;
  uint8_t *pages, *data;
  size_t pages_size, size;
};

enum { X, PLANES, CODEBOOK, PACKED, SCALE, SUM, SCRATCH, Y, AREAS };
enum { LACKS_FEATURES = 77 }; /* an exit code */

static struct area areas[AREAS];
static const char *running = "";
static size_t page;

static void fail(const char *what, const char *where) {
  fprintf(stderr, "%s: %s %s\n", running, what, where);
  _exit(1);
}

static void caught(int number, siginfo_t *info, void *context) {
  (void)context;
  const uint8_t *address = info->si_addr;
  if (number == SIGILL) fail("an instruction that this processor lacks", "");
  for (int i = 0; i < AREAS; i++)
    if (address >= areas[i].pages - page && address < areas[i].pages + areas[i].pages_size + page)
      fail("reads or writes outside of, or writes into,", areas[i].name);
  fail("reads or writes", "far outside of its arguments");
}

/* Give an area its memory: `size` bytes, `gap` bytes from the end of a page, or from the beginning of one. */
static void *place(int which, const char *name, size_t size, size_t gap, int front) {
  struct area *area = &areas[which];
  const size_t pages_size = (size + gap + page - 1) / page * page + (size + gap == 0 ? page : 0);
  uint8_t *all = mmap(NULL, pages_size + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED || mprotect(all + page, pages_size, PROT_READ | PROT_WRITE)) fail("no memory for", name);
  uint8_t *pages = all + page;
  *area = (struct area){name, pages, front ? pages + gap : pages + pages_size - gap - size, pages_size, size};
  memset(pages, 0xFF, pages_size);
  return area->data;
}

static void *read_input(int which, const char *name, size_t size, size_t gap, int front) {
  void *data = place(which, name, size, gap, front);
  if (size && fread(data, size, 1, stdin) != 1) fail("its case ends before", name);
  mprotect(areas[which].pages, areas[which].pages_size, PROT_READ);
  return data;
}

/* Look for bytes around an area that were written to, and give its memory back. */
static void release(int which) {
  const struct area *area = &areas[which];
  for (const uint8_t *byte = area->pages; byte < area->pages + area->pages_size; byte++)
    if (byte == area->data && area->size)
      byte += area->size - 1;
    else if (*byte != 0xFF)
      fail("writes outside of", area->name);
  munmap(area->pages - page, area->pages_size + 2 * page);
}

static void run_any(const struct header *h, const float *x, const uint8_t *planes, const uint16_t *codebook, float *y,
                    int32_t lines) {
  const int32_t row_bytes = (h->k + 7) / 8, group_bytes = (row_bytes + h->groups - 1) / h->groups;
  pmpd_any(planes, (int64_t)h->n * lines * 64, codebook, x, y, h->n, h->bits, h->groups, group_bytes, h->k, lines, h->m,
           h->begin, h->end);
}

/* As the operator does it: activations packed in parts; a kernel for one row of them is called for each. */
static void run_kernel(const struct header *h, const struct pmpd_kernel *kernel, const float *x, const uint8_t *planes,
                       const uint16_t *codebook, float *y, int32_t lines) {
  const int32_t m = kernel->many ? h->m : 1;
  const size_t vectors = (size_t)m * (size_t)lines;
  const int front = h->front;
  void *packed = place(PACKED, "packed", vectors * 512 * kernel->element_bytes, 0, front);
  float *scale = place(SCALE, "scale", vectors * 64, 0, front), *sum = place(SUM, "sum", (size_t)m * 4, 0, front);
  uint8_t *scratch = place(SCRATCH, "scratch", (size_t)(kernel->scratch_bytes + 63) / 64 * 64, 0, front);
  for (int32_t i = 0; i < h->m; i += m) {
    const float *rows = x + (int64_t)i * h->k;
    kernel->pack(rows, packed, scale, sum, h->k, lines, m / 3, m);
    kernel->pack(rows, packed, scale, sum, h->k, lines, 0, m / 3);
    kernel->matmul(planes, (int64_t)h->n * lines * 64, codebook, packed, scale, sum, y + (int64_t)i * h->n, h->n,
                   scratch, lines, m, h->begin, h->end);
  }
  for (int which = PACKED; which <= SCRATCH; which++) release(which);
}

static void run(const struct header *h) {
  const int32_t lines = (h->k + 511) / 512;
  const size_t m = (size_t)h->m, n = (size_t)h->n, bits = (size_t)h->bits, slack = (size_t)h->slack;
  const struct pmpd_kernel *kernel = NULL;
  for (size_t i = 0; i < pmpd_kernel_count; i++)
    if (!strcmp(pmpd_kernels[i].name, h->kernel)) kernel = &pmpd_kernels[i];
  if (!kernel && strcmp(pmpd_any_name, h->kernel)) fail("there is no such kernel", "");
  if (kernel && kernel->features & ~pmpd_cpu_features()) _exit(LACKS_FEATURES);
  const float *x = read_input(X, "x", m * (size_t)h->k * 4, slack * 4, h->front);
  const uint8_t *planes = read_input(PLANES, "planes", bits * n * (size_t)lines * 64, slack, h->front);
  const size_t entries = n * (size_t)h->groups << bits;
  const uint16_t *codebook = read_input(CODEBOOK, "codebook", entries * 2, slack * 2, h->front);
  float *y = place(Y, "y", m * n * 4, slack * 4, h->front);
  if (kernel)
    run_kernel(h, kernel, x, planes, codebook, y, lines);
  else
    run_any(h, x, planes, codebook, y, lines);
  fwrite(y, 4, m * n, stdout);
  for (int which = X; which <= CODEBOOK; which++) release(which);
  release(Y);
}

int main(void) {
  const int signals[] = {SIGSEGV, SIGBUS, SIGILL};
  for (size_t i = 0; i < sizeof signals / sizeof *signals; i++)
    sigaction(signals[i], &(struct sigaction){.sa_sigaction = caught, .sa_flags = SA_SIGINFO}, NULL);
  page = (size_t)sysconf(_SC_PAGESIZE);
  struct header header;
  while (fread(&header, sizeof header, 1, stdin) == 1) {
    running = header.kernel;
    run(&header);
  }
  return fflush(stdout) ? 1 : 0;
}
