/* Warm-up: experts that are likely to be wanted come into free slots while nobody waits for reads.
 *
 * There is no thread for it. Whoever finishes the last read in flight sends the next expert after it, or a context that
 * gives its slots back; one at a time, and only if nothing else is being read: so demand and read-ahead go first, and what
 * they find in their way is one expert. */
#include "slots/warm.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

struct gp_warm_up {
    uint32_t  next, n_experts;
    uint32_t  n_submitting;             /* threads that are about to submit such reads: */
    gp_read  *reads[GP_MAX_SLICES];     /* room for one expert's submission */
    gp_expert experts[];
};

/* Slots that a batch takes for the time of a layer stay free: a guess there would be gone with the first prompt. */
static bool has_room(const gp_class *c) {
    return c->n_free > c->n_slots - c->n_layers * c->batch_share;
}

uint32_t gp_warm_up_next(gp_pager *p) {
    gp_warm_up *w = p->warm_up;
    if (!w || p->n_in_flight > 0 || w->next == w->n_experts || atomic_load(&p->is_closing)) {
        return 0;
    }
    while (w->next < w->n_experts) {
        const gp_expert *e = &w->experts[w->next++];
        const gp_layer *l = &p->layers[e->layer];
        if (l->slot_of[e->expert] < 0 && has_room(&p->classes[l->spec.shape_class])) {
            const int32_t index = gp_slot_warm(p, e->layer, e->expert);
            /* Little, so that what is used goes before it, but enough that of two guesses the better one stays longer. More,
             * up to what the policy would have counted in the long run, was replayed and is worse. */
            gp_uses *uses = &p->layers[e->layer].uses[e->expert];
            if (uses->recent == 0) {
                *uses = (gp_uses) { e->share, e->share };
            }
            w->n_submitting++;
            return gp_slot_prepare_reads(p, (uint32_t) index, w->reads, 1);
        }
    }
    return 0;
}

void gp_warm_up_submit(gp_pager *p, uint32_t n_reads) {
    if (n_reads > 0) {
        gp_copies_submit(p->copies, p->warm_up->reads, n_reads);
        pthread_mutex_lock(&p->lock);
        p->warm_up->n_submitting--;
        pthread_cond_broadcast(&p->released);
        pthread_mutex_unlock(&p->lock);
    }
}

bool gp_warm_up_is_submitting(const gp_pager *p) {
    return p->warm_up && p->warm_up->n_submitting > 0;
}

void gp_warm_up_end(gp_pager *p) {
    p->warm_up->next = p->warm_up->n_experts;   /* whoever wants what could not be read hears why, and nobody else */
}

int gp_pager_warm_up(gp_pager *p, const gp_expert *experts, uint32_t n_experts) {
    if (getpid() != p->pid) {
        return -ECHILD;
    }
    for (uint32_t i = 0; i < n_experts; i++) {
        if (experts[i].layer >= p->config.n_layers || experts[i].expert < 0
            || (uint32_t) experts[i].expert >= p->layers[experts[i].layer].spec.n_experts) {
            return -EINVAL;
        }
    }
    gp_warm_up *w = malloc(sizeof *w + n_experts * sizeof *experts);
    if (!w) {
        return -ENOMEM;
    }
    *w = (gp_warm_up) { .n_experts = n_experts };
    for (uint32_t i = 0; i < n_experts; i++) {
        w->experts[i] = experts[i];
    }
    pthread_mutex_lock(&p->lock);
    const bool is_first = !p->warm_up;
    uint32_t n_reads = 0;
    if (is_first) {
        p->warm_up = w;
        n_reads = gp_warm_up_next(p);
    }
    pthread_mutex_unlock(&p->lock);
    gp_warm_up_submit(p, n_reads);
    if (!is_first) {
        free(w);
    }
    return is_first ? 0 : -EALREADY;
}
