#include "compute/ffn_between.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { GRAPH_NODES = 32, ROW_ALIGN = 16 };      /* of both nodes and leaves; floats that make a line of the cache */

typedef struct {
    void       *backend, *graph;
    ggml_tensor steps[FFN_STEPS];
    ggml_tensor sources[FFN_STEPS][FFN_SOURCES];
} rank_graph;

enum { LAST_ROWS = FFN_FIRST + FFN_STEPS, N_ROWS };

struct gp_ffn_between {
    const gp_ggml *ggml;
    uint32_t       most_ranks;
    int64_t        most_width;
    void          *context;     /* ggml's, with the graphs in it */
    rank_graph    *ranks;
    float         *rows;        /* N_ROWS times most_ranks times most_width */
    gp_ffn_shape   built;       /* what the graphs are made for, */
    uint32_t       n_built;     /* of so many ranks */
};

/* ---- rows ------------------------------------------------------------------------------------------------------- */

static float *row_of(const gp_ffn_between *b, uint32_t rows, uint32_t rank) {
    return b->rows + ((size_t) rows * b->most_ranks + rank) * (size_t) b->most_width;
}

float *gp_ffn_first_row(const gp_ffn_between *b, const gp_ffn_nodes *nodes, uint32_t index, uint32_t rank) {
    const ggml_tensor *node = nodes->first[0];
    return index == 0 ? (float *) ((char *) node->data + rank * node->nb[1]) : row_of(b, index, rank);
}

static float *step_row(const gp_ffn_between *b, uint32_t index, uint32_t rank) {
    return row_of(b, FFN_FIRST + index, rank);
}

float *gp_ffn_last_row(const gp_ffn_between *b, uint32_t rank) {
    return row_of(b, LAST_ROWS, rank);
}

float *gp_ffn_last_input(const gp_ffn_between *b, const gp_ffn_nodes *nodes, uint32_t rank) {
    const uint32_t n_steps = nodes->shape.n_steps;
    return n_steps > 0 ? step_row(b, n_steps - 1, rank) : gp_ffn_first_row(b, nodes, 0, rank);
}

/* ---- graphs ------------------------------------------------------------------------------------------------------ */

static void make_row(ggml_tensor *tensor, void *data) {
    tensor->ne[1] = 1;
    tensor->nb[1] = tensor->nb[2] = tensor->nb[3] = (size_t) tensor->ne[0] * sizeof(float);
    tensor->data = data;
    tensor->buffer = NULL;
}

/* A source of a step, as one rank sees it. */
static ggml_tensor *describe_source(gp_ffn_between *b, const gp_ffn_nodes *nodes, uint32_t rank, uint32_t at, uint32_t i) {
    const gp_ffn_source *source = &nodes->shape.steps[at].sources[i];
    ggml_tensor *theirs = nodes->steps[at]->src[i], *ours = &b->ranks[rank].sources[at][i];
    if (source->from == NOWHERE) {
        return NULL;
    }
    if (source->from == WEIGHTS) {
        return theirs;
    }
    if (source->from == OF_STEP && source->width == nodes->shape.steps[source->index].width) {
        return &b->ranks[rank].steps[source->index];
    }
    *ours = *theirs;
    ours->op = b->ggml->op_none;
    memset(ours->src, 0, sizeof ours->src);
    ours->view_src = NULL;
    ours->view_offs = 0;
    if (source->from == IDS) {
        ours->ne[0] = 1;
        ours->data = (char *) theirs->data + rank * theirs->nb[0];
    } else {
        char *row = (char *) (source->from == OF_FIRST ? gp_ffn_first_row(b, nodes, source->index, rank)
                                                       : step_row(b, source->index, rank));
        make_row(ours, row + source->offset_bytes);
    }
    return ours;
}

static void describe_rank(gp_ffn_between *b, const gp_ffn_nodes *nodes, uint32_t rank) {
    for (uint32_t at = 0; at < nodes->shape.n_steps; at++) {
        ggml_tensor *ours = &b->ranks[rank].steps[at];
        *ours = *nodes->steps[at];
        make_row(ours, step_row(b, at, rank));
        for (uint32_t i = 0; i < FFN_SOURCES; i++) {
            ours->src[i] = describe_source(b, nodes, rank, at, i);
        }
    }
}

/* ggml computes a graph's nodes by their addresses, which stay: a graph is made anew for another shape only. Its leaves,
 * of which some may be those of another layer, it does not look at. */
void gp_ffn_between_prepare(gp_ffn_between *b, const gp_ffn_nodes *nodes) {
    for (uint32_t rank = 0; rank < nodes->n_ranks; rank++) {
        describe_rank(b, nodes, rank);
    }
    if (gp_ffn_is_same_shape(&b->built, &nodes->shape) && b->n_built >= nodes->n_ranks) {
        return;
    }
    for (uint32_t rank = 0; rank < nodes->n_ranks; rank++) {
        rank_graph *r = &b->ranks[rank];
        b->ggml->graphs.clear(r->graph);
        for (uint32_t at = 0; at < nodes->shape.n_steps; at++) {
            b->ggml->graphs.expand(r->graph, &r->steps[at]);
        }
    }
    memcpy(&b->built, &nodes->shape, sizeof b->built);
    b->n_built = nodes->n_ranks;
}

int gp_ffn_between_compute(const gp_ffn_between *b, uint32_t rank) {
    return b->ggml->graphs.compute(b->ranks[rank].backend, b->ranks[rank].graph);
}

/* ---- opening and closing ---------------------------------------------------------------------------------------- */

static bool open_ranks(gp_ffn_between *b) {
    const gp_graphs *graphs = &b->ggml->graphs;
    for (uint32_t rank = 0; rank < b->most_ranks; rank++) {
        rank_graph *r = &b->ranks[rank];
        r->graph = graphs->new_graph(b->context, GRAPH_NODES, false);
        r->backend = graphs->backend_init();
        if (!r->graph || !r->backend) {
            return false;
        }
        graphs->backend_set_n_threads(r->backend, 1);
    }
    return true;
}

int gp_ffn_between_open(gp_ffn_between **out, const gp_ggml *ggml, uint32_t most_ranks, int64_t most_width) {
    *out = NULL;
    gp_ffn_between *b = calloc(1, sizeof *b);
    if (!b) {
        return -ENOMEM;
    }
    b->ggml = ggml;
    b->most_ranks = most_ranks;
    b->most_width = (most_width + ROW_ALIGN - 1) / ROW_ALIGN * ROW_ALIGN;
    b->ranks = calloc(most_ranks, sizeof *b->ranks);
    b->rows = malloc((size_t) N_ROWS * most_ranks * (size_t) b->most_width * sizeof *b->rows);
    b->context = ggml->graphs.init((gp_graphs_memory) { .bytes = most_ranks * ggml->graphs.overhead(GRAPH_NODES, false),
                                                        .no_alloc = true });
    if (!b->ranks || !b->rows || !b->context || !open_ranks(b)) {
        gp_ffn_between_close(b);
        return -ENOMEM;
    }
    *out = b;
    return 0;
}

void gp_ffn_between_close(gp_ffn_between *b) {
    if (!b) {
        return;
    }
    for (uint32_t rank = 0; b->ranks && rank < b->most_ranks; rank++) {
        if (b->ranks[rank].backend) {
            b->ggml->graphs.backend_free(b->ranks[rank].backend);
        }
    }
    if (b->context) {
        b->ggml->graphs.free(b->context);
    }
    free(b->rows);
    free(b->ranks);
    free(b);
}
