#include "compute/kernels.h"

#include <errno.h>
#include <stdlib.h>

int gp_kernels_open(gp_kernels *k, uint32_t n_slices) {
    *k = (gp_kernels) { .all = calloc(n_slices, sizeof *k->all) };
    return k->all ? 0 : -ENOMEM;
}

void gp_kernels_close(gp_kernels *k) {
    free(k->all);
    *k = (gp_kernels) { 0 };
}

gp_matrices *gp_kernels_find(gp_kernels *k, const gp_ggml *ggml, const gp_slice_spec *spec) {
    for (uint32_t i = 0; i < k->n; i++) {
        const gp_matrix *m = &k->all[i].matrix;
        if (m->type == spec->type && m->n_columns == spec->ne[0] && m->n_rows == spec->ne[1]) {
            return &k->all[i];
        }
    }
    gp_matrices *new = &k->all[k->n];
    if (!ggml->graphs.compute || !gp_matrix_find(&new->matrix, ggml, spec->type, spec->ne[0], spec->ne[1])) {
        return NULL;
    }
    k->n++;
    return new;
}

gp_kernel gp_kernel_for(const gp_matrices *kind, uint32_t n_rows) {
    return n_rows < GP_MANY_ROWS ? kind->few : kind->many;
}

void gp_kernels_count(const gp_kernels *k, uint32_t *n_same, uint32_t *n_other) {
    *n_same = *n_other = 0;
    for (uint32_t i = 0; i < k->n; i++) {
        const gp_matrices *m = &k->all[i];
        const bool is_other = m->few == GP_BY_NOBODY || m->many == GP_BY_NOBODY;
        *n_other += is_other;
        *n_same += !is_other && m->few != GP_UNTRIED_KERNEL;
    }
}
