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
 *   4. Reads may go on after a node was answered for. A product (product.h) waits for its own experts; before a MUL_MAT_ID
 *      that needs slices which are still on their way the piece of graph ends, and the slots are kept over that end.
 *   5. After a failure the node still points at slots, any slots: what it computes is thrown away by the abort, and the
 *      mapping, whose file may have lost its end, is not touched.
 *   6. A node is made a product only for the time of its piece, once per tensor and piece, and only of a kind whose bits
 *      were those of MUL_MAT_ID when ggml computed one.
 */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "ffn.h"
#include "ffn_batch.h"
#include "ggml_tensor.h"
#include "pager.h"
#include "product.h"

/* Whether our own product of some kind of matrices has the bits of ggml's: found out with the first node of that kind. */
typedef enum { UNTRIED, SAME, OTHER } verdict;

typedef struct {
    gp_kind kind;
    verdict is_same;
} tried_kind;

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
    tried_kind        *kind;        /* NULL: always computed by MUL_MAT_ID */
    gp_product         product;
} slice_view;

/* Per layer two routings are enough: the graph in use and the one before; more than one in the same graph is not known
 * to exist. A graph has three nodes per routing; sixteen leave room for those of graphs that are gone. */
enum { ROUTINGS = 2, NODES = 16, COMPUTED = 32, KINDS = 16 };

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
    bool         is_for_batch;          /* nothing of it was waited for: the batch will do it */
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
    tried_kind        kinds[KINDS];
    uint32_t          n_kinds;
    char             *inputs;           /* of the product that is being computed */
    float            *trial_output;
    slice_view       *trial;            /* its MUL_MAT_ID node ends this piece and is then compared with ours: */
    ggml_tensor      *trial_node;
    gp_ffn           *ffn;              /* NULL: matrix by matrix */
    const ggml_tensor *ffn_trial;       /* this node ends a piece in which ffn has tried something */
    gp_ffn_batch     *batch;            /* likewise, of several tokens */
    const ggml_tensor *batch_trial;
    gp_failure        failure;
    gp_eval_callback  next_eval;
    void             *next_eval_data;
    bool              next_wants;
    gp_abort_callback next_abort;
    void             *next_abort_data;
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

static bool is_trusted(const slice_view *v) {
    return v->kind && v->kind->is_same == SAME;
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
        r->is_for_batch = tap->batch && ids->ne[1] > 1 && tap->failure.error == 0
            && gp_ffn_batch_is_expected(tap->batch, v->layer, (uint64_t) (ids->ne[0] * ids->ne[1]));
        const bool is_product = ids->ne[1] == 1 && is_trusted(v);
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

/* The slices of the experts of this node may still be on their way. */
static void wait_for_slice(gp_tap *tap, const slice_view *v) {
    if (tap->failure.error == 0) {
        gp_failure failure;
        if (gp_pager_wait(tap->pager, &tap->hold, v->layer, 1u << v->index, &failure) != 0) {
            tap->failure = failure;
        }
    }
}

/* Whether the node makes the input of a multiplication of the layer at hand whose slices are still being read: what comes
 * before can be computed meanwhile. */
static bool is_worth_computing_to(gp_tap *tap, const ggml_tensor *node) {
    if (!tap->is_layer_open || tap->failure.error || (tap->batch && gp_ffn_batch_is_collecting(tap->batch))) {
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

/* ---- products --------------------------------------------------------------------------------------------------- */

/* From a MUL_MAT_ID of one token to our own product; until it is asked about again. */
static void become_product(const gp_tap *tap, slice_view *v, ggml_tensor *node) {
    gp_product_begin(&v->product, node);
    const gp_custom custom = { .compute = gp_product_compute, .n_tasks = GP_ALL_THREADS, .data = &v->product };
    memcpy(node->op_params, &custom, sizeof custom);
    node->op = tap->ggml.op_custom;
}

static void unbecome_product(const gp_tap *tap, ggml_tensor *node) {
    const uintptr_t from_first = (uintptr_t) node->src[0] - (uintptr_t) tap->views;
    if (node->op == tap->ggml.op_custom && tap->pager && from_first < tap->n_views * sizeof *tap->views) {
        memset(node->op_params, 0, sizeof(gp_custom));
        node->op = tap->ggml.op_mul_mat_id;
    }
}

/* Returns whether the piece is to end with this node, so that what was tried can be judged. */
static bool offer_to_ffn(gp_tap *tap, slice_view *v, ggml_tensor *node, const ggml_tensor *ids) {
    if (!tap->ffn) {
        return false;
    }
    const gp_ffn_fate fate = gp_ffn_offer(tap->ffn, &v->product, node, ids);
    tap->ffn_trial = fate == FFN_TRIED ? node : tap->ffn_trial;
    return fate == FFN_TRIED;
}

/* The same for several tokens; what is not taken is waited for here. */
static bool offer_to_batch(gp_tap *tap, slice_view *v, ggml_tensor *node, const routing *r) {
    const gp_ffn_fate fate = gp_ffn_batch_offer(tap->batch, v->layer, v->index, node, r->original, r->is_for_batch);
    if (node->op == tap->ggml.op_mul_mat_id) {
        wait_for_slice(tap, v);
    }
    tap->batch_trial = fate == FFN_TRIED ? node : tap->batch_trial;
    return fate == FFN_TRIED;
}

/* The node at hand, which this piece has not had for these matrices. Returns whether the piece is to end with it. */
static bool compute_or_try(gp_tap *tap, slice_view *v, ggml_tensor *node, const routing *r) {
    if (tap->failure.error == 0 && tap->batch && r->original->ne[1] > 1) {
        return offer_to_batch(tap, v, node, r);
    }
    if (tap->failure.error == 0 && v->kind && v->kind->is_same != OTHER
        && node->ne[1] <= (int64_t) gp_pager_layer(tap->pager, v->layer)->n_used    /* as foreseen in open_products */
        && gp_product_fits(&v->kind->kind, &tap->ggml, node)) {
        if (v->kind->is_same == SAME) {
            become_product(tap, v, node);
            return offer_to_ffn(tap, v, node, r->original);
        }
        if (!tap->trial) {
            tap->trial = v;
            tap->trial_node = node;
        }
    }
    wait_for_slice(tap, v);
    return tap->trial == v;
}

/* The trial's node is computed, by ggml. */
static void judge_trial(gp_tap *tap) {
    gp_product *product = &tap->trial->product;
    const ggml_tensor *node = tap->trial_node;
    ggml_tensor ours = *node;
    ours.data = tap->trial_output;
    gp_product_begin(product, &ours);
    gp_product_compute(&ours, 0, 1, product);
    const size_t bytes = (size_t) node->ne[1] * node->nb[1];
    tap->trial->kind->is_same = memcmp(ours.data, node->data, bytes) == 0 ? SAME : OTHER;
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
    point_at_slots(tap, v, r, node);
    v->input = node->src[1];
    bool wants = false;
    if (is_first) {
        wants = compute_or_try(tap, v, node, r);
    } else {
        wait_for_slice(tap, v);
    }
    tap->is_layer_open = node->op == tap->ggml.op_mul_mat_id;

    /* After a graph's last node nobody calls before the next graph: with other contexts about, ask for a call, or its
     * slots stay in use while this context rests. */
    const uint32_t at = (uint32_t) (v - tap->views);
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
    tap->trial = NULL;
    tap->ffn_trial = NULL;
    tap->batch_trial = NULL;
    if (tap->ffn) {
        gp_ffn_reset(tap->ffn);
    }
    if (tap->batch) {
        gp_ffn_batch_reset(tap->batch);
    }
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

bool gp_tap_eval(void *tensor, bool ask, void *data) {
    gp_tap *tap = data;
    ggml_tensor *node = tensor;
    unbecome_product(tap, node);
    if (!ask) {
        if (tap->trial && tap->trial_node == node && tap->failure.error == 0) {
            judge_trial(tap);
        }
        if (tap->ffn_trial == node && tap->failure.error == 0) {
            gp_ffn_judge(tap->ffn);
        }
        if (tap->batch_trial == node && tap->failure.error == 0) {
            gp_ffn_batch_judge(tap->batch);
        }
        if (tap->pause_at == node) {
            tap->pause_at = NULL;
            if (tap->batch) {
                gp_ffn_batch_interrupt(tap->batch);
            }
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
    } else if (tap->pager && !tap->next_wants && is_worth_computing_to(tap, node)) {
        wants = true;
        tap->pause_at = node;
    }
    return wants || tap->next_wants;
}

bool gp_tap_abort(void *data) {
    const gp_tap *tap = data;
    return tap->failure.error != 0 || (tap->next_abort && tap->next_abort(tap->next_abort_data));
}

void gp_tap_chain_abort(gp_tap *tap, gp_abort_callback next_abort, void *next_abort_data) {
    tap->next_abort = next_abort;
    tap->next_abort_data = next_abort_data;
}

void gp_tap_idle(gp_tap *tap) {
    piece_computed(tap);
}

gp_failure gp_tap_take_failure(gp_tap *tap) {
    const gp_failure failure = tap->failure;
    tap->failure = (gp_failure) { 0 };
    return failure;
}

void gp_tap_count_kinds(const gp_tap *tap, uint32_t *n_same, uint32_t *n_other) {
    *n_same = *n_other = 0;
    for (uint32_t i = 0; i < tap->n_kinds; i++) {
        *n_same += tap->kinds[i].is_same == SAME;
        *n_other += tap->kinds[i].is_same == OTHER;
    }
}

void gp_tap_count_ffns(const gp_tap *tap, uint32_t *n_same, uint32_t *n_other) {
    uint32_t n_same_in_batches, n_other_in_batches;
    gp_ffn_count_shapes(tap->ffn, n_same, n_other);
    gp_ffn_batch_count_shapes(tap->batch, &n_same_in_batches, &n_other_in_batches);
    *n_same += n_same_in_batches;
    *n_other += n_other_in_batches;
}

/* ---- opening and closing ---------------------------------------------------------------------------------------- */

/* NULL: ggml has no functions for it that are known here. */
static tried_kind *find_kind(gp_tap *tap, const gp_slice_spec *spec) {
    for (uint32_t i = 0; i < tap->n_kinds; i++) {
        const gp_kind *kind = &tap->kinds[i].kind;
        if (kind->type == spec->type && kind->n_columns == spec->ne[0] && kind->n_rows == spec->ne[1]) {
            return &tap->kinds[i];
        }
    }
    tried_kind *new = &tap->kinds[tap->n_kinds];
    if (tap->n_kinds == KINDS || !gp_kind_find(&new->kind, &tap->ggml, spec->type, spec->ne[0], spec->ne[1])) {
        return NULL;
    }
    tap->n_kinds++;
    return new;
}

/* Kinds of all slices, and memory for the largest product of each. */
static int open_products(gp_tap *tap) {
    size_t input_bytes = 1, output_bytes = 1, converted_bytes = 1;
    uint32_t n_ranks = 0;
    int64_t width = 1;
    for (uint32_t i = 0; i < tap->n_views; i++) {
        slice_view *v = &tap->views[i];
        const gp_layer_spec *layer = gp_pager_layer(tap->pager, v->layer);
        v->kind = find_kind(tap, &layer->slices[v->index]);
        if (!v->kind) {
            continue;
        }
        const size_t input = layer->n_used * v->kind->kind.input_bytes;
        const size_t output = layer->n_used * (size_t) v->kind->kind.n_rows * sizeof(float);
        input_bytes = input > input_bytes ? input : input_bytes;
        output_bytes = output > output_bytes ? output : output_bytes;
        converted_bytes = v->kind->kind.input_bytes > converted_bytes ? v->kind->kind.input_bytes : converted_bytes;
        n_ranks = layer->n_used > n_ranks ? layer->n_used : n_ranks;
        width = v->kind->kind.n_rows > width ? v->kind->kind.n_rows : width;
        width = v->kind->kind.n_columns > width ? v->kind->kind.n_columns : width;
    }
    tap->inputs = malloc(input_bytes);
    tap->trial_output = malloc(output_bytes);
    if (!tap->inputs || !tap->trial_output) {
        return -ENOMEM;
    }
    for (uint32_t i = 0; i < tap->n_views; i++) {
        slice_view *v = &tap->views[i];
        v->product = (gp_product) { .pager = tap->pager, .hold = &tap->hold, .failure = &tap->failure,
                                    .kind = v->kind ? &v->kind->kind : NULL, .layer = v->layer, .slice = v->index,
                                    .inputs = tap->inputs };
    }
    return gp_ffn_open(&tap->ffn, &tap->ggml, n_ranks, width, converted_bytes);
}

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
    return open_products(tap);
}

static void free_tables(gp_tap *tap) {
    free(tap->views);
    free(tap->routings);
    free(tap->slot_ids);
    free(tap->place);
    free(tap->experts);
    free(tap->expert_slots);
    free(tap->counts);
    free(tap->inputs);
    free(tap->trial_output);
    gp_ffn_close(tap->ffn);
    tap->ffn = NULL;
    tap->n_layers = tap->n_views = 0;
}

int gp_tap_open(gp_tap **out, const gp_ggml *ggml, uint32_t max_ids, size_t batch_bytes,
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
    const int error = gp_ffn_batch_open(&tap->batch, &tap->ggml, batch_bytes);
    if (error != 0) {
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
    if (error == 0 && tap->batch) {
        error = gp_ffn_batch_attach(tap->batch, pager, &tap->hold, &tap->failure, tap->n_layers);
    }
    if (error == 0) {
        error = gp_hold_open(&tap->hold, pager, tap->max_ids);
    }
    if (error != 0) {
        if (tap->batch) {
            gp_ffn_batch_detach(tap->batch);
        }
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
    gp_ffn_batch_close(tap->batch);
    free(tap);
}
