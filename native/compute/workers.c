#include "compute/workers.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { GRAPH_NODES = 64, MOST_ROWS = 512 };     /* of a graph, with its leaves; in one product */

typedef struct {
    void       *backend, *product_graph, *step_graph;
    ggml_tensor product, weights, input, zeros;
    ggml_tensor steps[GP_STEPS], sources[GP_STEPS][GP_SOURCES], experts;
    gp_shape    built;          /* what step_graph is made for */
} worker;

struct gp_workers {
    const gp_ggml *ggml;
    void          *context;     /* ggml's, with the graphs in it */
    worker         workers[GP_WORKERS];
    int32_t        zeros[MOST_ROWS];
};

/* ---- tensors ------------------------------------------------------------------------------------------------------ */

void gp_set_size(ggml_tensor *t, int64_t ne0, int64_t ne1, int64_t ne2, size_t nb0, size_t nb1, size_t nb2) {
    const int64_t ne[GGML_DIMS] = { ne0, ne1, ne2, 1 };
    const size_t nb[GGML_DIMS] = { nb0, nb1, nb2, nb2 * (size_t) ne2 };
    memcpy(t->ne, ne, sizeof ne);
    memcpy(t->nb, nb, sizeof nb);
}

/* A row of floats for each of n. */
static void set_rows(ggml_tensor *t, int64_t width, uint32_t n, void *data) {
    const size_t row_bytes = (size_t) width * sizeof(float);
    gp_set_size(t, width, 1, n, sizeof(float), row_bytes, row_bytes);
    t->data = data;
    t->buffer = NULL;
}

/* A number for each of n. */
static void set_ids(const gp_workers *all, ggml_tensor *t, uint32_t n, const int32_t *data) {
    t->op = all->ggml->op_none;
    t->type = all->ggml->type_i32;
    gp_set_size(t, 1, n, 1, sizeof *data, sizeof *data, sizeof *data * n);
    t->data = (void *) (uintptr_t) data;    /* ggml only reads it */
}

/* ---- products ----------------------------------------------------------------------------------------------------- */

int gp_worker_multiply(gp_workers *all, uint32_t number, const gp_matrix *m, const gp_matrix_part *part,
                       const char *inputs, uint32_t n, float *results, size_t row_bytes) {
    worker *w = &all->workers[number];
    const gp_ggml *ggml = all->ggml;
    const int64_t n_rows = part->end - part->first;
    w->weights.op = w->input.op = ggml->op_none;
    w->weights.type = m->type;
    gp_set_size(&w->weights, m->n_columns, n_rows, 1, ggml->type_size(m->type), part->row_bytes,
             part->row_bytes * (size_t) n_rows);
    w->weights.data = (void *) (uintptr_t) (part->data + (size_t) part->first * part->row_bytes);
    w->input.type = m->input_type;
    gp_set_size(&w->input, m->n_columns, 1, n, ggml->type_size(m->input_type), m->input_bytes, m->input_bytes);
    w->input.data = (void *) (uintptr_t) inputs;
    set_ids(all, &w->zeros, n, all->zeros);
    w->product.op = ggml->op_mul_mat_id;
    w->product.type = ggml->type_f32;
    w->product.flags = ggml->flag_compute;
    gp_set_size(&w->product, n_rows, 1, n, sizeof(float), row_bytes, row_bytes);
    w->product.data = results;
    return ggml->graphs.compute(w->backend, w->product_graph);
}

/* Once: ggml computes a graph's nodes by their addresses, which stay. */
static void build_product_graph(gp_workers *all, worker *w) {
    w->product.op = all->ggml->op_mul_mat_id;
    w->product.src[0] = &w->weights;
    w->product.src[1] = &w->input;
    w->product.src[2] = &w->zeros;
    w->weights.op = w->input.op = w->zeros.op = all->ggml->op_none;
    all->ggml->graphs.expand(w->product_graph, &w->product);
}

/* ---- steps -------------------------------------------------------------------------------------------------------- */

static ggml_tensor *describe_source(const gp_workers *all, worker *w, const gp_nodes *nodes, const gp_step_rows *rows,
                                    uint32_t at, uint32_t i) {
    const gp_source *source = &nodes->shape.steps[at].sources[i];
    ggml_tensor *theirs = nodes->steps[at]->src[i], *ours = &w->sources[at][i];
    if (source->from == NOWHERE || source->from == WEIGHTS) {
        return source->from == NOWHERE ? NULL : theirs;
    }
    if (source->from == IDS) {
        return &w->experts;
    }
    const bool is_first = source->from == OF_FIRST;
    const int64_t width = is_first ? nodes->shape.first_widths[source->index] : nodes->shape.steps[source->index].width;
    if (!is_first && source->width == width) {
        return &w->steps[source->index];
    }
    /* A leaf to ggml, also if it is a part of the rows of a step: it must not follow it, and finds it computed. */
    memset(ours, 0, sizeof *ours);
    ours->op = all->ggml->op_none;
    ours->type = all->ggml->type_f32;
    float *const from = is_first ? rows->first[source->index] : rows->steps[source->index];
    set_rows(ours, width, rows->n, (char *) from + source->offset_bytes);
    ours->ne[0] = source->width;
    return ours;
}

int gp_worker_step(gp_workers *all, uint32_t number, const gp_nodes *nodes, const gp_step_rows *rows) {
    worker *w = &all->workers[number];
    const gp_graphs *graphs = &all->ggml->graphs;
    set_ids(all, &w->experts, rows->n, rows->experts);
    for (uint32_t at = 0; at < nodes->shape.n_steps; at++) {
        ggml_tensor *ours = &w->steps[at];
        *ours = *nodes->steps[at];
        ours->flags |= all->ggml->flag_compute;
        set_rows(ours, ours->ne[0], rows->n, rows->steps[at]);
        for (uint32_t i = 0; i < GP_SOURCES; i++) {
            ours->src[i] = describe_source(all, w, nodes, rows, at, i);
        }
    }
    if (!gp_is_same_shape(&w->built, &nodes->shape)) {
        graphs->clear(w->step_graph);
        for (uint32_t at = 0; at < nodes->shape.n_steps; at++) {
            graphs->expand(w->step_graph, &w->steps[at]);
        }
        memcpy(&w->built, &nodes->shape, sizeof w->built);
    }
    return graphs->compute(w->backend, w->step_graph);
}

/* ---- opening and closing ---------------------------------------------------------------------------------------- */

int gp_workers_open(gp_workers **out, const gp_ggml *ggml) {
    *out = NULL;
    gp_workers *all = calloc(1, sizeof *all);
    if (!all) {
        return -ENOMEM;
    }
    all->ggml = ggml;
    const gp_graphs *graphs = &ggml->graphs;
    all->context = graphs->init((gp_graphs_memory) { .bytes = 2 * GP_WORKERS * graphs->overhead(GRAPH_NODES, false),
                                                     .no_alloc = true });
    for (uint32_t i = 0; all->context && i < GP_WORKERS; i++) {
        worker *w = &all->workers[i];
        w->product_graph = graphs->new_graph(all->context, GRAPH_NODES, false);
        w->step_graph = graphs->new_graph(all->context, GRAPH_NODES, false);
        w->backend = graphs->backend_init();
        if (!w->product_graph || !w->step_graph || !w->backend) {
            gp_workers_close(all);
            return -ENOMEM;
        }
        graphs->backend_set_n_threads(w->backend, 1);
        build_product_graph(all, w);
    }
    if (!all->context) {
        gp_workers_close(all);
        return -ENOMEM;
    }
    *out = all;
    return 0;
}

void gp_workers_close(gp_workers *all) {
    if (!all) {
        return;
    }
    for (uint32_t i = 0; i < GP_WORKERS; i++) {
        if (all->workers[i].backend) {
            all->ggml->graphs.backend_free(all->workers[i].backend);
        }
    }
    if (all->context) {
        all->ggml->graphs.free(all->context);
    }
    free(all);
}
