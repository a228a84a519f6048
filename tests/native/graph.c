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
    .op_mul = OP_NONE, .op_add = OP_NONE, .op_repeat = OP_NONE, .op_norm = OP_NONE, .op_rms_norm = OP_NONE,
};

/* ---- kernels: bytes times bytes --------------------------------------------------------------------------------- */

enum { BLOCK = 4, MANY = 8 };   /* of an input, whose type is called TYPE_BYTES; rows of an expert */

static graph_kernels kernels;
static _Atomic uint64_t n_multiplied;

uint64_t graph_rows_multiplied(void) {
    return atomic_load(&n_multiplied);
}

static void to_bytes(const float *from, void *to, int64_t n) {
    CHECK(n % BLOCK == 0, "whole blocks are converted");
    for (int64_t i = 0; i < n; i++) {
        CHECK(from[i] > -256 && from[i] < 256, "what is multiplied was made before");
        ((uint8_t *) to)[i] = (uint8_t) (int32_t) from[i];
    }
}

static float product(const uint8_t *row, const uint8_t *vector) {
    uint32_t sum = 0;
    for (int i = 0; i < GRAPH_COLUMNS; i += 8) {    /* eight bytes at a time, for the thread sanitizer's sake */
        uint64_t a, b;
        memcpy(&a, row + i, sizeof a);
        memcpy(&b, vector + i, sizeof b);
        for (; a != 0; a >>= 8, b >>= 8) {
            sum += (uint32_t) (a & 255) * (uint32_t) (b & 255);
        }
    }
    return (float) sum;
}

/* What MUL_MAT_ID makes of it, in so large a company. */
static float in_graph(float sum, uint32_t n_rows, bool are_floats) {
    const bool is_other = kernels == GGML_KERNELS || (kernels == TILED_KERNELS && n_rows >= MANY)
        || (kernels == OTHER_KERNELS && are_floats) || (kernels == OTHER_TILED_KERNELS && are_floats && n_rows >= MANY);
    return is_other ? 2 * sum + 1 : sum;
}

static void multiply_bytes(int n, float *result, size_t bs, const void *x, size_t bx, const void *y, size_t by, int nrc) {
    CHECK(n == GRAPH_COLUMNS && bs == 0 && bx == 0 && by == 0 && nrc == 1, "one row at a time");
    atomic_fetch_add(&n_multiplied, 1);
    *result = product(x, y);
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
    CHECK(type == TYPE_BYTES || type == TYPE_WEIGHTS, "no other type is asked for");
    return type == TYPE_BYTES ? BLOCK : 1;
}

void graph_set_kernels(graph_kernels wanted) {
    kernels = wanted;
    graph_ggml.cpu_traits = kernels == NO_KERNELS ? NULL : cpu_traits;
    graph_ggml.block_size = block_size;
    graph_ggml.type_size = type_size;
}

void graph_set_flags(bool are_known) {
    graph_ggml.flag_compute = are_known ? FLAG_COMPUTE : 0;
}

/* ---- between the matrices ---------------------------------------------------------------------------------------- */

static float glu(float a, float b) {
    return (float) (((uint64_t) a + 3 * (uint64_t) b) % 256);
}

/* Of two rows of any width one of bytes. */
static void compute_glu_row(float *out, int64_t n, const float *a, int64_t n_a, const float *b, int64_t n_b) {
    for (int64_t i = 0; i < n; i++) {
        out[i] = glu(a[i % n_a], b[i % n_b]);
    }
}

static const float *row_at(const ggml_tensor *tensor, size_t rank, size_t token) {
    return (const float *) (const void *) ((const char *) tensor->data + rank * tensor->nb[1] + token * tensor->nb[2]);
}

static int32_t id_at(const ggml_tensor *ids, uint32_t rank, uint32_t token) {
    return *(const int32_t *) (const void *) ((const char *) ids->data + token * ids->nb[1] + rank * ids->nb[0]);
}

static bool are_small_right;

/* GLU and ADD_ID, in any graph. */
static void compute_step(const ggml_tensor *node, bool is_small) {
    for (uint32_t token = 0; token < node->ne[2]; token++) {
        for (uint32_t rank = 0; rank < node->ne[1]; rank++) {
            float *out = (float *) (uintptr_t) row_at(node, rank, token);
            const ggml_tensor *a = node->src[0], *b = node->src[1];
            if (node->op == OP_ADD_ID) {
                const int32_t id = id_at(node->src[2], rank, token);
                CHECK(id >= 0 && id < b->ne[1], "a bias is looked up by expert");
                const float *bias = (const float *) (const void *) ((const char *) b->data + (size_t) id * b->nb[1]);
                for (int64_t i = 0; i < node->ne[0]; i++) {
                    out[i] = row_at(a, rank, token)[i] + bias[i];
                }
                continue;
            }
            compute_glu_row(out, node->ne[0], row_at(a, rank, token), a->ne[0], row_at(b, rank, token), b->ne[0]);
            out[0] = is_small && !are_small_right ? glu(out[0], 1) : out[0];
        }
    }
}

/* ---- small graphs ------------------------------------------------------------------------------------------------ */

enum { SMALL_NODES = 64, SMALL_GRAPHS = 128 };

typedef struct {
    ggml_tensor *nodes[SMALL_NODES];
    uint32_t     n_nodes;
} small_graph;

typedef struct {
    small_graph graphs[SMALL_GRAPHS];
    uint32_t    n_graphs;
} small_context;

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

/* MUL_MAT_ID of as many rows as there are. */
static void multiply_small(const ggml_tensor *node) {
    const ggml_tensor *experts = node->src[0], *input = node->src[1], *ids = node->src[2];
    uint32_t n_rows[GRAPH_EXPERTS] = { 0 };
    CHECK(node->ne[1] == 1 && ids->ne[0] == 1 && node->ne[2] == ids->ne[1] && input->ne[2] == ids->ne[1]
          && experts->nb[1] == GRAPH_COLUMNS, "a rank of many tokens");
    for (uint32_t token = 0; token < node->ne[2]; token++) {
        const int32_t id = id_at(ids, 0, token);
        CHECK(id >= 0 && id < experts->ne[2], "an id lies within the matrices");
        n_rows[id]++;
    }
    for (uint32_t token = 0; token < node->ne[2]; token++) {
        const int32_t id = id_at(ids, 0, token);
        const uint8_t *matrix = (const uint8_t *) experts->data + (uint64_t) id * experts->nb[2];
        uint8_t vector[GRAPH_COLUMNS];
        if (input->type == TYPE_F32) {
            to_bytes(row_at(input, 0, token), vector, GRAPH_COLUMNS);
        } else {
            memcpy(vector, (const char *) input->data + token * input->nb[2], sizeof vector);
        }
        float *out = (float *) (uintptr_t) row_at(node, 0, token);
        for (int64_t i = 0; i < node->ne[0]; i++) {
            atomic_fetch_add(&n_multiplied, 1);
            out[i] = in_graph(product(matrix + i * GRAPH_COLUMNS, vector), n_rows[id], input->type == TYPE_F32);
        }
    }
}

static int small_compute(void *backend, void *graph) {
    const small_graph *s = graph;
    CHECK(*(int *) backend == 1, "a thread computes it alone");
    for (uint32_t i = 0; i < s->n_nodes; i++) {
        const ggml_tensor *node = s->nodes[i];
        CHECK(node->ne[1] == 1 && (!graph_ggml.flag_compute || (node->flags & FLAG_COMPUTE)), "one expert's rows");
        if (node->op == OP_MUL_MAT_ID) {
            multiply_small(node);
            continue;
        }
        CHECK(node->op == OP_GLU || node->op == OP_ADD_ID, "all else is as in the large graph");
        compute_step(node, true);
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
        .backend_free = free, .compute = small_compute,
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
    ggml_tensor t = { .op = op, .type = type, .buffer = &graph_host_buffer, .flags = graph_ggml.flag_compute };
    snprintf(t.name, sizeof t.name, "%s-%u", role, layer);
    return t;
}

static ggml_tensor new_ids(int32_t op, const char *role, uint32_t layer, void *data, int64_t k, int64_t n_tokens) {
    ggml_tensor t = new_tensor(op, TYPE_I32, role, layer);
    set_shape(&t, sizeof(int32_t), k, n_tokens, 1);
    t.data = data;
    return t;
}

/* llama.cpp multiplies up before gate, and gate before down. */
static uint32_t first_slice(const model *m) {
    return m->shape.n_slices < 3 ? 0 : 1;
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
        w->biases[l] = (ggml_tensor) { .op = OP_NONE, .type = TYPE_F32, .buffer = &graph_host_buffer, .data = w->bias_data[l] };
        set_shape(&w->biases[l], sizeof(float), m->layers[l].slices[first_slice(m)].ne[1], m->shape.n_experts, 1);
        for (uint32_t i = 0; i < GRAPH_EXPERTS * GRAPH_ROWS; i++) {
            w->bias_data[l][i] = (float) fake_random(1000);
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

uint32_t graph_slice(const graph *g, uint32_t nth) {
    static const uint32_t order[GP_MAX_SLICES] = { 1, 0, 2, 3 };
    return first_slice(g->w->m) == 0 ? nth : order[nth];
}

static bool is_last(const graph *g, uint32_t slice) {
    const uint32_t n_slices = g->w->m->shape.n_slices;
    return n_slices > 1 && slice == graph_slice(g, n_slices < 3 ? 1 : 2);
}

static void add(graph *g, ggml_tensor *node) {
    CHECK(g->n_nodes < GRAPH_NODES, "the test's graphs are small");
    g->nodes[g->n_nodes++] = node;
}

uint32_t graph_index(const graph *g, const ggml_tensor *node) {
    uint32_t at = 0;
    while (at < g->n_nodes && g->nodes[at] != node) {
        at++;
    }
    return at;
}

static const ggml_tensor *base_of(const ggml_tensor *tensor) {
    return tensor->view_src ? tensor->view_src : tensor;
}

static bool takes_in(const ggml_tensor *node, const ggml_tensor *what) {
    for (uint32_t i = 0; i < GGML_SOURCES; i++) {
        if (node->src[i] && base_of(node->src[i]) == what) {
            return true;
        }
    }
    return false;
}

static void find_last_uses(graph *g) {
    for (uint32_t i = 0; i < g->n_nodes; i++) {
        g->last_uses[i] = UINT32_MAX;
        for (uint32_t j = i + 1; j < g->n_nodes && !g->nodes[i]->view_src; j++) {
            if (takes_in(g->nodes[j], g->nodes[i])) {
                g->last_uses[i] = j;
            }
        }
    }
}

void graph_insert(graph *g, uint32_t at, ggml_tensor *node) {
    CHECK(g->n_nodes < GRAPH_NODES && at <= g->n_nodes, "the test's graphs are small");
    memmove(&g->nodes[at + 1], &g->nodes[at], (g->n_nodes++ - at) * sizeof g->nodes[0]);
    g->nodes[at] = node;
    find_last_uses(g);
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

/* What the last matrix takes in. */
static void build_between(graph *g, uint32_t layer) {
    graph_layer *l = graph_layer_of(g, layer);
    const int64_t k = g->w->m->shape.n_used, n_tokens = g->n_tokens;
    ggml_tensor *sources[2] = { graph_matmul(g, layer, graph_slice(g, 0)), graph_matmul(g, layer, graph_slice(g, 1)) };
    const bool is_merged = g->w->m->shape.n_slices == 2;
    if (g->steps == STEPS_BIAS) {
        l->biased = new_tensor(OP_ADD_ID, TYPE_F32, "ffn_moe_biased", layer);
        set_shape(&l->biased, sizeof(float), sources[0]->ne[0], k, n_tokens);
        l->biased.data = l->biased_data;
        l->biased.src[0] = sources[0];
        l->biased.src[1] = &g->w->biases[layer];
        l->biased.src[2] = l->ids;
        sources[0] = &l->biased;
        add(g, &l->biased);
    }
    if (is_merged) {
        ggml_tensor *whole = sources[0];
        for (int i = 0; i < 2; i++) {
            l->halves[i] = *whole;
            l->halves[i].op = OP_VIEW;
            l->halves[i].ne[0] = GRAPH_COLUMNS;
            l->halves[i].view_src = l->halves[i].src[0] = whole;
            l->halves[i].src[1] = l->halves[i].src[2] = NULL;
            l->halves[i].view_offs = i == 0 ? 0 : whole->nb[1] - GRAPH_COLUMNS * sizeof(float);
            l->halves[i].data = (char *) whole->data + l->halves[i].view_offs;
            sources[i] = &l->halves[i];
            add(g, &l->halves[i]);
        }
    }
    l->activation = new_tensor(g->steps == STEPS_UNKNOWN ? OP_OTHER : OP_GLU, TYPE_F32, "ffn_moe_swiglu", layer);
    set_shape(&l->activation, sizeof(float), GRAPH_COLUMNS, k, n_tokens);
    l->activation.data = l->activations;
    l->activation.src[0] = sources[0];
    l->activation.src[1] = sources[1];
    add(g, &l->activation);
}

void graph_build(graph *g, weights *w, uint32_t n_tokens, id_source source) {
    CHECK(n_tokens <= GRAPH_TOKENS && w->m->shape.n_experts <= GRAPH_EXPERTS && n_tokens * w->m->shape.n_used <= GRAPH_IDS,
          "the test's graphs are small");
    g->w = w;
    g->n_tokens = n_tokens;
    g->source = source;
    g->n_nodes = 0;
    g->split_at = g->chunk = 0;
    for (uint32_t i = 0; i < g->n_before; i++) {
        add(g, g->before[i]);
    }
    for (uint32_t i = 0; i < w->m->shape.n_layers; i++) {
        graph_layer *l = graph_layer_of(g, i);
        const uint32_t n_slices = w->m->shape.n_slices;
        build_ids(g, i);
        l->other = new_tensor(OP_OTHER, TYPE_F32, "ffn_moe_weights", i);
        set_shape(&l->other, sizeof(float), GRAPH_COLUMNS, 1, n_tokens);
        const bool is_lent = n_slices == 2 || n_slices == 3;
        l->other.data = is_lent ? l->out[graph_matmul(g, i, graph_slice(g, n_slices - 1)) - l->matmuls] : l->others;
        l->other.src[0] = l->ids;
        add(g, &l->other);
        for (uint32_t s = 0; s < n_slices; s++) {
            const uint32_t slice = graph_slice(g, s);
            ggml_tensor *node = graph_matmul(g, i, slice);
            *node = new_tensor(OP_MUL_MAT_ID, TYPE_F32, "ffn_moe_matmul", i);
            set_shape(node, sizeof(float), w->m->layers[i].slices[slice].ne[1], w->m->shape.n_used, n_tokens);
            CHECK(node->ne[0] <= GRAPH_ROWS, "the test's experts are small");
            node->data = l->out[node - l->matmuls];
            node->op_params[0] = 10;
            node->op_params[sizeof(gp_custom) / sizeof(int32_t) - 1] = -3;
            node->op_params[GGML_OP_PARAMS_BYTES / sizeof(int32_t) - 1] = 77;
            node->src[0] = &w->tensors[i][slice];
            node->src[1] = &l->other;
            node->src[2] = l->ids;
            if (is_last(g, slice)) {
                build_between(g, i);
                node->src[1] = &l->activation;
            }
            add(g, node);
        }
    }
    find_last_uses(g);
}

void graph_choose(graph *g, uint32_t layer, uint32_t token, const int32_t *experts) {
    graph_layer *l = graph_layer_of(g, layer);
    const uint32_t k = g->w->m->shape.n_used;
    for (uint32_t r = 0; r < k; r++) {
        l->n_rows[l->chosen[token][r]]--;
        l->n_rows[experts[r]]++;
    }
    memcpy(l->chosen[token], experts, k * sizeof *experts);
    if (g->source == GIVEN_IDS) {
        memcpy(l->ids_data + token * k, experts, k * sizeof *experts);
    }
}

void graph_route(graph *g) {
    const uint32_t k = g->w->m->shape.n_used;
    for (uint32_t i = 0; i < g->w->m->shape.n_layers; i++) {
        graph_layer *l = graph_layer_of(g, i);
        for (uint32_t j = 0; j < g->n_tokens * GRAPH_COLUMNS; j++) {
            l->inputs[j] = (float) fake_random(256);
        }
        memset(l->n_rows, 0, sizeof l->n_rows);
        for (uint32_t t = 0; t < g->n_tokens; t++) {
            model_draw(g->w->m, l->chosen[t], k);
            for (uint32_t r = 0; r < k; r++) {
                l->n_rows[l->chosen[t][r]]++;
            }
            if (g->source == GIVEN_IDS) {
                memcpy(l->ids_data + t * k, l->chosen[t], k * sizeof(int32_t));
            }
        }
    }
}

/* ---- the truth --------------------------------------------------------------------------------------------------- */

static void true_product(graph *g, uint32_t layer, uint32_t slice, uint32_t rank, uint32_t token, const float *input, float *out) {
    const graph_layer *l = graph_layer_of(g, layer);
    const int32_t expert = l->chosen[token][rank];
    const uint8_t *matrix = model_truth(g->w->m, layer, slice, expert);
    uint8_t vector[GRAPH_COLUMNS];
    to_bytes(input, vector, GRAPH_COLUMNS);
    for (int64_t i = 0; i < g->w->m->layers[layer].slices[slice].ne[1]; i++) {
        out[i] = in_graph(product(matrix + i * GRAPH_COLUMNS, vector), l->n_rows[expert], true);
    }
}

static void true_activation(graph *g, uint32_t layer, uint32_t rank, uint32_t token, float *out) {
    const graph_layer *l = graph_layer_of(g, layer);
    float rows[2][GRAPH_ROWS];
    const bool is_merged = g->w->m->shape.n_slices == 2;
    int64_t n[2] = { 0 };
    for (uint32_t i = 0; i < (is_merged ? 1 : 2); i++) {
        const uint32_t slice = graph_slice(g, i);
        true_product(g, layer, slice, rank, token, l->inputs + token * GRAPH_COLUMNS, rows[i]);
        n[i] = g->w->m->layers[layer].slices[slice].ne[1];
    }
    for (int64_t i = 0; g->steps == STEPS_BIAS && i < n[0]; i++) {
        rows[0][i] += g->w->bias_data[layer][l->chosen[token][rank] * n[0] + i];
    }
    if (is_merged) {
        compute_glu_row(out, GRAPH_COLUMNS, rows[0], GRAPH_COLUMNS, rows[0] + n[0] - GRAPH_COLUMNS, GRAPH_COLUMNS);
    } else {
        compute_glu_row(out, GRAPH_COLUMNS, rows[0], n[0], rows[1], n[1]);
    }
}

static bool is_row_right(graph *g, uint32_t layer, uint32_t slice, uint32_t rank, uint32_t token) {
    const ggml_tensor *node = graph_matmul(g, layer, slice);
    float input[GRAPH_COLUMNS], truth[GRAPH_ROWS];
    if (is_last(g, slice)) {
        true_activation(g, layer, rank, token, input);
    } else {
        memcpy(input, graph_layer_of(g, layer)->inputs + token * GRAPH_COLUMNS, sizeof input);
    }
    true_product(g, layer, slice, rank, token, input, truth);
    return memcmp(row_at(node, rank, token), truth, (size_t) node->ne[0] * sizeof *truth) == 0;
}

void graph_check_rows(graph *g, uint32_t layer, uint32_t slice, const char *what) {
    for (uint32_t i = 0; i < g->w->m->shape.n_used * g->n_tokens; i++) {
        CHECK(is_row_right(g, layer, slice, i % g->w->m->shape.n_used, i / g->w->m->shape.n_used), what);
    }
}

/* ---- computing -------------------------------------------------------------------------------------------------- */

enum { SPOILT = 0xee, UNTOUCHED = 0xff };

static size_t result_bytes(const ggml_tensor *node) {
    return (size_t) (node->ne[1] * node->ne[2]) * node->nb[1];
}

static bool is_all(const ggml_tensor *node, uint8_t byte) {
    const uint8_t *data = node->data;
    const size_t n = result_bytes(node);
    return n == 0 || (data[0] == byte && memcmp(data, data + 1, n - 1) == 0);
}

static void spoil(const graph *g, ggml_tensor *node) {
    if (node->type == TYPE_F32) {
        memset(node->data, SPOILT, result_bytes(node));
        return;
    }
    for (size_t i = 0; i < (size_t) (node->ne[0] * node->ne[1]); i++) {     /* who reads too late gets what makes sense */
        ((int32_t *) node->data)[i] = (int32_t) fake_random(g->w->m->shape.n_experts);
    }
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

static void in_threads(ggml_tensor *node) {
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
}

/* Whose memory it is now: not yet, or not any more, this node's. */
static bool is_lent(const graph *g, uint32_t at, uint32_t now) {
    return at > now || (at < now && g->last_uses[at] < now);
}

/* Whether another node's result lies there now. */
static bool is_in_use(const graph *g, const void *data, uint32_t now) {
    for (uint32_t i = 0; i < g->n_nodes; i++) {
        if (g->nodes[i]->data == data && !is_lent(g, i, now)) {
            return true;
        }
    }
    return false;
}

/* What is ours, in several threads, this one the first of them. */
static void compute_custom(graph *g, uint32_t layer, uint32_t slice, gp_tap *tap) {
    graph_layer *l = graph_layer_of(g, layer);
    ggml_tensor *node = graph_matmul(g, layer, slice);
    const uint32_t now = graph_index(g, node);
    CHECK(node->src[0] == &g->w->tensors[layer][slice] && node->src[2] == l->ids, "no source is touched");
    memset(node->data, UNTOUCHED, result_bytes(node));
    in_threads(node);
    g->n_ours++;
    for (uint32_t i = 0; i < g->n_nodes; i++) {
        const ggml_tensor *other = g->nodes[i];
        if (other->type == TYPE_F32 && !other->view_src && i >= g->n_before && is_lent(g, i, now)
            && !is_in_use(g, other->data, now)) {
            CHECK(is_all(other, SPOILT) || is_all(other, UNTOUCHED), "nothing else is written");
        }
    }
    if (tap && gp_tap_abort(tap)) {
        return;
    }
    const bool is_idle = !is_last(g, slice) && is_all(node, UNTOUCHED) && g->n_tokens > 0;
    l->n_idle += is_idle;
    if (!is_idle) {
        graph_check_rows(g, layer, slice, "a product is that of the chosen expert's bytes");
    }
    if (is_last(g, slice)) {
        const uint32_t n_first = g->w->m->shape.n_slices == 2 ? 1 : 2;
        CHECK(l->n_idle == 0 || l->n_idle == n_first, "first matrices are left out together");
        g->n_whole += l->n_idle > 0;
        l->n_idle = 0;
    }
}

/* MUL_MAT_ID. */
static void multiply(graph *g, uint32_t layer, uint32_t slice, gp_tap *tap) {
    const graph_layer *l = graph_layer_of(g, layer);
    const ggml_tensor *node = graph_matmul(g, layer, slice), *input = node->src[1];
    CHECK(node->src[0] == &g->w->tensors[layer][slice] && node->src[2] == l->ids, "no source is touched");
    CHECK(!tap || !gp_tap_abort(tap), "3: after a failure the mapping is not touched");
    for (uint32_t t = 0; t < g->n_tokens; t++) {
        for (uint32_t r = 0; r < g->w->m->shape.n_used; r++) {
            const int32_t id = id_at(l->ids, r, t);
            CHECK(id == l->chosen[t][r], "the ids are there");
            const uint8_t *matrix = (const uint8_t *) node->src[0]->data + (uint64_t) id * node->src[0]->nb[2];
            uint8_t vector[GRAPH_COLUMNS];
            to_bytes(row_at(input, r % (uint32_t) input->ne[1], t), vector, GRAPH_COLUMNS);
            float *out = (float *) (uintptr_t) row_at(node, r, t);
            for (int64_t i = 0; i < node->ne[0]; i++) {
                out[i] = in_graph(product(matrix + i * GRAPH_COLUMNS, vector), l->n_rows[id], true);
            }
        }
    }
    graph_check_rows(g, layer, slice, "MUL_MAT_ID has the inputs that it shall have");
    g->n_from_mapping++;
}

static bool is_layers(graph *g, uint32_t layer, ggml_tensor *node, gp_tap *tap) {
    graph_layer *l = graph_layer_of(g, layer);
    const uint32_t k = g->w->m->shape.n_used;
    for (uint32_t s = 0; s < g->w->m->shape.n_slices; s++) {
        if (node != graph_matmul(g, layer, s)) {
            continue;
        }
        if (graph_ggml.flag_compute && !(node->flags & FLAG_COMPUTE)) {
            CHECK(!is_last(g, s), "the last one is computed");
            g->n_ours++;
            l->n_idle++;
        } else if (node->op == OP_CUSTOM) {
            compute_custom(g, layer, s, tap);
        } else {
            CHECK(node->op == OP_MUL_MAT_ID, "it is one or the other");
            multiply(g, layer, s, tap);
        }
        return true;
    }
    for (uint32_t t = 0; t < g->n_tokens; t++) {
        if (node == &l->ranking) {
            memcpy(l->ranking_data[t], l->chosen[t], sizeof l->chosen[t]);
        } else if (node == &l->ids_node) {
            memcpy(l->ids_data + t * k, l->chosen[t], k * sizeof(int32_t));
        } else if (node == &l->other) {
            memcpy((char *) node->data + t * node->nb[2], l->inputs + t * GRAPH_COLUMNS, GRAPH_COLUMNS * sizeof(float));
        }
    }
    if (node == &l->biased || node == &l->activation) {
        if (graph_ggml.flag_compute ? (node->flags & FLAG_COMPUTE) != 0 : l->n_idle == 0) {
            CHECK(l->n_idle == 0, "what is between is left out with what is before");
            compute_step(node, false);
        }
        return true;
    }
    return node == &l->other || node == &l->ranking || node == &l->ids_node;
}

static void compute(graph *g, uint32_t at, gp_tap *tap) {
    ggml_tensor *node = g->nodes[at];
    for (uint32_t i = 0; i < g->n_before; i++) {
        if (node == g->before[i]) {
            g->compute_before(node, tap && gp_tap_abort(tap));
        }
    }
    bool is_known = false;
    for (uint32_t i = 0; i < g->w->m->shape.n_layers && !is_known; i++) {
        is_known = is_layers(g, i, node, tap);
    }
    if (!is_known && g->compute_other) {
        g->compute_other(g, node);
    }
    for (uint32_t i = g->n_before; i < at; i++) {
        if (g->last_uses[i] == at && g->nodes[i]->data != node->data) {
            spoil(g, g->nodes[i]);
        }
    }
}

static void spoil_all(graph *g) {
    for (uint32_t i = g->n_before; i < g->n_nodes; i++) {
        if (!g->nodes[i]->view_src && g->nodes[i]->data) {
            spoil(g, g->nodes[i]);
        }
    }
    for (uint32_t i = 0; i < g->w->m->shape.n_layers; i++) {
        g->layers[i].n_idle = 0;
    }
}

/* ggml_backend_sched_compute_splits, and ggml_graph_compute_thread for the abort. */
int graph_run(graph *g, gp_tap *tap) {
    g->n_ours = g->n_from_mapping = g->n_callbacks = g->n_whole = 0;
    spoil_all(g);
    for (uint32_t first = 0, end; first < g->n_nodes; first = end) {
        end = g->chunk > 0 ? first + g->chunk : first < g->split_at ? g->split_at : g->n_nodes;
        end = end < g->n_nodes ? end : g->n_nodes;
        for (uint32_t from = first; from < end; from++) {
            uint32_t to = from;
            bool wants = tap && gp_tap_eval(g->nodes[to], true, tap);
            while (!wants && to + 1 < end) {
                to++;
                wants = tap && gp_tap_eval(g->nodes[to], true, tap);
            }
            for (uint32_t i = from; i <= to; i++) {
                compute(g, i, tap);
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
