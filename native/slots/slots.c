/* Slots: which expert lies where, who computes with it, what is being read.
 *
 *              choose_victim                 last slice read
 *     FREE  ---------------->  READING  ------------------>  READY
 *       ^                      |     | a slice failed          | choose_victim
 *       |   last slice read    v     |                         |
 *       +------------------ LEAVING  |                         |
 *       +----------------------------+-------------------------+
 *
 * Invariants
 *   1. layer.slot_of[expert] == s  exactly if  slot s is READING or READY and holds that expert of that layer.
 *   2. A slot whose mask of users is not empty, that is pinned, or that is READING or LEAVING is never chosen as a victim.
 *   3. pager.missing of a slot is not 0 exactly if it is READING, or LEAVING with reads that are still on their way.
 *   4. layer.resident is the number of slots READING or READY for it; layer.kept those of them that are neither transient
 *      nor warmed. pager.n_in_flight is the number of slots that are READING or LEAVING.
 *   5. A slot may be READING for nobody: read ahead, warmed up, or let go by a decode that has stopped (watch.h). It becomes
 *      READY all the same, or FREE if it could not be read.
 *   6. The lock is held for arithmetic only: never across a read, never together with the lock of fetch or of copies.
 */
#include "slots/slots.h"

#include <assert.h>
#include <errno.h>

/* ---- worth and victims ------------------------------------------------------------------------------------------ */

static double worth(const gp_pager *p, const gp_slot *s, const gp_layer *for_layer) {
    const gp_layer *own = &p->layers[s->layer];
    const uint32_t n_layers = p->classes[own->spec.shape_class].n_layers;
    const uint32_t away = (own->rank + n_layers - for_layer->rank) % n_layers;
    const gp_use use = {
        .uses = own->uses[s->expert],
        .age = own->counters.tokens - own->last_token[s->expert],
        .away = away ? away : n_layers,
        .n_layers = n_layers,
    };
    return p->policy->worth(&use);
}

static int32_t find_free(const gp_pager *p, const gp_class *c) {
    for (uint32_t i = c->first; c->n_free > 0 && i < c->first + c->n_slots; i++) {
        if (p->slots[i].state == FREE) {
            return (int32_t) i;
        }
    }
    return -1;
}

typedef enum { ALL, TRANSIENT, TRANSIENT_OF_OTHERS } choice;

/* Invariant 2 lives here. Returns the slot of least worth, or -1. */
static int32_t find_least(const gp_pager *p, const gp_class *c, const gp_layer *for_layer, choice among) {
    int32_t best = -1;
    double least = 0;
    for (uint32_t i = c->first; i < c->first + c->n_slots; i++) {
        const gp_slot *s = &p->slots[i];
        if (s->state != READY || s->users || s->is_pinned || s->foretold_for || (among != ALL && !s->is_transient)) {
            continue;
        }
        const gp_layer *own = &p->layers[s->layer];
        if (among == TRANSIENT_OF_OTHERS && own == for_layer) {
            continue;
        }
        if (!s->is_transient && !s->is_warmed && own != for_layer && own->kept <= c->floor) {
            continue;
        }
        const double value = worth(p, s, for_layer);
        if (best < 0 || value < least) {
            best = (int32_t) i;
            least = value;
        }
    }
    return best;
}

/* The last resort: the floor is a promise between layers, and what was foretold a guess: no reasons to stop. */
static int32_t find_any(const gp_pager *p, const gp_class *c) {
    for (uint32_t i = c->first; i < c->first + c->n_slots; i++) {
        const gp_slot *s = &p->slots[i];
        if (s->state == READY && !s->users && !s->is_pinned) {
            return (int32_t) i;
        }
    }
    return -1;
}

int32_t gp_slot_choose(const gp_pager *p, const gp_layer *for_layer, bool is_transient, bool must_go_on) {
    const gp_class *c = &p->classes[for_layer->spec.shape_class];
    const bool may_be_more = !is_transient || must_go_on || c->n_transient < c->transient_limit;
    int32_t victim = find_free(p, c);
    if (victim < 0 && c->n_transient > 0) {
        victim = find_least(p, c, for_layer, TRANSIENT);
    }
    if (victim < 0 && may_be_more) {
        victim = find_least(p, c, for_layer, ALL);
    }
    return victim < 0 && (!is_transient || must_go_on) ? find_any(p, c) : victim;
}

int32_t gp_slot_choose_spare(const gp_pager *p, const gp_layer *for_layer) {
    const gp_class *c = &p->classes[for_layer->spec.shape_class];
    const int32_t victim = find_free(p, c);
    /* The layer's own are wanted as much as the one that would take their place. */
    return victim < 0 ? find_least(p, c, for_layer, TRANSIENT_OF_OTHERS) : victim;
}

int32_t gp_slot_choose_foretold(const gp_pager *p, const gp_layer *for_layer) {
    const gp_class *c = &p->classes[for_layer->spec.shape_class];
    int32_t victim = find_free(p, c);
    if (victim < 0 && c->n_transient > 0) {
        victim = find_least(p, c, for_layer, TRANSIENT);
    }
    return victim < 0 ? find_least(p, c, for_layer, ALL) : victim;
}

/* ---- states of a slot ------------------------------------------------------------------------------------------- */

void gp_slot_want(gp_slot *s) {
    s->ahead_for = s->ahead_bytes = 0;
}

void gp_slot_keep(gp_pager *p, gp_slot *s) {
    if (s->is_transient) {
        s->is_transient = false;
        p->classes[p->layers[s->layer].spec.shape_class].n_transient--;
        p->layers[s->layer].kept++;
    } else if (s->is_warmed) {
        s->is_warmed = false;
        p->layers[s->layer].kept++;
    }
}

static void forget_expert(gp_pager *p, const gp_slot *s) {
    gp_layer *own = &p->layers[s->layer];
    own->slot_of[s->expert] = -1;
    own->counters.resident--;
    if (s->is_transient) {
        p->classes[own->spec.shape_class].n_transient--;
    } else if (!s->is_warmed) {
        own->kept--;
    }
}

void gp_slot_empty(gp_pager *p, gp_slot *s) {
    assert(s->state != FREE && !s->users);
    if (s->state != LEAVING) {
        forget_expert(p, s);
    }
    p->layers[s->layer].counters.bytes_wasted += s->ahead_bytes;
    p->classes[p->layers[s->layer].spec.shape_class].n_free++;
    p->n_in_flight -= s->state == LEAVING;
    *s = (gp_slot) { .state = FREE };
}

void gp_slot_let_go(gp_pager *p, gp_slot *s) {
    assert(s->state == READING && !s->users && !s->is_pinned);
    forget_expert(p, s);
    s->state = LEAVING;
    s->is_transient = false;
}

uint32_t gp_slot_withdraw(gp_pager *p, uint32_t index, gp_read **reads) {
    gp_slot *s = &p->slots[index];
    gp_slot_let_go(p, s);
    s->is_withdrawing = true;
    const uint32_t n_slices = p->layers[s->layer].spec.n_slices;
    for (uint32_t i = 0; i < n_slices; i++) {
        reads[i] = &p->reads[index * GP_MAX_SLICES + i];
    }
    return n_slices;
}

void gp_slot_assign(gp_pager *p, uint32_t index, uint32_t layer_index, int32_t expert, bool is_transient) {
    gp_slot *s = &p->slots[index];
    gp_layer *own = &p->layers[layer_index];
    gp_class *c = &p->classes[own->spec.shape_class];
    if (s->state != FREE) {
        p->layers[s->layer].counters.evictions++;
        gp_slot_empty(p, s);
    }
    c->n_free--;
    p->n_in_flight++;
    *s = (gp_slot) { .state = READING, .layer = layer_index, .expert = expert, .is_transient = is_transient };
    atomic_store(&p->missing[index], (uint8_t) ((1u << own->spec.n_slices) - 1));
    own->slot_of[expert] = (int32_t) index;
    own->counters.resident++;
    if (is_transient) {
        c->n_transient++;
    } else {
        own->kept++;
    }
}

int32_t gp_slot_warm(gp_pager *p, uint32_t layer_index, int32_t expert) {
    gp_layer *own = &p->layers[layer_index];
    const int32_t index = find_free(p, &p->classes[own->spec.shape_class]);
    if (index >= 0) {
        gp_slot_assign(p, (uint32_t) index, layer_index, expert, false);
        p->slots[index].is_warmed = true;
        own->kept--;
    }
    return index;
}

bool gp_slot_take_slice(gp_pager *p, const gp_read *read, int error) {
    gp_slot *s = &p->slots[read->tag];
    bool is_lost_guess = false;
    if (error == 0) {
        p->layers[s->layer].counters.bytes_read += read->bytes;
        s->ahead_bytes += s->ahead_for ? read->bytes : 0;
    } else {
        s->has_failed = true;
    }
    const uint32_t slice = (uint32_t) (read - &p->reads[read->tag * GP_MAX_SLICES]);
    const uint64_t users = s->users;
    const bool is_whole = (uint8_t) (atomic_fetch_and(&p->missing[read->tag], (uint8_t) ~(1u << slice)) & ~(1u << slice)) == 0;
    for (uint32_t bit = 0; bit < GP_MAX_TAPS && users >> bit; bit++) {
        if (users >> bit & 1) {
            gp_hold *hold = p->holds[bit];
            hold->n_pending -= is_whole;
            if (error != 0) {
                const gp_failure failure = gp_slot_failure(p, read->tag);
                gp_hold_fail(hold, &failure);
            }
            gp_hold_tell(hold);
        }
    }
    if (is_whole && s->state == LEAVING) {
        if (!s->is_withdrawing) {
            gp_slot_empty(p, s);
            pthread_cond_broadcast(&p->released);
        }
    } else if (is_whole) {
        s->state = READY;
        p->n_in_flight--;
        is_lost_guess = s->has_failed && s->is_warmed;
        if (s->has_failed && !users) {
            gp_slot_empty(p, s);    /* read-ahead: whoever wants it next reads again and hears of it */
        }
        pthread_cond_broadcast(&p->released);
    }
    return is_lost_guess;
}

void gp_hold_tell(gp_hold *hold) {
    atomic_fetch_add(&hold->n_arrived, 1);
    if (hold->n_watching > 0) {
        pthread_cond_broadcast(&hold->arrived);
    }
}

void gp_hold_fail(gp_hold *hold, const gp_failure *failure) {
    if (hold->failure.error == 0) {
        hold->failure = *failure;
    }
    atomic_store(&hold->has_failed, true);
    gp_hold_tell(hold);
}

gp_failure gp_slot_failure(const gp_pager *p, uint32_t index) {
    const gp_layer_spec *spec = &p->layers[p->slots[index].layer].spec;
    for (uint32_t i = 0; i < spec->n_slices; i++) {
        gp_read *read = &p->reads[index * GP_MAX_SLICES + i];
        const int error = atomic_load(&read->error);
        if (error != 0) {
            return (gp_failure) { error, read->file, atomic_load(&read->error_offset) };
        }
    }
    return (gp_failure) { -ESTALE, p->changed_file, spec->slices[0].offset_bytes };
}

char *gp_slot_slice(const gp_pager *p, uint32_t index, uint32_t slice) {
    const gp_layer_spec *spec = &p->layers[p->slots[index].layer].spec;
    const gp_class *c = &p->classes[spec->shape_class];
    return c->slots + (uint64_t) (index - c->first) * c->stride_bytes + spec->slices[slice].data_at;
}

uint32_t gp_slot_prepare_reads(gp_pager *p, uint32_t index, gp_read **reads, uint32_t step) {
    const gp_slot *s = &p->slots[index];
    const gp_layer_spec *spec = &p->layers[s->layer].spec;
    const gp_class *c = &p->classes[spec->shape_class];
    char *base = c->slots + (uint64_t) (index - c->first) * c->stride_bytes;
    for (uint32_t i = 0; i < spec->n_slices; i++) {
        const gp_slice_spec *slice = &spec->slices[i];
        gp_read *read = &p->reads[index * GP_MAX_SLICES + i];
        read->file = slice->file;
        read->offset_bytes = slice->offset_bytes + (uint64_t) s->expert * slice->slice_bytes;
        read->bytes = slice->slice_bytes;
        read->into = base + slice->data_at;
        read->region = base + slice->region_at;
        read->region_bytes = slice->region_bytes;
        read->done = p->slice_arrived;
        read->owner = p;
        read->tag = index;
        read->is_ahead = s->foretold_for != 0;      /* what a batch reads ahead is a stream, with nothing else to be read meanwhile */
        reads[i * step] = read;
    }
    return spec->n_slices;
}
