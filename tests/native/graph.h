/* A made-up llama.cpp: weights in a mapping, graphs of the shape it builds, and a scheduler that asks and calls back as
 * ggml's does. Its matrix multiply checks every row: the bytes it is pointed at must be those of the expert that the
 * router chose. */
#ifndef GGUF_PAGER_TEST_GRAPH_H
#define GGUF_PAGER_TEST_GRAPH_H

#include <stdbool.h>
#include <stdint.h>

#include "compute/ggml_tensor.h"
#include "model.h"

enum { GRAPH_TOKENS = 8, GRAPH_EXPERTS = 16, GRAPH_NODES = 96, GRAPH_COLUMNS = 32, GRAPH_ROWS = 128, GRAPH_THREADS = 3, ROW_BYTES = 4096 };

/* Numbers unlike ggml's, so that nothing rests on them. */
enum { OP_NONE = 40, OP_MUL_MAT_ID, OP_ARGSORT, OP_TOP_K, OP_VIEW, OP_RESHAPE, OP_CUSTOM, OP_CAST, OP_OTHER, OP_GLU,
       OP_ADD_ID, OP_GET_ROWS };
enum { FLAG_COMPUTE = 64 };
enum { TYPE_F32 = 3, TYPE_BYTES = 7, TYPE_WEIGHTS = 12, TYPE_I32 = 26 };

extern gp_ggml graph_ggml;
/* What it is able to: without functions for vectors, which is how a graph begins; with them; with others than those that
 * its MUL_MAT_ID computes with. */
typedef enum { NO_KERNELS, KERNELS, OTHER_KERNELS } graph_kernels;
void graph_set_kernels(graph_kernels kernels);
/* Whether it can make and compute small graphs; `is_right`: with the same result as in a large one. */
void graph_set_small_graphs(bool are_possible, bool is_right);
/* The nth small graph from now on (1: the next) cannot be computed, once. */
void graph_fail_small_graph(unsigned nth);
/* How many rows were multiplied since the start. */
uint64_t graph_rows_multiplied(void);
extern int graph_host_buffer, graph_device_buffer;      /* their addresses stand for buffers */

/* The tensors of a loaded model; contexts share them. */
typedef struct {
    const model *m;
    ggml_tensor  tensors[MODEL_LAYERS][GP_MAX_SLICES];
} weights;

void weights_map(weights *w, const model *m);

/* Where a layer's ids come from. */
typedef enum {
    TOP_K_VIEW,         /* the first k of a full ranking: rows lie n_experts apart */
    TOP_K_RESHAPED,     /* a reshaped view of that */
    COMPUTED_IDS,       /* a node of its own: a cast, a look-up in a hash table */
    GIVEN_IDS,          /* an input of the graph */
    UNNAMED_VIEW,       /* a view that does not say what it is */
} id_source;

typedef struct {
    ggml_tensor ranking, top_k, reshaped, ids_node;
    ggml_tensor matmuls[GP_MAX_SLICES], other, activation, lora;
    float       out[GP_MAX_SLICES][GRAPH_TOKENS * GRAPH_EXPERTS * GRAPH_ROWS];
    float       inputs[GRAPH_TOKENS * GRAPH_COLUMNS], activations[GRAPH_TOKENS * GRAPH_EXPERTS * GRAPH_COLUMNS];
    ggml_tensor *ids;                                   /* what the matmuls take as src[2] */
    int32_t     ranking_data[GRAPH_TOKENS][GRAPH_EXPERTS];
    int32_t     ids_data[GRAPH_TOKENS * GRAPH_EXPERTS]; /* rows of k */
    int32_t     chosen[GRAPH_TOKENS][GRAPH_EXPERTS];    /* by the router, this time */
} graph_layer;

typedef struct graph graph;
struct graph {
    weights     *w;
    uint32_t     n_tokens;
    id_source    source;
    bool         has_glu;           /* set before building: the last matrix' input is made of the others' results */
    uint32_t     shift;             /* set before building: layer l lies in layers[l + shift], its slices likewise */
    ggml_tensor *const *before;     /* set before building: nodes that come first, n_before of them, and who computes them */
    uint32_t     n_before;
    void       (*compute_before)(ggml_tensor *node, bool is_void);
    graph_layer  layers[MODEL_LAYERS];
    ggml_tensor *nodes[GRAPH_NODES];
    uint32_t     n_nodes;
    uint32_t     split_at;          /* a split ends before this node; 0: one split */

    /* What the last run did. */
    uint32_t     n_from_slots, n_from_mapping, n_callbacks;
    uint32_t     n_products;        /* of those from slots */
};

graph_layer *graph_layer_of(graph *g, uint32_t layer);
ggml_tensor *graph_matmul(graph *g, uint32_t layer, uint32_t slice);

/* Builds the graph from nothing, as llama.cpp does in memory that it used for the last one. */
void graph_build(graph *g, weights *w, uint32_t n_tokens, id_source source);
/* What the routers will choose: at random, all different within a token. */
void graph_route(graph *g);
/* llama_decode: 0, or 2 when the abort callback said so. The tap may be NULL. */
int  graph_run(graph *g, gp_tap *tap);
/* Runs it many times, each time with one of the next reads failing, of so many: that ends the graph, and nothing else does. */
void graph_fail_reads(graph *g, gp_tap *tap, gp_pager *pager, uint32_t among);

#endif
