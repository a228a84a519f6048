/* Read-ahead: while a batch computes one layer, experts of the next are read that it will probably want. What the context's
 * batch before chose there is the best guess; above some share of a layer it is all of it.
 *
 * It costs reads in vain, which are counted, and no time: nothing of the layer at hand is left to be read, and what is in
 * flight when the batch's own choice is known is a few pieces. Only slots whose loss costs nothing are taken for it.
 */
#include "slots/ahead.h"

#include <stdlib.h>

/* From this share of a layer on all of it is read. */
static const float WHOLE_SHARE = 0.6f;

static int by_uses(const void *left, const void *right) {
    const gp_guess *a = left, *b = right;
    return a->uses != b->uses ? (a->uses < b->uses) - (a->uses > b->uses) : (a->expert > b->expert) - (a->expert < b->expert);
}

/* Which experts of the next layer will be wanted, most wanted first, into p->guesses. */
static uint32_t guess(gp_pager *p, const gp_hold *hold, uint32_t next) {
    const uint32_t *routed = hold->routed[next];
    const uint32_t n_experts = p->layers[next].spec.n_experts;
    uint32_t n_routed = 0, n = 0;
    for (uint32_t e = 0; e < n_experts; e++) {
        n_routed += routed[e] > 0;
    }
    /* Of a first batch nothing is known but what it has just chosen elsewhere. */
    const float share = n_routed > 0 ? (float) n_routed / (float) n_experts
                                     : (float) hold->n_wanted / (float) p->layers[hold->layer].spec.n_experts;
    for (uint32_t e = 0; e < n_experts; e++) {
        if (p->layers[next].slot_of[e] < 0 && (routed[e] > 0 || share >= WHOLE_SHARE)) {
            p->guesses[n++] = (gp_guess) { (float) routed[e], (int32_t) e };
        }
    }
    qsort(p->guesses, n, sizeof *p->guesses, by_uses);
    return n;
}

void gp_ahead_plan(gp_pager *p, gp_hold *hold) {
    const uint32_t next = hold->layer + 1;
    hold->n_ahead = hold->next_ahead = 0;
    if (!p->config.read_ahead || next >= p->config.n_layers) {
        return;
    }
    hold->ahead_layer = next;
    hold->n_ahead = guess(p, hold, next);
    for (uint32_t i = 0; i < hold->n_ahead; i++) {
        hold->ahead[i] = p->guesses[i].expert;
    }
}

uint32_t gp_ahead_take(gp_pager *p, gp_hold *hold, gp_read **reads, uint32_t most_experts) {
    const gp_layer *l = &p->layers[hold->ahead_layer];
    uint32_t n_reads = 0;
    for (uint32_t n = 0; hold->next_ahead < hold->n_ahead && n < most_experts;) {
        const int32_t expert = hold->ahead[hold->next_ahead];
        if (l->slot_of[expert] >= 0) {      /* another context has read it meanwhile */
            hold->next_ahead++;
            continue;
        }
        const int32_t index = gp_slot_choose_spare(p, l);
        if (index < 0) {
            break;
        }
        gp_slot_assign(p, (uint32_t) index, hold->ahead_layer, expert, true);
        p->slots[index].ahead_for = UINT64_C(1) << hold->bit;
        n_reads += gp_slot_prepare_reads(p, (uint32_t) index, reads + n_reads, 1);
        hold->next_ahead++;
        n++;
    }
    return n_reads;
}

uint32_t gp_ahead_drop(gp_pager *p, const gp_hold *hold, uint32_t layer_index, gp_read **reads) {
    const gp_layer *l = &p->layers[layer_index];
    uint32_t n_reads = 0;
    for (uint32_t e = 0; e < l->spec.n_experts; e++) {
        if (l->slot_of[e] < 0) {
            continue;
        }
        const uint32_t index = (uint32_t) l->slot_of[e];
        const gp_slot *s = &p->slots[index];
        const bool is_others = (s->foretold_for & ~(UINT64_C(1) << hold->bit)) != 0;
        if (s->state == READING && s->ahead_for >> hold->bit & 1 && !s->users && !is_others) {
            n_reads += gp_slot_withdraw(p, index, reads + n_reads);
        }
    }
    return n_reads;
}

uint32_t gp_ahead_wanted(gp_pager *p, const gp_hold *hold, const gp_demand *demand, gp_read **reads) {
    const gp_layer *l = &p->layers[demand->layer];
    uint32_t n_reads = 0;
    for (uint32_t i = 0; i < demand->n_experts; i++) {
        const int32_t index = l->slot_of[demand->experts[i]];
        gp_read *first = index >= 0 ? &p->reads[(uint32_t) index * GP_MAX_SLICES] : NULL;
        if (first && p->slots[index].state == READING && p->slots[index].ahead_for >> hold->bit & 1 && first->is_ahead) {
            for (uint32_t s = 0; s < l->spec.n_slices; s++) {
                reads[n_reads++] = first + s;
            }
        }
    }
    return n_reads;
}

void gp_ahead_withdrawn(gp_pager *p, gp_read *const *reads, uint32_t n_reads) {
    bool is_any_free = false;
    for (uint32_t i = 0; i < n_reads; i++) {
        gp_slot *s = &p->slots[reads[i]->tag];
        if (s->is_withdrawing) {
            s->is_withdrawing = false;
            if (p->missing[reads[i]->tag] == 0) {
                gp_slot_empty(p, s);
                is_any_free = true;
            }
        }
    }
    if (is_any_free) {
        pthread_cond_broadcast(&p->released);
    }
}
