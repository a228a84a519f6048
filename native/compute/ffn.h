/* A layer's feed-forward for one token, an expert at a time: whoever's matrices are there is computed from the first to the
 * last while those of others are still being read. The nodes of llama.cpp's graph go matrix by matrix instead, through
 * all experts, and would wait at each. */
#ifndef GGUF_PAGER_FFN_H
#define GGUF_PAGER_FFN_H

#include "compute/ffn_shape.h"
#include "compute/product.h"

typedef struct gp_ffn gp_ffn;

/* What becomes of a product that was offered. */
typedef enum {
    FFN_APART,      /* it stays what it was; later ones of its feed-forward may take it along */
    FFN_TRIED,      /* it is the last of a feed-forward that is also computed here, to compare: gp_ffn_judge afterwards */
    FFN_TAKEN,      /* it is the last of one that is computed here: all its nodes were made operations of ours */
} gp_ffn_fate;

/* For up to n_ranks experts of up to `width` elements per row, and inputs that convert to so many bytes; *out is NULL
 * where ggml cannot do it. */
int  gp_ffn_open(gp_ffn **out, const gp_ggml *ggml, uint32_t n_ranks, int64_t width, size_t converted_bytes);
void gp_ffn_close(gp_ffn *ffn);

/* At the end of each piece of graph. */
void gp_ffn_reset(gp_ffn *ffn);
/* A node that was just made a product, in the order of the graph; `ids` are the experts that its ranks stand for. */
gp_ffn_fate gp_ffn_offer(gp_ffn *ffn, gp_product *product, ggml_tensor *node, const ggml_tensor *ids);
/* The piece that ended with the last node of what was tried is computed. */
void gp_ffn_judge(gp_ffn *ffn);

/* Of the shapes tried so far: those computed here, and those whose bits were not the same. */
void gp_ffn_count_shapes(const gp_ffn *ffn, uint32_t *n_same, uint32_t *n_other);

#endif
