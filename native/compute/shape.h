/* Recognising a feed-forward in a graph: which nodes lie between an expert's first matrices and its last, and whether what
 * they compute can be had row by row. Nothing is changed here. */
#ifndef GGUF_PAGER_SHAPE_H
#define GGUF_PAGER_SHAPE_H

#include <stdbool.h>
#include <stdint.h>

#include "compute/ggml_tensor.h"
#include "gguf_pager.h"

/* An expert's first matrices (gate, up), and nodes between them and the last (down), each with sources. */
enum { GP_FIRST = 2, GP_STEPS = 10, GP_SOURCES = 3 };

typedef enum { NOWHERE, OF_FIRST, OF_STEP, WEIGHTS, IDS } gp_origin;

/* What a step takes in. */
typedef struct {
    gp_origin from;
    uint32_t      index;            /* of the first matrix or step */
    size_t        offset_bytes;     /* within its rows */
    int64_t       width;
} gp_source;

/* A node between the first matrices and the last. */
typedef struct {
    int32_t       op;
    int32_t       op_params[GGML_OP_PARAMS_BYTES / sizeof(int32_t)];
    int64_t       width;
    gp_source sources[GP_SOURCES];
} gp_step;

/* What the bits may depend on. Compared as bytes: made from zeros. */
typedef struct {
    uint32_t    n_first, n_steps;
    int32_t     first_types[GP_FIRST], last_type;      /* of the matrices */
    int64_t     first_widths[GP_FIRST], last_width;
    gp_step steps[GP_STEPS];
} gp_shape;

/* The nodes of a graph that have it. */
typedef struct {
    gp_shape       shape;
    uint32_t           n_ranks, n_tokens;
    ggml_tensor       *first[GP_FIRST], *steps[GP_STEPS], *last;
    const ggml_tensor *ids;         /* the experts of the ranks */
} gp_nodes;

/* Follows the last node's input back to the first matrices, which are there, and fills in the steps, sources before
 * those that use them. Rows are floats, at most so many. */
bool gp_trace(gp_nodes *nodes, const gp_ggml *ggml, int64_t most_width);

/* Whether it is a first matrix or a step. */
bool gp_nodes_have(const gp_nodes *nodes, const ggml_tensor *tensor);
/* Whether a node that is none of these takes in one of them. A view computes nothing: who takes it does. */
bool gp_nodes_feed(const gp_nodes *nodes, const gp_ggml *ggml, const ggml_tensor *node);
/* Whether first matrices and steps are for the last matrix alone. `between`: all nodes of the graph that come between. */
bool gp_nodes_are_private(const gp_nodes *nodes, const gp_ggml *ggml, ggml_tensor *const *between, uint32_t n_between);

typedef enum { GP_UNTRIED, GP_SAME_BITS, GP_OTHER_BITS } gp_verdict;

/* Whether feed-forwards of a shape have the same bits when they are computed our way. */
typedef struct {
    gp_shape   shape;
    gp_verdict is_same;
} gp_kind;

enum { GP_CHAINS = 16 };

/* Made from zeros. */
typedef struct {
    gp_kind kinds[GP_CHAINS];
    uint32_t    n_kinds;
} gp_kinds;

/* NULL: there are too many different ones. */
gp_kind *gp_kind_find(gp_kinds *kinds, const gp_shape *shape);
void gp_kinds_count(const gp_kinds *kinds, uint32_t *n_same, uint32_t *n_other);

bool gp_is_same_shape(const gp_shape *a, const gp_shape *b);

#endif
