/* The graph hook: between the router's result and the matrix multiply.
 *
 * llama.cpp asks about every node before it computes a piece of graph, and calls again after a piece whose last node was
 * answered with true. So:  ask(router result) -> true;  computed(router result);  ask(MUL_MAT_ID) -> the experts are
 * brought in and the node is pointed at the slots;  the piece is computed;  the next computed() gives the slots back.
 *
 * Invariants
 *   1. Only a node whose ids are known to be computed is served. Any other is left as llama.cpp made it: slower, right.
 *   2. A node points either at its own tensors, src[0] and src[2], or at both of ours: a view of the slots and the
 *      slot numbers of one `routing`. A graph that is used again still has ours; the routing remembers the originals.
 *   3. Between two computed() calls the slots of a routing do not change: its ids are written once per piece of graph.
 *   4. Reads may go on after a node was answered for. What is computed by us (compute.h) waits for its own experts; before a
 *      MUL_MAT_ID that needs slices which are still on their way the piece of graph ends, and the slots are kept over that end.
 *   5. After a failure the node still points at slots, any slots: what it computes is thrown away by the abort, and the
 *      mapping, whose file may have lost its end, is not touched. After an interrupt (watch.h) reads may still write there.
 *   6. Nodes that look up rows of tables are rows.h's.
 */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "compute/compute.h"
#include "compute/ggml_tensor.h"
#include "graph/rows.h"
#include "slots/pager.h"

/* One expert tensor as this context sees it. */
typedef struct {
    uint32_t           layer;
    uint32_t           index;       /* among the layer's slices */
    bool               is_foreign;  /* a tensor of that name is something else: leave it alone */
    ggml_tensor       *original;
    uint64_t           piece;       /* in which it was last served, with these ids: */
    const ggml_tensor *ids;
    const ggml_tensor *input;       /* what was multiplied last */
    ggml_tensor        view;
} slice_view;

/* Per layer two routings are enough: the graph in use and the one before; more than one in the same graph is not known
 * to exist. A graph has three nodes per routing; sixteen leave room for those of graphs that are gone. */
enum { ROUTINGS = 2, NODES = 16, COMPUTED = 32 };

/* The ids of one router result, as expert ids (llama.cpp's) and as slot numbers (ours). */
typedef struct {
    ggml_tensor *original;
    ggml_tensor  slots;
    int32_t     *slot_ids;
    ggml_tensor *nodes[NODES];          /* the last ones pointed at `slots` */
    uint32_t     n_nodes;
    uint64_t     last_used;
    uint64_t     piece;                 /* the piece of graph it was filled in for */
    uint64_t     refused_piece;         /* one for which no slots were to be had */
    bool         is_for_batch;          /* nothing of it was waited for: it will be computed expert by expert */
} routing;

struct gp_tap {
    gp_pager         *pager;
    gp_ggml           ggml;
    gp_hold           hold;
    slice_view       *views;
    uint32_t          n_views;
    routing          *routings;     /* ROUTINGS per layer */
    uint32_t          n_layers;
    int32_t          *slot_ids;     /* max_ids per routing */
    uint32_t          max_ids;
    int32_t          *place;        /* by expert: its place in `experts`, or -1 */
    int32_t          *experts;      /* distinct ones of the batch at hand */
    int32_t          *expert_slots;
    uint32_t         *counts;
    const ggml_tensor *computed[COMPUTED];  /* integer results known to be there */
    uint32_t          next_computed;
    uint64_t          clock;
    uint64_t          piece;        /* of graph, being asked about */
    uint32_t          last_view;    /* the slice that comes last in a graph, as far as seen */
    uint32_t          latest_view;
    bool              is_layer_open;    /* in this piece, slots of latest_view's layer were taken */
    const ggml_tensor *pause_at;        /* this piece ends here, in the middle of it */
    gp_compute       *compute;
    gp_rows          *rows;
    gp_failure        failure;
    gp_eval_callback  next_eval;
    void             *next_eval_data;
    bool              next_wants;
    gp_abort_callback next_abort;
    void             *next_abort_data;
    gp_watch          watch;
};

/* ---- what is computed ------------------------------------------------------------------------------------------- */

static void forget_computed(gp_tap *tap, const ggml_tensor *tensor) {
    for (uint32_t i = 0; i < COMPUTED; i++) {
        if (tap->computed[i] == tensor) {
            tap->computed[i] = NULL;
        }
    }
}

static void note_computed(gp_tap *tap, const ggml_tensor *tensor) {
    tap->computed[tap->next_computed++ % COMPUTED] = tensor;
}

static const ggml_tensor *base_of(const ggml_tensor *tensor) {
    return tensor->view_src ? tensor->view_src : tensor;
}

/* An input, or a copy made before this piece of graph began. */
static bool is_given(const gp_tap *tap, const ggml_tensor *tensor) {
    return base_of(tensor)->op == tap->ggml.op_none;
}

static bool is_computed(const gp_tap *tap, const ggml_tensor *tensor) {
    const ggml_tensor *base = base_of(tensor);
    if (is_given(tap, tensor)) {
        return true;
    }
    for (uint32_t i = 0; i < COMPUTED; i++) {
        if (tap->computed[i] == tensor || tap->computed[i] == base) {
            return true;
        }
    }
    return false;
}

/* Integer results are few: the router's, and in some architectures a cast or a table look-up made of it. A ranking alone
 * is not stopped at; its view follows. */
static bool may_be_ids(const gp_tap *tap, const ggml_tensor *node) {
    static const char router_result[] = "ffn_moe_topk";
    if (strncmp(node->name, router_result, sizeof router_result - 1) == 0) {
        return true;
    }
    return node->op != tap->ggml.op_argsort && node->op != tap->ggml.op_top_k
        && node->op != tap->ggml.op_view && node->op != tap->ggml.op_reshape;
}

/* ---- recognising ------------------------------------------------------------------------------------------------ */

static bool is_as_in_layout(const gp_tap *tap, const ggml_tensor *tensor, const gp_slice_spec *spec) {
    return tensor->op == tap->ggml.op_none && tensor->type == spec->type
        && tensor->ne[0] == spec->ne[0] && tensor->ne[1] == spec->ne[1] && tensor->ne[2] == spec->ne[2]
        && tensor->ne[3] == 1 && tensor->nb[2] == spec->slice_bytes
        && tensor->buffer && tap->ggml.buffer_is_host(tensor->buffer);
}

static void describe_slots(gp_tap *tap, slice_view *v, const gp_slice_spec *spec) {
    const gp_layer_spec *layer = gp_pager_layer(tap->pager, v->layer);
    uint32_t n_slots;
    uint64_t stride_bytes;
    char *slots = gp_pager_slots(tap->pager, layer->shape_class, &n_slots, &stride_bytes);
    v->view = *v->original;
    v->view.data = slots + spec->data_at;
    v->view.ne[2] = n_slots;
    v->view.nb[2] = stride_bytes;
    v->view.nb[3] = stride_bytes * n_slots;
    v->view.view_src = NULL;
}

/* The paged tensor behind a node's src[0]: the model's own, or our view of it in a graph that is used again. */
static slice_view *find_view(gp_tap *tap, ggml_tensor *tensor) {
    const uintptr_t from_first = (uintptr_t) tensor - (uintptr_t) &tap->views[0].view;
    if (from_first < tap->n_views * sizeof(slice_view)) {
        assert(from_first % sizeof(slice_view) == 0);
        return &tap->views[from_first / sizeof(slice_view)];
    }
    for (uint32_t i = 0; i < tap->n_views; i++) {
        if (tap->views[i].original == tensor) {
            return tap->views[i].is_foreign ? NULL : &tap->views[i];
        }
    }
    for (uint32_t i = 0; i < tap->n_views; i++) {
        slice_view *v = &tap->views[i];
        const gp_slice_spec *spec = &gp_pager_layer(tap->pager, v->layer)->slices[v->index];
        if (v->original || strncmp(tensor->name, spec->name, GP_MAX_NAME) != 0) {
            continue;
        }
        v->original = tensor;
        v->is_foreign = !is_as_in_layout(tap, tensor, spec);
        if (v->is_foreign) {
            return NULL;
        }
        describe_slots(tap, v, spec);
        return v;
    }
    return NULL;
}

/* Of all slices, layer by layer. */
static uint32_t number_of(const gp_tap *tap, const slice_view *v) {
    return (uint32_t) (v - tap->views);
}

static bool is_current(const gp_tap *tap, const routing *r) {
    return r->piece == tap->piece;
}

static routing *find_routing(gp_tap *tap, uint32_t layer, const ggml_tensor *node) {
    routing *first = &tap->routings[layer * ROUTINGS];
    routing *oldest = NULL;
    for (routing *r = first; r < first + ROUTINGS; r++) {
        if (node->src[2] == &r->slots || r->original == node->src[2]) {
            return r;
        }
        if (!is_current(tap, r) && (!oldest || r->last_used < oldest->last_used)) {
            oldest = r;
        }
    }
    if (oldest) {
        oldest->original = node->src[2];
        oldest->last_used = oldest->refused_piece = 0;
        memset(oldest->nodes, 0, sizeof oldest->nodes);
    }
    return oldest;
}

/* ---- serving ---------------------------------------------------------------------------------------------------- */

static void restore(const slice_view *v, const routing *r, ggml_tensor *node) {
    if (node->src[0] == &v->view) {
        node->src[0] = v->original;
        node->src[2] = r->original;
    }
}

static int32_t id_at(const ggml_tensor *ids, int64_t rank, int64_t token) {
    /* Top-k is a view of the full ranking: rows lie n_expert apart, not k. */
    return *(const int32_t *) ((const char *) ids->data + (size_t) token * ids->nb[1] + (size_t) rank * ids->nb[0]);
}

/* Collects the distinct experts of a batch. Returns their number, or -1 when the ids make no sense. */
static int64_t collect_experts(gp_tap *tap, const ggml_tensor *ids, uint32_t n_experts) {
    uint32_t n = 0;
    bool is_sane = true;
    for (int64_t token = 0; token < ids->ne[1] && is_sane; token++) {
        for (int64_t rank = 0; rank < ids->ne[0]; rank++) {
            const int32_t expert = id_at(ids, rank, token);
            if (expert < 0 || (uint32_t) expert >= n_experts) {
                is_sane = false;
                break;
            }
            if (tap->place[expert] < 0) {
                tap->place[expert] = (int32_t) n;
                tap->experts[n] = expert;
                tap->counts[n++] = 0;
            }
            tap->counts[tap->place[expert]]++;
        }
    }
    return is_sane ? (int64_t) n : -1;
}

static void forget_places(gp_tap *tap, uint32_t n_experts) {
    for (uint32_t e = 0; e < n_experts; e++) {
        tap->place[e] = -1;
    }
}

static void write_slot_ids(gp_tap *tap, routing *r) {
    const ggml_tensor *ids = r->original;
    r->slots = *ids;
    r->slots.op = tap->ggml.op_none;
    memset(r->slots.src, 0, sizeof r->slots.src);
    r->slots.view_src = NULL;
    r->slots.view_offs = 0;
    r->slots.data = r->slot_ids;
    r->slots.nb[0] = sizeof(int32_t);
    for (int i = 1; i < GGML_DIMS; i++) {
        r->slots.nb[i] = r->slots.nb[i - 1] * (size_t) ids->ne[i - 1];
    }
    int32_t *out = r->slot_ids;
    for (int64_t token = 0; token < ids->ne[1]; token++) {
        for (int64_t rank = 0; rank < ids->ne[0]; rank++) {
            *out++ = tap->failure.error ? 0 : tap->expert_slots[tap->place[id_at(ids, rank, token)]];
        }
    }
}

/* Brings in what the routing names and writes the slot numbers. False: the node is to be left alone. */
static bool fill_in(gp_tap *tap, const slice_view *v, routing *r) {
    const gp_layer_spec *layer = gp_pager_layer(tap->pager, v->layer);
    const ggml_tensor *ids = r->original;
    if (ids->type != tap->ggml.type_i32 || ids->ne[2] != 1 || ids->ne[3] != 1 || !ids->buffer
        || !tap->ggml.buffer_is_host(ids->buffer) || ids->ne[0] * ids->ne[1] > tap->max_ids
        || !is_computed(tap, ids)) {
        return false;
    }
    if (r->refused_piece == tap->piece) {
        return false;   /* the layer's other nodes need not wait as long again */
    }
    bool is_served = false;
    const int64_t n = collect_experts(tap, ids, layer->n_experts);
    if (n > 0) {
        r->is_for_batch = ids->ne[1] > 1
            && gp_compute_is_batch_expected(tap->compute, v->layer, (uint64_t) (ids->ne[0] * ids->ne[1]));
        const bool is_product = ids->ne[1] == 1 && gp_compute_is_product(tap->compute, number_of(tap, v));
        const gp_demand demand = { .layer = v->layer, .experts = tap->experts, .counts = tap->counts,
                                   .n_experts = (uint32_t) n, .n_tokens = (uint32_t) ids->ne[1],
                                   .is_again = r->last_used == tap->clock,
                                   .later = is_product || r->is_for_batch ? ~0u : ~(1u << v->index) };
        gp_failure failure;
        const int error = tap->failure.error
            ? 0 : gp_pager_acquire(tap->pager, &tap->hold, &demand, tap->expert_slots, &failure);
        if (error != 0 && error != -EBUSY) {
            tap->failure = failure;
        }
        is_served = error != -EBUSY;
        r->last_used = tap->clock;
    }
    if (is_served) {
        write_slot_ids(tap, r);
        r->piece = tap->piece;
    } else {
        r->refused_piece = tap->piece;
    }
    forget_places(tap, layer->n_experts);
    return is_served;
}

static bool has_node(const routing *r, const ggml_tensor *node) {
    for (uint32_t i = 0; i < NODES; i++) {
        if (r->nodes[i] == node) {
            return true;
        }
    }
    return false;
}

/* Given ids cause no stop between two graphs: when a tensor is asked for again in what seems one piece, it is another
 * graph, whose ids may differ. */
static bool is_of_another_graph(const gp_tap *tap, const slice_view *v, const routing *r) {
    return is_current(tap, r) && v->piece == tap->piece && v->ids == r->original && is_given(tap, r->original);
}

/* Current, and its ids were not asked for since: if they were, they are about to be computed anew. */
static bool is_filled_in(const gp_tap *tap, const routing *r) {
    return is_current(tap, r) && is_computed(tap, r->original);
}

/* Whether the node makes the input of a multiplication of the layer at hand whose slices are still being read: what comes
 * before can be computed meanwhile. */
static bool is_worth_computing_to(gp_tap *tap, const ggml_tensor *node) {
    if (!tap->is_layer_open || tap->failure.error || gp_compute_is_collecting(tap->compute)) {
        return false;
    }
    const uint32_t layer = tap->views[tap->latest_view].layer;
    uint32_t at = tap->latest_view;
    while (at > 0 && tap->views[at - 1].layer == layer) {
        at--;
    }
    for (; at < tap->n_views && tap->views[at].layer == layer; at++) {
        const slice_view *v = &tap->views[at];
        if (v->piece != tap->piece && v->input == node) {
            return gp_pager_is_waiting(tap->pager, &tap->hold, 1u << v->index);
        }
    }
    return false;
}

static void point_at_slots(const gp_tap *tap, slice_view *v, routing *r, ggml_tensor *node) {
    v->piece = tap->piece;
    v->ids = r->original;
    node->src[0] = &v->view;
    node->src[2] = &r->slots;
    if (!has_node(r, node)) {
        r->nodes[r->n_nodes++ % NODES] = node;
    }
}

static void undo(gp_tap *tap, ggml_tensor *node) {
    const int error = gp_rows_undo(tap->rows, node);
    if (error != 0 && tap->failure.error == 0) {
        tap->failure = (gp_failure) { .error = error };
    }
    const uintptr_t from_first = (uintptr_t) node->src[0] - (uintptr_t) tap->views;
    if (node->op == tap->ggml.op_custom && tap->pager && from_first < tap->n_views * sizeof *tap->views) {
        gp_compute_undo(tap->compute, node);
    }
}

/* Returns whether llama.cpp shall call back after this node. */
static bool serve(gp_tap *tap, ggml_tensor *node) {
    slice_view *v = find_view(tap, node->src[0]);
    if (!v) {
        return false;
    }
    if (node->src[2]->ne[0] * node->src[2]->ne[1] == 0) {
        return false;   /* no token of this batch wants logits: the last layer computes nothing */
    }
    routing *r = find_routing(tap, v->layer, node);
    const bool is_ours = node->src[0] == &v->view;
    if (r && is_ours && !(node->src[2] == &r->slots && has_node(r, node))) {
        r = NULL;   /* a graph older than the last two: its originals are forgotten */
    }
    if (is_ours && !r) {
        tap->failure = (gp_failure) { .error = -ENOTRECOVERABLE };
        return false;
    }
    if (!r || is_of_another_graph(tap, v, r) || (!is_filled_in(tap, r) && !fill_in(tap, v, r))) {
        if (r) {
            restore(v, r, node);
        }
        gp_pager_count_left_alone(tap->pager, v->layer);
        return false;
    }
    const bool is_first = v->piece != tap->piece;
    const uint32_t at = number_of(tap, v);
    point_at_slots(tap, v, r, node);
    v->input = node->src[1];
    bool wants = false;
    if (is_first) {
        wants = gp_compute_offer(tap->compute, at, node, r->original, r->is_for_batch);
    } else {
        gp_compute_wait(tap->compute, at);
    }
    tap->is_layer_open = node->op == tap->ggml.op_mul_mat_id;

    /* After a graph's last node nobody calls before the next graph: with other contexts about, ask for a call, or its
     * slots stay in use while this context rests. */
    if (v->layer < tap->views[tap->latest_view].layer) {
        tap->last_view = tap->latest_view;
    }
    tap->latest_view = at;
    return wants || (at == tap->last_view && gp_pager_n_taps(tap->pager) > 1);
}

/* All nodes up to here are computed: nothing points at the slots any more. */
static void piece_computed(gp_tap *tap) {
    if (!tap->pager) {
        return;
    }
    tap->is_layer_open = false;
    tap->pause_at = NULL;
    gp_compute_reset(tap->compute);
    gp_rows_release(tap->rows);
    gp_pager_release(tap->pager, &tap->hold);
    tap->piece++;
}

/* The user's own callback shall see the node as llama.cpp made it, expert ids and all. */
static void give_back(gp_tap *tap, ggml_tensor *node) {
    if (tap->pager && node->op == tap->ggml.op_mul_mat_id) {
        const slice_view *v = find_view(tap, node->src[0]);
        const routing *r = v && node->src[0] == &v->view ? find_routing(tap, v->layer, node) : NULL;
        if (r && has_node(r, node)) {
            restore(v, r, node);
        }
    }
}

/* A failure: the decode is aborted, and nothing is served until it is taken. */
static void look_up(gp_tap *tap) {
    if (tap->failure.error == 0 && gp_watch_stops(&tap->watch)) {
        tap->failure = (gp_failure) { .error = -EINTR };
    }
}

bool gp_tap_eval(void *tensor, bool ask, void *data) {
    gp_tap *tap = data;
    ggml_tensor *node = tensor;
    undo(tap, node);
    if (ask) {      /* after the last node an abort would come too late */
        look_up(tap);
    }
    if (!ask) {
        gp_compute_judge(tap->compute, node);
        if (tap->pause_at == node) {
            tap->pause_at = NULL;
            gp_compute_interrupt(tap->compute);
        } else {
            piece_computed(tap);
        }
        if (node->type == tap->ggml.type_i32) {
            note_computed(tap, node);
            if (node->view_src) {
                note_computed(tap, node->view_src);
            }
        }
        if (!tap->next_wants) {
            return true;    /* false would end the graph in silence with wrong results */
        }
        give_back(tap, node);
        return tap->next_eval(tensor, false, tap->next_eval_data);
    }
    if (tap->next_eval) {
        give_back(tap, node);
        tap->next_wants = tap->next_eval(tensor, true, tap->next_eval_data);
    }
    bool wants = false;
    if (node->type == tap->ggml.type_i32) {
        forget_computed(tap, node);
        wants = may_be_ids(tap, node);
        tap->clock += wants;
    } else if (tap->pager && node->op == tap->ggml.op_mul_mat_id) {
        wants = serve(tap, node);
    } else if (tap->pager && gp_rows_is_look_up(tap->rows, node)) {
        gp_rows_serve(tap->rows, node, node->src[1] && is_computed(tap, node->src[1]), &tap->failure);
    } else if (tap->pager && !tap->next_wants && is_worth_computing_to(tap, node)) {
        wants = true;
        tap->pause_at = node;
    }
    return wants || tap->next_wants;
}

bool gp_tap_abort(void *data) {
    gp_tap *tap = data;
    look_up(tap);
    return tap->failure.error != 0 || (tap->next_abort && tap->next_abort(tap->next_abort_data));
}

void gp_tap_watch(gp_tap *tap, const gp_os *os, gp_abort_callback shall_stop, void *data) {
    tap->watch = (gp_watch) { .os = os, .ask = shall_stop, .data = data };
}

void gp_tap_chain_abort(gp_tap *tap, gp_abort_callback next_abort, void *next_abort_data) {
    tap->next_abort = next_abort;
    tap->next_abort_data = next_abort_data;
}

void gp_tap_idle(gp_tap *tap) {
    piece_computed(tap);
}

gp_failure gp_tap_take_failure(gp_tap *tap) {
    gp_failure failure = tap->failure;
    if (failure.error == 0 && gp_watch_has_stopped(&tap->watch)) {
        failure.error = -EINTR;     /* stopped behind the last node: what is computed is whole */
    }
    tap->failure = (gp_failure) { 0 };
    atomic_store(&tap->watch.has_stopped, false);
    return failure;
}

void gp_tap_count_kinds(const gp_tap *tap, uint32_t *n_same, uint32_t *n_other) {
    gp_compute_count_kinds(tap->compute, n_same, n_other);
}

void gp_tap_count_ffns(const gp_tap *tap, uint32_t *n_same, uint32_t *n_other) {
    gp_compute_count_ffns(tap->compute, n_same, n_other);
}

/* ---- opening and closing ---------------------------------------------------------------------------------------- */

static int open_tables(gp_tap *tap) {
    const gp_layer_spec *layer;
    uint32_t most_experts = 0;
    for (; (layer = gp_pager_layer(tap->pager, tap->n_layers)); tap->n_layers++) {
        tap->n_views += layer->n_slices;
        most_experts = layer->n_experts > most_experts ? layer->n_experts : most_experts;
    }
    const size_t n_routings = (size_t) tap->n_layers * ROUTINGS;
    tap->views = calloc(tap->n_views, sizeof *tap->views);
    tap->routings = calloc(n_routings, sizeof *tap->routings);
    tap->slot_ids = calloc(n_routings * tap->max_ids, sizeof *tap->slot_ids);
    tap->place = malloc(most_experts * sizeof *tap->place);
    tap->experts = malloc(most_experts * sizeof *tap->experts);
    tap->expert_slots = malloc(most_experts * sizeof *tap->expert_slots);
    tap->counts = malloc(most_experts * sizeof *tap->counts);
    if (!tap->views || !tap->routings || !tap->slot_ids || !tap->place || !tap->experts || !tap->expert_slots
        || !tap->counts) {
        return -ENOMEM;
    }
    forget_places(tap, most_experts);
    uint32_t view = 0;
    for (uint32_t l = 0; l < tap->n_layers; l++) {
        for (uint32_t s = 0; s < gp_pager_layer(tap->pager, l)->n_slices; s++) {
            tap->views[view].layer = l;
            tap->views[view++].index = s;
        }
        for (uint32_t r = 0; r < ROUTINGS; r++) {
            tap->routings[l * ROUTINGS + r].slot_ids = tap->slot_ids + (size_t) (l * ROUTINGS + r) * tap->max_ids;
        }
    }
    tap->last_view = tap->n_views - 1;
    return 0;
}

static void free_tables(gp_tap *tap) {
    free(tap->views);
    free(tap->routings);
    free(tap->slot_ids);
    free(tap->place);
    free(tap->experts);
    free(tap->expert_slots);
    free(tap->counts);
    tap->n_layers = tap->n_views = 0;
}

int gp_tap_open(gp_tap **out, const gp_ggml *ggml, uint32_t max_ids, size_t batch_bytes, size_t row_bytes,
                gp_eval_callback next_eval, void *next_eval_data,
                gp_abort_callback next_abort, void *next_abort_data) {
    *out = NULL;
    gp_tap *tap = calloc(1, sizeof *tap);
    if (!tap) {
        return -ENOMEM;
    }
    tap->ggml = *ggml;
    tap->max_ids = max_ids;
    tap->clock = tap->piece = 1;    /* 0 is a routing that was never filled in */
    tap->next_eval = next_eval;
    tap->next_eval_data = next_eval_data;
    tap->next_abort = next_abort;
    tap->next_abort_data = next_abort_data;
    int error = gp_compute_open(&tap->compute, &tap->ggml, batch_bytes);
    if (error == 0) {
        error = gp_rows_open(&tap->rows, &tap->ggml, row_bytes);
    }
    if (error != 0) {
        gp_compute_close(tap->compute);
        free(tap);
        return error;
    }
    *out = tap;
    return 0;
}

int gp_tap_attach(gp_tap *tap, gp_pager *pager) {
    assert(!tap->pager);
    tap->pager = pager;
    int error = open_tables(tap);
    if (error == 0) {
        error = gp_rows_attach(tap->rows, gp_pager_tables(pager), &tap->watch);
    }
    if (error == 0) {
        error = gp_hold_open(&tap->hold, pager, tap->max_ids);
    }
    if (error == 0) {
        tap->hold.watch = &tap->watch;
        error = gp_compute_attach(tap->compute, pager, &tap->hold, &tap->failure);
        if (error != 0) {
            gp_hold_close(&tap->hold, pager);
        }
    }
    if (error != 0) {
        free_tables(tap);
        tap->pager = NULL;
    }
    return error;
}

void gp_tap_close(gp_tap *tap) {
    if (!tap) {
        return;
    }
    if (tap->pager) {
        gp_hold_close(&tap->hold, tap->pager);
        free_tables(tap);
    }
    gp_rows_close(tap->rows);
    gp_compute_close(tap->compute);
    free(tap);
}
