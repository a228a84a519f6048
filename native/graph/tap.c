/* The graph hook: between the router's result and the matrix multiply.
 *
 * llama.cpp asks about every node before it computes a piece of graph, and calls again after a piece whose last node was
 * answered with true. So:  ask(router result) -> true;  computed(router result);  ask(MUL_MAT_ID) -> the node becomes an
 * operation of ours, which brings the experts in as it computes;  the piece is computed;  the next computed() ends it.
 *
 * Invariants
 *   1. Only a node whose ids are known to be computed is served. Any other is left as llama.cpp made it: slower, right.
 *   2. A node that llama.cpp asks about, or has just computed, is what llama.cpp made it: a user's own callback sees no other. A
 *      graph that is used again may still have ours.
 *   3. After a failure a node of ours computes nothing: what comes out is thrown away by the abort, and the mapping, whose file
 *      may have lost its end, is not touched.
 *   4. A piece ends after the last layer's experts: after a graph's last node nobody calls before the next graph.
 *   5. Nodes that look up rows of tables are rows.h's.
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
    const ggml_tensor *tensor;      /* NULL: not seen yet */
} expert_tensor;

enum { COMPUTED = 32 };

struct gp_tap {
    gp_pager         *pager;
    gp_ggml           ggml;
    gp_hold           hold;
    expert_tensor    *tensors;      /* layer by layer */
    uint32_t          n_tensors, n_layers;
    const ggml_tensor *computed[COMPUTED];  /* integer results known to be there */
    uint32_t          next_computed;
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

/* The number of a paged tensor; -1: it is none. */
static int32_t find_tensor(gp_tap *tap, const ggml_tensor *tensor) {
    for (uint32_t i = 0; i < tap->n_tensors; i++) {
        if (tap->tensors[i].tensor == tensor) {
            return tap->tensors[i].is_foreign ? -1 : (int32_t) i;
        }
    }
    for (uint32_t i = 0; i < tap->n_tensors; i++) {
        expert_tensor *t = &tap->tensors[i];
        const gp_slice_spec *spec = &gp_pager_layer(tap->pager, t->layer)->slices[t->index];
        if (!t->tensor && strncmp(tensor->name, spec->name, GP_MAX_NAME) == 0) {
            t->tensor = tensor;
            t->is_foreign = !is_as_in_layout(tap, tensor, spec);
            return t->is_foreign ? -1 : (int32_t) i;
        }
    }
    return -1;
}

/* ---- serving ---------------------------------------------------------------------------------------------------- */

static void undo(gp_tap *tap, ggml_tensor *node) {
    const int error = gp_rows_undo(tap->rows, node);
    if (error != 0 && tap->failure.error == 0) {
        tap->failure = (gp_failure) { .error = error };
    }
    gp_compute_undo(tap->compute, node);
}

/* Returns whether llama.cpp shall call back after this node. */
static bool serve(gp_tap *tap, ggml_tensor *node) {
    const int32_t number = find_tensor(tap, node->src[0]);
    const ggml_tensor *ids = node->src[2];
    if (number < 0 || ids->ne[0] * ids->ne[1] == 0) {   /* no token of this batch wants logits: the last layer computes nothing */
        return false;
    }
    const uint32_t layer = tap->tensors[number].layer;
    if (!is_computed(tap, ids) || !gp_compute_offer(tap->compute, (uint32_t) number, node, ids)) {
        gp_pager_count_left_alone(tap->pager, layer);
        return false;
    }
    return gp_compute_has_closed(tap->compute) && (layer + 1 == tap->n_layers || is_given(tap, ids));
}

/* All nodes up to here are computed. */
static void piece_computed(gp_tap *tap, bool is_idle) {
    if (tap->pager) {
        gp_compute_reset(tap->compute, is_idle);
        gp_rows_release(tap->rows);
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
    if (!ask) {
        piece_computed(tap, false);
        if (node->type == tap->ggml.type_i32) {
            note_computed(tap, node);
            if (node->view_src) {
                note_computed(tap, node->view_src);
            }
        }
        return !tap->next_wants || tap->next_eval(tensor, false, tap->next_eval_data);
    }
    look_up(tap);       /* after the last node an abort would come too late */
    if (tap->next_eval) {
        tap->next_wants = tap->next_eval(tensor, true, tap->next_eval_data);
    }
    bool wants = false;
    if (node->type == tap->ggml.type_i32) {
        forget_computed(tap, node);
        wants = may_be_ids(tap, node);
    } else if (tap->pager && node->op == tap->ggml.op_mul_mat_id) {
        wants = serve(tap, node);
    } else if (tap->pager && gp_rows_is_look_up(tap->rows, node)) {
        gp_rows_serve(tap->rows, node, node->src[1] && is_computed(tap, node->src[1]), &tap->failure);
    }
    if (tap->pager) {
        gp_compute_note(tap->compute, node);
    }
    return wants || tap->next_wants;    /* of what is computed, false would end the graph in silence with wrong results */
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
    piece_computed(tap, true);
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

static int open_tensors(gp_tap *tap) {
    const gp_layer_spec *layer;
    for (; (layer = gp_pager_layer(tap->pager, tap->n_layers)); tap->n_layers++) {
        tap->n_tensors += layer->n_slices;
    }
    tap->tensors = calloc(tap->n_tensors, sizeof *tap->tensors);
    expert_tensor *t = tap->tensors;
    for (uint32_t l = 0; t && l < tap->n_layers; l++) {
        for (uint32_t s = 0; s < gp_pager_layer(tap->pager, l)->n_slices; s++, t++) {
            t->layer = l;
            t->index = s;
        }
    }
    return tap->tensors ? 0 : -ENOMEM;
}

static void free_tensors(gp_tap *tap) {
    free(tap->tensors);
    tap->tensors = NULL;
    tap->n_layers = tap->n_tensors = 0;
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
    tap->next_eval = next_eval;
    tap->next_eval_data = next_eval_data;
    tap->next_abort = next_abort;
    tap->next_abort_data = next_abort_data;
    int error = gp_compute_open(&tap->compute, &tap->ggml, max_ids, batch_bytes);
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
    int error = open_tensors(tap);
    if (error == 0) {
        error = gp_rows_attach(tap->rows, gp_pager_tables(pager), &tap->watch);
    }
    if (error == 0) {
        error = gp_hold_open(&tap->hold, pager);
    }
    if (error == 0) {
        tap->hold.watch = &tap->watch;
        error = gp_compute_attach(tap->compute, pager, &tap->hold, &tap->failure);
        if (error != 0) {
            gp_hold_close(&tap->hold, pager);
        }
    }
    if (error != 0) {
        free_tensors(tap);
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
        free_tensors(tap);
    }
    gp_rows_close(tap->rows);
    gp_compute_close(tap->compute);
    free(tap);
}
