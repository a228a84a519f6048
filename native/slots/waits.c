#define _POSIX_C_SOURCE 200809L  /* clock_gettime */
#include "slots/waits.h"

#include <time.h>

static struct timespec ms_from_now(int ms) {
    struct timespec when;
    clock_gettime(CLOCK_REALTIME, &when);
    when.tv_sec += ms / 1000;
    when.tv_nsec += ms % 1000 * 1000000L;
    if (when.tv_nsec >= 1000000000) {
        when.tv_sec++;
        when.tv_nsec -= 1000000000;
    }
    return when;
}

bool gp_hold_has_stopped(const gp_hold *hold) {
    return hold->watch && gp_watch_has_stopped(hold->watch);
}

bool gp_hold_stops(gp_hold *hold, bool is_decoding) {
    return is_decoding && hold->watch ? gp_watch_stops(hold->watch) : gp_hold_has_stopped(hold);
}

/* Waits for the condition, with the lock held, but no longer than a moment where somebody may want to stop; who decodes asks
 * then, without the lock. The caller looks at what it waits for in any case. False: it is not to be waited for any more. */
static bool wait_on(gp_pager *p, gp_hold *hold, pthread_cond_t *condition, bool is_decoding) {
    if (!hold->watch || !hold->watch->ask) {
        pthread_cond_wait(condition, &p->lock);
        return true;
    }
    if (gp_hold_has_stopped(hold)) {
        return false;
    }
    const struct timespec when = ms_from_now(GP_LOOK_UP_MS);
    if (pthread_cond_timedwait(condition, &p->lock, &when) == 0 || !is_decoding) {
        return true;
    }
    pthread_mutex_unlock(&p->lock);
    const bool stops = gp_watch_stops(hold->watch);
    pthread_mutex_lock(&p->lock);
    return !stops;
}

gp_stall gp_stall_begin(const gp_pager *p) {
    return (gp_stall) { p->os->now_ns(), gp_copies_arrived_bytes(p->copies) };
}

void gp_stall_end(const gp_pager *p, gp_layer *l, const gp_stall *begun) {
    l->counters.stall_ns += p->os->now_ns() - begun->ns;
    l->counters.stall_bytes += gp_copies_arrived_bytes(p->copies) - begun->bytes;
}

bool gp_hold_is_pending(const gp_hold *hold, uint32_t slices) {
    bool is_any = false;
    for (uint32_t i = 0; i < GP_MAX_SLICES; i++) {
        is_any |= (slices >> i & 1) && hold->pending_slices[i] > 0;
    }
    return is_any;
}

bool gp_hold_wait(gp_pager *p, gp_hold *hold, uint32_t slices) {
    while (gp_hold_is_pending(hold, slices)) {
        if (!wait_on(p, hold, &hold->arrived, true)) {
            return false;
        }
    }
    return true;
}

static const gp_slot *slot_at(const gp_pager *p, uint32_t layer, uint32_t slot) {
    return &p->slots[p->classes[p->layers[layer].spec.shape_class].first + slot];
}

bool gp_pager_has_slice(const gp_pager *p, uint32_t layer, uint32_t slot, uint32_t slice) {
    return !(atomic_load_explicit(&slot_at(p, layer, slot)->missing, memory_order_acquire) >> slice & 1);
}

bool gp_pager_wait_slice(gp_pager *p, gp_hold *hold, uint32_t layer, uint32_t slot, uint32_t slice, bool is_decoding) {
    const gp_stall begun = gp_stall_begin(p);
    pthread_mutex_lock(&p->lock);
    hold->n_watching++;
    bool is_there;
    while (!(is_there = gp_pager_has_slice(p, layer, slot, slice))
           && wait_on(p, hold, &hold->slice_arrived, is_decoding)) {
    }
    hold->n_watching--;
    if (is_decoding) {
        gp_stall_end(p, &p->layers[layer], &begun);
    }
    pthread_mutex_unlock(&p->lock);
    return is_there;
}

unsigned gp_hold_n_arrived(const gp_hold *hold) {
    return atomic_load_explicit(&hold->n_arrived, memory_order_acquire);
}

bool gp_pager_wait_arrival(gp_pager *p, gp_hold *hold, uint32_t layer, unsigned n_arrived, bool is_decoding) {
    const gp_stall begun = gp_stall_begin(p);
    pthread_mutex_lock(&p->lock);
    hold->n_watching++;
    bool has_arrived;
    while (!(has_arrived = gp_hold_n_arrived(hold) != n_arrived)
           && wait_on(p, hold, &hold->slice_arrived, is_decoding)) {
    }
    hold->n_watching--;
    if (is_decoding) {
        gp_stall_end(p, &p->layers[layer], &begun);
    }
    pthread_mutex_unlock(&p->lock);
    return has_arrived;
}

bool gp_pager_is_waiting(gp_pager *p, const gp_hold *hold, uint32_t slices) {
    pthread_mutex_lock(&p->lock);
    const bool is_waiting = gp_hold_is_pending(hold, slices);
    pthread_mutex_unlock(&p->lock);
    return is_waiting;
}

bool gp_hold_wait_for_others(gp_pager *p, gp_hold *hold) {
    const struct timespec when = ms_from_now(GP_LOOK_UP_MS);
    (void) pthread_cond_timedwait(&p->released, &p->lock, &when);
    pthread_mutex_unlock(&p->lock);
    const bool stops = gp_hold_stops(hold, true);
    pthread_mutex_lock(&p->lock);
    return !stops;
}

