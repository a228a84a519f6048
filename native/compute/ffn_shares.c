#include "compute/ffn_shares.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { GRAPH_NODES = 64 };

/* What one thread computes with. */
struct gp_ffn_worker {
    void       *backend, *graph;
    ggml_tensor input, slot_ids, expert_ids;
    ggml_tensor matrices[FFN_MATRICES], products[FFN_MATRICES];
    ggml_tensor steps[FFN_STEPS], sources[FFN_STEPS][FFN_SOURCES];
};

static ggml_tensor *node_of(const gp_ffn_shares *all, uint32_t matrix) {
    return matrix == FFN_LAST ? all->nodes.last : all->nodes.first[matrix];
}

/* ---- one expert's graph ------------------------------------------------------------------------------------------ */

static void set_rows(ggml_tensor *tensor, int64_t width, uint32_t n_rows, void *data) {
    const int64_t ne[GGML_DIMS] = { width, 1, n_rows, 1 };
    const size_t row_bytes = (size_t) width * sizeof(float);
    const size_t nb[GGML_DIMS] = { sizeof(float), row_bytes, row_bytes, row_bytes * n_rows };
    memcpy(tensor->ne, ne, sizeof ne);
    memcpy(tensor->nb, nb, sizeof nb);
    tensor->data = data;
    tensor->buffer = NULL;
}

/* A tensor like another, without a past. */
static void copy_leaf(const gp_ffn_shares *all, ggml_tensor *ours, const ggml_tensor *theirs) {
    *ours = *theirs;
    ours->op = all->ggml->op_none;
    memset(ours->src, 0, sizeof ours->src);
    ours->view_src = NULL;
    ours->view_offs = 0;
}

static void set_ids(const gp_ffn_shares *all, ggml_tensor *ours, uint32_t n_rows, int32_t *data) {
    copy_leaf(all, ours, all->nodes.ids);
    set_rows(ours, 1, n_rows, data);    /* an id is as large as a float */
    ours->ne[1] = n_rows;
    ours->ne[2] = 1;
}

static float *rows_at(float *rows, int64_t width, const gp_ffn_share *s) {
    return rows + (size_t) s->first_row * (size_t) width;
}

static void describe_product(const gp_ffn_shares *all, gp_ffn_worker *w, const gp_ffn_share *s, uint32_t matrix,
                             ggml_tensor *input) {
    const ggml_tensor *node = node_of(all, matrix);
    ggml_tensor *ours = &w->matrices[matrix], *product = &w->products[matrix];
    copy_leaf(all, ours, node->src[0]);
    ours->data = (char *) node->src[0]->data + (uint64_t) s->slot * node->src[0]->nb[2];
    ours->ne[2] = 1;
    ours->nb[3] = ours->nb[2];
    *product = *node;
    product->op = all->ggml->op_mul_mat_id;
    memset(product->op_params, 0, sizeof product->op_params);
    product->src[0] = ours;
    product->src[1] = input;
    product->src[2] = &w->slot_ids;
    set_rows(product, node->ne[0], s->n_rows, rows_at(all->product_rows[matrix], node->ne[0], s));
}

static ggml_tensor *describe_source(const gp_ffn_shares *all, gp_ffn_worker *w, uint32_t at, uint32_t i) {
    const gp_ffn_source *source = &all->nodes.shape.steps[at].sources[i];
    ggml_tensor *theirs = all->nodes.steps[at]->src[i], *ours = &w->sources[at][i];
    if (source->from == NOWHERE || source->from == WEIGHTS) {
        return source->from == NOWHERE ? NULL : theirs;
    }
    if (source->from == IDS) {
        return &w->expert_ids;
    }
    ggml_tensor *base = source->from == OF_FIRST ? &w->products[source->index] : &w->steps[source->index];
    if (source->width == base->ne[0]) {
        return base;
    }
    /* A part of each row: a leaf to ggml, which must not follow it, and find it computed all the same. */
    copy_leaf(all, ours, base);
    ours->ne[0] = source->width;
    ours->data = (char *) base->data + source->offset_bytes;
    return ours;
}

static void describe(const gp_ffn_shares *all, gp_ffn_worker *w, const gp_ffn_share *s) {
    const gp_ffn_shape *shape = &all->nodes.shape;
    copy_leaf(all, &w->input, all->nodes.first[0]->src[1]);
    set_rows(&w->input, w->input.ne[0], s->n_rows, rows_at(all->input_rows, w->input.ne[0], s));
    set_ids(all, &w->slot_ids, s->n_rows, all->zeros);
    set_ids(all, &w->expert_ids, s->n_rows, all->experts + s->first_row);
    for (uint32_t i = 0; i < shape->n_first; i++) {
        describe_product(all, w, s, i, &w->input);
    }
    for (uint32_t at = 0; at < shape->n_steps; at++) {
        ggml_tensor *ours = &w->steps[at];
        *ours = *all->nodes.steps[at];
        set_rows(ours, ours->ne[0], s->n_rows, rows_at(all->step_rows[at], ours->ne[0], s));
        for (uint32_t i = 0; i < FFN_SOURCES; i++) {
            ours->src[i] = describe_source(all, w, at, i);
        }
    }
    describe_product(all, w, s, FFN_LAST, shape->n_steps > 0 ? &w->steps[shape->n_steps - 1] : &w->products[0]);
}

/* Once per shape: ggml computes a graph's nodes by their addresses, which stay. */
static void build_graphs(gp_ffn_shares *all) {
    const gp_graphs *graphs = &all->ggml->graphs;
    if (gp_ffn_is_same_shape(&all->built, &all->nodes.shape)) {
        return;
    }
    for (uint32_t i = 0; i < FFN_WORKERS; i++) {
        gp_ffn_worker *w = &all->workers[i];
        describe(all, w, &all->shares[0]);
        graphs->clear(w->graph);
        for (uint32_t at = 0; at < all->nodes.shape.n_first; at++) {
            graphs->expand(w->graph, &w->products[at]);
        }
        for (uint32_t at = 0; at < all->nodes.shape.n_steps; at++) {
            graphs->expand(w->graph, &w->steps[at]);
        }
        graphs->expand(w->graph, &w->products[FFN_LAST]);
    }
    memcpy(&all->built, &all->nodes.shape, sizeof all->built);
}

/* ---- rows ------------------------------------------------------------------------------------------------------- */

static char *row_in(const ggml_tensor *tensor, const gp_ffn_row *r) {
    const uint32_t rank = tensor->ne[1] == 1 ? 0 : r->rank;
    return (char *) tensor->data + rank * tensor->nb[1] + r->token * tensor->nb[2];
}

void gp_ffn_rows_copy(const gp_ffn_shares *all, uint32_t matrix, uint32_t first, uint32_t n) {
    ggml_tensor *node = node_of(all, matrix);
    const size_t width = (size_t) node->ne[0];
    for (uint32_t i = first; i < first + n && i < all->n_rows; i++) {
        memcpy(row_in(node, &all->rows[i]), all->product_rows[matrix] + i * width, width * sizeof(float));
    }
}

bool gp_ffn_rows_are_same(const gp_ffn_shares *all, uint32_t matrix) {
    const ggml_tensor *node = node_of(all, matrix);
    const size_t width = (size_t) node->ne[0];
    bool are_same = true;
    for (uint32_t i = 0; i < all->n_rows; i++) {
        are_same &= memcmp(row_in(node, &all->rows[i]), all->product_rows[matrix] + i * width, width * sizeof(float)) == 0;
    }
    return are_same;
}

/* ---- computing -------------------------------------------------------------------------------------------------- */

bool gp_ffn_share_is_there(const gp_ffn_shares *all, const gp_ffn_share *s) {
    const bool is_first_there = gp_pager_has_slice(all->pager, all->layer, s->slot, all->slices[0]);
    return is_first_there && gp_pager_has_slice(all->pager, all->layer, s->slot, all->slices[FFN_LAST])
        && (all->nodes.shape.n_first == 1 || gp_pager_has_slice(all->pager, all->layer, s->slot, all->slices[1]));
}

int gp_ffn_share_compute(gp_ffn_shares *all, uint32_t worker, const gp_ffn_share *s) {
    gp_ffn_worker *w = &all->workers[worker];
    const ggml_tensor *input = all->nodes.first[0]->src[1];
    const size_t width = (size_t) input->ne[0];
    for (uint32_t i = s->first_row; i < s->first_row + s->n_rows; i++) {
        memcpy(all->input_rows + i * width, row_in(input, &all->rows[i]), width * sizeof(float));
    }
    describe(all, w, s);
    return all->ggml->graphs.compute(w->backend, w->graph);
}

int gp_ffn_node_compute(gp_ffn_shares *all, const ggml_tensor *node) {
    gp_ffn_worker *w = &all->workers[0];
    ggml_tensor *ours = &w->products[0];
    *ours = *node;
    ours->op = all->ggml->op_mul_mat_id;
    memset(ours->op_params, 0, sizeof ours->op_params);
    copy_leaf(all, &w->input, node->src[1]);    /* it is computed: its own sources are no business of this graph */
    ours->src[1] = &w->input;
    all->ggml->graphs.clear(w->graph);
    all->ggml->graphs.expand(w->graph, ours);
    memset(&all->built, 0, sizeof all->built);
    return all->ggml->graphs.compute(w->backend, w->graph);
}

/* ---- sharing out -------------------------------------------------------------------------------------------------- */

static float *take_floats(gp_ffn_shares *all, size_t *at, int64_t width) {
    float *rows = all->floats + *at;
    *at += (size_t) width * all->n_rows;
    return rows;
}

size_t gp_ffn_floats_per_row(const gp_ffn_nodes *nodes) {
    const gp_ffn_shape *shape = &nodes->shape;
    int64_t n = nodes->first[0]->src[1]->ne[0] + shape->last_width;
    for (uint32_t i = 0; i < shape->n_first; i++) {
        n += shape->first_widths[i];
    }
    for (uint32_t i = 0; i < shape->n_steps; i++) {
        n += shape->steps[i].width;
    }
    return (size_t) n;
}

static void share_out_floats(gp_ffn_shares *all) {
    const gp_ffn_shape *shape = &all->nodes.shape;
    size_t at = 0;
    all->input_rows = take_floats(all, &at, all->nodes.first[0]->src[1]->ne[0]);
    for (uint32_t i = 0; i < shape->n_first; i++) {
        all->product_rows[i] = take_floats(all, &at, shape->first_widths[i]);
    }
    for (uint32_t i = 0; i < shape->n_steps; i++) {
        all->step_rows[i] = take_floats(all, &at, shape->steps[i].width);
    }
    all->product_rows[FFN_LAST] = take_floats(all, &at, shape->last_width);
}

static int32_t id_at(const ggml_tensor *ids, uint32_t rank, uint32_t token) {
    return *(const int32_t *) ((const char *) ids->data + token * ids->nb[1] + rank * ids->nb[0]);
}

static void add_share(gp_ffn_shares *all, uint32_t slot) {
    gp_ffn_share *s = &all->shares[all->n_shares];
    s->slot = slot;
    s->n_rows = 0;
    atomic_store(&s->is_taken, false);
    all->share_of_slot[slot] = all->n_shares++;
}

enum { NO_SHARE = UINT32_MAX };

static uint32_t slot_at(const gp_ffn_shares *all, uint32_t i) {
    return (uint32_t) id_at(all->nodes.last->src[2], i % all->nodes.n_ranks, i / all->nodes.n_ranks);
}

static void add_shares(gp_ffn_shares *all, bool only_there) {
    for (uint32_t i = 0; i < all->n_rows; i++) {
        const gp_ffn_share of_slot = { .slot = slot_at(all, i) };
        if (all->share_of_slot[of_slot.slot] == NO_SHARE && (!only_there || gp_ffn_share_is_there(all, &of_slot))) {
            add_share(all, of_slot.slot);
        }
    }
}

/* Experts that are there before those that are not, each with its rows token by token. */
static void share_out_rows(gp_ffn_shares *all) {
    all->n_shares = 0;
    for (uint32_t i = 0; i < all->n_rows; i++) {
        all->share_of_slot[slot_at(all, i)] = NO_SHARE;
    }
    add_shares(all, true);
    add_shares(all, false);
    for (uint32_t i = 0; i < all->n_rows; i++) {
        all->shares[all->share_of_slot[slot_at(all, i)]].n_rows++;
    }
    for (uint32_t i = 0, first = 0; i < all->n_shares; i++) {
        all->shares[i].first_row = first;
        first += all->shares[i].n_rows;
        all->shares[i].n_rows = 0;
    }
    for (uint32_t i = 0; i < all->n_rows; i++) {
        const gp_ffn_row r = { i % all->nodes.n_ranks, i / all->nodes.n_ranks };
        gp_ffn_share *s = &all->shares[all->share_of_slot[slot_at(all, i)]];
        const uint32_t at = s->first_row + s->n_rows++;
        all->rows[at] = r;
        all->experts[at] = id_at(all->nodes.ids, r.rank, r.token);
    }
}

void gp_ffn_shares_prepare(gp_ffn_shares *all) {
    share_out_rows(all);
    share_out_floats(all);
    build_graphs(all);
}

/* ---- opening and closing ---------------------------------------------------------------------------------------- */

static bool open_workers(gp_ffn_shares *all) {
    const gp_graphs *graphs = &all->ggml->graphs;
    for (uint32_t i = 0; i < FFN_WORKERS; i++) {
        gp_ffn_worker *w = &all->workers[i];
        w->graph = graphs->new_graph(all->context, GRAPH_NODES, false);
        w->backend = graphs->backend_init();
        if (!w->graph || !w->backend) {
            return false;
        }
        graphs->backend_set_n_threads(w->backend, 1);
    }
    return true;
}

int gp_ffn_shares_open(gp_ffn_shares *all, const gp_ggml *ggml, size_t rows_bytes) {
    *all = (gp_ffn_shares) { .ggml = ggml, .most_floats = rows_bytes / sizeof(float) };
    all->workers = calloc(FFN_WORKERS, sizeof *all->workers);
    all->floats = malloc(rows_bytes);
    all->zeros = calloc(FFN_ROWS, sizeof *all->zeros);
    all->experts = malloc(FFN_ROWS * sizeof *all->experts);
    all->rows = malloc(FFN_ROWS * sizeof *all->rows);
    all->shares = malloc(FFN_ROWS * sizeof *all->shares);
    all->context = ggml->graphs.init((gp_graphs_memory) { .bytes = FFN_WORKERS * ggml->graphs.overhead(GRAPH_NODES, false),
                                                          .no_alloc = true });
    const bool is_whole = all->workers && all->floats && all->zeros && all->experts && all->rows && all->shares
        && all->context && open_workers(all);
    return is_whole ? 0 : -ENOMEM;
}

int gp_ffn_shares_attach(gp_ffn_shares *all, gp_pager *pager, uint32_t n_layers) {
    uint32_t most_slots = 0;
    for (uint32_t i = 0; i < n_layers; i++) {
        uint32_t n_slots;
        uint64_t stride_bytes;
        (void) gp_pager_slots(pager, gp_pager_layer(pager, i)->shape_class, &n_slots, &stride_bytes);
        most_slots = n_slots > most_slots ? n_slots : most_slots;
    }
    all->pager = pager;
    all->share_of_slot = malloc(most_slots * sizeof *all->share_of_slot);
    return all->share_of_slot ? 0 : -ENOMEM;
}

void gp_ffn_shares_detach(gp_ffn_shares *all) {
    free(all->share_of_slot);
    all->share_of_slot = NULL;
}

void gp_ffn_shares_close(gp_ffn_shares *all) {
    gp_ffn_shares_detach(all);
    for (uint32_t i = 0; all->workers && i < FFN_WORKERS; i++) {
        if (all->workers[i].backend) {
            all->ggml->graphs.backend_free(all->workers[i].backend);
        }
    }
    if (all->context) {
        all->ggml->graphs.free(all->context);
    }
    free(all->shares);
    free(all->rows);
    free(all->experts);
    free(all->zeros);
    free(all->floats);
    free(all->workers);
}
