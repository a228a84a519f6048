/* Invariants
 *   1. A hold's forecast is open from when its layer was foretold until that layer's turn, a new forecast, or the hold's end.
 *   2. A slot has the hold's bit in foretold_for exactly while the forecast that named its expert is open, and it was not given up.
 *   3. What is read for a forecast is transient until it is wanted: first to go once its layer's turn has passed.
 */
#include "slots/look_ahead.h"

#include "slots/forecast.h"
#include "slots/slots.h"

static uint64_t bit_of(const gp_hold *hold) {
    return UINT64_C(1) << hold->bit;
}

static gp_look look_at(gp_pager *p, const gp_hold *hold, uint32_t layer) {
    if (layer == p->config.n_layers || p->layers[layer].router != GP_ROUTER_IS_KNOWN) {
        return GP_LOOK_NOT;
    }
    if (p->config.look_ahead == GP_LOOK_ALWAYS) {
        return GP_LOOK_TO_READ;
    }
    gp_foresight *f = &p->layers[layer].foresight;
    if (!hold->contest->looks) {
        return GP_LOOK_NOT;
    }
    return gp_foresight_pays(f) ? GP_LOOK_TO_READ : gp_foresight_shall_learn(f) ? GP_LOOK_TO_LEARN : GP_LOOK_NOT;
}

void gp_look_ahead_decide(gp_pager *p, gp_hold *hold, const gp_demand *demand) {
    hold->look = GP_LOOK_NOT;
    if (demand->layer == 0) {
        hold->contest->begun_ns = 0;    /* of a token that did not come to its end */
    }
    /* Batches of more tokens are prompts': they want so much of a layer that the batch before says as much. */
    if (p->config.look_ahead == GP_LOOK_NEVER || demand->n_tokens > GP_LOOK_ROWS) {
        return;
    }
    if (demand->layer == 0) {
        hold->contest = &hold->contests[demand->n_tokens > 1];
        gp_contest_begin(hold->contest, demand->n_tokens, p->os->now_ns());
    }
    p->is_slower = !hold->contest->is_on;
    hold->look = look_at(p, hold, demand->layer + 1);
}

void gp_look_ahead_token_ends(const gp_pager *p, gp_hold *hold) {
    if (hold->layer + 1 == p->config.n_layers) {
        gp_contest_end(hold->contest, p->os->now_ns());
    }
}

/* Takes a slot for an expert of the next layer. Returns the number of its reads; 0: there is no slot. */
static uint32_t take(gp_pager *p, const gp_hold *hold, uint32_t layer, int32_t expert, gp_read **reads) {
    const int32_t index = gp_slot_choose_foretold(p, &p->layers[layer]);
    if (index < 0) {
        return 0;
    }
    gp_slot_assign(p, (uint32_t) index, layer, expert, true);
    p->slots[index].ahead_for = p->slots[index].foretold_for = bit_of(hold);
    return gp_slot_prepare_reads(p, (uint32_t) index, reads, 1);
}

void gp_look_ahead_begin(gp_pager *p, gp_hold *hold, const int32_t *experts, uint32_t n_experts) {
    gp_forecast *f = &hold->forecast;
    uint32_t n_reads = 0;
    pthread_mutex_lock(&p->lock);
    gp_forecast_end(p, hold);
    *f = (gp_forecast) { .layer = hold->layer + 1, .n = n_experts, .is_open = true, .experts = f->experts };
    const gp_layer *l = &p->layers[f->layer];
    for (uint32_t i = 0; i < n_experts; i++) {      /* before any is read: they must not push each other out */
        const int32_t index = l->slot_of[experts[i]];
        f->experts[i] = (gp_foretold) { .expert = experts[i], .was_missing = index < 0 };
        if (index >= 0) {
            p->slots[index].foretold_for |= bit_of(hold);
        }
    }
    for (uint32_t i = 0; hold->look == GP_LOOK_TO_READ && i < n_experts; i++) {
        gp_foretold *e = &f->experts[i];
        const uint32_t n = e->was_missing ? take(p, hold, f->layer, e->expert, hold->reads + n_reads) : 0;
        e->is_read = n > 0;
        n_reads += n;
    }
    pthread_mutex_unlock(&p->lock);
    if (n_reads > 0) {
        gp_copies_submit(p->copies, hold->reads, n_reads);
    }
}

void gp_forecast_end(gp_pager *p, gp_hold *hold) {
    gp_forecast *f = &hold->forecast;
    for (uint32_t i = 0; f->is_open && i < f->n; i++) {
        const int32_t index = p->layers[f->layer].slot_of[f->experts[i].expert];
        if (index >= 0) {
            p->slots[index].foretold_for &= ~bit_of(hold);
        }
    }
    f->is_open = false;
}

static bool is_wanted(const gp_demand *demand, int32_t expert) {
    for (uint32_t i = 0; i < demand->n_experts; i++) {
        if (demand->experts[i] == expert) {
            return true;
        }
    }
    return false;
}

uint32_t gp_forecast_settle(gp_pager *p, gp_hold *hold, const gp_demand *demand) {
    gp_layer *l = &p->layers[demand->layer];
    const gp_forecast *f = &hold->forecast;
    uint32_t n_true = 0, n_false = 0, n_ready = 0;
    for (uint32_t i = 0; f->is_open && f->layer == demand->layer && i < f->n; i++) {
        const gp_foretold *e = &f->experts[i];
        const bool is_true = is_wanted(demand, e->expert);
        n_true += e->was_missing && is_true;
        n_false += e->was_missing && !is_true;
        l->counters.in_vain += e->is_read && !is_true;
        const int32_t index = l->slot_of[e->expert];
        if (e->is_read && is_true && index >= 0) {
            l->counters.foreseen++;
            n_ready += p->slots[index].state == READY;
        }
    }
    gp_foresight_note(&l->foresight, n_true, n_false);
    gp_forecast_end(p, hold);
    return n_ready;
}

gp_sight gp_look_ahead_sight(const gp_pager *p, uint32_t layer) {
    const gp_layer *l = &p->layers[layer];
    if (p->config.look_ahead == GP_LOOK_NEVER) {
        return GP_SIGHT_OFF;
    }
    if (layer == 0) {
        return GP_SIGHT_FIRST;
    }
    if (l->router != GP_ROUTER_IS_KNOWN) {
        return l->router == GP_ROUTER_IS_OTHER ? GP_SIGHT_OTHER : GP_SIGHT_UNSEEN;
    }
    if (p->config.look_ahead == GP_LOOK_ALWAYS) {
        return GP_SIGHT_ON;
    }
    return p->is_slower ? GP_SIGHT_SLOWER : !l->foresight.is_judged ? GP_SIGHT_UNSEEN
        : l->foresight.is_poor ? GP_SIGHT_POOR : GP_SIGHT_ON;
}

bool gp_look_ahead_is_wanted(const gp_pager *p) {
    return p->config.look_ahead != GP_LOOK_NEVER;
}

void gp_look_ahead_note_router(gp_pager *p, uint32_t layer, bool is_known) {
    pthread_mutex_lock(&p->lock);
    p->layers[layer].router = is_known ? GP_ROUTER_IS_KNOWN : GP_ROUTER_IS_OTHER;
    pthread_mutex_unlock(&p->lock);
}
