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

bool gp_hold_wait(gp_pager *p, gp_hold *hold, bool is_decoding) {
    const bool has_watch = hold->watch && hold->watch->ask;
    if (has_watch && gp_hold_has_stopped(hold)) {
        return false;
    }
    int error = 0;
    hold->n_watching++;
    if (has_watch) {
        const struct timespec when = ms_from_now(GP_LOOK_UP_MS);
        error = pthread_cond_timedwait(&hold->arrived, &p->lock, &when);
    } else {
        pthread_cond_wait(&hold->arrived, &p->lock);
    }
    hold->n_watching--;
    if (error == 0 || !is_decoding) {
        return true;
    }
    pthread_mutex_unlock(&p->lock);     /* who decodes asks without it */
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

bool gp_hold_wait_for_others(gp_pager *p, gp_hold *hold) {
    const struct timespec when = ms_from_now(GP_LOOK_UP_MS);
    (void) pthread_cond_timedwait(&p->released, &p->lock, &when);
    pthread_mutex_unlock(&p->lock);
    const bool stops = gp_hold_stops(hold, true);
    pthread_mutex_lock(&p->lock);
    return !stops;
}

