/* Waiting for slots that others hold: it costs no processor time and no expert, takes nothing that is being read, and
 * ends: with the slots when they come, with -EBUSY after two seconds, at once when there is nobody to wait for. */
#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <time.h>

#include "check.h"
#include "fake_os.h"
#include "model.h"

enum { WAITERS = 3 };

static model m;
static gp_pager *pager;
static gp_hold owner;

typedef struct {
    pthread_t  thread;
    gp_hold    hold;
    uint32_t   layer, n;
    int32_t    experts[4];
    int        error;
    gp_failure failure;
} waiter;

static void *acquire(void *data) {
    waiter *w = data;
    int32_t slots[4];
    w->error = model_acquire(pager, &w->hold, w->layer, w->experts, w->n, 1, slots, &w->failure);
    for (uint32_t i = 0; w->error == 0 && i < w->n; i++) {
        CHECK(model_slot_holds(&m, pager, (uint32_t) slots[i], w->layer, w->experts[i]), "the slots hold the experts");
    }
    gp_pager_release(pager, &w->hold);
    return NULL;
}

static void begin(uint32_t n_slots, waiter *waiters, int n) {
    model_make(&m, (model_shape) { .n_slots = n_slots, .n_used = 3, .piece_bytes = 64 << 10 });
    pager = model_open(&m);
    CHECK(gp_hold_open(&owner, pager, 4) == 0, "a hold opens");
    for (int i = 0; i < n; i++) {
        CHECK(gp_hold_open(&waiters[i].hold, pager, 4) == 0, "a hold opens");
    }
}

static void start(waiter *w) {
    CHECK(pthread_create(&w->thread, NULL, acquire, w) == 0, "the test has threads");
}

static void end(waiter *waiters, int n) {
    model_check_invariants(pager);
    for (int i = 0; i < n; i++) {
        gp_hold_close(&waiters[i].hold, pager);
    }
    gp_hold_close(&owner, pager);
    gp_pager_close(pager);
    model_end(&m);
}

static void own(uint32_t layer, const int32_t *experts, uint32_t n) {
    int32_t slots[4];
    gp_failure failure;
    CHECK(model_acquire(pager, &owner, layer, experts, n, 1, slots, &failure) == 0, "the owner gets its slots");
}

static double seconds(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return (double) now.tv_sec + now.tv_nsec / 1e9;
}

static void sleep_ms(long ms) {
    nanosleep(&(struct timespec) { .tv_nsec = ms * 1000000 }, NULL);
}

static uint64_t evictions(void) {
    gp_counters counters[MODEL_LAYERS];
    uint64_t n = 0;
    gp_pager_counters(pager, counters);
    for (uint32_t l = 0; l < m.shape.n_layers; l++) {
        n += counters[l].evictions;
    }
    return n;
}

static void several_wait_without_spinning(void) {
    waiter waiters[WAITERS] = { 0 };
    begin(3, waiters, WAITERS);
    own(0, (int32_t[]) { 0, 1, 2 }, 3);
    for (int i = 0; i < WAITERS; i++) {
        waiters[i].layer = 1;
        waiters[i].n = 2;
        waiters[i].experts[0] = 2 * i;
        waiters[i].experts[1] = 2 * i + 1;
        start(&waiters[i]);
    }
    sleep_ms(50);
    const double before = seconds(CLOCK_PROCESS_CPUTIME_ID);
    sleep_ms(400);
    const double used = seconds(CLOCK_PROCESS_CPUTIME_ID) - before;
    gp_pager_release(pager, &owner);
    for (int i = 0; i < WAITERS; i++) {
        pthread_join(waiters[i].thread, NULL);
        CHECK(waiters[i].error == 0, "who waits gets the slots when they come");
    }
    CHECK(used < 0.1, "those who wait sleep");
    end(waiters, WAITERS);
}

static void waiting_evicts_nobody(void) {
    waiter w = { .layer = 1, .n = 3, .experts = { 0, 1, 2 } };
    begin(5, &w, 1);
    model_use(&m, pager, &owner, 2, (int32_t[]) { 7, 8 }, 2, 1);
    own(0, (int32_t[]) { 0, 1, 2 }, 3);
    start(&w);
    sleep_ms(50);
    CHECK(evictions() == 0, "as long as too few slots can be had, none is taken");
    CHECK(model_is_resident(pager, &m, 2, 7) && model_is_resident(pager, &m, 2, 8), "and no expert is lost");
    model_check_invariants(pager);
    gp_pager_release(pager, &owner);
    pthread_join(w.thread, NULL);
    CHECK(w.error == 0, "who waits gets the slots when they come");
    end(&w, 1);
}

static void slots_being_read_are_waited_for(void) {
    waiter waiters[2] = { { .layer = 0, .n = 3, .experts = { 0, 1, 2 } }, { .layer = 1, .n = 2, .experts = { 0, 1 } } };
    begin(3, waiters, 2);
    fake_hold_reads();
    start(&waiters[0]);
    fake_wait_for_reads(3);
    start(&waiters[1]);
    sleep_ms(50);
    pthread_mutex_lock(&pager->lock);
    for (uint32_t e = 0; e < 3; e++) {
        CHECK(pager->layers[0].slot_of[e] >= 0, "2: a slot that is being read is not given up");
    }
    pthread_mutex_unlock(&pager->lock);
    fake_let_reads_go();
    for (int i = 0; i < 2; i++) {
        pthread_join(waiters[i].thread, NULL);
        CHECK(waiters[i].error == 0, "both get their slots");
    }
    end(waiters, 2);
}

/* A hit needs no slot: it does not queue behind those who wait for one. */
static void hits_do_not_wait(void) {
    waiter waiters[2] = { { .layer = 1, .n = 3, .experts = { 0, 1, 2 } }, { .layer = 0, .n = 2, .experts = { 0, 1 } } };
    begin(4, waiters, 2);
    own(0, (int32_t[]) { 0, 1, 2 }, 3);
    start(&waiters[0]);
    sleep_ms(20);
    const double before = seconds(CLOCK_MONOTONIC);
    start(&waiters[1]);
    pthread_join(waiters[1].thread, NULL);
    CHECK(waiters[1].error == 0 && seconds(CLOCK_MONOTONIC) - before < 1, "experts in slots are served at once");
    gp_pager_release(pager, &owner);
    pthread_join(waiters[0].thread, NULL);
    CHECK(waiters[0].error == 0, "who waits gets the slots when they come");
    end(waiters, 2);
}

static void waiting_ends(void) {
    waiter w = { .layer = 1, .n = 2, .experts = { 0, 1 } };
    begin(3, &w, 1);
    own(0, (int32_t[]) { 0, 1 }, 2);
    const double before = seconds(CLOCK_MONOTONIC);
    acquire(&w);
    const double waited = seconds(CLOCK_MONOTONIC) - before;
    CHECK(w.error == -EBUSY && w.failure.error == 0, "slots that never come are no failure of the file's");
    CHECK(waited > 1.8 && waited < 10, "the wait for them ends after two seconds");
    CHECK(w.hold.n_slots == 0 && w.hold.pending == 0, "and nothing is held");
    w.n = 1;
    acquire(&w);
    CHECK(w.error == 0, "one slot is still to be had");
    end(&w, 1);
}

static void nobody_to_wait_for(void) {
    waiter none;
    begin(3, &none, 0);
    int32_t slots[4];
    gp_failure failure;
    const double before = seconds(CLOCK_MONOTONIC);
    CHECK(model_acquire(pager, &owner, 0, (int32_t[]) { 0, 1, 2, 3 }, 4, 1, slots, &failure) == -EBUSY,
          "four experts do not fit into three slots");
    CHECK(seconds(CLOCK_MONOTONIC) - before < 1, "and no waiting would help");
    model_use(&m, pager, &owner, 0, (int32_t[]) { 0, 1, 2 }, 3, 1);
    end(&none, 0);
}

int main(void) {
    check_begin();
    several_wait_without_spinning();
    waiting_evicts_nobody();
    slots_being_read_are_waited_for();
    hits_do_not_wait();
    nobody_to_wait_for();
    waiting_ends();
    return 0;
}
