/* Invariants
 *   1. A node is ours from the ask about it until it is asked about again or has ended a piece: what it was can be read off it,
 *      so nothing of a graph has to be remembered for that.
 *   2. Every node of ours can be computed alone. When the last one of a feed-forward comes, all of it is computed in that node's
 *      time: the first node converts its input, which is there then; those between do nothing.
 *   3. A kind of matrices is ours once a trial has given ggml's bits (trial.h). What lies between the matrices is ours once it has
 *      given those of llama.cpp's own nodes, in a piece in which every matrix was computed alone.
 *   4. What lies between is left out only if no other node of the piece looks at it. A piece ends after the last layer, so that
 *      nodes of one graph are never taken for those of the next.
 *   5. A wave is begun when the first of its nodes is asked about, so that reads begin, or in that node's time.
 *   6. All nodes of a piece are asked about before the first of them is computed. A piece may end without a word, where llama.cpp
 *      splits its graph: once a node of ours is computed, nothing that was asked about before is changed any more.
 */
#include "compute/compute.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "compute/crew.h"
#include "compute/foretell.h"
#include "compute/samples.h"
#include "compute/trial.h"

/* A flag that ggml does not have: this node has lost the one that makes ggml compute it. */
enum { LEFT_OUT = 1 << 30 };
/* Nodes that may lie between the matrices, views included. */
enum { BETWEEN = 32, SPINS = 1000 };

typedef struct slice slice;

/* A run, as nodes know it. */
typedef struct {
    gp_compute  *compute;
    const slice *leader;        /* what is multiplied with first */
    gp_run       run;
    uint32_t     ticket;        /* another one each time that it is asked about */
} planned_run;

/* A slice of the model, and what a node of ours that multiplies with it is given as its data. */
struct slice {
    uint32_t     layer, index;  /* among the layer's slices */
    gp_matrices *kind;          /* NULL: left to ggml */
    planned_run  alone, *run;   /* the node alone; what the node is for: that, or all of the feed-forward */
    int32_t      op_params[sizeof(gp_custom) / sizeof(int32_t)];    /* of the node that llama.cpp has made */
    uint32_t     piece;         /* in which a node was last made ours */
};

typedef struct {
    gp_nodes     nodes;         /* of the feed-forward, as far as it was offered */
    slice       *first[GP_FIRST], *last;
    gp_kind     *kind;
    planned_run  whole;
    const slice *leader;        /* the slice that comes first in a graph: with it a batch is counted; NULL: none was seen */
    const ggml_tensor *counted; /* in this piece: the ids of that batch */
} layer;

struct gp_compute {
    const gp_ggml *ggml;
    uint32_t       most_ids;
    size_t         bytes;
    gp_pager      *pager;
    gp_hold       *hold;
    gp_failure    *failure;
    slice         *slices;
    layer         *layers;
    uint32_t       n_slices, n_layers;
    gp_kernels     kernels;
    gp_kinds       kinds;       /* of feed-forwards */
    gp_batch       batch;
    gp_crew        crew;
    gp_foretell   *foretell;
    uint32_t       n_tickets;
    atomic_uint    started;     /* the ticket of the run that may be computed */

    /* This piece. */
    uint32_t       piece;           /* its number; another one once it is being computed */
    const ggml_tensor *begun_ids;   /* a wave has begun with them, and is not computed yet; NULL: none */
    uint32_t       begun_layer;
    layer         *collecting;  /* its last node is still to come */
    ggml_tensor   *between[BETWEEN];
    uint32_t       n_between;
    layer         *whole;       /* the one that is computed as a whole */
    bool           has_closed;  /* what was offered last was the last node of a feed-forward */
    gp_samples     samples;     /* of one whose nodes are computed alone */
};

/* ---- nodes -------------------------------------------------------------------------------------------------------- */

typedef void (*gp_operation)(ggml_tensor *node, int ith, int nth, void *data);

static void convert_inputs(ggml_tensor *node, int ith, int nth, void *data);
static void compute_run(ggml_tensor *node, int ith, int nth, void *data);
static void compute_nothing(ggml_tensor *node, int ith, int nth, void *data);

static void become(const gp_compute *c, ggml_tensor *node, gp_operation operation, slice *s, planned_run *run) {
    const gp_custom custom = { .compute = operation, .n_tasks = GP_ALL_THREADS, .data = s };
    memcpy(s->op_params, node->op_params, sizeof s->op_params);
    memcpy(node->op_params, &custom, sizeof custom);
    node->op = c->ggml->op_custom;
    s->run = run;
}

static void leave_out(const gp_compute *c, ggml_tensor *node) {
    if (c->ggml->flag_compute) {
        node->flags = (node->flags & ~c->ggml->flag_compute) | LEFT_OUT;
    }
}

static bool is_ours(const gp_compute *c, const ggml_tensor *node) {
    gp_custom custom;
    memcpy(&custom, node->op_params, sizeof custom);
    return node->op == c->ggml->op_custom
        && (custom.compute == convert_inputs || custom.compute == compute_run || custom.compute == compute_nothing);
}

void gp_compute_undo(const gp_compute *c, ggml_tensor *node) {
    if (node->flags & LEFT_OUT) {
        node->flags = (node->flags & ~LEFT_OUT) | c->ggml->flag_compute;
    }
    if (is_ours(c, node)) {
        gp_custom custom;
        memcpy(&custom, node->op_params, sizeof custom);
        const slice *s = custom.data;
        memcpy(node->op_params, s->op_params, sizeof s->op_params);
        node->op = c->ggml->op_mul_mat_id;
    }
}

/* As ggml's MUL_MAT_ID stands in a graph of llama.cpp, with inputs and results of floats in this machine's memory. */
static bool is_plain(const gp_compute *c, const ggml_tensor *node, const ggml_tensor *ids) {
    const ggml_tensor *input = node->src[1];
    return node->type == c->ggml->type_f32 && input->type == c->ggml->type_f32
        && node->nb[0] == sizeof(float) && input->nb[0] == sizeof(float)
        && input->buffer && c->ggml->buffer_is_host(input->buffer)
        && (input->ne[1] == 1 || input->ne[1] == ids->ne[0]) && input->ne[2] == ids->ne[1] && input->ne[3] == 1
        && node->ne[1] == ids->ne[0] && node->ne[2] == ids->ne[1] && node->ne[3] == 1
        && ids->type == c->ggml->type_i32 && ids->ne[2] == 1 && ids->ne[3] == 1
        && ids->buffer && c->ggml->buffer_is_host(ids->buffer);
}

/* ---- waves -------------------------------------------------------------------------------------------------------- */

/* Whether these ids have been counted: with an earlier node of the layer, or for a trial that another has driven out since. */
static bool is_again(gp_compute *c, const slice *s, const ggml_tensor *ids) {
    layer *l = &c->layers[s->layer];
    const bool is_again = l->leader != s || l->counted == ids;
    l->counted = ids;
    return is_again;
}

/* In the decoding thread. False: the decode has failed. */
static bool begin_wave(gp_compute *c, const slice *s, const ggml_tensor *ids) {
    gp_failure failure;
    c->begun_ids = NULL;
    if (gp_batch_begin(&c->batch, s->layer, ids, is_again(c, s, ids), &failure) != 0) {
        *c->failure = failure;
        return false;
    }
    c->begun_ids = ids;
    c->begun_layer = s->layer;
    return true;
}

static bool has_begun(const gp_compute *c, uint32_t layer, const ggml_tensor *ids) {
    return c->begun_ids == ids && c->begun_layer == layer;
}

/* Waits until two experts of the wave are there, or one, if there is no slot for another. */
static bool wait_for_some(gp_compute *c, uint32_t *n) {
    const uint32_t all = (1u << gp_pager_layer(c->pager, c->begun_layer)->n_slices) - 1;
    gp_failure failure;
    *n = 0;
    while (*n < 2 && *n < c->hold->n_wanted && (*n == 0 || gp_wave_has(c->pager, c->hold, *n, 0))) {
        const unsigned n_arrived = gp_wave_n_arrived(c->hold);
        if (gp_wave_has(c->pager, c->hold, *n, all)) {
            (*n)++;
        } else if (gp_wave_stops(c->hold, true) || !gp_wave_wait(c->pager, c->hold, n_arrived, true)) {
            break;
        }
    }
    if (*n == 0 && gp_wave_end(c->pager, c->hold, &failure) != 0) {
        *c->failure = failure;
    }
    return *n > 0;
}

/* Finds out who can compute these matrices, if it is not known. False: the decode has failed, or it cannot be known now. */
static bool try_matrices(gp_compute *c, slice *s, const ggml_tensor *node, const ggml_tensor *ids, uint32_t most_rows) {
    const bool is_many = most_rows >= GP_MANY_ROWS;
    const bool is_known = s->kind->few != GP_UNTRIED_KERNEL && (!is_many || s->kind->many != GP_UNTRIED_KERNEL);
    if (is_known || s->kind->few == GP_BY_NOBODY) {
        return true;
    }
    gp_trial_experts experts = { .row_bytes = node->src[0]->nb[1] };
    if ((!has_begun(c, s->layer, ids) && !begin_wave(c, s, ids)) || !wait_for_some(c, &experts.n)) {
        return false;
    }
    for (uint32_t i = 0; i < experts.n; i++) {
        experts.data[i] = gp_batch_matrix(&c->batch, i, s->index, node);
    }
    int error = 0;
    if (s->kind->few == GP_UNTRIED_KERNEL) {
        error = gp_try(s->kind, false, c->ggml, c->crew.workers, &experts);
    }
    if (error == 0 && is_many && s->kind->many == GP_UNTRIED_KERNEL) {
        error = gp_try(s->kind, true, c->ggml, c->crew.workers, &experts);
    }
    return error == 0;
}

/* ---- computing ---------------------------------------------------------------------------------------------------- */

/* What a node was left for is not computed any more: its memory is there, and what is in it is thrown away. */
static void compute_nothing(ggml_tensor *node, int ith, int nth, void *data) {
    (void) node;
    (void) ith;
    (void) nth;
    (void) data;
}

static void convert_inputs(ggml_tensor *node, int ith, int nth, void *data) {
    (void) nth;
    const planned_run *own = ((const slice *) data)->run;
    if (ith == 0) {
        gp_foretell_keep(own->compute->foretell, own->run.layer, node, own->run.ids);
    }
    gp_crew_convert(&own->compute->crew, &own->run);
}

static void start(gp_compute *c, planned_run *own, uint32_t n_threads) {
    const gp_run *run = &own->run;
    c->collecting = c->whole = NULL;
    c->piece++;
    if (c->failure->error == 0) {
        gp_samples_compare(&c->samples, run->last, c->crew.workers, c->crew.memory, c->crew.bytes);
    }
    if (c->failure->error == 0 && (has_begun(c, run->layer, run->ids) || begin_wave(c, own->leader, run->ids))) {
        gp_crew_begin(&c->crew, run, n_threads);
    } else {
        gp_crew_rest(&c->crew);
    }
    c->begun_ids = NULL;
}

static void finish(gp_compute *c, const planned_run *own) {
    gp_failure failure;
    if (c->failure->error == 0 && gp_wave_end(c->pager, c->hold, &failure) != 0) {
        *c->failure = failure;
    }
    if (c->failure->error == 0 && atomic_load(&c->crew.has_failed)) {
        *c->failure = (gp_failure) { .error = -ENOTRECOVERABLE };
    }
    if (c->failure->error == 0) {
        gp_samples_keep(&c->samples, own->run.last);
    }
}

/* While the others compute already. */
static void look_ahead(gp_compute *c, const planned_run *own, const ggml_tensor *node) {
    if (c->failure->error != 0 || own->leader != c->layers[own->run.layer].leader) {
        return;
    }
    if (own->run.n_first == 0) {
        gp_foretell_keep(c->foretell, own->run.layer, node, own->run.ids);
    }
    gp_foretell_ahead(c->foretell, own->run.layer);
}

/* ggml_custom_op_t: thread `ith` of `nth`. */
static void compute_run(ggml_tensor *node, int ith, int nth, void *data) {
    planned_run *own = ((const slice *) data)->run;
    gp_compute *c = own->compute;
    if (ith == 0) {
        start(c, own, (uint32_t) nth);
        atomic_store_explicit(&c->started, own->ticket, memory_order_release);
        look_ahead(c, own, node);
    }
    for (uint32_t i = 0; atomic_load_explicit(&c->started, memory_order_acquire) != own->ticket; i++) {
        if (i > SPINS) {
            sched_yield();
        }
    }
    gp_crew_compute(&c->crew, (uint32_t) ith);
    if (ith == 0) {
        finish(c, own);
    }
}

/* ---- feed-forwards ------------------------------------------------------------------------------------------------ */

static void plan(gp_compute *c, planned_run *own, const slice *leader, const gp_run *run) {
    own->compute = c;
    own->leader = leader;
    own->run = *run;
    own->ticket = ++c->n_tickets;
}

static void start_collecting(gp_compute *c, const slice *s, const ggml_tensor *ids) {
    layer *l = &c->layers[s->layer];
    memset(&l->nodes, 0, sizeof l->nodes);
    l->nodes.n_ranks = (uint32_t) ids->ne[0];
    l->nodes.n_tokens = (uint32_t) ids->ne[1];
    l->nodes.ids = ids;
    memset(&l->whole.run, 0, sizeof l->whole.run);
    l->whole.run.layer = s->layer;
    l->whole.run.ids = ids;
    c->collecting = l;
    c->n_between = 0;
}

static void add_first(layer *l, slice *s, ggml_tensor *node) {
    const uint32_t at = l->nodes.shape.n_first++;
    l->nodes.shape.first_types[at] = s->kind->matrix.type;
    l->nodes.shape.first_widths[at] = node->ne[0];
    l->nodes.first[at] = node;
    l->first[at] = s;
    l->whole.run.first[at] = node;
    l->whole.run.first_kinds[at] = s->kind;
    l->whole.run.first_slices[at] = s->index;
}

/* All nodes of a feed-forward are known, and are computed alone until here. */
static void become_whole(gp_compute *c, layer *l, uint32_t most_rows) {
    const gp_nodes *nodes = &l->nodes;
    gp_run run = l->whole.run;
    run.n_first = nodes->shape.n_first;
    run.nodes = nodes;
    if (!gp_crew_has_room(&c->crew, &run, most_rows)) {
        return;
    }
    plan(c, &l->whole, l->first[0], &run);
    gp_crew_expect(&c->crew);
    for (uint32_t i = 0; i < nodes->shape.n_first; i++) {
        gp_compute_undo(c, nodes->first[i]);
        become(c, nodes->first[i], i == 0 ? convert_inputs : compute_nothing, l->first[i], &l->whole);
        if (i > 0) {
            leave_out(c, nodes->first[i]);
        }
    }
    for (uint32_t i = 0; i < nodes->shape.n_steps; i++) {
        leave_out(c, nodes->steps[i]);
    }
    gp_compute_undo(c, nodes->last);
    become(c, nodes->last, compute_run, l->last, &l->whole);
    c->whole = l;
}

static void become_alone(gp_compute *c, layer *l) {
    const gp_nodes *nodes = &l->nodes;
    for (uint32_t i = 0; i < nodes->shape.n_first; i++) {
        gp_compute_undo(c, nodes->first[i]);
        become(c, nodes->first[i], compute_run, l->first[i], &l->first[i]->alone);
    }
    for (uint32_t i = 0; i < nodes->shape.n_steps; i++) {
        gp_compute_undo(c, nodes->steps[i]);
    }
    gp_compute_undo(c, nodes->last);
    become(c, nodes->last, compute_run, l->last, &l->last->alone);
}

static void end_collecting(gp_compute *c, slice *s, ggml_tensor *node, uint32_t most_rows) {
    layer *l = c->collecting;
    c->collecting = NULL;
    l->nodes.last = node;
    l->nodes.shape.last_type = s->kind->matrix.type;
    l->nodes.shape.last_width = node->ne[0];
    l->whole.run.last = node;
    l->whole.run.last_kind = s->kind;
    l->whole.run.last_slice = s->index;
    l->last = s;
    c->has_closed = true;
    const bool is_private = c->n_between < BETWEEN && gp_trace(&l->nodes, c->ggml, INT64_MAX)
        && gp_nodes_are_private(&l->nodes, c->ggml, c->between, c->n_between);
    if (!is_private) {
        return;
    }
    l->kind = gp_kind_find(&c->kinds, &l->nodes.shape);
    if (l->kind && l->kind->is_same == GP_SAME_BITS && !c->whole) {
        become_whole(c, l, most_rows);
    } else if (l->kind && l->kind->is_same == GP_UNTRIED && !c->samples.nodes) {
        gp_samples_begin(&c->samples, &l->nodes, l->kind);
    }
}

static void collect(gp_compute *c, slice *s, ggml_tensor *node, const ggml_tensor *ids, uint32_t most_rows) {
    layer *l = c->collecting;
    if (c->whole == &c->layers[s->layer]) {
        return;     /* its nodes are known, and still to be computed */
    }
    const bool goes_on = l && l == &c->layers[s->layer] && l->nodes.ids == ids && !gp_nodes_have(&l->nodes, node);
    if (goes_on && (l->nodes.shape.n_first == GP_FIRST || node->src[1] != l->nodes.first[0]->src[1])) {
        end_collecting(c, s, node, most_rows);
        return;
    }
    if (!goes_on) {
        start_collecting(c, s, ids);
    }
    add_first(c->collecting, s, node);
}

/* ---- what the tap calls ------------------------------------------------------------------------------------------- */

bool gp_compute_offer(gp_compute *c, uint32_t number, ggml_tensor *node, const ggml_tensor *ids) {
    slice *s = &c->slices[number];
    layer *l = &c->layers[s->layer];
    c->has_closed = false;
    if (c->failure->error != 0) {
        become(c, node, compute_nothing, s, s->run);    /* the mapping, whose file may have lost its end, is not touched */
        return true;
    }
    if (s->piece == c->piece) {
        return false;       /* a second node with these matrices: the first one is still to be computed */
    }
    const gp_layer_spec *spec = gp_pager_layer(c->pager, s->layer);
    const uint32_t most_rows = s->kind && is_plain(c, node, ids) ? gp_batch_most(&c->batch, ids, spec->n_experts) : 0;
    if (most_rows == 0) {
        return false;
    }
    l->leader = l->leader ? l->leader : s;
    if (l->leader == s) {
        gp_foretell_see(c->foretell, s->layer, node, ids);
    }
    const gp_run run = { .layer = s->layer, .last = node, .ids = ids, .last_kind = s->kind, .last_slice = s->index };
    if (!gp_crew_has_room(&c->crew, &run, most_rows)) {
        return false;
    }
    const bool is_known = try_matrices(c, s, node, ids, most_rows);
    if (c->failure->error != 0) {
        become(c, node, compute_nothing, s, NULL);
        return true;
    }
    if (!is_known || s->kind->few == GP_BY_NOBODY || (most_rows >= GP_MANY_ROWS && s->kind->many != GP_BY_GGML)) {
        return false;
    }
    if (!c->begun_ids && !begin_wave(c, s, ids)) {
        become(c, node, compute_nothing, s, NULL);
        return true;
    }
    plan(c, &s->alone, s, &run);
    become(c, node, compute_run, s, &s->alone);
    s->piece = c->piece;
    collect(c, s, node, ids, most_rows);
    return true;
}

void gp_compute_note(gp_compute *c, ggml_tensor *node) {
    if (is_ours(c, node)) {
        return;
    }
    if (c->collecting && c->n_between < BETWEEN) {
        c->between[c->n_between++] = node;
    }
    if (c->whole && gp_nodes_feed(&c->whole->nodes, c->ggml, node)) {
        c->whole->kind->is_same = GP_OTHER_BITS;
        become_alone(c, c->whole);
        c->whole = NULL;
    }
}

bool gp_compute_has_closed(const gp_compute *c) {
    return c->has_closed;
}

void gp_compute_reset(gp_compute *c, bool is_idle) {
    c->piece++;
    for (uint32_t i = 0; i < c->n_layers; i++) {
        c->layers[i].counted = NULL;
    }
    c->begun_ids = NULL;
    c->collecting = NULL;
    c->samples.nodes = NULL;
    c->whole = NULL;
    if (is_idle) {
        gp_hold_rest(c->pager, c->hold);
    } else {
        gp_hold_release(c->pager, c->hold);
    }
}

/* ---- counting ----------------------------------------------------------------------------------------------------- */

void gp_compute_count_kinds(const gp_compute *c, uint32_t *n_same, uint32_t *n_other) {
    gp_kernels_count(&c->kernels, n_same, n_other);
}

void gp_compute_count_ffns(const gp_compute *c, uint32_t *n_same, uint32_t *n_other) {
    gp_kinds_count(&c->kinds, n_same, n_other);
}

/* ---- opening and closing ------------------------------------------------------------------------------------------ */

static int open_slices(gp_compute *c) {
    c->slices = calloc(c->n_slices, sizeof *c->slices);
    c->layers = calloc(c->n_layers, sizeof *c->layers);
    if (!c->slices || !c->layers || gp_kernels_open(&c->kernels, c->n_slices) != 0) {
        return -ENOMEM;
    }
    slice *s = c->slices;
    int64_t widest = 1;
    for (uint32_t l = 0; l < c->n_layers; l++) {
        const gp_layer_spec *spec = gp_pager_layer(c->pager, l);
        for (uint32_t i = 0; i < spec->n_slices; i++, s++) {
            s->layer = l;
            s->index = i;
            s->kind = gp_kernels_find(&c->kernels, c->ggml, &spec->slices[i]);
            widest = spec->slices[i].ne[1] > widest ? spec->slices[i].ne[1] : widest;
        }
    }
    return gp_samples_open(&c->samples, widest);
}

static void detach(gp_compute *c) {
    gp_crew_close(&c->crew);
    gp_foretell_close(c->foretell);
    gp_batch_close(&c->batch);
    free(c->slices);
    gp_kernels_close(&c->kernels);
    free(c->layers);
    gp_samples_close(&c->samples);
    *c = (gp_compute) { .ggml = c->ggml, .most_ids = c->most_ids, .bytes = c->bytes };
}

int gp_compute_attach(gp_compute *c, gp_pager *pager, gp_hold *hold, gp_failure *failure) {
    c->pager = pager;
    c->hold = hold;
    c->failure = failure;
    c->piece = 1;
    const gp_layer_spec *spec;
    for (; (spec = gp_pager_layer(pager, c->n_layers)); c->n_layers++) {
        c->n_slices += spec->n_slices;
    }
    int error = open_slices(c);
    if (error == 0) {
        error = gp_batch_open(&c->batch, pager, hold, c->most_ids);
    }
    if (error == 0) {
        error = gp_crew_open(&c->crew, c->ggml, pager, hold, &c->batch, c->bytes);
    }
    if (error == 0) {
        error = gp_foretell_open(&c->foretell, c->ggml, pager, hold);
    }
    if (error != 0) {
        detach(c);
    }
    return error;
}

int gp_compute_open(gp_compute **out, const gp_ggml *ggml, uint32_t most_ids, size_t bytes) {
    *out = calloc(1, sizeof **out);
    if (!*out) {
        return -ENOMEM;
    }
    **out = (gp_compute) { .ggml = ggml, .most_ids = most_ids, .bytes = bytes };
    return 0;
}

void gp_compute_close(gp_compute *c) {
    if (c) {
        detach(c);
        free(c);
    }
}
