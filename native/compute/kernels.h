/* Kinds of matrices, and which kernel gives each of them the bits of ggml's MUL_MAT_ID: found out once per kind (trial.h). */
#ifndef GGUF_PAGER_KERNELS_H
#define GGUF_PAGER_KERNELS_H

#include "compute/matrix.h"

/* From so many rows per expert on ggml may have other kernels than vec_dot, with other bits (ggml-cpu/tiled of llama-cpp-python
 * 0.3.36: 8 rows). */
enum { GP_MANY_ROWS = 8 };

typedef enum { GP_UNTRIED_KERNEL, GP_BY_DOT, GP_BY_GGML, GP_BY_NOBODY } gp_kernel;

/* Matrices of a kind, and what gives them ggml's bits: of experts with few rows, and with many. */
typedef struct {
    gp_matrix matrix;
    gp_kernel few, many;
} gp_matrices;

/* Made from zeros. */
typedef struct {
    gp_matrices *all;
    uint32_t     n;
} gp_kernels;

/* For so many slices, of a kind each at most; -ENOMEM. To be closed even if it fails. */
int  gp_kernels_open(gp_kernels *kernels, uint32_t n_slices);
void gp_kernels_close(gp_kernels *kernels);

/* NULL: ggml has no functions for such matrices that are known here. */
gp_matrices *gp_kernels_find(gp_kernels *kernels, const gp_ggml *ggml, const gp_slice_spec *spec);
/* Of an expert with so many rows. */
gp_kernel    gp_kernel_for(const gp_matrices *kind, uint32_t n_rows);
/* As in gp_compute_count_kinds. */
void         gp_kernels_count(const gp_kernels *kernels, uint32_t *n_same, uint32_t *n_other);

#endif
