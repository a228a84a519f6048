/* One token's vector times its experts' matrices, by ggml's own kernels but in our order: experts that are in their slots
 * first, the others as they arrive, while ggml's MUL_MAT_ID would have to wait for all. */
#ifndef GGUF_PAGER_PRODUCT_H
#define GGUF_PAGER_PRODUCT_H

#include <stdatomic.h>

#include "compute/ggml_tensor.h"
#include "slots/pager.h"

enum { PRODUCT_RANKS = 32 };    /* experts per token: 4 to 22 in models of 2026 */

/* Matrices of one type and size, and ggml's functions for them. */
typedef struct {
    int32_t           type;
    int64_t           n_columns, n_rows;
    gp_from_float     from_float;       /* to the type that inputs are multiplied in; NULL: that is f32, as they are */
    gp_vec_dot        vec_dot;
    int64_t           unit;             /* elements converted at once: whole blocks */
    size_t            unit_bytes;       /* what they become */
    size_t            input_bytes;      /* what a whole input becomes */
} gp_kind;

/* One product. Begun by the decoding thread, then computed by all threads of the graph; all of it lives as long as the
 * tap, because a graph that is used again still points here. */
typedef struct {
    gp_pager    *pager;
    gp_hold     *hold;
    gp_failure  *failure;               /* the tap's; written by the decoding thread alone */
    const gp_kind *kind;
    uint32_t     layer, slice;
    char        *inputs;                /* converted; room for one per rank */
    uint32_t     n_inputs, n_ranks, n_units, n_chunks;
    uint8_t      order[PRODUCT_RANKS];
    bool         is_computed;           /* since it was begun; the decoding thread's */
    atomic_uint  next_unit, units_done, next_chunk;
} gp_product;

/* Asks ggml for its functions. False: it cannot multiply these, or not in a way that is known here. */
bool gp_kind_find(gp_kind *kind, const gp_ggml *ggml, int32_t type, int64_t n_columns, int64_t n_rows);

/* Whether a MUL_MAT_ID node, pointed at slots, is the product of one token and of this kind. */
bool gp_product_fits(const gp_kind *kind, const gp_ggml *ggml, const ggml_tensor *node);

/* Before each time that the node is computed. */
void gp_product_begin(gp_product *product, const ggml_tensor *node);

/* Its parts, for those who put them together in another order. Converts the inputs; all threads, until all are. */
void gp_product_convert(gp_product *product, const ggml_tensor *input);
/* The vector that a rank's matrix is multiplied with, converted. */
const char *gp_product_input(const gp_product *product, const ggml_tensor *node, uint32_t rank);
/* The slot of a rank's expert. */
uint32_t gp_product_slot(const ggml_tensor *node, uint32_t rank);
/* A rank's result comes in so many chunks. */
uint32_t gp_product_chunks(const gp_kind *kind);
void gp_product_chunk(const gp_kind *kind, const ggml_tensor *node, uint32_t rank, const char *vector, float *result,
                      uint32_t chunk);
/* In the decoding thread, once slices have arrived: whether they could all be read. */
void gp_product_check(const gp_product *product, uint32_t slices);
void gp_pause_briefly(void);

/* ggml_custom_op_t: thread `ith` of `nth`, each with the same node, which is a MUL_MAT_ID in all but its op. */
void gp_product_compute(ggml_tensor *node, int ith, int nth, void *product);

#endif
