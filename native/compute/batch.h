/* The rows of the batch at hand, expert by expert. */
#ifndef GGUF_PAGER_BATCH_H
#define GGUF_PAGER_BATCH_H

#include "compute/ggml_tensor.h"
#include "slots/pager.h"

/* One rank of one token. */
typedef struct {
    uint32_t rank, token;
} gp_row;

typedef struct {
    gp_pager   *pager;
    gp_hold    *hold;
    uint32_t    most_rows, most_experts;
    int32_t    *place;          /* by expert: its place among those that were collected, or -1 */
    int32_t    *collected;      /* distinct experts, in the order in which they are named */
    uint32_t   *counts;         /* of ids that named them */

    /* What was opened: the ith expert of the hold's wave has the rows from first_row[i] up to first_row[i + 1]. */
    uint32_t   *first_row;
    gp_row     *rows;           /* those of an expert in the order of tokens, as ggml's MUL_MAT_ID groups them */
    int32_t    *experts;        /* of each row */
} gp_batch;

/* The id of a rank and token. Top-k may be a view of the full ranking: rows lie n_expert apart, not k. */
int32_t gp_id_in(const ggml_tensor *ids, const gp_row *row);
/* A row of a node's floats, or of its input's, which may be the same for all ranks. */
float  *gp_row_in(const ggml_tensor *tensor, const gp_row *row);

/* For batches of so many rows, ranks times tokens. To be closed even if it fails. */
int  gp_batch_open(gp_batch *batch, gp_pager *pager, gp_hold *hold, uint32_t most_rows);
void gp_batch_close(gp_batch *batch);

/* A node's matrix of the ith expert, which is there: in its slot, or in llama.cpp's mapping. */
const char *gp_batch_matrix(const gp_batch *batch, uint32_t i, uint32_t slice, const ggml_tensor *node);

/* What a router has chosen, of so many experts: how many ids the most wanted one has; 0: these ids make no sense, or are too
 * many. */
uint32_t gp_batch_most(gp_batch *batch, const ggml_tensor *ids, uint32_t n_experts);
/* Begins a wave with it, and sorts its rows; not 0: as gp_wave_begin. */
int  gp_batch_begin(gp_batch *batch, uint32_t layer, const ggml_tensor *ids, bool is_again, gp_failure *failure);

#endif
