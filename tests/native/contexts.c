/* Several contexts, each in its own thread, on one arena that is too small for all: every one of them gets its turn and
 * the right bytes, and what one computes with no other writes to. */
#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>

#include "check.h"
#include "fake_os.h"
#include "model.h"

enum { MOST = 12 };

static model m;
static gp_pager *pager;
static atomic_bool is_over;     /* ends contexts before they have had all their turns */

typedef struct {
    pthread_t thread;
    gp_hold   hold;
    uint32_t  n_turns, n_experts, n_tokens;
    bool      goes_in_order;    /* layer by layer, as a graph does; otherwise anywhere */
    unsigned  n_busy;
} context;

static bool slots_hold(uint32_t layer, const int32_t *experts, const int32_t *slots, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) {
        if (!model_slot_holds(&m, pager, (uint32_t) slots[i], layer, experts[i])) {
            return false;
        }
    }
    return true;
}

static void *compute(void *data) {
    context *c = data;
    for (uint32_t turn = 0; turn < c->n_turns && !atomic_load(&is_over); turn++) {
        const uint32_t layer = c->goes_in_order ? turn % m.shape.n_layers : fake_random(m.shape.n_layers);
        int32_t experts[MOST], slots[MOST];
        gp_failure failure;
        model_draw(&m, experts, c->n_experts);
        const int error = model_acquire(pager, &c->hold, layer, experts, c->n_experts, c->n_tokens, slots, &failure);
        if (error == -EBUSY) {
            c->n_busy++;
            continue;
        }
        CHECK(error == 0, "the experts come");
        CHECK(slots_hold(layer, experts, slots, c->n_experts), "the slots hold them");
        sched_yield();
        CHECK(slots_hold(layer, experts, slots, c->n_experts), "also a while later: nobody writes to slots in use");
        gp_hold_release(pager, &c->hold);
    }
    return NULL;
}

static void run(context *contexts, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) {
        CHECK(gp_hold_open(&contexts[i].hold, pager) == 0, "a hold opens");
    }
    for (uint32_t i = 0; i < n; i++) {
        CHECK(pthread_create(&contexts[i].thread, NULL, compute, &contexts[i]) == 0, "the test has threads");
    }
    for (uint32_t i = 0; i < n; i++) {
        pthread_join(contexts[i].thread, NULL);
        gp_hold_close(&contexts[i].hold, pager);
    }
    model_check_invariants(pager);
}

static void two_on_few_slots(model_shape shape) {
    model_make(&m, shape);
    pager = model_open(&m);
    fake_set_weather((fake_weather) { .delay_us = 60, .short_one_in = 6, .interrupted_one_in = 9, .is_ragged = true });
    context contexts[] = { { .n_turns = 250, .n_experts = 3, .n_tokens = 1 },
                           { .n_turns = 250, .n_experts = 2, .n_tokens = 1, .goes_in_order = true } };
    run(contexts, 2);
    CHECK(contexts[0].n_busy + contexts[1].n_busy == 0, "both get their turn");
    gp_pager_close(pager);
    model_end(&m);
}

/* Slots for one at a time, and no pause between a release and the next demand: as in a graph, where the next layer's
 * router was computed before the release. */
static void neither_starves(void) {
    model_make(&m, (model_shape) { .n_slots = 3, .n_used = 3 });
    pager = model_open(&m);
    fake_set_weather((fake_weather) { .delay_us = 200 });
    context greedy = { .n_turns = UINT32_MAX, .n_experts = 3, .n_tokens = 1 };
    context modest = { .n_turns = 40, .n_experts = 3, .n_tokens = 1 };
    CHECK(gp_hold_open(&greedy.hold, pager) == 0 && gp_hold_open(&modest.hold, pager) == 0, "two holds open");
    CHECK(pthread_create(&greedy.thread, NULL, compute, &greedy) == 0, "the test has threads");
    compute(&modest);
    atomic_store(&is_over, true);
    pthread_join(greedy.thread, NULL);
    atomic_store(&is_over, false);
    CHECK(modest.n_busy == 0 && greedy.n_busy == 0, "a context that waits gets the slots when they are released");
    gp_hold_close(&greedy.hold, pager);
    gp_hold_close(&modest.hold, pager);
    gp_pager_close(pager);
    model_end(&m);
}

/* Room for the layer that each computes and for one read ahead: all plan and submit read-ahead all the time. */
static void batches_side_by_side(void) {
    model_make(&m, (model_shape) { .n_layers = 8, .n_experts = MOST, .n_slots = 5 * MOST, .read_ahead = true });
    pager = model_open(&m);
    context contexts[] = { { .n_turns = 100, .n_experts = MOST, .n_tokens = 20 },
                           { .n_turns = 100, .n_experts = MOST, .n_tokens = 20 },
                           { .n_turns = 100, .n_experts = MOST, .n_tokens = 20 } };
    run(contexts, 3);
    CHECK(contexts[0].n_busy + contexts[1].n_busy + contexts[2].n_busy == 0, "all get their turn");
    gp_pager_close(pager);
    model_end(&m);
}

static void batches_beside_decoding(void) {
    model_make(&m, (model_shape) { .n_layers = 4, .n_experts = MOST, .n_slots = 30, .read_ahead = true, .n_classes = 1,
                                   .policy = "lfru" });
    pager = model_open(&m);
    fake_set_weather((fake_weather) { .delay_us = 60, .short_one_in = 6 });
    context contexts[] = { { .n_turns = 60, .n_experts = MOST, .n_tokens = 20, .goes_in_order = true },
                           { .n_turns = 60, .n_experts = MOST, .n_tokens = 20 },
                           { .n_turns = 250, .n_experts = 2, .n_tokens = 1, .goes_in_order = true } };
    run(contexts, 3);
    CHECK(contexts[0].n_busy + contexts[1].n_busy + contexts[2].n_busy == 0, "all get their turn");
    gp_pager_close(pager);
    model_end(&m);
}

/* What the user interface asks for while tokens are made. */
static void *watch(void *data) {
    (void) data;
    while (!atomic_load(&is_over)) {
        gp_counters counters[MODEL_LAYERS];
        uint8_t resident[MOST];
        gp_failure failure;
        gp_pager_counters(pager, counters);
        CHECK(gp_pager_resident(pager, 1, resident) == 0, "the layer exists");
        const int error = gp_pager_pin(pager, 1, (int32_t[]) { 5 }, 1, NULL, NULL, &failure);
        CHECK(error == 0 || error == -EBUSY, "an expert can be pinned beside decoding");
        gp_pager_count_left_alone(pager, 0);
        gp_pager_unpin_all(pager);
    }
    return NULL;
}

static void watched_and_pinned_meanwhile(void) {
    model_make(&m, (model_shape) { .n_experts = MOST, .n_slots = 16 });
    pager = model_open(&m);
    pthread_t watcher;
    CHECK(pthread_create(&watcher, NULL, watch, NULL) == 0, "the test has threads");
    context contexts[] = { { .n_turns = 150, .n_experts = 3, .n_tokens = 1 },
                           { .n_turns = 150, .n_experts = 3, .n_tokens = 1 } };
    run(contexts, 2);
    atomic_store(&is_over, true);
    pthread_join(watcher, NULL);
    atomic_store(&is_over, false);
    gp_pager_close(pager);
    model_end(&m);
}

int main(void) {
    check_begin();
    two_on_few_slots((model_shape) { .n_slots = 4, .n_used = 3 });
    two_on_few_slots((model_shape) { .n_slots = 4, .n_used = 3, .n_files = 2, .n_classes = 2, .n_readers = 5 });
    two_on_few_slots((model_shape) { .n_slots = 3, .n_used = 3, .offset_align = 512, .memory_align = 512 });
    neither_starves();
    batches_side_by_side();
    batches_beside_decoding();
    watched_and_pinned_meanwhile();
    return 0;
}
