/* Who computes a node that was pointed at slots: ggml, as it stands; our product, for one token (product.h); or, with the
 * other nodes of its feed-forward, an expert at a time (ffn.h, ffn_batch.h). Nothing is ours before ggml has computed one of
 * its kind and the bits were the same. It knows nothing of experts' ids and of where slots come from. */
#ifndef GGUF_PAGER_COMPUTE_H
#define GGUF_PAGER_COMPUTE_H

#include "compute/ggml_tensor.h"
#include "slots/pager.h"

typedef struct gp_compute gp_compute;

/* batch_bytes: memory for the rows of batches that are computed an expert at a time. */
int  gp_compute_open(gp_compute **out, const gp_ggml *ggml, size_t batch_bytes);
void gp_compute_close(gp_compute *compute);
/* Before the first node; may fail, and be tried again. `failure` is the tap's, for which nothing is done any more once it is
 * there. Slices are numbered through all layers, in their order. */
int  gp_compute_attach(gp_compute *compute, gp_pager *pager, gp_hold *hold, gp_failure *failure);

/* Whether the node of this slice need not wait for its experts' slices, nor those of later ones: for one token, */
bool gp_compute_is_product(const gp_compute *compute, uint32_t slice);
/* and for several, of so many rows (ranks times tokens). */
bool gp_compute_is_batch_expected(const gp_compute *compute, uint32_t layer, uint64_t n_rows);

/* A MUL_MAT_ID node, in the order of the graph, once in a piece for each slice; `ids` are llama.cpp's. What stays a MUL_MAT_ID
 * has its slices afterwards. Returns whether the piece is to end with it, so that what was tried can be judged. */
bool gp_compute_offer(gp_compute *compute, uint32_t slice, ggml_tensor *node, const ggml_tensor *ids, bool is_batch_expected);
/* Waits for the slices that a MUL_MAT_ID of this number needs. */
void gp_compute_wait(gp_compute *compute, uint32_t slice);
/* What a node of ours was before. */
void gp_compute_undo(const gp_compute *compute, ggml_tensor *node);

/* Whether the last node of a feed-forward is still to come, and the piece better not interrupted until then. */
bool gp_compute_is_collecting(const gp_compute *compute);
/* What was offered is being computed, but the piece goes on. */
void gp_compute_interrupt(gp_compute *compute);
/* This node is computed: if anything was to be tried with it, it is judged. */
void gp_compute_judge(gp_compute *compute, const ggml_tensor *node);
/* At the end of each piece. */
void gp_compute_reset(gp_compute *compute);

/* As in gguf_pager.h. */
void gp_compute_count_kinds(const gp_compute *compute, uint32_t *n_same, uint32_t *n_other);
void gp_compute_count_ffns(const gp_compute *compute, uint32_t *n_same, uint32_t *n_other);

#endif
