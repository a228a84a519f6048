/* Who computes a MUL_MAT_ID over a model's experts: ggml, from llama.cpp's mapping, or we, an expert at a time (crew.h), alone or
 * as a part of its feed-forward. Nothing is ours before the same bits were seen. It knows nothing of which ids are computed. */
#ifndef GGUF_PAGER_COMPUTE_H
#define GGUF_PAGER_COMPUTE_H

#include "compute/ggml_tensor.h"
#include "slots/pager.h"

typedef struct gp_compute gp_compute;

/* most_ids: of one node; bytes: memory for the rows of a batch. */
int  gp_compute_open(gp_compute **out, const gp_ggml *ggml, uint32_t most_ids, size_t bytes);
void gp_compute_close(gp_compute *compute);
/* Before the first node; may fail, and be tried again. `failure` is the tap's, for which nothing is computed any more once it is
 * there. Slices are numbered through all layers, in their order. */
int  gp_compute_attach(gp_compute *compute, gp_pager *pager, gp_hold *hold, gp_failure *failure);

/* Makes a node what llama.cpp has made it: first of all, whenever it asks about it or has computed it. */
void gp_compute_undo(const gp_compute *compute, ggml_tensor *node);
/* A MUL_MAT_ID with this slice's tensor and ids that are known, in the order of the graph. False: it is left as it is. */
bool gp_compute_offer(gp_compute *compute, uint32_t slice, ggml_tensor *node, const ggml_tensor *ids);
/* Whether what was offered last was the last node of a feed-forward. */
bool gp_compute_has_closed(const gp_compute *compute);
/* Any other node that llama.cpp asks about. */
void gp_compute_note(gp_compute *compute, ggml_tensor *node);
/* At the end of each piece of graph, and when the context rests, is_idle: nobody computes, and no slot is held any more. */
void gp_compute_reset(gp_compute *compute, bool is_idle);

/* As in gguf_pager.h. */
void gp_compute_count_kinds(const gp_compute *compute, uint32_t *n_same, uint32_t *n_other);
void gp_compute_count_ffns(const gp_compute *compute, uint32_t *n_same, uint32_t *n_other);

#endif
