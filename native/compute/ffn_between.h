/* What lies between an expert's first matrices and its last, computed by ggml for one rank at a time: a graph per rank,
 * with copies of llama.cpp's nodes that are one row high. And where the rows of all results lie. */
#ifndef GGUF_PAGER_FFN_BETWEEN_H
#define GGUF_PAGER_FFN_BETWEEN_H

#include "compute/ffn_shape.h"

typedef struct gp_ffn_between gp_ffn_between;

/* -ENOMEM; for up to so many ranks of rows of so many floats. `ggml` is kept. */
int    gp_ffn_between_open(gp_ffn_between **out, const gp_ggml *ggml, uint32_t most_ranks, int64_t most_width);
void   gp_ffn_between_close(gp_ffn_between *between);

/* Makes the graphs those of these nodes. In the decoding thread. */
void   gp_ffn_between_prepare(gp_ffn_between *between, const gp_ffn_nodes *nodes);
/* Computes one rank's; any thread, each another rank. Not 0: ggml could not. */
int    gp_ffn_between_compute(const gp_ffn_between *between, uint32_t rank);

/* Rows of a first matrix' result: of the very first in its node, which is the one at hand when they are computed. */
float *gp_ffn_first_row(const gp_ffn_between *between, const gp_ffn_nodes *nodes, uint32_t index, uint32_t rank);
float *gp_ffn_last_row(const gp_ffn_between *between, uint32_t rank);
/* What the last matrix is multiplied with. */
float *gp_ffn_last_input(const gp_ffn_between *between, const gp_ffn_nodes *nodes, uint32_t rank);

#endif
