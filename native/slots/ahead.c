/* Read-ahead: while a batch computes one layer, experts of the next are read that it will probably want, the most used
 * first. Once the batch's own choice is known, those that it does not want and that nobody has begun to read are let go.
 *
 * It costs reads in vain, and no time: the device would have been idle, and what is in flight when the choice is known is
 * a few pieces. Only slots whose loss costs nothing are taken for it.
 */
#include "slots/ahead.h"

#include <errno.h>
#include <stdlib.h>

/* How probable it must be that an expert is wanted. Measured on the Qwen3 shape at 25 % resident (benchmarks/LOG.md,
 * 2026-11-24): with 0.2 a batch of 8 tokens became slower, with 0.45 batches of 16 and 32 gained nothing; 64 and more
 * gain the same with all three. */
static const float LEAST_CHANCE = 0.3f;

static int by_uses(const void *left, const void *right) {
    const gp_guess *a = left, *b = right;
    return a->uses != b->uses ? (a->uses < b->uses) - (a->uses > b->uses) : (a->expert > b->expert) - (a->expert < b->expert);
}

static double uses_of(const gp_layer *l, uint32_t expert) {
    return gp_uses_lasting(&l->uses[expert], l->counters.tokens - l->last_token[expert]);
}

/* Which experts of a layer that are not in slots will be wanted, if the batch wants this share of them: the share, by how
 * much more or less than others each was used so far. Everybody is given one use more than he had, so that nothing is
 * concluded from a few tokens. */
static uint32_t guess(gp_pager *p, const gp_layer *l, float share) {
    uint32_t n = 0;
    double mean = 1;
    for (uint32_t e = 0; e < l->spec.n_experts; e++) {
        mean += uses_of(l, e) / l->spec.n_experts;
    }
    for (uint32_t e = 0; e < l->spec.n_experts; e++) {
        const double uses = uses_of(l, e);
        if (l->slot_of[e] < 0 && share * (uses + 1) / mean >= LEAST_CHANCE) {
            p->guesses[n++] = (gp_guess) { (float) uses, (int32_t) e };
        }
    }
    qsort(p->guesses, n, sizeof *p->guesses, by_uses);
    return n;
}

uint32_t gp_ahead_plan(gp_pager *p, const gp_hold *hold, const gp_demand *demand) {
    const uint32_t next = demand->layer + 1;
    if (!p->config.read_ahead || p->is_reading_ahead || next >= p->config.n_layers) {
        return 0;
    }
    uint32_t n_reads = 0;
    const float share = (float) demand->n_experts / (float) p->layers[demand->layer].spec.n_experts;
    const uint32_t n_guesses = guess(p, &p->layers[next], share);
    for (uint32_t i = 0; i < n_guesses; i++) {
        const int32_t victim = gp_slot_choose_spare(p, &p->layers[next]);
        if (victim < 0) {
            break;
        }
        gp_slot_assign(p, (uint32_t) victim, next, p->guesses[i].expert, true);
        p->slots[victim].ahead_for = UINT64_C(1) << hold->bit;
        n_reads += gp_slot_prepare_reads(p, (uint32_t) victim, p->ahead_reads + n_reads, 1);
    }
    p->is_reading_ahead = n_reads > 0;
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
        if (s->state == READING && s->ahead_for >> hold->bit & 1 && !s->users) {
            n_reads += gp_slot_withdraw(p, index, reads + n_reads);
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
            if (s->missing == 0) {
                gp_slot_empty(p, s);
                is_any_free = true;
            }
        }
    }
    if (is_any_free) {
        pthread_cond_broadcast(&p->released);
    }
}
