/* Whether what lies between an expert's matrices has the bits of llama.cpp's own nodes when it is computed for a few rows at a time:
 * some rows of the first matrices' results are kept, and what llama.cpp has made of them is compared with what ours makes. */
#ifndef GGUF_PAGER_SAMPLES_H
#define GGUF_PAGER_SAMPLES_H

#include "compute/batch.h"
#include "compute/shape.h"
#include "compute/workers.h"

enum { GP_SAMPLES = 8 };        /* rows */

typedef struct {
    float          *kept[GP_FIRST];
    const gp_nodes *nodes;      /* of the feed-forward that is looked at; NULL: none */
    gp_kind        *kind;
    gp_row          rows[GP_SAMPLES];
    uint32_t        n_rows, n_kept;     /* n_kept: first matrices so far */
} gp_samples;

/* For results of so many floats per row; -ENOMEM. To be closed even if it fails. */
int  gp_samples_open(gp_samples *samples, int64_t widest);
void gp_samples_close(gp_samples *samples);

/* The nodes of a feed-forward are about to be computed one by one: chooses rows. */
void gp_samples_begin(gp_samples *samples, const gp_nodes *nodes, gp_kind *kind);
/* A node has been computed: if it is one of the first, its rows are kept. */
void gp_samples_keep(gp_samples *samples, const ggml_tensor *node);
/* This node is about to be: if it is the last, and nothing is missing, its input says whether the bits are the same. In `memory`,
 * of so many bytes, with worker 0; what does not fit is found out another time. */
void gp_samples_compare(gp_samples *samples, const ggml_tensor *node, gp_workers *workers, char *memory, size_t bytes);

#endif
