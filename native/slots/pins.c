/* Pins: experts that no policy may give up, until they are all let go. */
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "slots/slots.h"

/* Whether there is room for these beside those that are pinned already, and for a token's. With the lock held. */
static bool has_room(const gp_pager *p, const gp_layer *l, const int32_t *experts, uint32_t n_experts) {
    const gp_class *c = &p->classes[l->spec.shape_class];
    uint32_t n_pinned = 0;
    for (uint32_t i = c->first; i < c->first + c->n_slots; i++) {
        n_pinned += p->slots[i].is_pinned;
    }
    for (uint32_t i = 0; i < n_experts; i++) {
        const int32_t index = l->slot_of[experts[i]];
        n_pinned += index < 0 || !p->slots[index].is_pinned;
    }
    return n_pinned + l->spec.n_used <= c->n_slots;
}

static void set_pinned(gp_pager *p, uint32_t layer, const gp_wanted *w, bool is_pinned) {
    const uint32_t first = p->classes[p->layers[layer].spec.shape_class].first;
    pthread_mutex_lock(&p->lock);
    p->slots[first + (uint32_t) w->slot].is_pinned = is_pinned;
    pthread_mutex_unlock(&p->lock);
}

/* An expert after the other, as they come. On failure none is pinned that was not before. */
static int pin_all(gp_pager *p, gp_hold *hold, uint32_t layer, const bool *was_pinned, gp_failure *failure) {
    const uint32_t all = (1u << p->layers[layer].spec.n_slices) - 1;
    uint32_t n = 0;
    bool is_busy = false;       /* others hold what slots there are, and have not given any back */
    while (n < hold->n_wanted && !is_busy && !gp_wave_stops(hold, true)) {
        const unsigned n_arrived = gp_wave_n_arrived(hold);
        if (hold->wanted[n].slot == GP_NO_SLOT) {
            is_busy = true;
        } else if (gp_wave_has(p, hold, n, all)) {
            set_pinned(p, layer, &hold->wanted[n], true);
            gp_wave_done(p, hold, n++);
        } else if (!gp_wave_wait(p, hold, n_arrived, true)) {
            break;
        }
    }
    int error = gp_wave_end(p, hold, failure);
    if (error == 0 && is_busy) {
        error = failure->error = -EBUSY;
    }
    for (uint32_t i = 0; error != 0 && i < n; i++) {
        if (!was_pinned[hold->wanted[i].at]) {
            set_pinned(p, layer, &hold->wanted[i], false);
        }
    }
    return error;
}

/* A list may name an expert twice, a wave may not. */
static uint32_t keep_distinct(const int32_t *named, uint32_t n_named, int32_t *experts) {
    uint32_t n = 0;
    for (uint32_t i = 0; i < n_named; i++) {
        bool is_new = true;
        for (uint32_t j = 0; j < n; j++) {
            is_new &= experts[j] != named[i];
        }
        if (is_new) {
            experts[n++] = named[i];
        }
    }
    return n;
}

int gp_pager_pin(gp_pager *p, uint32_t layer, const int32_t *named, uint32_t n_named,
                 gp_abort_callback shall_stop, void *data, gp_failure *failure) {
    const gp_layer *l = &p->layers[layer];
    gp_watch watch = { .os = p->os, .ask = shall_stop, .data = data };
    gp_hold hold;
    int32_t *experts = calloc(n_named + 1, sizeof *experts);
    uint32_t *counts = calloc(n_named + 1, sizeof *counts);
    bool *was_pinned = calloc(n_named + 1, sizeof *was_pinned);
    *failure = (gp_failure) { 0 };
    int error = getpid() != p->pid ? -ECHILD : experts && counts && was_pinned ? gp_hold_open(&hold, p) : -ENOMEM;
    if (error == 0) {
        const uint32_t n_experts = keep_distinct(named, n_named, experts);
        hold.watch = &watch;
        pthread_mutex_lock(&p->lock);
        for (uint32_t i = 0; i < n_experts; i++) {
            const int32_t index = l->slot_of[experts[i]];
            was_pinned[i] = index >= 0 && p->slots[index].is_pinned;
        }
        error = has_room(p, l, experts, n_experts) ? 0 : -ENOSPC;
        pthread_mutex_unlock(&p->lock);
        const gp_demand demand = { .layer = layer, .experts = experts, .counts = counts, .n_experts = n_experts, .n_tokens = 1,
                                   .is_again = true };
        error = error == 0 ? gp_wave_begin(p, &hold, &demand, failure) : error;
        error = error == 0 ? pin_all(p, &hold, layer, was_pinned, failure) : error;
        gp_hold_release(p, &hold);
        gp_hold_close(&hold, p);
    }
    free(was_pinned);
    free(counts);
    free(experts);
    return error;
}

void gp_pager_unpin_all(gp_pager *p) {
    const bool has_entered = gp_pager_enter(p);
    for (uint32_t i = 0; i < p->n_slots; i++) {
        p->slots[i].is_pinned = false;
    }
    gp_pager_leave(p, has_entered);
}
