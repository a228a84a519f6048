/* The rows of a batch, expert by expert, and how ggml computes one expert's: with a small graph of copies of llama.cpp's
 * nodes that have its rows alone. */
#ifndef GGUF_PAGER_FFN_SHARES_H
#define GGUF_PAGER_FFN_SHARES_H

#include <stdatomic.h>

#include "compute/ffn_shape.h"
#include "slots/pager.h"

enum { FFN_WORKERS = 32, FFN_ROWS = 4096 };     /* threads that compute; rows at most */
enum { FFN_LAST = FFN_FIRST, FFN_MATRICES };    /* the last matrix' number comes after those of the first */

/* One rank of one token. */
typedef struct {
    uint32_t rank, token;
} gp_ffn_row;

/* One expert's. */
typedef struct {
    uint32_t    slot, first_row, n_rows;
    atomic_bool is_taken;
} gp_ffn_share;

typedef struct gp_ffn_worker gp_ffn_worker;

typedef struct {
    const gp_ggml *ggml;
    gp_pager      *pager;
    void          *context;             /* ggml's, with the workers' graphs in it */
    gp_ffn_worker *workers;
    gp_ffn_shape   built;               /* what the graphs are made for */
    size_t         most_floats;
    float         *floats;
    int32_t       *zeros, *experts;     /* per row: of a matrix that stands alone, and of all */
    gp_ffn_row    *rows;                /* those of an expert beside one another */
    gp_ffn_share  *shares;              /* those first that were there */
    uint32_t      *share_of_slot;

    /* The batch at hand; nodes, layer and slices are the caller's to fill in. */
    gp_ffn_nodes   nodes;
    uint32_t       layer, slices[FFN_MATRICES];
    uint32_t       n_shares, n_rows;
    float         *input_rows, *product_rows[FFN_MATRICES], *step_rows[FFN_STEPS];
} gp_ffn_shares;

/* With so many bytes for rows. To be closed even if it fails. */
int    gp_ffn_shares_open(gp_ffn_shares *shares, const gp_ggml *ggml, size_t rows_bytes);
void   gp_ffn_shares_close(gp_ffn_shares *shares);
int    gp_ffn_shares_attach(gp_ffn_shares *shares, gp_pager *pager, uint32_t n_layers);
void   gp_ffn_shares_detach(gp_ffn_shares *shares);

/* How many floats a row of these nodes takes, as far as they are known. */
size_t gp_ffn_floats_per_row(const gp_ffn_nodes *nodes);
/* Shares out the batch, for which there must be floats enough. In the decoding thread. */
void   gp_ffn_shares_prepare(gp_ffn_shares *shares);

/* The rest in any thread. Whether all slices of a share's expert are in. */
bool   gp_ffn_share_is_there(const gp_ffn_shares *shares, const gp_ffn_share *share);
/* Computes it; each worker is one thread's. Not 0: ggml could not. */
int    gp_ffn_share_compute(gp_ffn_shares *shares, uint32_t worker, const gp_ffn_share *share);
/* Copies so many rows of a matrix' results, or as many as there are, to where its node has them. */
void   gp_ffn_rows_copy(const gp_ffn_shares *shares, uint32_t matrix, uint32_t first, uint32_t n);
bool   gp_ffn_rows_are_same(const gp_ffn_shares *shares, uint32_t matrix);
/* Computes a node as llama.cpp made it, while no worker computes. */
int    gp_ffn_node_compute(gp_ffn_shares *shares, const ggml_tensor *node);

#endif
