/* Pins: experts that no policy may give up, until they are all let go. */
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "slots/slots.h"

int gp_pager_pin(gp_pager *p, uint32_t layer_index, const int32_t *experts, uint32_t n_experts,
                 gp_abort_callback shall_stop, void *data, gp_failure *failure) {
    gp_layer *l = &p->layers[layer_index];
    const gp_class *c = &p->classes[l->spec.shape_class];
    gp_watch watch = { .os = p->os, .ask = shall_stop, .data = data };
    gp_hold hold;
    int32_t *slots = malloc(n_experts * sizeof *slots);
    uint32_t *counts = calloc(n_experts, sizeof *counts);
    *failure = (gp_failure) { 0 };
    int error = getpid() != p->pid ? -ECHILD : slots && counts ? gp_hold_open(&hold, p, 0) : -ENOMEM;
    if (error != 0) {
        goto fail;
    }
    hold.watch = &watch;
    pthread_mutex_lock(&p->lock);
    uint32_t n_pinned = 0;
    for (uint32_t i = c->first; i < c->first + c->n_slots; i++) {
        n_pinned += p->slots[i].is_pinned;
    }
    for (uint32_t i = 0; i < n_experts; i++) {      /* those that are pinned already take no more */
        const int32_t index = l->slot_of[experts[i]];
        n_pinned += index < 0 || !p->slots[index].is_pinned;
    }
    uint32_t n_needed = l->spec.n_used;
    for (uint32_t i = 0; i < GP_MAX_TAPS; i++) {
        if (p->holds[i] && p->holds[i]->n_needed > n_needed) {
            n_needed = p->holds[i]->n_needed;
        }
    }
    if (n_needed > l->spec.n_experts) {
        n_needed = l->spec.n_experts;
    }
    if (n_pinned + n_needed > c->n_slots) {
        error = -ENOSPC;
    }
    pthread_mutex_unlock(&p->lock);
    if (error == 0) {
        const gp_demand demand = { .layer = layer_index, .experts = experts, .counts = counts,
                                   .n_experts = n_experts, .n_tokens = 1, .is_again = true };
        error = gp_pager_acquire(p, &hold, &demand, slots, failure);
    }
    if (error == 0) {
        pthread_mutex_lock(&p->lock);
        for (uint32_t i = 0; i < n_experts; i++) {
            p->slots[c->first + (uint32_t) slots[i]].is_pinned = true;
        }
        pthread_mutex_unlock(&p->lock);
    }
    gp_hold_close(&hold, p);
fail:
    free(counts);
    free(slots);
    return error;
}

void gp_pager_unpin_all(gp_pager *p) {
    const bool has_entered = gp_pager_enter(p);
    for (uint32_t i = 0; i < p->n_slots; i++) {
        p->slots[i].is_pinned = false;
    }
    gp_pager_leave(p, has_entered);
}
