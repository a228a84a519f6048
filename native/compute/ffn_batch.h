/* A layer's feed-forward for a few tokens, an expert at a time: one that is there is computed for all tokens that chose it,
 * from its first matrix to its last, while others are still being read. ggml computes, with small graphs of copies of
 * llama.cpp's nodes that have one expert's rows. */
#ifndef GGUF_PAGER_FFN_BATCH_H
#define GGUF_PAGER_FFN_BATCH_H

#include "compute/ffn.h"

typedef struct gp_ffn_batch gp_ffn_batch;

/* With so many bytes for rows. *out is NULL where ggml cannot do it, or there are none. */
int  gp_ffn_batch_open(gp_ffn_batch **out, const gp_ggml *ggml, size_t rows_bytes);
void gp_ffn_batch_close(gp_ffn_batch *batch);
/* Before the first node; may fail, and be tried again. */
int  gp_ffn_batch_attach(gp_ffn_batch *batch, gp_pager *pager, gp_hold *hold, gp_failure *failure, uint32_t n_layers);
void gp_ffn_batch_detach(gp_ffn_batch *batch);

/* Whether a batch of so many rows (ranks times tokens) of this layer will in all likelihood be computed here: then nothing
 * of it need be waited for, and all its nodes must be offered. */
bool gp_ffn_batch_is_expected(const gp_ffn_batch *batch, uint32_t layer, uint64_t n_rows);

/* At the end of each piece of graph. */
void gp_ffn_batch_reset(gp_ffn_batch *batch);
/* Whether the last of a feed-forward is still to come, which is worth waiting for with all of it. */
bool gp_ffn_batch_is_collecting(const gp_ffn_batch *batch);
/* What was offered in this piece is being computed: it cannot be taken any more. */
void gp_ffn_batch_interrupt(gp_ffn_batch *batch);
/* A MUL_MAT_ID node that is pointed at slots, in the order of the graph. One that is an operation of ours afterwards waits
 * for its slices itself. */
gp_ffn_fate gp_ffn_batch_offer(gp_ffn_batch *batch, uint32_t layer, uint32_t slice, ggml_tensor *node,
                               const ggml_tensor *ids, bool is_expected);
void gp_ffn_batch_judge(gp_ffn_batch *batch);
void gp_ffn_batch_count_shapes(const gp_ffn_batch *batch, uint32_t *n_same, uint32_t *n_other);

#endif
