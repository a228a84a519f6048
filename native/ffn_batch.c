/* Invariants
 *   1. As in ffn.c: nothing of the graph's is written before its time, and a shape is trusted once it gave the same bits.
 *   2. The rows of an expert are the ranks that chose it, token by token, as ggml's MUL_MAT_ID groups them: which of ggml's
 *      kernels computes them, and in which company, is the same here and there.
 *   3. A thread that takes an expert computes all of it, alone.
 *   4. A node that was expected here waits for its own slices, should the feed-forward not come together after all.
 */
#include "ffn_batch.h"

#include <errno.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum { WORKERS = 32, SHAPES = 16, GRAPH_NODES = 64, MOST_ROWS = 4096, COPY_ROWS = 16 };
enum { LAST = FFN_FIRST, MATRICES };

typedef enum { UNTRIED, SAME, OTHER } verdict;

typedef struct {
    gp_ffn_shape shape;
    verdict      is_same;
} tried_shape;

/* What is known of a layer's batches. */
typedef enum { UNKNOWN, HERE, ELSEWHERE } place;

/* One rank of one token. */
typedef struct {
    uint32_t rank, token;
} row;

/* One expert's. */
typedef struct {
    uint32_t    slot, first_row, n_rows;
    atomic_bool is_taken;
} share;

/* What one thread computes with. */
typedef struct {
    void       *backend, *graph;
    ggml_tensor input, slot_ids, expert_ids;
    ggml_tensor matrices[MATRICES], products[MATRICES];
    ggml_tensor steps[FFN_STEPS], sources[FFN_STEPS][FFN_SOURCES];
} worker;

/* What a node of llama.cpp's is given as its data: its number, LAST or that of a first matrix. */
typedef struct {
    gp_ffn_batch *batch;
    uint32_t      index;
} part;

struct gp_ffn_batch {
    const gp_ggml *ggml;
    gp_pager      *pager;
    gp_hold       *hold;
    gp_failure    *failure;
    void          *context;                 /* ggml's, with the graphs in it */
    worker         workers[WORKERS];        /* those of further threads have nothing to do */
    part           parts[MATRICES];
    tried_shape    tried[SHAPES];
    uint32_t       n_tried;
    gp_ffn_shape   built;                   /* what the graphs are made for */
    place         *places;                  /* per layer */
    bool           is_last_here;            /* the last feed-forward that was looked at is computed here: */
    size_t         last_row_floats;         /* with so much memory per row */
    size_t         most_floats;
    float         *floats;
    int32_t       *zeros, *experts;         /* per row: of a matrix that stands alone, and of all */
    row           *rows;                    /* those of an expert beside one another */
    share         *shares;                  /* those first that are there */
    uint32_t      *share_of_slot;

    /* The feed-forward at hand; until it is taken, as far as it was offered. */
    bool           is_closed, is_computed, is_trial;
    uint32_t       layer, slices[MATRICES];
    gp_ffn_nodes   nodes;
    tried_shape   *kind;
    uint32_t       n_shares, n_rows;
    float         *input_rows, *product_rows[MATRICES], *step_rows[FFN_STEPS];
    atomic_uint    next_copy[MATRICES];
    atomic_bool    has_failed;
};

static ggml_tensor *node_of(const gp_ffn_batch *b, uint32_t matrix) {
    return matrix == LAST ? b->nodes.last : b->nodes.first[matrix];
}

/* Which of the matrices there are: an expert may have one first matrix only. */
static bool has_matrix(const gp_ffn_batch *b, uint32_t matrix) {
    return matrix == LAST || matrix < b->nodes.shape.n_first;
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
static void copy_leaf(const gp_ffn_batch *b, ggml_tensor *ours, const ggml_tensor *theirs) {
    *ours = *theirs;
    ours->op = b->ggml->op_none;
    memset(ours->src, 0, sizeof ours->src);
    ours->view_src = NULL;
    ours->view_offs = 0;
}

static void set_ids(const gp_ffn_batch *b, ggml_tensor *ours, uint32_t n_rows, int32_t *data) {
    copy_leaf(b, ours, b->nodes.ids);
    set_rows(ours, 1, n_rows, data);    /* an id is as large as a float */
    ours->ne[1] = n_rows;
    ours->ne[2] = 1;
}

static float *rows_at(float *rows, int64_t width, const share *s) {
    return rows + (size_t) s->first_row * (size_t) width;
}

static void describe_product(const gp_ffn_batch *b, worker *w, const share *s, uint32_t matrix, ggml_tensor *input) {
    const ggml_tensor *node = node_of(b, matrix);
    ggml_tensor *ours = &w->matrices[matrix], *product = &w->products[matrix];
    copy_leaf(b, ours, node->src[0]);
    ours->data = (char *) node->src[0]->data + (uint64_t) s->slot * node->src[0]->nb[2];
    ours->ne[2] = 1;
    ours->nb[3] = ours->nb[2];
    *product = *node;
    product->op = b->ggml->op_mul_mat_id;
    memset(product->op_params, 0, sizeof product->op_params);
    product->src[0] = ours;
    product->src[1] = input;
    product->src[2] = &w->slot_ids;
    set_rows(product, node->ne[0], s->n_rows, rows_at(b->product_rows[matrix], node->ne[0], s));
}

static ggml_tensor *describe_source(const gp_ffn_batch *b, worker *w, uint32_t at, uint32_t i) {
    const gp_ffn_source *source = &b->nodes.shape.steps[at].sources[i];
    ggml_tensor *theirs = b->nodes.steps[at]->src[i], *ours = &w->sources[at][i];
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
    copy_leaf(b, ours, base);
    ours->ne[0] = source->width;
    ours->data = (char *) base->data + source->offset_bytes;
    return ours;
}

static void describe(const gp_ffn_batch *b, worker *w, const share *s) {
    const gp_ffn_shape *shape = &b->nodes.shape;
    copy_leaf(b, &w->input, b->nodes.first[0]->src[1]);
    set_rows(&w->input, w->input.ne[0], s->n_rows, rows_at(b->input_rows, w->input.ne[0], s));
    set_ids(b, &w->slot_ids, s->n_rows, b->zeros);
    set_ids(b, &w->expert_ids, s->n_rows, b->experts + s->first_row);
    for (uint32_t i = 0; i < shape->n_first; i++) {
        describe_product(b, w, s, i, &w->input);
    }
    for (uint32_t at = 0; at < shape->n_steps; at++) {
        ggml_tensor *ours = &w->steps[at];
        *ours = *b->nodes.steps[at];
        set_rows(ours, ours->ne[0], s->n_rows, rows_at(b->step_rows[at], ours->ne[0], s));
        for (uint32_t i = 0; i < FFN_SOURCES; i++) {
            ours->src[i] = describe_source(b, w, at, i);
        }
    }
    describe_product(b, w, s, LAST, shape->n_steps > 0 ? &w->steps[shape->n_steps - 1] : &w->products[0]);
}

/* In the decoding thread, once per shape: ggml computes a graph's nodes by their addresses, which stay. */
static void build_graphs(gp_ffn_batch *b) {
    const gp_graphs *graphs = &b->ggml->graphs;
    if (gp_ffn_is_same_shape(&b->built, &b->nodes.shape)) {
        return;
    }
    for (uint32_t i = 0; i < WORKERS; i++) {
        worker *w = &b->workers[i];
        describe(b, w, &b->shares[0]);
        graphs->clear(w->graph);
        for (uint32_t at = 0; at < b->nodes.shape.n_first; at++) {
            graphs->expand(w->graph, &w->products[at]);
        }
        for (uint32_t at = 0; at < b->nodes.shape.n_steps; at++) {
            graphs->expand(w->graph, &w->steps[at]);
        }
        graphs->expand(w->graph, &w->products[LAST]);
    }
    memcpy(&b->built, &b->nodes.shape, sizeof b->built);
}

/* ---- computing -------------------------------------------------------------------------------------------------- */

static char *row_in(const ggml_tensor *tensor, const row *r) {
    const uint32_t rank = tensor->ne[1] == 1 ? 0 : r->rank;
    return (char *) tensor->data + rank * tensor->nb[1] + r->token * tensor->nb[2];
}

static bool is_there(const gp_ffn_batch *b, const share *s) {
    bool is_all = true;
    for (uint32_t i = 0; i < MATRICES; i++) {
        is_all = is_all && (!has_matrix(b, i) || gp_pager_has_slice(b->pager, b->layer, s->slot, b->slices[i]));
    }
    return is_all;
}

static void copy_rows(const gp_ffn_batch *b, const ggml_tensor *node, const float *rows, uint32_t first, uint32_t n) {
    for (uint32_t i = first; i < first + n && i < b->n_rows; i++) {
        memcpy(row_in(node, &b->rows[i]), rows + (size_t) i * (size_t) node->ne[0], (size_t) node->ne[0] * sizeof(float));
    }
}

static void compute_share(gp_ffn_batch *b, worker *w, const share *s, const ggml_tensor *first) {
    const ggml_tensor *input = first->src[1];
    for (uint32_t i = s->first_row; i < s->first_row + s->n_rows; i++) {
        memcpy(b->input_rows + (size_t) i * (size_t) input->ne[0], row_in(input, &b->rows[i]),
               (size_t) input->ne[0] * sizeof(float));
    }
    describe(b, w, s);
    if (b->ggml->graphs.compute(w->backend, w->graph) != 0) {
        atomic_store(&b->has_failed, true);
    }
    if (!b->is_trial) {
        copy_rows(b, first, b->product_rows[0], s->first_row, s->n_rows);
    }
}

/* A node as llama.cpp made it, by ggml. */
static void compute_whole(gp_ffn_batch *b, const ggml_tensor *node) {
    worker *w = &b->workers[0];
    ggml_tensor *ours = &w->products[0];
    *ours = *node;
    ours->op = b->ggml->op_mul_mat_id;
    memset(ours->op_params, 0, sizeof ours->op_params);
    copy_leaf(b, &w->input, node->src[1]);      /* computed; its own sources are no business of this graph */
    ours->src[1] = &w->input;
    b->ggml->graphs.clear(w->graph);
    b->ggml->graphs.expand(w->graph, ours);
    memset(&b->built, 0, sizeof b->built);
    if (b->ggml->graphs.compute(w->backend, w->graph) != 0) {
        atomic_store(&b->has_failed, true);
    }
}

static void check(gp_ffn_batch *b, uint32_t slices) {
    gp_failure failure;
    if (b->failure->error == 0 && gp_pager_wait(b->pager, b->hold, b->layer, slices, &failure) != 0) {
        *b->failure = failure;
    }
    if (b->failure->error == 0 && atomic_load(&b->has_failed)) {
        *b->failure = (gp_failure) { .error = -ENOTRECOVERABLE };
    }
}

/* Takes what is there; false: nothing is. *is_more: some are not taken by anybody. */
static bool take_shares(gp_ffn_batch *b, worker *w, const ggml_tensor *first, bool *is_more) {
    bool is_any = false;
    *is_more = false;
    for (uint32_t i = 0; i < b->n_shares; i++) {
        share *s = &b->shares[i];
        if (atomic_load_explicit(&s->is_taken, memory_order_relaxed)) {
            continue;
        }
        if (!is_there(b, s)) {
            *is_more = true;
        } else if (!atomic_exchange(&s->is_taken, true)) {
            compute_share(b, w, s, first);
            is_any = true;
        }
    }
    return is_any;
}

/* ggml_custom_op_t of the first node: all of the feed-forward. */
static void compute_all(ggml_tensor *node, int ith, int nth, void *data) {
    (void) nth;
    gp_ffn_batch *b = ((const part *) data)->batch;
    for (bool is_more = ith < WORKERS; is_more;) {
        const unsigned n_arrived = gp_hold_n_arrived(b->hold);      /* before looking what is there */
        if (!take_shares(b, &b->workers[ith], node, &is_more) && is_more) {
            gp_pager_wait_arrival(b->pager, b->hold, b->layer, n_arrived, ith == 0);
        }
    }
    if (ith == 0) {
        b->is_computed = true;
        check(b, ~0u);
    }
}

/* The same, and then the node itself as it is without us: what follows in the graph is compared with ours. */
static void compute_all_to_try(ggml_tensor *node, int ith, int nth, void *data) {
    gp_ffn_batch *b = ((const part *) data)->batch;
    if (ith == 0) {     /* alone: the graph of a worker is needed for the node */
        compute_all(node, ith, nth, data);
        compute_whole(b, node);
    }
}

/* Of a node that was expected, and whose feed-forward did not come together. */
static void compute_alone(ggml_tensor *node, int ith, int nth, void *data) {
    (void) nth;
    const part *own = data;
    if (ith == 0) {
        own->batch->is_computed = true;
        check(own->batch, 1u << own->batch->slices[own->index]);
        compute_whole(own->batch, node);
    }
}

static void copy_results(ggml_tensor *node, int ith, int nth, void *data) {
    (void) nth;
    const part *own = data;
    gp_ffn_batch *b = own->batch;
    uint32_t at;
    while ((at = atomic_fetch_add_explicit(&b->next_copy[own->index], COPY_ROWS, memory_order_relaxed)) < b->n_rows) {
        copy_rows(b, node, b->product_rows[own->index], at, COPY_ROWS);
    }
    if (ith == 0) {
        check(b, 0);
    }
}

/* ---- what the tap calls ------------------------------------------------------------------------------------------ */

bool gp_ffn_batch_is_expected(const gp_ffn_batch *b, uint32_t layer, uint64_t n_rows) {
    return n_rows <= MOST_ROWS && b->is_last_here && b->places[layer] != ELSEWHERE
        && n_rows * b->last_row_floats <= b->most_floats;
}

void gp_ffn_batch_reset(gp_ffn_batch *b) {
    b->is_closed = false;
    b->nodes.shape.n_first = 0;
}

void gp_ffn_batch_interrupt(gp_ffn_batch *b) {
    b->is_closed = true;
}

/* All but the kind of matrices as ggml's MUL_MAT_ID has it in a graph of llama.cpp. */
static bool is_plain(const gp_ffn_batch *b, const ggml_tensor *node) {
    const ggml_tensor *input = node->src[1], *ids = node->src[2];
    bool is_plain = node->type == b->ggml->type_f32 && input->type == b->ggml->type_f32
        && node->nb[0] == sizeof(float) && input->nb[0] == sizeof(float)
        && input->buffer && b->ggml->buffer_is_host(input->buffer)
        && ids->ne[0] * ids->ne[1] <= MOST_ROWS && (input->ne[1] == 1 || input->ne[1] == ids->ne[0])
        && input->ne[2] == ids->ne[1] && input->ne[3] == 1
        && node->ne[1] == ids->ne[0] && node->ne[2] == ids->ne[1] && node->ne[3] == 1;
    for (uint32_t i = 0; i < sizeof node->op_params / sizeof *node->op_params; i++) {
        is_plain &= node->op_params[i] == 0;
    }
    return is_plain;
}

static void become(gp_ffn_batch *b, uint32_t matrix, void (*compute)(ggml_tensor *, int, int, void *)) {
    const gp_custom custom = { .compute = compute, .n_tasks = GP_ALL_THREADS, .data = &b->parts[matrix] };
    memcpy(node_of(b, matrix)->op_params, &custom, sizeof custom);
    node_of(b, matrix)->op = b->ggml->op_custom;
}

static float *take_floats(gp_ffn_batch *b, size_t *at, int64_t width) {
    float *rows = b->floats + *at;
    *at += (size_t) width * b->n_rows;
    return rows;
}

static size_t floats_per_row(const gp_ffn_nodes *nodes) {
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

static void share_out_floats(gp_ffn_batch *b) {
    const gp_ffn_shape *shape = &b->nodes.shape;
    size_t at = 0;
    b->input_rows = take_floats(b, &at, b->nodes.first[0]->src[1]->ne[0]);
    for (uint32_t i = 0; i < shape->n_first; i++) {
        b->product_rows[i] = take_floats(b, &at, shape->first_widths[i]);
    }
    for (uint32_t i = 0; i < shape->n_steps; i++) {
        b->step_rows[i] = take_floats(b, &at, shape->steps[i].width);
    }
    b->product_rows[LAST] = take_floats(b, &at, shape->last_width);
}

static int32_t id_at(const ggml_tensor *ids, uint32_t rank, uint32_t token) {
    return *(const int32_t *) ((const char *) ids->data + token * ids->nb[1] + rank * ids->nb[0]);
}

static void add_share(gp_ffn_batch *b, uint32_t slot) {
    share *s = &b->shares[b->n_shares];
    s->slot = slot;
    s->n_rows = 0;
    atomic_store(&s->is_taken, false);
    b->share_of_slot[slot] = b->n_shares++;
}

enum { NO_SHARE = UINT32_MAX };

static uint32_t slot_at(const gp_ffn_batch *b, uint32_t i) {
    return (uint32_t) id_at(b->nodes.last->src[2], i % b->nodes.n_ranks, i / b->nodes.n_ranks);
}

static void add_shares(gp_ffn_batch *b, bool only_there) {
    for (uint32_t i = 0; i < b->n_rows; i++) {
        const share of_slot = { .slot = slot_at(b, i) };
        if (b->share_of_slot[of_slot.slot] == NO_SHARE && (!only_there || is_there(b, &of_slot))) {
            add_share(b, of_slot.slot);
        }
    }
}

/* Experts that are there before those that are not, each with its rows token by token. */
static void share_out_rows(gp_ffn_batch *b) {
    b->n_shares = 0;
    for (uint32_t i = 0; i < b->n_rows; i++) {
        b->share_of_slot[slot_at(b, i)] = NO_SHARE;
    }
    add_shares(b, true);
    add_shares(b, false);
    for (uint32_t i = 0; i < b->n_rows; i++) {
        b->shares[b->share_of_slot[slot_at(b, i)]].n_rows++;
    }
    for (uint32_t i = 0, first = 0; i < b->n_shares; i++) {
        b->shares[i].first_row = first;
        first += b->shares[i].n_rows;
        b->shares[i].n_rows = 0;
    }
    for (uint32_t i = 0; i < b->n_rows; i++) {
        const row r = { i % b->nodes.n_ranks, i / b->nodes.n_ranks };
        share *s = &b->shares[b->share_of_slot[slot_at(b, i)]];
        const uint32_t at = s->first_row + s->n_rows++;
        b->rows[at] = r;
        b->experts[at] = id_at(b->nodes.ids, r.rank, r.token);
    }
}

static void start(gp_ffn_batch *b, uint32_t layer, const ggml_tensor *ids) {
    memset(&b->nodes, 0, sizeof b->nodes);
    b->nodes.n_ranks = (uint32_t) ids->ne[0];
    b->nodes.n_tokens = (uint32_t) ids->ne[1];
    b->nodes.ids = ids;
    b->layer = layer;
    b->n_rows = b->nodes.n_ranks * b->nodes.n_tokens;
    b->is_computed = false;
}

static void add_first(gp_ffn_batch *b, uint32_t slice, ggml_tensor *node, bool is_expected) {
    const uint32_t at = b->nodes.shape.n_first++;
    b->nodes.shape.first_widths[at] = node->ne[0];
    b->nodes.first[at] = node;
    b->slices[at] = slice;
    if (is_expected) {
        become(b, at, compute_alone);
    }
}

static tried_shape *find_shape(gp_ffn_batch *b) {
    for (uint32_t i = 0; i < b->n_tried; i++) {
        if (gp_ffn_is_same_shape(&b->tried[i].shape, &b->nodes.shape)) {
            return &b->tried[i];
        }
    }
    if (b->n_tried == SHAPES) {
        return NULL;
    }
    tried_shape *new = &b->tried[b->n_tried++];
    memcpy(&new->shape, &b->nodes.shape, sizeof new->shape);
    return new;
}

static void note_place(gp_ffn_batch *b, bool is_here) {
    b->places[b->layer] = is_here ? HERE : ELSEWHERE;
    b->is_last_here = is_here;
    b->last_row_floats = floats_per_row(&b->nodes);
}

static void begin(gp_ffn_batch *b) {
    share_out_rows(b);
    share_out_floats(b);
    build_graphs(b);
    for (uint32_t i = 0; i < MATRICES; i++) {
        atomic_store(&b->next_copy[i], 0);
    }
    atomic_store(&b->has_failed, false);
}

static gp_ffn_fate end(gp_ffn_batch *b, uint32_t slice, ggml_tensor *node, const ggml_tensor *ids) {
    b->is_closed = true;
    b->nodes.last = node;
    b->nodes.shape.last_width = node->ne[0];
    b->slices[LAST] = slice;
    const bool is_whole = !b->is_computed && ids == b->nodes.ids && gp_ffn_trace(&b->nodes, b->ggml, INT64_MAX);
    b->kind = is_whole ? find_shape(b) : NULL;
    if (!b->kind || b->kind->is_same == OTHER || floats_per_row(&b->nodes) * b->n_rows > b->most_floats) {
        note_place(b, false);
        return FFN_APART;
    }
    begin(b);
    b->is_trial = b->kind->is_same == UNTRIED;
    if (b->is_trial) {
        become(b, 0, compute_all_to_try);
        return FFN_TRIED;
    }
    note_place(b, true);
    become(b, 0, compute_all);
    for (uint32_t i = 1; i < b->nodes.shape.n_first; i++) {
        become(b, i, copy_results);
    }
    become(b, LAST, copy_results);
    return FFN_TAKEN;
}

gp_ffn_fate gp_ffn_batch_offer(gp_ffn_batch *b, uint32_t layer, uint32_t slice, ggml_tensor *node,
                               const ggml_tensor *ids, bool is_expected) {
    if (b->is_closed || !is_plain(b, node)) {
        return FFN_APART;
    }
    const bool is_first = b->nodes.shape.n_first == 0 || b->layer != layer;
    if (is_first) {
        start(b, layer, ids);
    }
    if (is_first || (b->nodes.shape.n_first < FFN_FIRST && node->src[1] == b->nodes.first[0]->src[1])) {
        add_first(b, slice, node, is_expected);
        return FFN_APART;
    }
    return end(b, slice, node, ids);
}

void gp_ffn_batch_judge(gp_ffn_batch *b) {
    bool is_same = !atomic_load(&b->has_failed);
    for (uint32_t i = 0; i < b->n_rows; i++) {
        const int64_t width = b->nodes.last->ne[0];
        is_same &= memcmp(row_in(b->nodes.last, &b->rows[i]), b->product_rows[LAST] + (size_t) i * (size_t) width,
                          (size_t) width * sizeof(float)) == 0;
    }
    b->kind->is_same = is_same ? SAME : OTHER;
    note_place(b, is_same);
}

void gp_ffn_batch_count_shapes(const gp_ffn_batch *b, uint32_t *n_same, uint32_t *n_other) {
    *n_same = *n_other = 0;
    for (uint32_t i = 0; b && i < b->n_tried; i++) {
        *n_same += b->tried[i].is_same == SAME;
        *n_other += b->tried[i].is_same == OTHER;
    }
}

/* ---- opening and closing ---------------------------------------------------------------------------------------- */

static bool open_workers(gp_ffn_batch *b) {
    const gp_graphs *graphs = &b->ggml->graphs;
    for (uint32_t i = 0; i < WORKERS; i++) {
        worker *w = &b->workers[i];
        w->graph = graphs->new_graph(b->context, GRAPH_NODES, false);
        w->backend = graphs->backend_init();
        if (!w->graph || !w->backend) {
            return false;
        }
        graphs->backend_set_n_threads(w->backend, 1);
    }
    return true;
}

int gp_ffn_batch_open(gp_ffn_batch **out, const gp_ggml *ggml, size_t rows_bytes) {
    *out = NULL;
    if (!ggml->graphs.compute || ggml->graphs.is_numa() || rows_bytes == 0) {
        return 0;
    }
    gp_ffn_batch *b = calloc(1, sizeof *b);
    if (!b) {
        return -ENOMEM;
    }
    b->ggml = ggml;
    b->most_floats = rows_bytes / sizeof(float);
    b->floats = malloc(rows_bytes);
    b->zeros = calloc(MOST_ROWS, sizeof *b->zeros);
    b->experts = malloc(MOST_ROWS * sizeof *b->experts);
    b->rows = malloc(MOST_ROWS * sizeof *b->rows);
    b->shares = malloc(MOST_ROWS * sizeof *b->shares);
    b->context = ggml->graphs.init((gp_graphs_memory) { .bytes = WORKERS * ggml->graphs.overhead(GRAPH_NODES, false),
                                                        .no_alloc = true });
    if (!b->floats || !b->zeros || !b->experts || !b->rows || !b->shares || !b->context || !open_workers(b)) {
        gp_ffn_batch_close(b);
        return -ENOMEM;
    }
    for (uint32_t i = 0; i < MATRICES; i++) {
        b->parts[i] = (part) { b, i };
    }
    *out = b;
    return 0;
}

int gp_ffn_batch_attach(gp_ffn_batch *b, gp_pager *pager, gp_hold *hold, gp_failure *failure, uint32_t n_layers) {
    uint32_t most_slots = 0;
    for (uint32_t i = 0; i < n_layers; i++) {
        uint32_t n_slots;
        uint64_t stride_bytes;
        (void) gp_pager_slots(pager, gp_pager_layer(pager, i)->shape_class, &n_slots, &stride_bytes);
        most_slots = n_slots > most_slots ? n_slots : most_slots;
    }
    b->places = calloc(n_layers, sizeof *b->places);
    b->share_of_slot = malloc(most_slots * sizeof *b->share_of_slot);
    if (!b->places || !b->share_of_slot) {
        gp_ffn_batch_detach(b);
        return -ENOMEM;
    }
    b->pager = pager;
    b->hold = hold;
    b->failure = failure;
    return 0;
}

void gp_ffn_batch_detach(gp_ffn_batch *b) {
    free(b->share_of_slot);
    free(b->places);
    b->share_of_slot = NULL;
    b->places = NULL;
}

void gp_ffn_batch_close(gp_ffn_batch *b) {
    if (!b) {
        return;
    }
    gp_ffn_batch_detach(b);
    for (uint32_t i = 0; i < WORKERS; i++) {
        if (b->workers[i].backend) {
            b->ggml->graphs.backend_free(b->workers[i].backend);
        }
    }
    if (b->context) {
        b->ggml->graphs.free(b->context);
    }
    free(b->shares);
    free(b->rows);
    free(b->experts);
    free(b->zeros);
    free(b->floats);
    free(b);
}
