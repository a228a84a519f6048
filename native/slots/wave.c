/* Waves: experts wanted become slots held, misses become reads, and what is computed makes room for the next. The states of a
 * slot and their invariants are at the head of slots.c.
 *
 * Invariants
 *   1. hold.n_open is the number of its experts that have a slot and are not done, hold.n_pending of those whose slot lacks a
 *      slice. Each of them has the hold's bit in its slot's mask of users; nothing else has.
 *   2. Slots are taken in the order of hold.wanted: those before hold.next have one, or had.
 *   3. A wave that holds nothing takes any slot there is. So it goes on while anybody's slots come back, and nobody waits for
 *      slots while holding some that he could give back.
 *   4. A slot goes only after its file was seen unchanged since the read. Where only the file's times have changed, the thread
 *      that decodes compares the bytes first.
 *   5. After a failure, and once the watch has stopped, nothing is given back before gp_hold_release: others may be computing.
 */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "slots/ahead.h"
#include "slots/forecast.h"
#include "slots/pager.h"
#include "slots/slots.h"
#include "slots/waits.h"
#include "slots/warm.h"

/* Experts that one thread asks for when it is done with one; how long a wave waits for slots of others, who give them back within
 * one layer's compute. */
enum { AT_ONCE = 4, MOST_WAIT_SECONDS = 2 };

static gp_layer *layer_of(gp_pager *p, const gp_hold *hold) {
    return &p->layers[hold->layer];
}

static gp_slot *slot_of(const gp_pager *p, const gp_hold *hold, uint32_t i) {
    const int32_t slot = atomic_load_explicit(&hold->wanted[i].slot, memory_order_acquire);
    return slot < 0 ? NULL : &p->slots[p->classes[p->layers[hold->layer].spec.shape_class].first + (uint32_t) slot];
}

/* ---- slots taken and given back; with the lock held --------------------------------------------------------------- */

static void take(gp_pager *p, gp_hold *hold, uint32_t i, uint32_t index) {
    gp_slot *s = &p->slots[index];
    s->users |= UINT64_C(1) << hold->bit;
    gp_slot_want(s);
    hold->n_open++;
    hold->n_pending += p->missing[index] != 0;
    const uint32_t first = p->classes[layer_of(p, hold)->spec.shape_class].first;
    atomic_store_explicit(&hold->wanted[i].slot, (int32_t) (index - first), memory_order_release);
}

static void give_back(gp_pager *p, gp_hold *hold, uint32_t i) {
    gp_slot *s = slot_of(p, hold, i);
    hold->wanted[i].is_done = true;
    hold->n_open--;
    if (!s) {
        return;
    }
    s->users &= ~(UINT64_C(1) << hold->bit);
    hold->n_pending -= p->missing[s - p->slots] != 0;
    s->has_failed |= s->is_doubtful && !s->is_checked && !s->users;     /* nobody will compare it: better to read it anew */
    if (s->has_failed && s->state == READY && !s->users) {
        gp_slot_empty(p, s);
    }
}

/* Whether the ith expert of a large batch may stay: the layer's most used ones, as long as there is room beside the transient
 * slots; the rest is transient. */
static bool is_worth_keeping(const gp_layer *l, const gp_class *c, const gp_hold *hold, uint32_t i) {
    if (l->kept >= c->batch_share) {
        return false;
    }
    uint32_t better = 0;
    for (uint32_t j = 0; j < hold->n_wanted; j++) {
        better += hold->wanted[j].count > hold->wanted[i].count;
    }
    return better < c->batch_share;
}

static void take_hit(gp_pager *p, gp_hold *hold, uint32_t i, uint32_t index) {
    const gp_layer *l = layer_of(p, hold);
    gp_slot *s = &p->slots[index];
    take(p, hold, i, index);
    if (s->has_failed) {        /* others have joined the read of it, too, and not all of them have heard */
        const gp_failure failure = gp_slot_failure(p, index);
        gp_hold_fail(hold, &failure);
    }
    if (!hold->is_large || ((s->is_transient || s->is_warmed)
                            && is_worth_keeping(l, &p->classes[l->spec.shape_class], hold, i))) {
        gp_slot_keep(p, s);     /* read ahead for this batch, left over from an earlier one, or guessed right */
    }
}

/* Slots for those that come next, as far as there are any: whose reads, so many in all, are put into `reads`. */
static uint32_t take_more(gp_pager *p, gp_hold *hold, gp_read **reads, uint32_t most_experts) {
    const gp_layer *l = layer_of(p, hold);
    const gp_class *c = &p->classes[l->spec.shape_class];
    uint32_t *const taken = hold->touched + hold->n_wanted;     /* room for as many again */
    uint32_t n_taken = 0;
    while (hold->next < hold->n_wanted && n_taken < most_experts) {
        const int32_t expert = hold->wanted[hold->next].expert;
        int32_t index = l->slot_of[expert];
        if (index >= 0) {       /* it was there, or another context has read it meanwhile */
            take_hit(p, hold, hold->next++, (uint32_t) index);
            gp_hold_tell(hold);     /* it may be there already, and then nothing arrives */
            continue;
        }
        const bool is_transient = hold->is_large && !is_worth_keeping(l, c, hold, hold->next);
        index = gp_slot_choose(p, l, is_transient, hold->n_open == 0);
        if (index < 0) {
            break;
        }
        gp_slot_assign(p, (uint32_t) index, hold->layer, expert, is_transient);
        take(p, hold, hold->next++, (uint32_t) index);
        taken[n_taken++] = (uint32_t) index;
    }
    /* In the order in which they are computed with: of one token the first slice of all, then the second; of several tokens an
     * expert after the other. */
    const bool is_by_slice = hold->n_tokens == 1;
    uint32_t n_reads = 0;
    for (uint32_t i = 0; i < n_taken; i++) {
        n_reads += gp_slot_prepare_reads(p, taken[i], reads + (is_by_slice ? i : n_reads), is_by_slice ? n_taken : 1);
    }
    return n_reads;
}

/* ---- beginning ------------------------------------------------------------------------------------------------------ */

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

/* Most rows first: the others are read while these are computed. */
static int by_count(const void *left, const void *right) {
    const gp_wanted *a = left, *b = right;
    return a->count != b->count ? (a->count < b->count) - (a->count > b->count) : (a->at > b->at) - (a->at < b->at);
}

static void add(gp_hold *hold, const gp_demand *demand, uint32_t at) {
    gp_wanted *w = &hold->wanted[hold->n_wanted++];
    w->expert = demand->experts[at];
    w->count = demand->counts[at];
    w->at = at;
    w->is_done = false;
    atomic_store_explicit(&w->slot, GP_NO_SLOT_YET, memory_order_relaxed);
}

/* What is in slots, and may be computed at once, goes before what is on its way, and that before the rest: our own misses must not
 * push them out. Returns how many are not in slots. */
static uint32_t line_up(const gp_pager *p, gp_hold *hold, const gp_demand *demand) {
    const gp_layer *l = &p->layers[demand->layer];
    hold->layer = demand->layer;
    hold->n_tokens = demand->n_tokens;
    hold->is_large = demand->n_tokens > 1 && demand->n_experts > p->classes[l->spec.shape_class].share;
    hold->n_wanted = hold->next = 0;
    for (uint32_t i = 0; i < demand->n_experts; i++) {
        const int32_t index = l->slot_of[demand->experts[i]];
        if (index >= 0 && p->slots[index].state == READY) {
            add(hold, demand, i);
        }
    }
    const uint32_t n_missed = demand->n_experts - hold->n_wanted;
    for (uint32_t i = 0; i < demand->n_experts; i++) {
        const int32_t index = l->slot_of[demand->experts[i]];
        if (index >= 0 && p->slots[index].state == READING) {
            add(hold, demand, i);
        }
    }
    const uint32_t n_here = hold->n_wanted;
    for (uint32_t i = 0; i < demand->n_experts; i++) {
        if (l->slot_of[demand->experts[i]] < 0) {
            add(hold, demand, i);
        }
    }
    if (demand->n_tokens > 1) {
        qsort(hold->wanted + n_here, hold->n_wanted - n_here, sizeof *hold->wanted, by_count);
    }
    return n_missed;
}

/* Nothing is held, or an earlier wave that nobody computes with any more. */
static void start_anew(gp_pager *p, gp_hold *hold) {
    for (uint32_t i = 0; i < hold->next; i++) {
        if (!hold->wanted[i].is_done) {
            give_back(p, hold, i);
        }
    }
    assert(hold->n_open == 0 && hold->n_pending == 0);
    hold->n_wanted = hold->next = 0;
    hold->n_ahead = hold->next_ahead = 0;
    hold->waits_since_ns = 0;
    atomic_store(&hold->n_touched, 0);
    hold->failure = (gp_failure) { 0 };
    atomic_store(&hold->has_failed, false);
}

/* What it chose is the best guess at what the next batch of this context will. */
static void remember(gp_hold *hold, const gp_layer *l) {
    uint32_t *const routed = hold->routed[hold->layer];
    memset(routed, 0, l->spec.n_experts * sizeof *routed);
    for (uint32_t i = 0; i < hold->n_wanted; i++) {
        routed[hold->wanted[i].expert] = hold->wanted[i].count;
    }
}

static void submit(gp_pager *p, gp_read *const *reads, uint32_t n_reads) {
    if (n_reads > 0) {
        gp_copies_submit(p->copies, reads, n_reads);
    }
}

int gp_wave_begin(gp_pager *p, gp_hold *hold, const gp_demand *demand, gp_failure *failure) {
    gp_layer *l = &p->layers[demand->layer];
    *failure = (gp_failure) { 0 };
    if (getpid() != p->pid) {
        *failure = (gp_failure) { .error = -ECHILD };
        return -ECHILD;
    }
    pthread_mutex_lock(&p->lock);
    start_anew(p, hold);
    uint32_t n_foreseen = 0;
    if (!demand->is_again) {
        count_use(l, demand);
        n_foreseen = gp_forecast_settle(p, hold, demand);
        gp_look_ahead_decide(p, hold, demand);
    }
    const uint32_t n_missed = line_up(p, hold, demand) + n_foreseen;
    const uint32_t n_ahead = gp_ahead_wanted(p, hold, demand, hold->reads);
    gp_read **const reads = hold->reads + n_ahead;
    uint32_t n_reads = take_more(p, hold, reads, hold->n_wanted);
    if (!demand->is_again) {
        l->counters.hits += demand->n_experts - n_missed;
        l->counters.misses += n_missed;
    }
    /* What was read ahead in vain makes way first: the new reads come after all that are in the list. */
    gp_read **const unwanted = reads + n_reads;
    const uint32_t n_unwanted = demand->is_again ? 0 : gp_ahead_drop(p, hold, demand->layer, unwanted);
    if (n_unwanted > 0) {
        pthread_mutex_unlock(&p->lock);
        gp_copies_withdraw(p->copies, unwanted, n_unwanted);
        pthread_mutex_lock(&p->lock);
        gp_ahead_withdrawn(p, unwanted, n_unwanted);
        n_reads += take_more(p, hold, unwanted, hold->n_wanted);
    }
    if (demand->n_tokens > 1 && !demand->is_again) {
        if (hold->look != GP_LOOK_TO_READ) {
            gp_ahead_plan(p, hold);
        }
        remember(hold, l);
    }
    if (hold->next == hold->n_wanted) {
        n_reads += gp_ahead_take(p, hold, reads + n_reads, UINT32_MAX);
    }
    pthread_mutex_unlock(&p->lock);
    if (n_ahead > 0) {
        gp_copies_want(p->copies, hold->reads, n_ahead);    /* their slots are held */
    }
    submit(p, reads, n_reads);
    return 0;
}

/* ---- computing ------------------------------------------------------------------------------------------------------ */

bool gp_wave_has(const gp_pager *p, const gp_hold *hold, uint32_t i, uint32_t slices) {
    const gp_slot *s = slot_of(p, hold, i);
    if (!s) {
        return atomic_load_explicit(&hold->wanted[i].slot, memory_order_acquire) == GP_NO_SLOT;
    }
    return (atomic_load_explicit(&p->missing[s - p->slots], memory_order_acquire) & slices) == 0;
}

const char *gp_wave_slice(const gp_pager *p, const gp_hold *hold, uint32_t i, uint32_t slice) {
    const gp_slot *s = slot_of(p, hold, i);
    return s ? gp_slot_slice(p, (uint32_t) (s - p->slots), slice) : NULL;
}

unsigned gp_wave_n_arrived(const gp_hold *hold) {
    return atomic_load_explicit(&hold->n_arrived, memory_order_acquire);
}

bool gp_wave_stops(gp_hold *hold, bool is_decoding) {
    return atomic_load_explicit(&hold->has_failed, memory_order_relaxed) || gp_hold_stops(hold, is_decoding);
}

/* The files of a layer's slices, in every copy, must still be those whose header was read. */
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

/* In the thread that decodes: whether the ith expert's bytes are those of the file. Nobody gives up a slot that is held. */
static int compare(gp_pager *p, const gp_hold *hold, uint32_t i) {
    const gp_layer_spec *spec = &p->layers[hold->layer].spec;
    const uint64_t expert = (uint64_t) hold->wanted[i].expert;
    const uint32_t index = (uint32_t) (slot_of(p, hold, i) - p->slots);
    for (uint32_t s = 0; p->compare && s < spec->n_slices; s++) {
        const gp_slice_spec *slice = &spec->slices[s];
        const int got = p->compare(p->compare_data, slice->file, slice->offset_bytes + expert * slice->slice_bytes,
                                   gp_slot_slice(p, index, s), slice->slice_bytes);
        if (got != GP_SAME) {
            return got < 0 && got > -4096 ? got : -EINTR;
        }
    }
    return p->compare ? 0 : -ESTALE;
}

/* It is known whether the bytes are the file's. With the lock held. */
static void judge(gp_pager *p, gp_hold *hold, uint32_t i, int error, const gp_failure *failure) {
    gp_slot *s = slot_of(p, hold, i);
    /* Who was interrupted has found nothing out: whoever holds the slot as well asks himself. */
    if (error != 0 && error != -EINTR) {
        p->changed_file = failure->file;
        s->has_failed |= !s->is_checked;
    }
    if (error != 0) {
        gp_hold_fail(hold, failure);
    } else {
        s->is_checked = true;
    }
}

/* Invariant 5. */
static bool may_go_on(const gp_hold *hold) {
    return !atomic_load(&hold->has_failed) && !gp_hold_has_stopped(hold);
}

static uint32_t go_on(gp_pager *p, gp_hold *hold, uint32_t i, gp_read **reads) {
    give_back(p, hold, i);
    uint32_t n_reads = take_more(p, hold, reads, AT_ONCE);
    if (hold->next == hold->n_wanted) {
        n_reads += gp_ahead_take(p, hold, reads + n_reads, AT_ONCE - n_reads / layer_of(p, hold)->spec.n_slices);
    } else if (hold->n_open == 0) {
        gp_hold_tell(hold);     /* others hold all slots: nothing arrives unless the thread that decodes takes what they let go */
    }
    pthread_cond_broadcast(&p->released);
    return n_reads;
}

void gp_wave_done(gp_pager *p, gp_hold *hold, uint32_t i) {
    gp_read *reads[AT_ONCE * GP_MAX_SLICES];
    pthread_mutex_lock(&p->lock);
    bool is_touched = false;
    const gp_slot *s = slot_of(p, hold, i);
    if (s && !s->is_checked) {
        const gp_slice_spec *first = &layer_of(p, hold)->spec.slices[0];
        gp_failure failure = { 0, first->file, first->offset_bytes };
        pthread_mutex_unlock(&p->lock);
        const int error = check_files(p, &layer_of(p, hold)->spec, &failure, &is_touched);
        pthread_mutex_lock(&p->lock);
        is_touched |= s->is_doubtful;
        if (error != 0 || !is_touched) {
            judge(p, hold, i, error, &failure);
        } else if (!atomic_load(&hold->has_failed)) {
            hold->touched_at = failure;
            hold->touched[atomic_fetch_add(&hold->n_touched, 1)] = i;
            gp_hold_tell(hold);
        }
    }
    const bool goes_on = !is_touched && may_go_on(hold);
    const uint32_t n_reads = goes_on ? go_on(p, hold, i, reads) : 0;
    pthread_mutex_unlock(&p->lock);
    submit(p, reads, n_reads);
}

void gp_wave_tell(gp_pager *p, gp_hold *hold) {
    pthread_mutex_lock(&p->lock);
    gp_hold_tell(hold);
    pthread_mutex_unlock(&p->lock);
}

/* In the thread that decodes: compares what the others have left to it. */
static void settle(gp_pager *p, gp_hold *hold) {
    gp_read *reads[AT_ONCE * GP_MAX_SLICES];
    while (atomic_load(&hold->n_touched) > 0 && may_go_on(hold)) {
        pthread_mutex_lock(&p->lock);
        const uint32_t i = hold->touched[atomic_fetch_sub(&hold->n_touched, 1) - 1];
        gp_failure failure = hold->touched_at;
        pthread_mutex_unlock(&p->lock);
        const int error = failure.error = compare(p, hold, i);
        pthread_mutex_lock(&p->lock);
        judge(p, hold, i, error, &failure);
        const uint32_t n_reads = error == 0 ? go_on(p, hold, i, reads) : 0;
        pthread_mutex_unlock(&p->lock);
        submit(p, reads, n_reads);
    }
}

/* Nobody has given a slot back for long: a context that holds them all does not go on before we do, because it waits for us in a
 * callback, say. The rest of the wave comes from llama.cpp's mapping. */
static void do_without(gp_pager *p, gp_hold *hold) {
    for (; hold->next < hold->n_wanted; hold->next++) {
        atomic_store_explicit(&hold->wanted[hold->next].slot, GP_NO_SLOT, memory_order_release);
        hold->n_open++;
    }
    layer_of(p, hold)->counters.left_alone++;
    gp_hold_tell(hold);
}

/* In the thread that decodes, with the lock held, which it lets go: others hold what slots there are. */
static void wait_for_a_slot(gp_pager *p, gp_hold *hold) {
    gp_read *reads[AT_ONCE * GP_MAX_SLICES];
    const uint32_t n_reads = take_more(p, hold, reads, AT_ONCE);
    if (hold->n_open > 0) {
        hold->waits_since_ns = 0;
    } else if (hold->waits_since_ns == 0) {
        hold->waits_since_ns = p->os->now_ns();
    } else if (p->os->now_ns() - hold->waits_since_ns >= MOST_WAIT_SECONDS * UINT64_C(1000000000)) {
        do_without(p, hold);
    } else {
        (void) gp_hold_wait_for_others(p, hold);
    }
    pthread_mutex_unlock(&p->lock);
    submit(p, reads, n_reads);
    pthread_mutex_lock(&p->lock);
}

bool gp_wave_wait(gp_pager *p, gp_hold *hold, unsigned n_arrived, bool is_decoding) {
    if (is_decoding) {
        settle(p, hold);
    }
    const gp_stall begun = gp_stall_begin(p);
    pthread_mutex_lock(&p->lock);
    bool may_wait = true;
    if (is_decoding && hold->n_open == 0 && hold->next < hold->n_wanted) {
        wait_for_a_slot(p, hold);
    } else {
        while (may_wait && gp_wave_n_arrived(hold) == n_arrived) {
            may_wait = gp_hold_wait(p, hold, is_decoding);
        }
    }
    if (is_decoding) {
        gp_stall_end(p, layer_of(p, hold), &begun);
    }
    pthread_mutex_unlock(&p->lock);
    return may_wait;
}

/* ---- ending --------------------------------------------------------------------------------------------------------- */

/* Bytes that did not come are missing because the file has changed, if it has: that it cannot be read is not what is wrong. */
static void explain(gp_pager *p, const gp_hold *hold, gp_failure *failure) {
    gp_failure changed;
    bool is_touched = false;
    if (failure->error != 0 && failure->error != -EINTR
        && check_files(p, &layer_of(p, hold)->spec, &changed, &is_touched) == -ESTALE) {
        *failure = changed;
    }
}

int gp_wave_end(gp_pager *p, gp_hold *hold, gp_failure *failure) {
    settle(p, hold);
    gp_look_ahead_token_ends(p, hold);
    pthread_mutex_lock(&p->lock);
    *failure = gp_hold_has_stopped(hold) ? (gp_failure) { .error = -EINTR } : hold->failure;
    uint32_t n_next = 0;
    if (failure->error == 0 && hold->n_open == 0) {
        hold->n_wanted = hold->next = 0;
        n_next = gp_warm_up_next(p);    /* the last reads may have been withdrawn, so that none was finished */
    }
    pthread_mutex_unlock(&p->lock);
    gp_warm_up_submit(p, n_next);
    explain(p, hold, failure);
    return failure->error;
}

void gp_hold_rest(gp_pager *p, gp_hold *hold) {
    gp_hold_release(p, hold);
    if (hold->forecast.is_open && gp_pager_enter(p)) {      /* only this thread opens one */
        gp_forecast_end(p, hold);
        gp_pager_leave(p, true);
    }
}

void gp_hold_release(gp_pager *p, gp_hold *hold) {
    if (hold->n_wanted == 0 || !gp_pager_enter(p)) {    /* only this thread changes n_wanted */
        return;
    }
    if (!may_go_on(hold)) {
        gp_forecast_end(p, hold);
    }
    while (atomic_load(&hold->has_failed) && hold->n_pending > 0) {
        if (!gp_hold_wait(p, hold, true)) {
            break;      /* of a decode that has stopped: nobody's then, and READING until it is read */
        }
    }
    start_anew(p, hold);
    pthread_cond_broadcast(&p->released);
    const uint32_t n_next = gp_warm_up_next(p);
    pthread_mutex_unlock(&p->lock);
    gp_warm_up_submit(p, n_next);
}

/* ---- opening and closing -------------------------------------------------------------------------------------------- */

static void free_hold(gp_hold *hold, const gp_pager *p) {
    for (uint32_t i = 0; hold->routed && i < p->config.n_layers; i++) {
        free(hold->routed[i]);
    }
    free(hold->routed);
    free(hold->wanted);
    free(hold->touched);
    free(hold->ahead);
    free(hold->reads);
    free(hold->forecast.experts);
}

static bool open_hold(gp_hold *hold, const gp_pager *p) {
    uint32_t most = 0;
    hold->routed = calloc(p->config.n_layers, sizeof *hold->routed);
    bool is_whole = hold->routed != NULL;
    for (uint32_t i = 0; is_whole && i < p->config.n_layers; i++) {
        const uint32_t n_experts = p->layers[i].spec.n_experts;
        hold->routed[i] = calloc(n_experts, sizeof **hold->routed);
        is_whole = hold->routed[i] != NULL;
        most = n_experts > most ? n_experts : most;
    }
    hold->wanted = malloc(most * sizeof *hold->wanted);
    hold->touched = malloc(2 * most * sizeof *hold->touched);
    hold->ahead = malloc(most * sizeof *hold->ahead);
    hold->reads = malloc((size_t) p->n_slots * GP_MAX_SLICES * sizeof *hold->reads);
    hold->forecast.experts = malloc(most * sizeof *hold->forecast.experts);
    return is_whole && hold->forecast.experts && hold->wanted && hold->touched && hold->ahead && hold->reads;
}

int gp_hold_open(gp_hold *hold, gp_pager *p) {
    *hold = (gp_hold) { 0 };
    hold->contest = &hold->contests[0];
    if (!open_hold(hold, p)) {
        free_hold(hold, p);
        return -ENOMEM;
    }
    pthread_mutex_lock(&p->lock);
    while (hold->bit < GP_MAX_TAPS && p->holds[hold->bit]) {
        hold->bit++;
    }
    const bool has_bit = hold->bit < GP_MAX_TAPS;
    if (has_bit) {
        pthread_cond_init(&hold->arrived, NULL);
        p->holds[hold->bit] = hold;
    }
    pthread_mutex_unlock(&p->lock);
    if (!has_bit) {
        free_hold(hold, p);
    }
    return has_bit ? 0 : -EMFILE;
}

void gp_hold_close(gp_hold *hold, gp_pager *p) {
    if (getpid() == p->pid) {   /* in a fork: glibc's destroy would wait for the parent's waiters */
        pthread_mutex_lock(&p->lock);
        start_anew(p, hold);
        gp_forecast_end(p, hold);
        pthread_cond_broadcast(&p->released);
        p->holds[hold->bit] = NULL;
        pthread_mutex_unlock(&p->lock);
        pthread_cond_destroy(&hold->arrived);
    }
    free_hold(hold, p);
}
