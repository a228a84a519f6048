/* Invariants
 *   1. A node is made ours only for the time of its piece, once per slice and piece, and only of a kind whose bits were
 *      those of MUL_MAT_ID when ggml computed one.
 *   2. One product is tried at a time, and its node ends the piece.
 *   3. A node that stays a MUL_MAT_ID has all its slices: a failure is noted, and what it then computes thrown away.
 */
#include "compute/compute.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "compute/ffn.h"
#include "compute/ffn_batch.h"
#include "compute/product.h"

enum { KINDS = 16 };

/* Whether our own product of some kind of matrices has the bits of ggml's: found out with the first node of that kind. */
typedef enum { UNTRIED, SAME, OTHER } verdict;

typedef struct {
    gp_kind kind;
    verdict is_same;
} tried_kind;

/* What is known of a slice of the model. */
typedef struct {
    uint32_t    layer, index;       /* among the layer's slices */
    tried_kind *kind;               /* NULL: always computed by MUL_MAT_ID */
    gp_product  product;
} matrices;

struct gp_compute {
    const gp_ggml *ggml;
    gp_pager      *pager;
    gp_hold       *hold;
    gp_failure    *failure;
    matrices      *slices;
    uint32_t       n_slices;
    tried_kind     kinds[KINDS];
    uint32_t       n_kinds;
    char          *inputs;          /* of the product that is being computed */
    float         *trial_output;
    matrices      *trial;           /* its MUL_MAT_ID node ends this piece and is then compared with ours: */
    ggml_tensor   *trial_node;
    gp_ffn        *ffn;             /* NULL: matrix by matrix */
    const ggml_tensor *ffn_trial;   /* this node ends a piece in which ffn has tried something */
    gp_ffn_batch  *batch;           /* likewise, of several tokens */
    const ggml_tensor *batch_trial;
};

/* ---- nodes ------------------------------------------------------------------------------------------------------ */

bool gp_compute_is_product(const gp_compute *c, uint32_t slice) {
    return c->slices[slice].kind && c->slices[slice].kind->is_same == SAME;
}

bool gp_compute_is_batch_expected(const gp_compute *c, uint32_t layer, uint64_t n_rows) {
    return c->batch && c->failure->error == 0 && gp_ffn_batch_is_expected(c->batch, layer, n_rows);
}

void gp_compute_wait(gp_compute *c, uint32_t slice) {
    const matrices *m = &c->slices[slice];
    gp_failure failure;
    if (c->failure->error == 0 && gp_pager_wait(c->pager, c->hold, m->layer, 1u << m->index, &failure) != 0) {
        *c->failure = failure;
    }
}

/* From a MUL_MAT_ID of one token to our own product; until it is asked about again. */
static void become_product(const gp_compute *c, matrices *m, ggml_tensor *node) {
    gp_product_begin(&m->product, node);
    const gp_custom custom = { .compute = gp_product_compute, .n_tasks = GP_ALL_THREADS, .data = &m->product };
    memcpy(node->op_params, &custom, sizeof custom);
    node->op = c->ggml->op_custom;
}

void gp_compute_undo(const gp_compute *c, ggml_tensor *node) {
    memset(node->op_params, 0, sizeof(gp_custom));
    node->op = c->ggml->op_mul_mat_id;
}

static bool offer_to_ffn(gp_compute *c, matrices *m, ggml_tensor *node, const ggml_tensor *ids) {
    if (!c->ffn) {
        return false;
    }
    const gp_ffn_fate fate = gp_ffn_offer(c->ffn, &m->product, node, ids);
    c->ffn_trial = fate == FFN_TRIED ? node : c->ffn_trial;
    return fate == FFN_TRIED;
}

/* The same for several tokens; what is not taken is waited for here. */
static bool offer_to_batch(gp_compute *c, uint32_t slice, ggml_tensor *node, const ggml_tensor *ids, bool is_expected) {
    const matrices *m = &c->slices[slice];
    const gp_ffn_fate fate = gp_ffn_batch_offer(c->batch, m->layer, m->index, node, ids, is_expected);
    if (node->op == c->ggml->op_mul_mat_id) {
        gp_compute_wait(c, slice);
    }
    c->batch_trial = fate == FFN_TRIED ? node : c->batch_trial;
    return fate == FFN_TRIED;
}

bool gp_compute_offer(gp_compute *c, uint32_t slice, ggml_tensor *node, const ggml_tensor *ids, bool is_batch_expected) {
    matrices *m = &c->slices[slice];
    if (c->failure->error == 0 && c->batch && ids->ne[1] > 1) {
        return offer_to_batch(c, slice, node, ids, is_batch_expected);
    }
    if (c->failure->error == 0 && m->kind && m->kind->is_same != OTHER
        && node->ne[1] <= (int64_t) gp_pager_layer(c->pager, m->layer)->n_used      /* as foreseen in open_products */
        && gp_product_fits(&m->kind->kind, c->ggml, node)) {
        if (m->kind->is_same == SAME) {
            become_product(c, m, node);
            return offer_to_ffn(c, m, node, ids);
        }
        if (!c->trial) {
            c->trial = m;
            c->trial_node = node;
        }
    }
    gp_compute_wait(c, slice);
    return c->trial == m;
}

bool gp_compute_is_collecting(const gp_compute *c) {
    return c->batch && gp_ffn_batch_is_collecting(c->batch);
}

void gp_compute_interrupt(gp_compute *c) {
    if (c->batch) {
        gp_ffn_batch_interrupt(c->batch);
    }
}

/* The trial's node is computed, by ggml. */
static void judge_trial(gp_compute *c) {
    gp_product *product = &c->trial->product;
    const ggml_tensor *node = c->trial_node;
    ggml_tensor ours = *node;
    ours.data = c->trial_output;
    gp_product_begin(product, &ours);
    gp_product_compute(&ours, 0, 1, product);
    const size_t bytes = (size_t) node->ne[1] * node->nb[1];
    c->trial->kind->is_same = memcmp(ours.data, node->data, bytes) == 0 ? SAME : OTHER;
}

void gp_compute_judge(gp_compute *c, const ggml_tensor *node) {
    if (c->failure && c->failure->error != 0) {
        return;
    }
    if (c->trial && c->trial_node == node) {
        judge_trial(c);
    }
    if (c->ffn_trial == node) {
        gp_ffn_judge(c->ffn);
    }
    if (c->batch_trial == node) {
        gp_ffn_batch_judge(c->batch);
    }
}

void gp_compute_reset(gp_compute *c) {
    c->trial = NULL;
    c->ffn_trial = NULL;
    c->batch_trial = NULL;
    if (c->ffn) {
        gp_ffn_reset(c->ffn);
    }
    if (c->batch) {
        gp_ffn_batch_reset(c->batch);
    }
}

/* ---- counting --------------------------------------------------------------------------------------------------- */

void gp_compute_count_kinds(const gp_compute *c, uint32_t *n_same, uint32_t *n_other) {
    *n_same = *n_other = 0;
    for (uint32_t i = 0; i < c->n_kinds; i++) {
        *n_same += c->kinds[i].is_same == SAME;
        *n_other += c->kinds[i].is_same == OTHER;
    }
}

void gp_compute_count_ffns(const gp_compute *c, uint32_t *n_same, uint32_t *n_other) {
    uint32_t n_same_in_batches, n_other_in_batches;
    gp_ffn_count_shapes(c->ffn, n_same, n_other);
    gp_ffn_batch_count_shapes(c->batch, &n_same_in_batches, &n_other_in_batches);
    *n_same += n_same_in_batches;
    *n_other += n_other_in_batches;
}

/* ---- opening and closing ---------------------------------------------------------------------------------------- */

/* NULL: ggml has no functions for it that are known here. */
static tried_kind *find_kind(gp_compute *c, const gp_slice_spec *spec) {
    for (uint32_t i = 0; i < c->n_kinds; i++) {
        const gp_kind *kind = &c->kinds[i].kind;
        if (kind->type == spec->type && kind->n_columns == spec->ne[0] && kind->n_rows == spec->ne[1]) {
            return &c->kinds[i];
        }
    }
    tried_kind *new = &c->kinds[c->n_kinds];
    if (c->n_kinds == KINDS || !gp_kind_find(&new->kind, c->ggml, spec->type, spec->ne[0], spec->ne[1])) {
        return NULL;
    }
    c->n_kinds++;
    return new;
}

static int open_slices(gp_compute *c, uint32_t n_layers) {
    c->slices = calloc(c->n_slices, sizeof *c->slices);
    if (!c->slices) {
        return -ENOMEM;
    }
    matrices *m = c->slices;
    for (uint32_t l = 0; l < n_layers; l++) {
        const gp_layer_spec *layer = gp_pager_layer(c->pager, l);
        for (uint32_t s = 0; s < layer->n_slices; s++, m++) {
            m->layer = l;
            m->index = s;
            m->kind = find_kind(c, &layer->slices[s]);
        }
    }
    return 0;
}

/* Memory for the largest product of each kind. */
static int open_products(gp_compute *c) {
    size_t input_bytes = 1, output_bytes = 1, converted_bytes = 1;
    uint32_t n_ranks = 0;
    int64_t width = 1;
    for (uint32_t i = 0; i < c->n_slices; i++) {
        const matrices *m = &c->slices[i];
        if (!m->kind) {
            continue;
        }
        const gp_kind *kind = &m->kind->kind;
        const uint32_t n_used = gp_pager_layer(c->pager, m->layer)->n_used;
        const size_t input = n_used * kind->input_bytes;
        const size_t output = n_used * (size_t) kind->n_rows * sizeof(float);
        input_bytes = input > input_bytes ? input : input_bytes;
        output_bytes = output > output_bytes ? output : output_bytes;
        converted_bytes = kind->input_bytes > converted_bytes ? kind->input_bytes : converted_bytes;
        n_ranks = n_used > n_ranks ? n_used : n_ranks;
        width = kind->n_rows > width ? kind->n_rows : width;
        width = kind->n_columns > width ? kind->n_columns : width;
    }
    c->inputs = malloc(input_bytes);
    c->trial_output = malloc(output_bytes);
    if (!c->inputs || !c->trial_output) {
        return -ENOMEM;
    }
    for (uint32_t i = 0; i < c->n_slices; i++) {
        matrices *m = &c->slices[i];
        m->product = (gp_product) { .pager = c->pager, .hold = c->hold, .failure = c->failure,
                                    .kind = m->kind ? &m->kind->kind : NULL, .layer = m->layer, .slice = m->index,
                                    .inputs = c->inputs };
    }
    return gp_ffn_open(&c->ffn, c->ggml, n_ranks, width, converted_bytes);
}

static void detach(gp_compute *c) {
    free(c->slices);
    free(c->inputs);
    free(c->trial_output);
    c->slices = NULL;
    c->inputs = NULL;
    c->trial_output = NULL;
    c->n_slices = c->n_kinds = 0;
    gp_ffn_close(c->ffn);
    c->ffn = NULL;
    if (c->batch) {
        gp_ffn_batch_detach(c->batch);
    }
}

int gp_compute_attach(gp_compute *c, gp_pager *pager, gp_hold *hold, gp_failure *failure) {
    c->pager = pager;
    c->hold = hold;
    c->failure = failure;
    const gp_layer_spec *layer;
    uint32_t n_layers = 0;
    for (; (layer = gp_pager_layer(pager, n_layers)); n_layers++) {
        c->n_slices += layer->n_slices;
    }
    int error = open_slices(c, n_layers);
    if (error == 0) {
        error = open_products(c);
    }
    if (error == 0 && c->batch) {
        error = gp_ffn_batch_attach(c->batch, pager, hold, failure, n_layers);
    }
    if (error != 0) {
        detach(c);
    }
    return error;
}

int gp_compute_open(gp_compute **out, const gp_ggml *ggml, size_t batch_bytes) {
    *out = NULL;
    gp_compute *c = calloc(1, sizeof *c);
    if (!c) {
        return -ENOMEM;
    }
    c->ggml = ggml;
    const int error = gp_ffn_batch_open(&c->batch, ggml, batch_bytes);
    if (error != 0) {
        free(c);
        return error;
    }
    *out = c;
    return 0;
}

void gp_compute_close(gp_compute *c) {
    if (c) {
        detach(c);
        gp_ffn_batch_close(c->batch);
        free(c);
    }
}
