/* Computing an expert at a time: the threads of a graph take pieces of whatever experts are there, each expert from its first
 * matrices to its last, and let its slot go for the next. */
#ifndef GGUF_PAGER_CREW_H
#define GGUF_PAGER_CREW_H

#include <stdatomic.h>

#include "compute/batch.h"
#include "compute/kernels.h"
#include "compute/scratch.h"
#include "compute/shape.h"
#include "compute/workers.h"

/* What is computed in one node's time: a MUL_MAT_ID, or all of a feed-forward, whose last one it is. */
typedef struct {
    uint32_t           layer;
    uint32_t           n_first;         /* 0: the node alone */
    ggml_tensor       *first[GP_FIRST], *last;
    const ggml_tensor *ids;
    const gp_nodes    *nodes;           /* with what lies between; NULL: the node alone */
    const gp_matrices *first_kinds[GP_FIRST], *last_kind;
    uint32_t           first_slices[GP_FIRST], last_slice;     /* among the layer's */
} gp_run;

typedef struct gp_share gp_share;

typedef struct {
    const gp_ggml *ggml;
    gp_pager      *pager;
    gp_hold       *hold;
    gp_batch      *batch;
    gp_workers    *workers;
    char          *memory;
    size_t         bytes;
    gp_scratch     scratch;
    gp_share      *shares;              /* one expert's each, as in the batch */
    float         *parts;               /* per worker: a product's results before they are scattered */

    /* The run at hand. */
    const gp_run  *run;
    atomic_uint    next_input;
    uint32_t       n_shares;
    int64_t        ggml_rows;           /* of a matrix, in one piece for MUL_MAT_ID */
    atomic_uint    first_open, n_done;
    atomic_bool    has_failed;          /* ggml could not */
} gp_crew;

/* With so many bytes for rows. To be closed even if it fails. */
int    gp_crew_open(gp_crew *crew, const gp_ggml *ggml, gp_pager *pager, gp_hold *hold, gp_batch *batch, size_t bytes);
void   gp_crew_close(gp_crew *crew);

/* Whether there is memory for a run in which no expert has more rows than this. */
bool   gp_crew_has_room(const gp_crew *crew, const gp_run *run, uint32_t most_rows);

/* Converts the inputs of a run of several matrices, in the time of its first node, whose input it is: by the time of the last one
 * llama.cpp has lent that memory to somebody else. gp_crew_expect before, in the decoding thread. */
void   gp_crew_expect(gp_crew *crew);
void   gp_crew_convert(gp_crew *crew, const gp_run *run);

/* In the decoding thread, with the batch begun: the others may compute from now on. */
void   gp_crew_begin(gp_crew *crew, const gp_run *run, uint32_t n_threads);
/* Likewise: there is nothing to compute. */
void   gp_crew_rest(gp_crew *crew);
/* Each thread of the graph, `worker` is its number, 0 that of the decoding one. Returns when all is computed, or nothing more shall
 * be. */
void   gp_crew_compute(gp_crew *crew, uint32_t worker);

#endif
