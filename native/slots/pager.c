/* Serving contexts: experts wanted become slots held, misses become reads waited for. The states of a slot and the
 * invariants are at the head of slots.c. */
#include "slots/pager.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "slots/ahead.h"
#include "slots/slots.h"
#include "slots/waits.h"
#include "slots/warm.h"

enum { BUSY_WAIT_SECONDS = 2 };         /* a context gives its slots back within one layer's compute */

bool gp_pager_enter(gp_pager *p) {
    return getpid() == p->pid && pthread_mutex_lock(&p->lock) == 0;
}

void gp_pager_leave(gp_pager *p, bool has_entered) {
    if (has_entered) {
        pthread_mutex_unlock(&p->lock);
    }
}

/* ---- acquire and release ---------------------------------------------------------------------------------------- */

static void count_pending(gp_hold *hold, const gp_slot *s, uint32_t by) {
    hold->pending += s->missing ? by : 0;
    for (uint32_t i = 0; i < GP_MAX_SLICES; i++) {
        hold->pending_slices[i] += s->missing >> i & 1 ? by : 0;
    }
}

static void hold_slot(gp_hold *hold, gp_slot *s, uint32_t index) {
    const uint64_t mine = UINT64_C(1) << hold->bit;
    if (!(s->users & mine)) {
        s->users |= mine;
        hold->slots[hold->n_slots++] = index;
        count_pending(hold, s, 1);
    }
}

static void release_from(gp_pager *p, gp_hold *hold, uint32_t first) {
    for (uint32_t i = first; i < hold->n_slots; i++) {
        gp_slot *s = &p->slots[hold->slots[i]];
        s->users &= ~(UINT64_C(1) << hold->bit);
        count_pending(hold, s, (uint32_t) -1);
        if (s->has_failed && s->state == READY && !s->users) {
            gp_slot_empty(p, s);
        }
    }
    hold->n_slots = first;
}

static void release_and_tell(gp_pager *p, gp_hold *hold, uint32_t first) {
    release_from(p, hold, first);
    pthread_cond_broadcast(&p->released);
}

static void count_use(gp_layer *l, const gp_demand *demand) {
    l->counters.visits++;
    l->counters.tokens += demand->n_tokens;
    const gp_uses each = gp_uses_in_batch(demand->n_tokens);
    for (uint32_t i = 0; i < demand->n_experts; i++) {
        const int32_t e = demand->experts[i];
        gp_uses_add(&l->uses[e], l->counters.tokens - l->last_token[e], demand->counts[i], &each);
        l->chosen[e] += demand->counts[i];
        l->last_token[e] = l->counters.tokens;
    }
}

/* Whether this expert of a large batch may stay: the layer's most used ones, as long as there is room beside the
 * transient slots; the rest is transient. */
static bool is_worth_keeping(const gp_layer *l, const gp_class *c, const gp_demand *demand, uint32_t i) {
    if (l->kept >= c->batch_share) {
        return false;
    }
    uint32_t better = 0;
    for (uint32_t j = 0; j < demand->n_experts; j++) {
        better += demand->counts[j] > demand->counts[i];
    }
    return better < c->batch_share;
}

/* Slots that could be given up now. */
static uint32_t count_takeable(const gp_pager *p, const gp_class *c) {
    uint32_t n = 0;
    for (uint32_t i = c->first; i < c->first + c->n_slots; i++) {
        const gp_slot *s = &p->slots[i];
        n += s->state == FREE || (s->state == READY && !s->users && !s->is_pinned);
    }
    return n;
}

/* Takes slots for all misses. Returns the number of reads, or -EBUSY with nothing taken and nobody evicted. */
static int take_slots(gp_pager *p, gp_hold *hold, const gp_demand *demand, uint32_t *n_missed) {
    gp_layer *l = &p->layers[demand->layer];
    const gp_class *c = &p->classes[l->spec.shape_class];
    const bool is_batch = demand->n_experts > c->share && demand->n_tokens > 1;
    const uint32_t first_held = hold->n_slots;
    uint32_t n_reads = 0, n_wanted = 0;
    *n_missed = 0;
    for (uint32_t i = 0; i < demand->n_experts; i++) {      /* hits first: our own misses must not push them out */
        const int32_t index = l->slot_of[demand->experts[i]];
        if (index >= 0) {
            gp_slot *s = &p->slots[index];
            *n_missed += s->state == READING;
            hold_slot(hold, s, (uint32_t) index);
            if (!is_batch || ((s->is_transient || s->is_warmed) && is_worth_keeping(l, c, demand, i))) {
                gp_slot_keep(p, s);     /* read ahead for this batch, left over from an earlier one, or guessed right */
            }
        } else {
            n_wanted++;
        }
    }
    if (n_wanted > c->n_free && n_wanted > count_takeable(p, c)) {
        release_from(p, hold, first_held);
        return -EBUSY;
    }
    const uint32_t first_taken = hold->n_slots;
    for (uint32_t i = 0; i < demand->n_experts; i++) {
        if (l->slot_of[demand->experts[i]] >= 0) {
            continue;
        }
        const bool is_transient = is_batch && !is_worth_keeping(l, c, demand, i);
        const int32_t victim = gp_slot_choose(p, l, is_transient);
        assert(victim >= 0);    /* they were counted */
        gp_slot_assign(p, (uint32_t) victim, demand->layer, demand->experts[i], is_transient);
        hold_slot(hold, &p->slots[victim], (uint32_t) victim);
        (*n_missed)++;
    }
    /* In the order in which they are computed with: the first slice of all, then the second, unless the batch is computed an
     * expert at a time. */
    const uint32_t n_taken = hold->n_slots - first_taken;
    for (uint32_t i = 0; i < n_taken; i++) {
        const bool is_whole = demand->n_tokens > 1 && demand->later == ~0u;
        gp_read **const at = hold->reads + (is_whole ? n_reads : i);
        n_reads += gp_slot_prepare_reads(p, hold->slots[first_taken + i], at, is_whole ? 1 : n_taken);
    }
    return (int) n_reads;
}

/* The files, in every copy, must still be those whose header was read. */
static int check_files(gp_pager *p, const gp_layer_spec *spec, gp_failure *failure, bool *is_touched) {
    uint64_t checked = UINT64_MAX;
    for (uint32_t i = 0; i < spec->n_slices; i++) {
        const uint32_t file = spec->slices[i].file;
        if (file == checked) {
            continue;
        }
        checked = file;
        bool is_other = false;
        uint32_t changed_file;
        const int error = gp_copies_check(p->copies, file, &changed_file, &is_other);
        if (is_other) {
            *failure = (gp_failure) { error, changed_file, spec->slices[i].offset_bytes };
        }
        *is_touched |= is_other;
        if (error != 0) {
            return error;
        }
    }
    return 0;
}

/* Of a file that was touched: what came into this hold's new slots, slice by slice. Nobody gives up slots that are held, and
 * only this thread changes what is held. */
static int compare_new_slots(gp_pager *p, const gp_hold *hold, uint32_t first, const gp_layer_spec *spec) {
    for (uint32_t i = first; p->compare && i < hold->n_slots; i++) {
        const uint32_t index = hold->slots[i];
        pthread_mutex_lock(&p->lock);
        const bool is_checked = p->slots[index].is_checked;     /* by another context that waited for it */
        const uint64_t expert = (uint64_t) p->slots[index].expert;
        pthread_mutex_unlock(&p->lock);
        for (uint32_t s = 0; s < spec->n_slices && !is_checked; s++) {
            const gp_slice_spec *slice = &spec->slices[s];
            const int got = p->compare(p->compare_data, slice->file, slice->offset_bytes + expert * slice->slice_bytes,
                                       gp_slot_slice(p, index, s), slice->slice_bytes);
            if (got != GP_SAME) {
                return got < 0 && got > -4096 ? got : -EINTR;
            }
        }
    }
    return p->compare ? 0 : -ESTALE;
}

/* Whether a slot of the class may come free without this hold's doing. */
static bool is_worth_waiting(const gp_pager *p, const gp_class *c, const gp_hold *hold) {
    for (uint32_t i = c->first; i < c->first + c->n_slots; i++) {
        if (p->slots[i].state == READING || p->slots[i].state == LEAVING || p->slots[i].users & ~(UINT64_C(1) << hold->bit)) {
            return true;
        }
    }
    return false;
}

/* Looks at the files once the reads are done, so that no change during them is missed, for slots that nobody has done
 * it for: our misses, reads of others that we joined, read-ahead. Unlocks meanwhile; we hold the slots. */
static int check_new_slots(gp_pager *p, const gp_hold *hold, uint32_t first, const gp_layer_spec *spec,
                           gp_failure *failure) {
    bool is_checked = true;
    for (uint32_t i = first; i < hold->n_slots; i++) {
        is_checked &= p->slots[hold->slots[i]].is_checked;
    }
    if (is_checked) {
        return 0;
    }
    pthread_mutex_unlock(&p->lock);
    bool is_touched = false;
    int error = check_files(p, spec, failure, &is_touched);
    if (error == 0 && is_touched) {
        failure->error = error = compare_new_slots(p, hold, first, spec);
    }
    pthread_mutex_lock(&p->lock);
    /* Who was interrupted has found nothing out: whoever holds the slots as well asks himself. */
    const bool is_bad = error != 0 && error != -EINTR;
    p->changed_file = is_bad ? failure->file : p->changed_file;
    for (uint32_t i = first; i < hold->n_slots; i++) {
        gp_slot *s = &p->slots[hold->slots[i]];
        s->has_failed |= is_bad && !s->is_checked;
        s->is_checked |= error == 0;
    }
    return error;
}

/* Gives back what was taken, once nothing of it is being read: a slot that has failed is emptied then, and whoever wants
 * its expert next reads anew. Of a decode that has stopped it is given back as it is: nobody's, and READING until it is read. */
static void give_up(gp_pager *p, gp_hold *hold, uint32_t first) {
    (void) gp_hold_wait(p, hold, GP_ALL_SLICES);
    release_and_tell(p, hold, first);
}

void gp_pager_compare_with(gp_pager *p, gp_compare compare, void *data) {
    p->compare = compare;
    p->compare_data = data;
    gp_tables_compare_with(p->tables, compare, data);
}

int gp_pager_accept(gp_pager *p, const gp_file_times *times) {
    if (getpid() != p->pid) {
        return -ECHILD;
    }
    pthread_mutex_lock(&p->lock);
    for (uint32_t i = 0; i < p->n_slots; i++) {
        gp_slot *s = &p->slots[i];
        if (s->is_checked || s->users) {    /* the context that uses it looks itself */
            continue;
        }
        if (s->state == READY && !s->is_pinned) {
            gp_slot_empty(p, s);
        } else if (s->state == READING) {
            s->has_failed = true;           /* it may have begun before */
        }
    }
    pthread_cond_broadcast(&p->released);
    pthread_mutex_unlock(&p->lock);
    return gp_copies_accept(p->copies, times);
}

static int find_failed(const gp_pager *p, const gp_hold *hold, uint32_t first, gp_failure *failure) {
    for (uint32_t i = first; i < hold->n_slots; i++) {
        if (p->slots[hold->slots[i]].has_failed) {
            *failure = gp_slot_failure(p, hold->slots[i]);
            return failure->error;
        }
    }
    return 0;
}

/* After a wait: why what was waited for is of no use, if it is not. */
static int find_fault(gp_pager *p, const gp_hold *hold, uint32_t first, const gp_layer_spec *spec, gp_failure *failure) {
    if (gp_hold_has_stopped(hold)) {
        *failure = (gp_failure) { .error = -EINTR };
        return -EINTR;
    }
    const int error = hold->pending ? 0 : check_new_slots(p, hold, first, spec, failure);
    return error == 0 ? find_failed(p, hold, first, failure) : error;
}

void gp_pager_release(gp_pager *p, gp_hold *hold) {
    if (hold->n_slots == 0 || !gp_pager_enter(p)) {     /* only this thread changes n_slots */
        return;
    }
    gp_failure failure;
    if (find_failed(p, hold, 0, &failure) != 0) {
        give_up(p, hold, 0);
    } else {
        release_and_tell(p, hold, 0);
    }
    const uint32_t n_next = gp_warm_up_next(p);     /* the last reads may have been withdrawn, so that none was finished */
    pthread_mutex_unlock(&p->lock);
    gp_warm_up_submit(p, n_next);
}

int gp_pager_wait(gp_pager *p, gp_hold *hold, uint32_t layer_index, uint32_t slices, gp_failure *failure) {
    gp_layer *l = &p->layers[layer_index];
    *failure = (gp_failure) { 0 };
    pthread_mutex_lock(&p->lock);
    if (gp_hold_is_pending(hold, slices)) {
        const gp_stall begun = gp_stall_begin(p);
        (void) gp_hold_wait(p, hold, slices);
        gp_stall_end(p, l, &begun);
    }
    const int error = find_fault(p, hold, 0, &l->spec, failure);
    pthread_mutex_unlock(&p->lock);
    return error;
}

int gp_pager_acquire(gp_pager *p, gp_hold *hold, const gp_demand *demand, int32_t *slots, gp_failure *failure) {
    gp_layer *l = &p->layers[demand->layer];
    *failure = (gp_failure) { 0 };
    if (getpid() != p->pid) {
        *failure = (gp_failure) { .error = -ECHILD };
        return -ECHILD;
    }
    pthread_mutex_lock(&p->lock);
    if (!demand->is_again) {
        count_use(l, demand);
    }
    const uint32_t first_held = hold->n_slots;
    const uint64_t begun_ns = p->os->now_ns();
    uint32_t n_missed;
    int n_reads;
    while ((n_reads = take_slots(p, hold, demand, &n_missed)) == -EBUSY) {
        if (!is_worth_waiting(p, &p->classes[l->spec.shape_class], hold)
            || p->os->now_ns() - begun_ns >= BUSY_WAIT_SECONDS * UINT64_C(1000000000)) {
            pthread_mutex_unlock(&p->lock);
            return -EBUSY;
        }
        if (!gp_hold_wait_for_others(p, hold)) {
            pthread_mutex_unlock(&p->lock);
            *failure = (gp_failure) { .error = -EINTR };
            return -EINTR;
        }
    }
    if (!demand->is_again) {
        l->counters.hits += demand->n_experts - n_missed;
        l->counters.misses += n_missed;
    }
    const bool is_stalled = hold->pending > 0;
    const gp_stall begun = is_stalled ? gp_stall_begin(p) : (gp_stall) { 0 };
    /* What was read ahead in vain makes way first: the new reads come after all that are in the list. */
    gp_read **const unwanted = hold->reads + n_reads;
    const uint32_t n_unwanted = demand->is_again ? 0 : gp_ahead_drop(p, hold, demand->layer, unwanted);
    if (n_reads > 0 || n_unwanted > 0) {
        pthread_mutex_unlock(&p->lock);
        if (n_unwanted > 0) {
            gp_copies_withdraw(p->copies, unwanted, n_unwanted);
        }
        gp_copies_submit(p->copies, hold->reads, (uint32_t) n_reads);
        pthread_mutex_lock(&p->lock);
        gp_ahead_withdrawn(p, unwanted, n_unwanted);
    }
    if (is_stalled) {
        (void) gp_hold_wait(p, hold, GP_ALL_SLICES & ~demand->later);
        gp_stall_end(p, l, &begun);
    }
    const int error = find_fault(p, hold, first_held, &l->spec, failure);
    for (uint32_t i = 0; i < demand->n_experts; i++) {
        const int32_t index = l->slot_of[demand->experts[i]];
        assert(index >= 0 && (error == -EINTR || (p->slots[index].missing & ~demand->later) == 0));
        slots[i] = index - (int32_t) p->classes[l->spec.shape_class].first;
    }
    uint32_t n_ahead = 0;
    if (error != 0) {
        give_up(p, hold, first_held);
    } else if (!demand->is_again && demand->n_tokens > 1) {
        n_ahead = gp_ahead_plan(p, hold, demand);
    }
    pthread_mutex_unlock(&p->lock);
    if (n_ahead > 0) {
        gp_copies_submit(p->copies, p->ahead_reads, n_ahead);
        pthread_mutex_lock(&p->lock);
        p->is_reading_ahead = false;
        pthread_mutex_unlock(&p->lock);
    }
    return error;
}

void gp_pager_count_left_alone(gp_pager *p, uint32_t layer_index) {
    const bool has_entered = gp_pager_enter(p);
    p->layers[layer_index].counters.left_alone++;
    gp_pager_leave(p, has_entered);
}

/* ---- holds ------------------------------------------------------------------------------------------------------ */

int gp_hold_open(gp_hold *hold, gp_pager *p, uint32_t n_needed) {
    *hold = (gp_hold) { .n_needed = n_needed };
    hold->slots = malloc(p->n_slots * sizeof *hold->slots);
    hold->reads = malloc((size_t) p->n_slots * GP_MAX_SLICES * sizeof *hold->reads);
    if (!hold->slots || !hold->reads) {
        goto fail;
    }
    pthread_cond_init(&hold->arrived, NULL);
    pthread_cond_init(&hold->slice_arrived, NULL);
    pthread_mutex_lock(&p->lock);
    while (hold->bit < GP_MAX_TAPS && p->holds[hold->bit]) {
        hold->bit++;
    }
    if (hold->bit < GP_MAX_TAPS) {
        p->holds[hold->bit] = hold;
    }
    pthread_mutex_unlock(&p->lock);
    if (hold->bit < GP_MAX_TAPS) {
        return 0;
    }
    pthread_cond_destroy(&hold->slice_arrived);
    pthread_cond_destroy(&hold->arrived);
fail:
    free(hold->reads);
    free(hold->slots);
    return hold->bit < GP_MAX_TAPS ? -ENOMEM : -EMFILE;
}

void gp_hold_close(gp_hold *hold, gp_pager *p) {
    if (getpid() == p->pid) {   /* in a fork: glibc's destroy would wait for the parent's waiters */
        pthread_mutex_lock(&p->lock);
        release_and_tell(p, hold, 0);
        p->holds[hold->bit] = NULL;
        pthread_mutex_unlock(&p->lock);
        pthread_cond_destroy(&hold->slice_arrived);
        pthread_cond_destroy(&hold->arrived);
    }
    free(hold->reads);
    free(hold->slots);
}

const gp_layer_spec *gp_pager_layer(const gp_pager *p, uint32_t layer_index) {
    return layer_index < p->config.n_layers ? &p->layers[layer_index].spec : NULL;
}

gp_tables *gp_pager_tables(const gp_pager *p) {
    return p->tables;
}

uint32_t gp_pager_n_taps(gp_pager *p) {
    uint32_t n = 0;
    const bool has_entered = gp_pager_enter(p);
    for (uint32_t i = 0; i < GP_MAX_TAPS; i++) {
        n += p->holds[i] != NULL;
    }
    gp_pager_leave(p, has_entered);
    return n;
}

char *gp_pager_slots(const gp_pager *p, uint32_t shape_class, uint32_t *n_slots, uint64_t *stride_bytes) {
    *n_slots = p->classes[shape_class].n_slots;
    *stride_bytes = p->classes[shape_class].stride_bytes;
    return p->classes[shape_class].slots;
}

/* ---- counters ---------------------------------------------------------------------------------------------------- */

void gp_pager_counters(gp_pager *p, gp_counters *counters) {
    const bool has_entered = gp_pager_enter(p);
    for (uint32_t i = 0; i < p->config.n_layers; i++) {
        counters[i] = p->layers[i].counters;
    }
    gp_pager_leave(p, has_entered);
}

void gp_pager_row_counters(const gp_pager *p, gp_row_counters *counters) {
    gp_tables_counters(p->tables, counters);
}

bool gp_pager_reads_in_background(const gp_pager *p) {
    return gp_copies_are_in_background(p->copies);
}

void gp_pager_copies(const gp_pager *p, uint64_t *bytes_read) {
    gp_copies_bytes_read(p->copies, bytes_read);
}

int gp_pager_resident(gp_pager *p, uint32_t layer_index, uint8_t *resident) {
    if (layer_index >= p->config.n_layers) {
        return -EINVAL;
    }
    const gp_layer *l = &p->layers[layer_index];
    const bool has_entered = gp_pager_enter(p);
    for (uint32_t e = 0; e < l->spec.n_experts; e++) {
        const int32_t index = l->slot_of[e];
        resident[e] = index < 0 ? 0 : p->slots[index].is_pinned ? 2 : 1;
    }
    gp_pager_leave(p, has_entered);
    return 0;
}

int gp_pager_chosen(gp_pager *p, uint32_t layer_index, uint64_t *chosen) {
    if (layer_index >= p->config.n_layers) {
        return -EINVAL;
    }
    const gp_layer *l = &p->layers[layer_index];
    const bool has_entered = gp_pager_enter(p);
    memcpy(chosen, l->chosen, l->spec.n_experts * sizeof *chosen);
    gp_pager_leave(p, has_entered);
    return 0;
}
