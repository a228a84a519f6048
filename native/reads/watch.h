/* Whether a decode shall stop before its end: the caller is asked now and then, wherever the decode may stay for long.
 *
 * Invariants
 *   1. Only the thread that decodes asks, and holds no lock meanwhile: the answer may be a signal handler of the user's.
 *   2. Once stopped, a decode stays so until its failure is taken: what other threads of the graph left undone is never
 *      taken for a result.
 *   3. A stopped decode waits for no read. Slots that are still being read are let go as they are: READING, used by nobody,
 *      until their last slice has come.
 */
#ifndef GGUF_PAGER_WATCH_H
#define GGUF_PAGER_WATCH_H

#include <stdatomic.h>

#include "gguf_pager.h"

/* How long a wait lasts before it looks up, and how often somebody is asked: an answer takes Python's lock, for which it may
 * have to wait 5 ms where other threads want it, too. */
enum { GP_LOOK_UP_MS = 100, GP_ASK_MS = 200 };

/* Zeroed: nobody wants to stop anything. */
typedef struct {
    const gp_os       *os;
    gp_abort_callback  ask;
    void              *data;
    uint64_t           asked_ns;        /* the decoding thread's */
    atomic_bool        has_stopped;     /* written by it alone */
} gp_watch;

/* In the decoding thread, without locks: whether to stop, now or already. */
static inline bool gp_watch_stops(gp_watch *watch) {
    if (!watch->ask || atomic_load_explicit(&watch->has_stopped, memory_order_relaxed)) {
        return watch->ask != NULL;
    }
    const uint64_t now_ns = watch->os->now_roughly_ns();
    if (now_ns - watch->asked_ns < GP_ASK_MS * UINT64_C(1000000)) {
        return false;
    }
    watch->asked_ns = now_ns;
    if (watch->ask(watch->data)) {
        atomic_store(&watch->has_stopped, true);
        return true;
    }
    return false;
}

/* Any thread. */
static inline bool gp_watch_has_stopped(const gp_watch *watch) {
    return atomic_load_explicit(&watch->has_stopped, memory_order_relaxed);
}

#endif
