/* Why it comes true: a layer adds little to what it is given, so that the next layer's input, normalised, is nearly this one's. Each is
 * multiplied with its own norm's weight, so this layer's is divided out; the next one's is a part of the router that was copied.
 *
 * Peers ask the next router with what comes into this layer, and report 72 % of the choices foretold on trained models
 * (benchmarks/LOG.md, 2026-11-30). */
#include "compute/foretell.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "compute/batch.h"
#include "compute/drift.h"
#include "compute/margin.h"
#include "compute/router.h"
#include "slots/look_ahead.h"

typedef struct {
    gp_router router;
    gp_norm   norm;         /* in front of its experts, or of its router alone */
    bool      is_apart;     /* what the router takes in is not what the experts do: they get a projection of it, say */
    gp_drift  drift;        /* to the next layer */
    gp_margin margin;       /* of its router's choices, when they are foretold */
} layer;

/* An expert and how many of the batch's tokens it is foretold for; the smaller `at`, the sooner it was named. */
typedef struct {
    int32_t  expert;
    uint32_t count, at;
} choice;

/* An expert of which it is to be seen whether a token chooses it. */
typedef struct {
    uint32_t token;
    int32_t  expert;
} doubt;

/* How many are looked at beyond those that a router uses; doubts of a batch, at most; steps of a projection. */
enum { MORE_RANKS = 3, MOST_DOUBTS = 8 * GP_LOOK_ROWS, MOST_STEPS = 6 };

struct gp_foretell {
    gp_pager  *pager;
    gp_hold   *hold;
    gp_routers routers;
    layer     *layers;
    uint32_t   n_layers;
    float     *kept;        /* GP_LOOK_ROWS rows, normalised */
    float     *guessed;     /* one row, of the next layer */
    int64_t    width;       /* room in each; 0: none yet */
    uint32_t   n_kept;      /* tokens of the batch at hand; 0: nothing is to be foretold with them */
    uint32_t   kept_layer, n_passed;    /* whose rows are kept, and how many: learnt from at the next layer */
    int32_t   *place;       /* by expert; -1: not named */
    choice    *choices;
    int32_t   *experts;
    doubt      doubts[MOST_DOUBTS];
    uint32_t   n_doubts;    /* of the layer after kept_layer */
};

/* Whether the next layer's router can be asked with this layer's input. */
static bool leads_on(const gp_foretell *f, uint32_t layer_index) {
    const layer *l = &f->layers[layer_index], *next = l + 1;
    return layer_index + 1 < f->n_layers && l->norm.is_known && next->router.state == GP_ROUTER_KNOWN
        && next->router.n_embd == l->norm.n_embd;
}

/* Both of a layer and the next have been seen. */
static void note(gp_foretell *f, uint32_t layer_index) {
    if (layer_index + 1 < f->n_layers && f->layers[layer_index].router.state != GP_ROUTER_UNSEEN
        && f->layers[layer_index + 1].router.state != GP_ROUTER_UNSEEN) {
        gp_look_ahead_note_router(f->pager, layer_index + 1, leads_on(f, layer_index));
    }
}

/* Whether a tensor was computed from another one alone and in few steps, as by a projection, and not by experts. */
static bool is_made_of(const gp_ggml *ggml, const ggml_tensor *made, const ggml_tensor *of, uint32_t most_steps) {
    if (made == of) {
        return true;
    }
    bool is = false;
    for (uint32_t i = 0; i < 2 && most_steps > 0 && made->op != ggml->op_mul_mat_id; i++) {
        is |= made->src[i] && is_made_of(ggml, made->src[i], of, most_steps - 1);
    }
    return is;
}

/* What goes before a layer's experts, or before its router alone. */
static void find_norm(gp_foretell *f, layer *l, const ggml_tensor *input, const ggml_tensor *ids) {
    const gp_ggml *ggml = f->routers.ggml;
    l->norm = gp_norm_before(ggml, input);
    const bool is_other = !l->norm.is_known || l->norm.n_embd != l->router.n_embd;
    const ggml_tensor *own = is_other ? gp_router_input(&l->router, ggml, ids) : NULL;
    if (own && is_made_of(ggml, input, own, MOST_STEPS)) {
        l->norm = gp_norm_before(ggml, own);
        l->is_apart = true;
    }
}

void gp_foretell_see(gp_foretell *f, uint32_t layer_index, const ggml_tensor *node, const ggml_tensor *ids) {
    layer *l = &f->layers[layer_index];
    if (l->router.state != GP_ROUTER_UNSEEN) {
        return;
    }
    gp_router_learn(&l->router, &f->routers, ids);
    if (l->router.state != GP_ROUTER_UNSEEN) {
        find_norm(f, l, node->src[1], ids);
        if (layer_index > 0) {
            note(f, layer_index - 1);
        }
        note(f, layer_index);
    }
}

static bool has_room(gp_foretell *f, int64_t width) {
    if (f->width < width) {
        free(f->kept);
        f->kept = malloc((GP_LOOK_ROWS + 1) * (size_t) width * sizeof *f->kept);
        f->width = f->kept ? width : 0;
        f->guessed = f->kept ? f->kept + GP_LOOK_ROWS * (size_t) width : NULL;
        f->n_passed = 0;
    }
    return f->kept != NULL;
}

/* Tokens' inputs of a layer, a row each. */
typedef struct {
    const char *data;       /* NULL: they are not to be had */
    size_t      row_bytes;
} inputs;

static inputs inputs_of(const gp_foretell *f, const layer *l, const ggml_tensor *node, const ggml_tensor *ids) {
    if (!l->is_apart) {
        return (inputs) { node->src[1]->data, node->src[1]->nb[2] };
    }
    const ggml_tensor *own = gp_router_input(&l->router, f->routers.ggml, ids);
    return own ? (inputs) { own->data, own->nb[1] } : (inputs) { NULL, 0 };
}

static void undo_norm(const layer *l, const inputs *in, uint32_t token, float *normalised) {
    gp_norm_undo(&l->norm, (const float *) (const void *) (in->data + token * in->row_bytes), normalised);
}

/* From what is kept of the layer before, and the same tokens' inputs of this one. */
static void learn(gp_foretell *f, uint32_t layer_index, const inputs *in) {
    layer *before = &f->layers[layer_index - 1];
    const int64_t n = f->layers[layer_index].norm.n_embd;
    if (!before->drift.here && !gp_drift_open(&before->drift, n)) {
        return;
    }
    for (uint32_t token = 0; token < f->n_passed; token++) {
        undo_norm(&f->layers[layer_index], in, token, f->guessed);
        gp_drift_learn(&before->drift, n, f->kept + token * (size_t) f->width, f->guessed);
    }
}

static bool has_chosen(const ggml_tensor *ids, uint32_t token, int32_t expert) {
    for (uint32_t rank = 0; rank < (uint32_t) ids->ne[0]; rank++) {
        if (gp_id_in(ids, &(gp_row) { rank, token }) == expert) {
            return true;
        }
    }
    return false;
}

static void settle_doubts(gp_foretell *f, uint32_t layer_index, const ggml_tensor *ids) {
    for (uint32_t i = 0; i < f->n_doubts; i++) {
        gp_margin_learn(&f->layers[layer_index].margin, has_chosen(ids, f->doubts[i].token, f->doubts[i].expert));
    }
}

void gp_foretell_keep(gp_foretell *f, uint32_t layer_index, const ggml_tensor *node, const ggml_tensor *ids) {
    const layer *l = &f->layers[layer_index];
    const uint32_t n_tokens = (uint32_t) ids->ne[1];
    const inputs in = inputs_of(f, l, node, ids);
    f->n_kept = 0;
    if (!l->norm.is_known || !in.data || n_tokens > GP_LOOK_ROWS || !has_room(f, l->norm.n_embd)) {
        return;
    }
    if (f->n_passed == n_tokens && layer_index > 0 && f->kept_layer == layer_index - 1
        && f->layers[layer_index - 1].norm.n_embd == l->norm.n_embd) {
        learn(f, layer_index, &in);
        settle_doubts(f, layer_index, ids);
    }
    f->n_passed = f->n_doubts = 0;
    if (f->hold->look == GP_LOOK_NOT || !leads_on(f, layer_index)) {
        return;
    }
    for (; f->n_kept < n_tokens; f->n_kept++) {
        undo_norm(l, &in, f->n_kept, f->kept + f->n_kept * (size_t) f->width);
    }
    f->kept_layer = layer_index;
    f->n_passed = f->n_kept;
}

/* What a token's input of the next layer will probably be. */
static const float *guess(gp_foretell *f, uint32_t token) {
    const layer *l = &f->layers[f->kept_layer];
    const float *now = f->kept + token * (size_t) f->width;
    if (l->drift.here) {
        gp_drift_follow(&l->drift, l->norm.n_embd, now, f->guessed);
        return f->guessed;
    }
    return now;
}

static int most_wanted_first(const void *left, const void *right) {
    const choice *a = left, *b = right;
    return a->count != b->count ? (a->count < b->count) - (a->count > b->count) : (a->at > b->at) - (a->at < b->at);
}

/* A router may rank more than the layer's experts: some models have such as do nothing. */
static uint32_t choose(gp_foretell *f, uint32_t layer_index, int32_t expert, uint32_t rank, uint32_t n) {
    if (expert < 0 || (uint32_t) expert >= gp_pager_layer(f->pager, layer_index)->n_experts) {
        return n;
    }
    if (f->place[expert] < 0) {
        f->place[expert] = (int32_t) n;
        f->choices[n++] = (choice) { .expert = expert, .at = rank };
    }
    f->choices[f->place[expert]].count++;
    return n;
}

/* Of a ranking of all experts, those that are worth it; n were chosen before. Returns how many are now. */
static uint32_t choose_by_score(gp_foretell *f, uint32_t layer_index, const int32_t *ranking, uint32_t token, uint32_t n) {
    layer *l = &f->layers[layer_index];
    const float *scores = l->router.scores->data;
    const uint32_t n_used = l->router.n_used, n_experts = (uint32_t) l->router.scores->ne[0];
    const float last = scores[ranking[n_used - 1]], next = scores[ranking[n_used]];
    gp_margin_note(&l->margin, last, next);
    for (uint32_t rank = 0; rank < n_used + MORE_RANKS && rank < n_experts; rank++) {
        const float above = gp_margin_above(&l->margin, scores[ranking[rank]], last, next);
        if (gp_margin_is_doubtful(&l->margin, above) && f->n_doubts < MOST_DOUBTS) {
            f->doubts[f->n_doubts++] = (doubt) { token, ranking[rank] };
        }
        n = gp_margin_is_worth(&l->margin, above) ? choose(f, layer_index, ranking[rank], rank, n) : n;
    }
    return n;
}

/* Scores of which some are no numbers say nothing: experts that a router may not choose are put at minus infinity. */
static bool has_scores(const layer *l, const int32_t *ranking) {
    const ggml_tensor *scores = l->router.scores;
    if (!scores || (int64_t) l->router.n_used >= scores->ne[0]) {
        return false;
    }
    const float *of = scores->data;
    return isfinite(of[ranking[l->router.n_used - 1]] - of[ranking[l->router.n_used]]);
}

/* Asks a layer's router about every token that was kept. Returns how many different experts are to be read for. */
static uint32_t collect(gp_foretell *f, uint32_t layer_index) {
    layer *l = &f->layers[layer_index];
    uint32_t n = 0;
    for (uint32_t token = 0; token < f->n_kept; token++) {
        const int32_t *ranking = gp_router_ask(&l->router, &f->routers, guess(f, token));
        if (ranking && has_scores(l, ranking)) {
            n = choose_by_score(f, layer_index, ranking, token, n);
            continue;
        }
        for (uint32_t rank = 0; ranking && rank < l->router.n_used; rank++) {
            n = choose(f, layer_index, ranking[rank], rank, n);
        }
    }
    qsort(f->choices, n, sizeof *f->choices, most_wanted_first);
    for (uint32_t i = 0; i < n; i++) {
        f->experts[i] = f->choices[i].expert;
        f->place[f->experts[i]] = -1;
    }
    return n;
}

void gp_foretell_ahead(gp_foretell *f, uint32_t layer_index) {
    if (f->n_kept > 0 && f->kept_layer == layer_index) {
        gp_look_ahead_begin(f->pager, f->hold, f->experts, collect(f, layer_index + 1));
    }
    f->n_kept = 0;
}

int gp_foretell_open(gp_foretell **out, const gp_ggml *ggml, gp_pager *pager, gp_hold *hold) {
    *out = NULL;
    gp_foretell *f = calloc(1, sizeof *f);
    if (!f) {
        return -ENOMEM;
    }
    f->pager = pager;
    f->hold = hold;
    uint32_t most = 0;
    const gp_layer_spec *spec;
    for (; (spec = gp_pager_layer(pager, f->n_layers)); f->n_layers++) {
        most = spec->n_experts > most ? spec->n_experts : most;
    }
    f->layers = calloc(f->n_layers, sizeof *f->layers);
    f->place = malloc(most * sizeof *f->place);
    f->choices = malloc(most * sizeof *f->choices);
    f->experts = malloc(most * sizeof *f->experts);
    int error = f->layers && f->place && f->choices && f->experts ? 0 : -ENOMEM;
    f->routers.ggml = ggml;
    if (error == 0 && gp_look_ahead_is_wanted(pager)) {     /* otherwise no router is learnt, and nothing is kept */
        error = gp_routers_open(&f->routers, ggml);
    }
    if (error != 0) {
        gp_foretell_close(f);
        return error;
    }
    for (uint32_t e = 0; e < most; e++) {
        f->place[e] = -1;
    }
    *out = f;
    return 0;
}

void gp_foretell_close(gp_foretell *f) {
    if (!f) {
        return;
    }
    for (uint32_t i = 0; f->layers && i < f->n_layers; i++) {
        gp_router_close(&f->layers[i].router, &f->routers);
        gp_drift_close(&f->layers[i].drift);
    }
    gp_routers_close(&f->routers);
    free(f->layers);
    free(f->kept);
    free(f->place);
    free(f->choices);
    free(f->experts);
    free(f);
}
