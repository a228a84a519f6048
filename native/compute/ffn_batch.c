/* Invariants
 *   1. As in ffn.c: nothing of the graph's is written before its time, and a shape is trusted once it gave the same bits.
 *   2. The rows of an expert are the ranks that chose it, token by token, as ggml's MUL_MAT_ID groups them: which of ggml's
 *      kernels computes them, and in which company, is the same here and there.
 *   3. A thread that takes an expert computes all of it, alone.
 *   4. A node that was expected here waits for its own slices, should the feed-forward not come together after all.
 */
#include "compute/ffn_batch.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "compute/ffn_shares.h"

enum { COPY_ROWS = 16 };

/* What is known of a layer's batches. */
typedef enum { UNKNOWN, HERE, ELSEWHERE } place;

/* What a node of llama.cpp's is given as its data: its number, FFN_LAST or that of a first matrix. */
typedef struct {
    gp_ffn_batch *batch;
    uint32_t      index;
} part;

struct gp_ffn_batch {
    const gp_ggml *ggml;
    gp_hold       *hold;
    gp_failure    *failure;
    gp_ffn_shares  shares;
    part           parts[FFN_MATRICES];
    gp_ffn_kinds   kinds;
    place         *places;                  /* per layer */
    bool           is_last_here;            /* the last feed-forward that was looked at is computed here: */
    size_t         last_row_floats;         /* with so much memory per row */

    /* The feed-forward at hand; until it is taken, as far as it was offered. */
    bool           is_closed, is_computed, is_trial;
    gp_ffn_kind   *kind;
    atomic_uint    next_copy[FFN_MATRICES];
    atomic_bool    has_failed;
};

static ggml_tensor *node_of(const gp_ffn_batch *b, uint32_t matrix) {
    return matrix == FFN_LAST ? b->shares.nodes.last : b->shares.nodes.first[matrix];
}

/* ---- computing -------------------------------------------------------------------------------------------------- */

static void note_failure(gp_ffn_batch *b, int status) {
    if (status != 0) {
        atomic_store(&b->has_failed, true);
    }
}

static void compute_share(gp_ffn_batch *b, uint32_t worker, const gp_ffn_share *s) {
    note_failure(b, gp_ffn_share_compute(&b->shares, worker, s));
    if (!b->is_trial) {
        gp_ffn_rows_copy(&b->shares, 0, s->first_row, s->n_rows);
    }
}

static void check(gp_ffn_batch *b, uint32_t slices) {
    gp_failure failure;
    if (b->failure->error == 0 && gp_pager_wait(b->shares.pager, b->hold, b->shares.layer, slices, &failure) != 0) {
        *b->failure = failure;
    }
    if (b->failure->error == 0 && atomic_load(&b->has_failed)) {
        *b->failure = (gp_failure) { .error = -ENOTRECOVERABLE };
    }
}

/* Takes what is there; false: nothing is. *is_more: some are not taken by anybody. */
static bool take_shares(gp_ffn_batch *b, uint32_t worker, bool *is_more) {
    bool is_any = false;
    *is_more = false;
    for (uint32_t i = 0; i < b->shares.n_shares && !gp_hold_stops(b->hold, worker == 0); i++) {
        gp_ffn_share *s = &b->shares.shares[i];
        if (atomic_load_explicit(&s->is_taken, memory_order_relaxed)) {
            continue;
        }
        if (!gp_ffn_share_is_there(&b->shares, s)) {
            *is_more = true;
        } else if (!atomic_exchange(&s->is_taken, true)) {
            compute_share(b, worker, s);
            is_any = true;
        }
    }
    return is_any;
}

/* ggml_custom_op_t of the first node: all of the feed-forward. */
static void compute_all(ggml_tensor *node, int ith, int nth, void *data) {
    (void) node;
    (void) nth;
    gp_ffn_batch *b = ((const part *) data)->batch;
    for (bool is_more = ith < FFN_WORKERS; is_more;) {     /* further threads have nothing to do */
        const unsigned n_arrived = gp_hold_n_arrived(b->hold);      /* before looking what is there */
        if (!take_shares(b, (uint32_t) ith, &is_more) && is_more) {
            is_more = gp_pager_wait_arrival(b->shares.pager, b->hold, b->shares.layer, n_arrived, ith == 0);
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
    if (ith == 0) {     /* alone: the node needs a worker's graph */
        compute_all(node, ith, nth, data);
        if (b->failure->error == 0) {
            note_failure(b, gp_ffn_node_compute(&b->shares, node));
        }
    }
}

/* Of a node that was expected, and whose feed-forward did not come together. */
static void compute_alone(ggml_tensor *node, int ith, int nth, void *data) {
    (void) nth;
    const part *own = data;
    gp_ffn_batch *b = own->batch;
    if (ith == 0) {
        b->is_computed = true;
        check(b, 1u << b->shares.slices[own->index]);
        if (b->failure->error == 0) {
            note_failure(b, gp_ffn_node_compute(&b->shares, node));
            check(b, 0);
        }
    }
}

static void copy_results(ggml_tensor *node, int ith, int nth, void *data) {
    (void) node;
    (void) nth;
    const part *own = data;
    gp_ffn_batch *b = own->batch;
    atomic_uint *next = &b->next_copy[own->index];
    uint32_t at;
    while ((at = atomic_fetch_add_explicit(next, COPY_ROWS, memory_order_relaxed)) < b->shares.n_rows) {
        gp_ffn_rows_copy(&b->shares, own->index, at, COPY_ROWS);
    }
    if (ith == 0) {
        check(b, 0);
    }
}

/* ---- what the tap calls ------------------------------------------------------------------------------------------ */

bool gp_ffn_batch_is_expected(const gp_ffn_batch *b, uint32_t layer, uint64_t n_rows) {
    return n_rows <= FFN_ROWS && b->is_last_here && b->places[layer] != ELSEWHERE
        && n_rows * b->last_row_floats <= b->shares.most_floats;
}

void gp_ffn_batch_reset(gp_ffn_batch *b) {
    b->is_closed = false;
    b->shares.nodes.shape.n_first = 0;
}

bool gp_ffn_batch_is_collecting(const gp_ffn_batch *b) {
    const gp_ffn_shares *all = &b->shares;
    return !b->is_closed && all->nodes.shape.n_first > 0 && b->places[all->layer] != ELSEWHERE
        && gp_ffn_floats_per_row(&all->nodes) * all->n_rows <= all->most_floats;
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
        && ids->ne[0] * ids->ne[1] <= FFN_ROWS && (input->ne[1] == 1 || input->ne[1] == ids->ne[0])
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

static void start(gp_ffn_batch *b, uint32_t layer, const ggml_tensor *ids) {
    memset(&b->shares.nodes, 0, sizeof b->shares.nodes);
    b->shares.nodes.n_ranks = (uint32_t) ids->ne[0];
    b->shares.nodes.n_tokens = (uint32_t) ids->ne[1];
    b->shares.nodes.ids = ids;
    b->shares.layer = layer;
    b->shares.n_rows = b->shares.nodes.n_ranks * b->shares.nodes.n_tokens;
    b->is_computed = false;
    atomic_store(&b->has_failed, false);
}

static void add_first(gp_ffn_batch *b, uint32_t slice, ggml_tensor *node, bool is_expected) {
    const uint32_t at = b->shares.nodes.shape.n_first++;
    b->shares.nodes.shape.first_types[at] = node->src[0]->type;
    b->shares.nodes.shape.first_widths[at] = node->ne[0];
    b->shares.nodes.first[at] = node;
    b->shares.slices[at] = slice;
    if (is_expected) {
        become(b, at, compute_alone);
    }
}

static void note_place(gp_ffn_batch *b, bool is_here) {
    b->places[b->shares.layer] = is_here ? HERE : ELSEWHERE;
    b->is_last_here = is_here;
    b->last_row_floats = gp_ffn_floats_per_row(&b->shares.nodes);
}

static void begin(gp_ffn_batch *b) {
    gp_ffn_shares_prepare(&b->shares);
    for (uint32_t i = 0; i < FFN_MATRICES; i++) {
        atomic_store(&b->next_copy[i], 0);
    }
}

static gp_ffn_fate end(gp_ffn_batch *b, uint32_t slice, ggml_tensor *node, const ggml_tensor *ids) {
    b->is_closed = true;
    b->shares.nodes.last = node;
    b->shares.nodes.shape.last_type = node->src[0]->type;
    b->shares.nodes.shape.last_width = node->ne[0];
    b->shares.slices[FFN_LAST] = slice;
    const gp_ffn_nodes *nodes = &b->shares.nodes;
    const bool is_whole = !b->is_computed && ids == nodes->ids && gp_ffn_trace(&b->shares.nodes, b->ggml, INT64_MAX);
    b->kind = is_whole ? gp_ffn_kind_find(&b->kinds, &nodes->shape) : NULL;
    if (!b->kind || b->kind->is_same == FFN_OTHER) {
        note_place(b, false);
        return FFN_APART;
    }
    if (gp_ffn_floats_per_row(nodes) * b->shares.n_rows > b->shares.most_floats) {
        return FFN_APART;   /* this time */
    }
    begin(b);
    b->is_trial = b->kind->is_same == FFN_UNTRIED;
    if (b->is_trial) {
        become(b, 0, compute_all_to_try);
        return FFN_TRIED;
    }
    note_place(b, true);
    become(b, 0, compute_all);
    for (uint32_t i = 1; i < nodes->shape.n_first; i++) {
        become(b, i, copy_results);
    }
    become(b, FFN_LAST, copy_results);
    return FFN_TAKEN;
}

gp_ffn_fate gp_ffn_batch_offer(gp_ffn_batch *b, uint32_t layer, uint32_t slice, ggml_tensor *node,
                               const ggml_tensor *ids, bool is_expected) {
    if (b->is_closed || !is_plain(b, node)) {
        return FFN_APART;
    }
    const bool is_first = b->shares.nodes.shape.n_first == 0 || b->shares.layer != layer;
    if (is_first) {
        start(b, layer, ids);
    }
    if (is_first || (b->shares.nodes.shape.n_first < FFN_FIRST && node->src[1] == b->shares.nodes.first[0]->src[1])) {
        add_first(b, slice, node, is_expected);
        return FFN_APART;
    }
    return end(b, slice, node, ids);
}

void gp_ffn_batch_judge(gp_ffn_batch *b) {
    const bool is_same = !atomic_load(&b->has_failed) && gp_ffn_rows_are_same(&b->shares, FFN_LAST);
    b->kind->is_same = is_same ? FFN_SAME : FFN_OTHER;
    note_place(b, is_same);
}

void gp_ffn_batch_count_shapes(const gp_ffn_batch *b, uint32_t *n_same, uint32_t *n_other) {
    gp_ffn_kinds_count(b ? &b->kinds : NULL, n_same, n_other);
}

/* ---- opening and closing ---------------------------------------------------------------------------------------- */

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
    const int error = gp_ffn_shares_open(&b->shares, ggml, rows_bytes);
    if (error != 0) {
        gp_ffn_batch_close(b);
        return error;
    }
    for (uint32_t i = 0; i < FFN_MATRICES; i++) {
        b->parts[i] = (part) { b, i };
    }
    *out = b;
    return 0;
}

int gp_ffn_batch_attach(gp_ffn_batch *b, gp_pager *pager, gp_hold *hold, gp_failure *failure, uint32_t n_layers) {
    b->hold = hold;
    b->failure = failure;
    b->places = calloc(n_layers, sizeof *b->places);
    if (!b->places || gp_ffn_shares_attach(&b->shares, pager, n_layers) != 0) {
        gp_ffn_batch_detach(b);
        return -ENOMEM;
    }
    return 0;
}

void gp_ffn_batch_detach(gp_ffn_batch *b) {
    gp_ffn_shares_detach(&b->shares);
    free(b->places);
    b->places = NULL;
}

void gp_ffn_batch_close(gp_ffn_batch *b) {
    if (b) {
        gp_ffn_batch_detach(b);
        gp_ffn_shares_close(&b->shares);
        free(b);
    }
}
