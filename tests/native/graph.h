/* A made-up llama.cpp: weights in a mapping, graphs of the shape it builds, and a scheduler that asks and calls back as
 * ggml's does. Every row of every result is checked: it must be that of the expert that the router chose. Memory is lent as
 * llama.cpp lends it: what nobody takes in any more is spoilt at once, and the last matrix' result lies where the first ones'
 * inputs were. */
#ifndef GGUF_PAGER_TEST_GRAPH_H
#define GGUF_PAGER_TEST_GRAPH_H

#include <stdbool.h>
#include <stdint.h>

#include "compute/ggml_tensor.h"
#include "model.h"

enum { GRAPH_TOKENS = 200, GRAPH_EXPERTS = 16, GRAPH_IDS = 640, GRAPH_NODES = 160, GRAPH_COLUMNS = 32, GRAPH_ROWS = 192,
       GRAPH_THREADS = 3 };
/* Room for rows that is always enough: of tables, of batches. */
enum { ROW_BYTES = 4096, BATCH_BYTES = 4 << 20 };

/* Numbers unlike ggml's, so that nothing rests on them. */
enum { OP_NONE = 40, OP_MUL_MAT_ID, OP_ARGSORT, OP_TOP_K, OP_VIEW, OP_RESHAPE, OP_CUSTOM, OP_CAST, OP_OTHER, OP_GLU,
       OP_ADD_ID, OP_GET_ROWS };
enum { FLAG_OUTPUT = 2, FLAG_COMPUTE = 64 };
enum { TYPE_F32 = 3, TYPE_BYTES = 7, TYPE_WEIGHTS = 12, TYPE_I32 = 26 };

extern gp_ggml graph_ggml;
/* What it is able to, and what its MUL_MAT_ID computes. */
typedef enum {
    NO_KERNELS,         /* no functions for vectors, which is how a test begins */
    KERNELS,            /* with the bits of its product of two vectors */
    TILED_KERNELS,      /* of experts with eight rows or more other bits, in whatever company */
    GGML_KERNELS,       /* always other bits, in whatever company */
    OTHER_KERNELS,      /* bits that nobody has again */
    OTHER_TILED_KERNELS /* the same of experts with eight rows or more only */
} graph_kernels;
void graph_set_kernels(graph_kernels kernels);
/* Whether it can make and compute small graphs; `is_right`: with the same result between matrices as in a large one. */
void graph_set_small_graphs(bool are_possible, bool is_right);
/* Whether a node without FLAG_COMPUTE is not computed; as from the start. */
void graph_set_flags(bool are_known);
/* The nth small graph from now on (1: the next) cannot be computed, once. */
void graph_fail_small_graph(unsigned nth);
/* How many rows of matrices the tested code has multiplied since the start. */
uint64_t graph_rows_multiplied(void);
extern int graph_host_buffer, graph_device_buffer;      /* their addresses stand for buffers */

/* The tensors of a loaded model; contexts share them. */
typedef struct {
    const model *m;
    ggml_tensor  tensors[MODEL_LAYERS][GP_MAX_SLICES];
    ggml_tensor  biases[MODEL_LAYERS];
    float        bias_data[MODEL_LAYERS][GRAPH_EXPERTS * GRAPH_ROWS];
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

/* What lies between the first matrices and the last, where there are several. */
typedef enum {
    STEPS_UNKNOWN,      /* an operation that nobody knows */
    STEPS_GLU,          /* of two matrices' results; of two halves, where there is one */
    STEPS_BIAS,         /* a bias first, by expert */
} graph_steps;

typedef struct {
    ggml_tensor ranking, top_k, reshaped, ids_node;
    ggml_tensor matmuls[GP_MAX_SLICES], other, biased, halves[2], activation, lora;
    float       out[GP_MAX_SLICES][GRAPH_IDS * GRAPH_ROWS];     /* `other` is where the last one's will be, if there is no fourth */
    float       inputs[GRAPH_TOKENS * GRAPH_COLUMNS], others[GRAPH_TOKENS * GRAPH_COLUMNS];     /* what `other` will make */
    float       biased_data[GRAPH_IDS * GRAPH_ROWS], activations[GRAPH_IDS * GRAPH_COLUMNS];
    ggml_tensor *ids;                                   /* what the matmuls take as src[2] */
    int32_t     ranking_data[GRAPH_TOKENS][GRAPH_EXPERTS];
    int32_t     ids_data[GRAPH_IDS];                    /* rows of k */
    int32_t     chosen[GRAPH_TOKENS][GRAPH_EXPERTS];    /* by the router, this time */
    uint32_t    n_rows[GRAPH_EXPERTS];                  /* of each expert */
    uint32_t    n_idle;                                 /* first matrices that were not computed in their time */
} graph_layer;

typedef struct graph graph;
struct graph {
    weights     *w;
    uint32_t     n_tokens;
    id_source    source;
    graph_steps  steps;             /* set before building */
    uint32_t     shift;             /* set before building: layer l lies in layers[l + shift], its slices likewise */
    ggml_tensor *const *before;     /* set before building: nodes that come first, n_before of them, and who computes them */
    uint32_t     n_before;
    void       (*compute_before)(ggml_tensor *node, bool is_void);
    graph_layer  layers[MODEL_LAYERS];
    ggml_tensor *nodes[GRAPH_NODES];
    uint32_t     n_nodes;
    uint32_t     last_uses[GRAPH_NODES];    /* by node: the last one that takes it in; UINT32_MAX: it is a result */
    void       (*compute_other)(graph *g, ggml_tensor *node);      /* of a node that was put in; may be NULL */
    uint32_t     split_at;          /* a split ends before this node; 0: one split */
    uint32_t     chunk;             /* it ends after so many nodes, again and again; 0: it does not */

    /* What the last run did. */
    uint32_t     n_ours, n_from_mapping, n_callbacks;   /* matmuls, calls */
    uint32_t     n_whole;           /* feed-forwards of which only the last node was computed */
};

graph_layer *graph_layer_of(graph *g, uint32_t layer);
ggml_tensor *graph_matmul(graph *g, uint32_t layer, uint32_t slice);
/* Which of them comes nth in the graph. The last one, or the third of four, takes what those before it make. */
uint32_t     graph_slice(const graph *g, uint32_t nth);
/* Where it stands in the graph. */
uint32_t     graph_index(const graph *g, const ggml_tensor *node);
/* Puts a node at that place of a graph that is built. */
void         graph_insert(graph *g, uint32_t at, ggml_tensor *node);

/* Builds the graph from nothing, as llama.cpp does in memory that it used for the last one. */
void graph_build(graph *g, weights *w, uint32_t n_tokens, id_source source);
/* What the routers will choose: at random, all different within a token. */
void graph_route(graph *g);
/* The routers of a layer choose this; graph_route before. */
void graph_choose(graph *g, uint32_t layer, uint32_t token, const int32_t *experts);
/* llama_decode: 0, or 2 when the abort callback said so. The tap may be NULL. */
int  graph_run(graph *g, gp_tap *tap);
/* Runs it many times, each time with one of the next reads failing, of so many: that ends the graph, and nothing else does. */
void graph_fail_reads(graph *g, gp_tap *tap, gp_pager *pager, uint32_t among);

/* Checks that these are the right rows of a first matrix, or of the last. */
void graph_check_rows(graph *g, uint32_t layer, uint32_t slice, const char *what);

#endif
