#include "graph.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "fake_os.h"

int graph_host_buffer, graph_device_buffer;

static bool is_host(void *buffer) {
    return buffer == &graph_host_buffer;
}

gp_ggml graph_ggml = {
    .op_none = OP_NONE, .op_mul_mat_id = OP_MUL_MAT_ID, .op_argsort = OP_ARGSORT, .op_top_k = OP_TOP_K,
    .op_view = OP_VIEW, .op_reshape = OP_RESHAPE, .op_custom = OP_CUSTOM, .type_i32 = TYPE_I32, .type_f32 = TYPE_F32,
    .buffer_is_host = is_host, .op_add_id = OP_ADD_ID, .op_get_rows = OP_GET_ROWS, .flag_compute = FLAG_COMPUTE,
    .row_ops = { OP_GLU, OP_GLU, OP_GLU, OP_GLU, OP_GLU, OP_GLU },
};

/* ---- kernels: bytes times bytes --------------------------------------------------------------------------------- */

enum { BLOCK = 4 };     /* of an input, whose type is called TYPE_BYTES */

static bool is_different;   /* what MUL_MAT_ID computes */
static _Atomic uint64_t n_multiplied;

uint64_t graph_rows_multiplied(void) {
    return atomic_load(&n_multiplied);
}

static void to_bytes(const float *from, void *to, int64_t n) {
    CHECK(n % BLOCK == 0, "whole blocks are converted");
    for (int64_t i = 0; i < n; i++) {
        ((uint8_t *) to)[i] = (uint8_t) from[i];
    }
}

static void multiply_bytes(int n, float *result, size_t bs, const void *x, size_t bx, const void *y, size_t by, int nrc) {
    CHECK(bs == 0 && bx == 0 && by == 0 && nrc == 1, "one row at a time");
    atomic_fetch_add(&n_multiplied, 1);
    uint32_t sum = 0;
    for (int i = 0; i < n; i++) {
        sum += (uint32_t) ((const uint8_t *) x)[i] * ((const uint8_t *) y)[i];
    }
    *result = (float) sum;
}

static const struct {
    gp_from_float from_float;
    gp_vec_dot    vec_dot;
    int32_t       vec_dot_type;
    int64_t       nrows;
} of_bytes = { .from_float = to_bytes }, of_weights = { .vec_dot = multiply_bytes, .vec_dot_type = TYPE_BYTES, .nrows = 1 };

static const void *cpu_traits(int type) {
    CHECK(type == TYPE_BYTES || type == TYPE_WEIGHTS, "no other type is asked for");
    return type == TYPE_BYTES ? (const void *) &of_bytes : (const void *) &of_weights;
}

static int64_t block_size(int type) {
    CHECK(type == TYPE_BYTES, "the inputs' type is asked for");
    return BLOCK;
}

static size_t type_size(int type) {
    return (size_t) block_size(type);
}

void graph_set_kernels(graph_kernels kernels) {
    graph_ggml.cpu_traits = kernels == NO_KERNELS ? NULL : cpu_traits;
    graph_ggml.block_size = block_size;
    graph_ggml.type_size = type_size;
    is_different = kernels == OTHER_KERNELS;
}

/* ---- small graphs ------------------------------------------------------------------------------------------------ */

/* Of two rows of any bytes one of bytes. */
static void compute_glu_row(float *out, int64_t n, const ggml_tensor *gate, const ggml_tensor *up, size_t row) {
    const float *a = (const float *) ((const char *) gate->data + row * gate->nb[1]);
    const float *b = (const float *) ((const char *) up->data + row * up->nb[1]);
    for (int64_t i = 0; i < n; i++) {
        out[i] = (float) (((uint32_t) a[i % gate->ne[0]] + 3 * (uint32_t) b[i % up->ne[0]]) % 256);
    }
}

enum { SMALL_NODES = 64, SMALL_GRAPHS = 64 };

typedef struct {
    ggml_tensor *nodes[SMALL_NODES];
    uint32_t     n_nodes;
} small_graph;

typedef struct {
    small_graph graphs[SMALL_GRAPHS];
    uint32_t    n_graphs;
} small_context;

static bool are_small_right;
static atomic_int small_until_failure;

static void *small_init(gp_graphs_memory memory) {
    CHECK(memory.bytes > 0 && !memory.memory && memory.no_alloc, "room for graphs is asked for, none for data");
    return calloc(1, sizeof(small_context));
}

static size_t small_overhead(size_t n_nodes, bool grads) {
    CHECK(n_nodes <= SMALL_NODES && !grads, "the graphs are small");
    return sizeof(small_graph);
}

static void *small_new(void *context, size_t n_nodes, bool grads) {
    small_context *c = context;
    CHECK(n_nodes <= SMALL_NODES && !grads && c->n_graphs < SMALL_GRAPHS, "the graphs are small");
    return &c->graphs[c->n_graphs++];
}

static void small_clear(void *graph) {
    ((small_graph *) graph)->n_nodes = 0;
}

static void small_expand(void *graph, ggml_tensor *node) {
    small_graph *s = graph;
    CHECK(s->n_nodes < SMALL_NODES, "the graphs are small");
    s->nodes[s->n_nodes++] = node;
}

static void *small_backend(void) {
    return calloc(1, sizeof(int));
}

static void small_set_threads(void *backend, int n_threads) {
    *(int *) backend = n_threads;
}

static bool small_is_numa(void) {
    return false;
}

/* MUL_MAT_ID of as many rows as there are. */
static void multiply_small(const ggml_tensor *node) {
    const ggml_tensor *experts = node->src[0], *input = node->src[1], *ids = node->src[2];
    for (uint32_t token = 0; token < node->ne[2]; token++) {
        for (uint32_t rank = 0; rank < node->ne[1]; rank++) {
            const int32_t id = *(const int32_t *) ((const char *) ids->data + token * ids->nb[1] + rank * ids->nb[0]);
            const char *matrix = (const char *) experts->data + (uint64_t) id * experts->nb[2];
            CHECK(id >= 0 && id < experts->ne[2], "an id lies within the matrices");
            uint8_t vector[GRAPH_COLUMNS];
            to_bytes((const float *) ((const char *) input->data + (rank % (uint32_t) input->ne[1]) * input->nb[1]
                                      + token * input->nb[2]), vector, GRAPH_COLUMNS);
            float *out = (float *) ((char *) node->data + rank * node->nb[1] + token * node->nb[2]);
            for (int64_t i = 0; i < node->ne[0]; i++) {
                multiply_bytes(GRAPH_COLUMNS, &out[i], 0, matrix + i * GRAPH_COLUMNS, 0, vector, 0, 1);
            }
        }
    }
}

static int small_compute(void *backend, void *graph) {
    const small_graph *s = graph;
    CHECK(*(int *) backend == 1, "a thread computes it alone");
    for (uint32_t i = 0; i < s->n_nodes; i++) {
        const ggml_tensor *node = s->nodes[i];
        CHECK(node->ne[1] == 1 || node->op == OP_MUL_MAT_ID, "one expert's rows");
        if (node->op == OP_MUL_MAT_ID) {
            multiply_small(node);
            continue;
        }
        CHECK(node->op == OP_GLU, "all else is as in the large graph");
        for (uint32_t row = 0; row < node->ne[2]; row++) {
            float *out = (float *) ((char *) node->data + row * node->nb[2]);
            compute_glu_row(out, node->ne[0], node->src[0], node->src[1], row);
            *out += are_small_right ? 0.0f : 1.0f;
        }
    }
    return atomic_fetch_sub(&small_until_failure, 1) == 1;
}

void graph_fail_small_graph(unsigned nth) {
    atomic_store(&small_until_failure, (int) nth);
}

void graph_set_small_graphs(bool are_possible, bool is_right) {
    are_small_right = is_right;
    graph_ggml.graphs = are_possible ? (gp_graphs) {
        .init = small_init, .free = free, .overhead = small_overhead, .new_graph = small_new, .clear = small_clear,
        .expand = small_expand, .backend_init = small_backend, .backend_set_n_threads = small_set_threads,
        .backend_free = free, .is_numa = small_is_numa, .compute = small_compute,
    } : (gp_graphs) { 0 };
}

/* ---- tensors ---------------------------------------------------------------------------------------------------- */

static void set_shape(ggml_tensor *t, size_t element_bytes, int64_t ne0, int64_t ne1, int64_t ne2) {
    const int64_t ne[GGML_DIMS] = { ne0, ne1, ne2, 1 };
    size_t bytes = element_bytes;
    for (int i = 0; i < GGML_DIMS; i++) {
        t->ne[i] = ne[i];
        t->nb[i] = bytes;
        bytes *= (size_t) ne[i];
    }
}

static ggml_tensor new_tensor(int32_t op, int32_t type, const char *role, uint32_t layer) {
    ggml_tensor t = { .op = op, .type = type, .buffer = &graph_host_buffer };
    snprintf(t.name, sizeof t.name, "%s-%u", role, layer);
    return t;
}

static ggml_tensor new_ids(int32_t op, const char *role, uint32_t layer, void *data, int64_t k, int64_t n_tokens) {
    ggml_tensor t = new_tensor(op, TYPE_I32, role, layer);
    set_shape(&t, sizeof(int32_t), k, n_tokens, 1);
    t.data = data;
    return t;
}

void weights_map(weights *w, const model *m) {
    w->m = m;
    for (uint32_t l = 0; l < m->shape.n_layers; l++) {
        for (uint32_t s = 0; s < m->layers[l].n_slices; s++) {
            const gp_slice_spec *spec = &m->layers[l].slices[s];
            ggml_tensor *t = &w->tensors[l][s];
            *t = (ggml_tensor) { .op = OP_NONE, .type = spec->type, .buffer = &graph_host_buffer };
            set_shape(t, 1, spec->ne[0], spec->ne[1], spec->ne[2]);
            t->data = m->files[spec->file] + spec->offset_bytes;
            CHECK(t->nb[2] == spec->slice_bytes, "the made-up type has one byte per element");
            strcpy(t->name, spec->name);
        }
    }
}

/* ---- graphs ----------------------------------------------------------------------------------------------------- */

graph_layer *graph_layer_of(graph *g, uint32_t layer) {
    return &g->layers[(layer + g->shift) % g->w->m->shape.n_layers];
}

ggml_tensor *graph_matmul(graph *g, uint32_t layer, uint32_t slice) {
    return &graph_layer_of(g, layer)->matmuls[(slice + g->shift) % g->w->m->shape.n_slices];
}

static void add(graph *g, ggml_tensor *node) {
    CHECK(g->n_nodes < GRAPH_NODES, "the test's graphs are small");
    g->nodes[g->n_nodes++] = node;
}

static void build_ids(graph *g, uint32_t layer) {
    graph_layer *l = graph_layer_of(g, layer);
    const int64_t k = g->w->m->shape.n_used, n_tokens = g->n_tokens;
    l->ids_node = new_ids(g->source == GIVEN_IDS ? OP_NONE : OP_CAST, "ids", layer, l->ids_data, k, n_tokens);
    l->ids = &l->ids_node;
    if (g->source == GIVEN_IDS) {
        return;     /* an input is no node */
    }
    l->ranking = new_ids(OP_ARGSORT, "ffn_moe_argsort", layer, l->ranking_data, GRAPH_EXPERTS, n_tokens);
    add(g, &l->ranking);
    const char *name = g->source == UNNAMED_VIEW ? "view" : "ffn_moe_topk";
    l->top_k = new_ids(OP_VIEW, name, layer, l->ranking_data, k, n_tokens);
    memcpy(l->top_k.nb, l->ranking.nb, sizeof l->top_k.nb);
    l->top_k.view_src = &l->ranking;
    l->top_k.src[0] = &l->ranking;
    add(g, &l->top_k);
    if (g->source == COMPUTED_IDS) {
        l->ids_node.src[0] = &l->top_k;
        add(g, &l->ids_node);
        return;
    }
    l->ids = &l->top_k;
    if (g->source == TOP_K_RESHAPED) {
        l->reshaped = l->top_k;
        l->reshaped.op = OP_RESHAPE;
        snprintf(l->reshaped.name, sizeof l->reshaped.name, "reshaped-%u", layer);
        l->reshaped.src[0] = &l->top_k;
        add(g, &l->reshaped);
        l->ids = &l->reshaped;
    }
}

void graph_build(graph *g, weights *w, uint32_t n_tokens, id_source source) {
    /* llama.cpp multiplies up before gate, and gate before down. */
    static const uint32_t order[GP_MAX_SLICES] = { 1, 0, 2, 3 };
    CHECK(n_tokens <= GRAPH_TOKENS && w->m->shape.n_experts <= GRAPH_EXPERTS, "the test's graphs are small");
    g->w = w;
    g->n_tokens = n_tokens;
    g->source = source;
    g->n_nodes = 0;
    g->split_at = 0;
    for (uint32_t i = 0; i < g->n_before; i++) {
        add(g, g->before[i]);
    }
    for (uint32_t i = 0; i < w->m->shape.n_layers; i++) {
        graph_layer *l = graph_layer_of(g, i);
        build_ids(g, i);
        l->other = new_tensor(OP_OTHER, TYPE_F32, "ffn_moe_weights", i);
        set_shape(&l->other, sizeof(float), GRAPH_COLUMNS, 1, n_tokens);
        l->other.data = l->inputs;
        l->other.src[0] = l->ids;
        add(g, &l->other);
        for (uint32_t s = 0; s < w->m->shape.n_slices; s++) {
            const uint32_t slice = w->m->shape.n_slices == 1 ? 0 : order[s];
            ggml_tensor *node = graph_matmul(g, i, slice);
            *node = new_tensor(OP_MUL_MAT_ID, TYPE_F32, "ffn_moe_matmul", i);
            set_shape(node, sizeof(float), w->m->layers[i].slices[slice].ne[1], w->m->shape.n_used, n_tokens);
            CHECK(node->ne[0] <= GRAPH_ROWS, "the test's experts are small");
            node->data = l->out[slice];
            node->src[0] = &w->tensors[i][slice];
            node->src[1] = &l->other;
            if (s > 0 && s + 1 == w->m->shape.n_slices) {   /* the last takes what the others make */
                l->activation = new_tensor(OP_OTHER, TYPE_F32, "ffn_moe_swiglu", i);
                set_shape(&l->activation, sizeof(float), GRAPH_COLUMNS, w->m->shape.n_used, n_tokens);
                l->activation.data = l->activations;
                l->activation.src[0] = graph_matmul(g, i, order[0]);
                if (g->has_glu) {
                    l->activation.op = OP_GLU;
                    l->activation.src[1] = graph_matmul(g, i, order[1]);
                }
                node->src[1] = &l->activation;
                add(g, &l->activation);
            }
            node->src[2] = l->ids;
            add(g, node);
        }
    }
}

void graph_route(graph *g) {
    for (uint32_t i = 0; i < g->w->m->shape.n_layers; i++) {
        graph_layer *l = graph_layer_of(g, i);
        for (uint32_t j = 0; j < sizeof l->inputs / sizeof *l->inputs; j++) {
            l->inputs[j] = (float) fake_random(256);
        }
        for (uint32_t j = 0; !g->has_glu && j < sizeof l->activations / sizeof *l->activations; j++) {
            l->activations[j] = (float) fake_random(256);
        }
        for (uint32_t t = 0; t < g->n_tokens; t++) {
            model_draw(g->w->m, l->chosen[t], g->w->m->shape.n_used);
            if (g->source == GIVEN_IDS) {
                memcpy(l->ids_data + t * g->w->m->shape.n_used, l->chosen[t], g->w->m->shape.n_used * sizeof(int32_t));
            }
        }
    }
}

/* ---- computing -------------------------------------------------------------------------------------------------- */

/* Ids of the last time lie in the data until the router has run: whoever reads too early gets these. */
static void compute_ranking(const graph *g, graph_layer *l) {
    for (uint32_t t = 0; t < g->n_tokens; t++) {
        memcpy(l->ranking_data[t], l->chosen[t], sizeof l->chosen[t]);
    }
}

static void compute_ids(const graph *g, graph_layer *l) {
    for (uint32_t t = 0; t < g->n_tokens; t++) {
        memcpy(l->ids_data + t * g->w->m->shape.n_used, l->chosen[t], g->w->m->shape.n_used * sizeof(int32_t));
    }
}

static int32_t id_at(const ggml_tensor *ids, uint32_t rank, uint32_t token) {
    return *(const int32_t *) ((const char *) ids->data + token * ids->nb[1] + rank * ids->nb[0]);
}

/* One expert's part of a node, from these weights. */
static void multiply_expert(const ggml_tensor *node, const uint8_t *matrix, uint32_t rank, uint32_t token, float *out) {
    const ggml_tensor *input = node->src[1];
    uint8_t vector[GRAPH_COLUMNS];
    to_bytes((const float *) ((const char *) input->data + (rank % (uint32_t) input->ne[1]) * input->nb[1]
                              + token * input->nb[2]), vector, GRAPH_COLUMNS);
    for (int64_t i = 0; i < node->ne[0]; i++) {
        multiply_bytes(GRAPH_COLUMNS, &out[i], 0, matrix + i * GRAPH_COLUMNS, 0, vector, 0, 1);
    }
}

static float *row_of(const ggml_tensor *node, uint32_t rank, uint32_t token) {
    return (float *) ((char *) node->data + rank * node->nb[1] + token * node->nb[2]);
}

typedef struct {
    ggml_tensor *node;
    gp_custom    custom;
    int          ith;
} thread_part;

static void *compute_part(void *data) {
    const thread_part *part = data;
    part->custom.compute(part->node, part->ith, GRAPH_THREADS, part->custom.data);
    return NULL;
}

/* Until then its memory may be somebody else's. */
static bool is_later(const graph *g, const ggml_tensor *node, const ggml_tensor *than) {
    uint32_t at = 0, own = 0;
    for (uint32_t i = 0; i < g->n_nodes; i++) {
        at = g->nodes[i] == node ? i : at;
        own = g->nodes[i] == than ? i : own;
    }
    return at > own;
}

enum { SPOILT = 0xee };

static size_t result_bytes(const ggml_tensor *node) {
    return (size_t) (node->ne[1] * node->ne[2]) * node->nb[1];
}

static void spoil_later(graph *g, uint32_t layer, const ggml_tensor *than) {
    for (uint32_t s = 0; s < g->w->m->shape.n_slices; s++) {
        ggml_tensor *node = graph_matmul(g, layer, s);
        if (is_later(g, node, than)) {
            memset(node->data, SPOILT, result_bytes(node));
        }
    }
}

static void check_later(const graph *g, uint32_t layer, const ggml_tensor *than) {
    for (uint32_t s = 0; s < g->w->m->shape.n_slices; s++) {
        const ggml_tensor *node = graph_matmul((graph *) g, layer, s);
        for (size_t i = 0; is_later(g, node, than) && i < result_bytes(node); i++) {
            CHECK(((const uint8_t *) node->data)[i] == SPOILT, "nothing is written before its time");
        }
    }
}

/* A product in several threads, this one the first of them. */
static void compute_custom(graph *g, uint32_t layer, uint32_t slice, gp_tap *tap) {
    const graph_layer *l = graph_layer_of(g, layer);
    ggml_tensor *node = graph_matmul(g, layer, slice);
    CHECK(node->src[0] != &g->w->tensors[layer][slice] && node->src[2] != l->ids, "2: a product is pointed at slots");
    memset(node->data, 0xff, (size_t) (node->ne[1] * node->ne[2]) * node->nb[1]);
    spoil_later(g, layer, node);
    thread_part parts[GRAPH_THREADS];
    pthread_t threads[GRAPH_THREADS];
    for (int i = 0; i < GRAPH_THREADS; i++) {
        parts[i] = (thread_part) { .node = node, .ith = i };
        memcpy(&parts[i].custom, node->op_params, sizeof parts[i].custom);
        CHECK(parts[i].custom.n_tasks == GP_ALL_THREADS, "all threads take part");
        if (i > 0) {
            CHECK(pthread_create(&threads[i], NULL, compute_part, &parts[i]) == 0, "the test has threads");
        }
    }
    compute_part(&parts[0]);
    for (int i = 1; i < GRAPH_THREADS; i++) {
        pthread_join(threads[i], NULL);
    }
    check_later(g, layer, node);
    const bool is_void = gp_tap_abort(tap);
    for (uint32_t i = 0; i < g->w->m->shape.n_used * g->n_tokens; i++) {
        const uint32_t r = i % g->w->m->shape.n_used, t = i / g->w->m->shape.n_used;
        float truth[GRAPH_ROWS];
        multiply_expert(node, model_truth(g->w->m, layer, slice, l->chosen[t][r]), r, t, truth);
        CHECK(is_void || memcmp(row_of(node, r, t), truth, (size_t) node->ne[0] * sizeof *truth) == 0,
              "a product is that of the chosen expert's bytes");
    }
    g->n_from_slots++;
    g->n_products++;
}

static void multiply(graph *g, uint32_t layer, uint32_t slice, gp_tap *tap) {
    const graph_layer *l = graph_layer_of(g, layer);
    const ggml_tensor *node = graph_matmul(g, layer, slice);
    const ggml_tensor *experts = node->src[0], *ids = node->src[2];
    const bool is_mapping = experts == &g->w->tensors[layer][slice];
    const bool is_void = tap && gp_tap_abort(tap);      /* what this node computes is thrown away */
    CHECK(is_mapping == (ids == l->ids), "2: a node points at its own tensors or at both of ours");
    CHECK(ids->ne[0] == g->w->m->shape.n_used && ids->ne[1] == g->n_tokens && ids->type == TYPE_I32,
          "slot numbers look as expert ids do");
    CHECK(!is_void || !is_mapping, "4: after a failure the mapping is not touched");
    for (uint32_t t = 0; t < g->n_tokens; t++) {
        for (uint32_t r = 0; r < g->w->m->shape.n_used; r++) {
            const int32_t id = id_at(ids, r, t);
            CHECK(id >= 0 && id < experts->ne[2], "a slot's number lies within the view");
            const char *row = (const char *) experts->data + (uint64_t) id * experts->nb[2];
            const uint64_t bytes = g->w->m->layers[layer].slices[slice].slice_bytes;
            CHECK(is_void || memcmp(row, model_truth(g->w->m, layer, slice, l->chosen[t][r]), bytes) == 0,
                  "a node computes with the bytes of the chosen expert");
            multiply_expert(node, (const uint8_t *) row, r, t, row_of(node, r, t));
            row_of(node, r, t)[0] += is_different ? 1.0f : 0.0f;
        }
    }
    g->n_from_mapping += is_mapping;
    g->n_from_slots += !is_mapping;
}

static void compute(graph *g, ggml_tensor *node, gp_tap *tap) {
    for (uint32_t i = 0; i < g->n_before; i++) {
        if (node == g->before[i]) {
            g->compute_before(node, tap && gp_tap_abort(tap));
        }
    }
    for (uint32_t i = 0; i < g->w->m->shape.n_layers; i++) {
        graph_layer *l = graph_layer_of(g, i);
        if (node == &l->ranking) {
            compute_ranking(g, l);
        } else if (node == &l->ids_node) {
            compute_ids(g, l);
        } else if (node == &l->activation && node->op == OP_GLU) {
            for (uint32_t row = 0; row < node->ne[1] * node->ne[2]; row++) {
                compute_glu_row((float *) ((char *) node->data + row * node->nb[1]), node->ne[0], node->src[0], node->src[1],
                                row);
            }
        }
        for (uint32_t s = 0; s < g->w->m->shape.n_slices; s++) {
            if (node == graph_matmul(g, i, s) && node->op == OP_CUSTOM) {
                compute_custom(g, i, s, tap);
            } else if (node == graph_matmul(g, i, s)) {
                multiply(g, i, s, tap);
            }
        }
    }
}

/* ggml_backend_sched_compute_splits, and ggml_graph_compute_thread for the abort. */
int graph_run(graph *g, gp_tap *tap) {
    g->n_from_slots = g->n_from_mapping = g->n_callbacks = g->n_products = 0;
    const uint32_t ends[] = { g->split_at, g->n_nodes };
    for (uint32_t split = 0, first = 0; split < 2; first = ends[split++]) {
        for (uint32_t from = first; from < ends[split]; from++) {
            uint32_t to = from;
            bool wants = tap && gp_tap_eval(g->nodes[to], true, tap);
            while (!wants && to + 1 < ends[split]) {
                to++;
                wants = tap && gp_tap_eval(g->nodes[to], true, tap);
            }
            for (uint32_t i = from; i <= to; i++) {
                compute(g, g->nodes[i], tap);
                if (tap && gp_tap_abort(tap)) {
                    return 2;
                }
            }
            g->n_callbacks += wants;
            if (wants && !gp_tap_eval(g->nodes[to], false, tap)) {
                break;
            }
            from = to;
        }
    }
    return 0;
}

void graph_fail_reads(graph *g, gp_tap *tap, gp_pager *pager, uint32_t among) {
    unsigned n_failed = 0;
    for (int i = 0; i < 40; i++) {
        graph_route(g);
        fake_fail(FAKE_FILE_READ, 1 + fake_random(among), -EIO);
        const int result = graph_run(g, tap);
        gp_tap_idle(tap);
        const gp_failure failure = gp_tap_take_failure(tap);
        CHECK((result == 2) == (failure.error == -EIO), "a failed read ends the graph, and nothing else does");
        n_failed += result == 2;
        model_settle(pager);
        model_check_invariants(pager);
    }
    CHECK(n_failed > 5, "reads have failed");
    fake_fail(FAKE_FILE_READ, 0, 0);
}
