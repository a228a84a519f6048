/* Whether products that are computed an expert at a time, in pieces, by one thread, have the bits of a MUL_MAT_ID over several
 * experts: found out with a model's own experts and made-up inputs, before anything rests on it. */
#ifndef GGUF_PAGER_TRIAL_H
#define GGUF_PAGER_TRIAL_H

#include "compute/crew.h"

/* Some experts' matrices of a kind. */
typedef struct {
    const char *data[2];
    uint32_t    n;
    size_t      row_bytes;
} gp_trial_experts;

/* Fills in what gives the same bits, for few rows or for many; -ENOMEM: nothing is known. In the decoding thread, while no worker
 * computes. */
int gp_try(gp_matrices *kind, bool is_many, const gp_ggml *ggml, gp_workers *workers, const gp_trial_experts *experts);

#endif
