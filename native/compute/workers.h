/* What threads compute with: ggml's own operations, on a few rows at a time, in small graphs that each thread has for itself. */
#ifndef GGUF_PAGER_WORKERS_H
#define GGUF_PAGER_WORKERS_H

#include "compute/matrix.h"
#include "compute/shape.h"

enum { GP_WORKERS = 64 };       /* threads that compute */

typedef struct gp_workers gp_workers;

/* The elements of a tensor of three dimensions, and the bytes from one to the next. */
void gp_set_size(ggml_tensor *tensor, int64_t ne0, int64_t ne1, int64_t ne2, size_t nb0, size_t nb1, size_t nb2);

int  gp_workers_open(gp_workers **out, const gp_ggml *ggml);
void gp_workers_close(gp_workers *workers);

/* Rows that go through the steps between an expert's first matrices and its last: of each result one after the other. */
typedef struct {
    uint32_t       n;
    float         *first[GP_FIRST], *steps[GP_STEPS];
    const int32_t *experts;     /* that each belongs to, for steps that look something up by it */
} gp_step_rows;

/* These two in any thread, each with a worker of its own. Not 0: ggml could not.
 * By ggml's MUL_MAT_ID: n converted inputs, one after the other, with a part of a matrix. The results for it are `row_bytes`
 * apart. */
int  gp_worker_multiply(gp_workers *workers, uint32_t worker, const gp_matrix *matrix, const gp_matrix_part *part,
                        const char *inputs, uint32_t n, float *results, size_t row_bytes);
/* What lies between, by ggml's own operations. */
int  gp_worker_step(gp_workers *workers, uint32_t worker, const gp_nodes *nodes, const gp_step_rows *rows);

#endif
