/* Waves: every expert comes once, through however few slots, in the order that keeps whoever computes busy; slots turn over as
 * threads are done with them; and contexts that share the slots wait for each other, never for good. */
#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>

#include "check.h"
#include "fake_os.h"
#include "model.h"

enum { EXPERTS = 12, THREADS = 3 };

static const int32_t all[EXPERTS] = { 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 };
static const uint32_t once[EXPERTS] = { 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1 };

static model m;
static gp_pager *pager;
static gp_hold hold, other;

static void begin(model_shape shape) {
    shape.n_experts = EXPERTS;
    shape.n_used = shape.n_used ? shape.n_used : 1;
    model_make(&m, shape);
    pager = model_open(&m);
    CHECK(gp_hold_open(&hold, pager) == 0 && gp_hold_open(&other, pager) == 0, "two holds open");
}

static void end(void) {
    model_check_invariants(pager);
    gp_hold_close(&hold, pager);
    gp_hold_close(&other, pager);
    gp_pager_close(pager);
    model_end(&m);
}

static void pause_us(long us) {
    nanosleep(&(struct timespec) { .tv_nsec = us * 1000 }, NULL);
}

static gp_counters counters_of(uint32_t layer) {
    gp_counters counters[MODEL_LAYERS];
    gp_pager_counters(pager, counters);
    return counters[layer];
}

static uint64_t expert_bytes(uint32_t layer) {
    uint64_t bytes = 0;
    for (uint32_t s = 0; s < m.shape.n_slices; s++) {
        bytes += m.layers[layer].slices[s].slice_bytes;
    }
    return bytes;
}

static const gp_slot *slot_of(const gp_hold *h, uint32_t i) {
    const uint32_t first = pager->classes[m.layers[h->layer].shape_class].first;
    return &pager->slots[first + (uint32_t) atomic_load(&h->wanted[i].slot)];
}

static gp_demand demand_of(uint32_t layer, const int32_t *experts, uint32_t n, uint32_t n_tokens) {
    return (gp_demand) { .layer = layer, .experts = experts, .counts = once, .n_experts = n, .n_tokens = n_tokens };
}

static void start(gp_hold *h, const gp_demand *demand) {
    gp_failure failure;
    CHECK(gp_wave_begin(pager, h, demand, &failure) == 0 && failure.error == 0, "a wave begins");
    model_check_invariants(pager);
}

static void ends_well(gp_hold *h) {
    gp_failure failure;
    CHECK(gp_wave_end(pager, h, &failure) == 0 && failure.error == 0, "a wave ends well");
    CHECK(h->n_open == 0 && h->n_wanted == 0, "and holds nothing");
    gp_hold_release(pager, h);
    model_check_invariants(pager);
}

static bool has(const gp_hold *h, uint32_t i) {
    return gp_wave_has(pager, h, i, (1u << m.shape.n_slices) - 1);
}

/* Waits for the ith in the thread that decodes. */
static void wait_for(gp_hold *h, uint32_t i) {
    for (;;) {
        const unsigned n_arrived = gp_wave_n_arrived(h);
        if (has(h, i)) {
            return;
        }
        CHECK(!gp_wave_stops(h, true) && gp_wave_wait(pager, h, n_arrived, true), "nothing ends the wait");
    }
}

/* ---- threads that compute ------------------------------------------------------------------------------------------ */

/* As those of a graph do: each takes what is there, and sleeps when there is nothing. */
typedef struct {
    gp_hold    *hold;
    uint32_t    n_experts;
    uint32_t    most_us;                /* that it takes to compute one */
    atomic_bool is_taken[EXPERTS];
    atomic_uint n_done;
    atomic_bool is_wrong;               /* some bytes were not the expert's: those of a read that failed, say */
} crew;

static bool compute_one(crew *c) {
    for (uint32_t i = 0; i < c->n_experts; i++) {
        if (!has(c->hold, i) || atomic_exchange(&c->is_taken[i], true)) {
            continue;
        }
        const int32_t in = atomic_load(&c->hold->wanted[i].slot), expert = c->hold->wanted[i].expert;
        CHECK(in >= 0, "a slot comes in time");
        const uint32_t slot = (uint32_t) in;
        bool is_right = model_slot_holds(&m, pager, slot, c->hold->layer, expert);
        if (c->most_us > 0) {
            pause_us(fake_random(c->most_us));
            is_right &= model_slot_holds(&m, pager, slot, c->hold->layer, expert);
        }
        if (!is_right) {
            atomic_store(&c->is_wrong, true);
        }
        gp_wave_done(pager, c->hold, i);
        if (atomic_fetch_add(&c->n_done, 1) + 1 == c->n_experts) {
            gp_wave_tell(pager, c->hold);
        }
        return true;
    }
    return false;
}

static void compute(crew *c, bool is_decoding) {
    while (!gp_wave_stops(c->hold, is_decoding)) {
        const unsigned n_arrived = gp_wave_n_arrived(c->hold);
        if (compute_one(c)) {
            continue;
        }
        if (atomic_load(&c->n_done) == c->n_experts || !gp_wave_wait(pager, c->hold, n_arrived, is_decoding)) {
            break;
        }
    }
}

static void *help(void *data) {
    compute(data, false);
    return NULL;
}

static int compute_wave(gp_hold *h, const gp_demand *demand, uint32_t n_threads, uint32_t most_us, gp_failure *failure) {
    crew c = { .hold = h, .n_experts = demand->n_experts, .most_us = most_us };
    pthread_t helpers[THREADS];
    int error = gp_wave_begin(pager, h, demand, failure);
    if (error == 0) {
        for (uint32_t i = 1; i < n_threads; i++) {
            CHECK(pthread_create(&helpers[i], NULL, help, &c) == 0, "the test has threads");
        }
        compute(&c, true);
        for (uint32_t i = 1; i < n_threads; i++) {
            pthread_join(helpers[i], NULL);
        }
        error = gp_wave_end(pager, h, failure);
    }
    CHECK(error != 0 || atomic_load(&c.n_done) == demand->n_experts, "a wave that ends well has brought every expert");
    CHECK(error != 0 || !atomic_load(&c.is_wrong), "whose bytes lay in its slot as long as it was computed with");
    gp_hold_release(pager, h);
    return error;
}

static void comes(gp_hold *h, const gp_demand *demand, uint32_t n_threads, uint32_t most_us) {
    gp_failure failure;
    CHECK(compute_wave(h, demand, n_threads, most_us, &failure) == 0 && failure.error == 0, "the experts come");
}

/* ---- one context --------------------------------------------------------------------------------------------------- */

static void any_number_of_slots_will_do(void) {
    for (uint32_t n_slots = 1; n_slots <= 2 * EXPERTS; n_slots += n_slots < 5 ? 1 : 4) {
        for (uint32_t n_threads = 1; n_threads <= THREADS; n_threads++) {
            begin((model_shape) { .n_slots = n_slots, .n_layers = 2, .piece_bytes = 1024 });
            fake_set_weather((fake_weather) { .delay_us = 30, .short_one_in = 7 });
            for (int round = 0; round < 3; round++) {
                for (uint32_t l = 0; l < 2; l++) {
                    const uint64_t before = counters_of(l).bytes_read, missed = counters_of(l).misses;
                    const gp_demand demand = demand_of(l, all, EXPERTS, 6);
                    comes(&hold, &demand, n_threads, 0);
                    model_check_invariants(pager);
                    CHECK(counters_of(l).bytes_read - before == (counters_of(l).misses - missed) * expert_bytes(l),
                          "what was missed is read once, and nothing else");
                }
            }
            CHECK(counters_of(0).hits + counters_of(0).misses == 3 * EXPERTS, "every expert of every batch is counted");
            CHECK(counters_of(0).resident + counters_of(1).resident <= n_slots, "in the slots there are");
            end();
        }
    }
}

/* A hit that stays until it is computed with: others of the same wave are not read into its slot. */
static void hits_are_held_before_misses_take_slots(void) {
    begin((model_shape) { .n_slots = 3, .n_layers = 1 });
    model_use(&m, pager, &hold, 0, (int32_t[]) { 9, 10, 11 }, 3, 1);
    const gp_demand demand = demand_of(0, all, EXPERTS, 6);
    comes(&hold, &demand, 1, 0);
    CHECK(counters_of(0).hits == 3 && counters_of(0).misses == 3 + EXPERTS - 3, "what was there at the beginning is a hit");
    CHECK(counters_of(0).bytes_read == EXPERTS * expert_bytes(0), "and is read no second time");
    end();
}

static void the_order_keeps_threads_busy(void) {
    begin((model_shape) { .n_slots = 2 * EXPERTS, .n_layers = 1, .piece_bytes = 64 << 10 });
    model_use(&m, pager, &hold, 0, (int32_t[]) { 4, 8 }, 2, 1);
    fake_hold_reads();
    const gp_demand way = demand_of(0, (int32_t[]) { 7, 2 }, 2, 1);
    start(&other, &way);
    const int32_t experts[] = { 0, 2, 4, 6, 7, 8, 9, 3 };
    const uint32_t counts[] = { 1, 1, 1, 5, 9, 1, 3, 5 };
    const gp_demand demand = { .layer = 0, .experts = experts, .counts = counts, .n_experts = 8, .n_tokens = 9 };
    start(&hold, &demand);
    static const int32_t expected[] = { 4, 8, 2, 7, 6, 3, 9, 0 };
    for (uint32_t i = 0; i < 8; i++) {
        CHECK(hold.wanted[i].expert == expected[i],
              "what is in slots, what is on its way, then by rows; in the batch's order where they are equal");
        CHECK(experts[hold.wanted[i].at] == expected[i] && counts[hold.wanted[i].at] == hold.wanted[i].count,
              "each with its place in the demand");
        CHECK(has(&hold, i) == (i < 2), "only what was in slots is there");
    }
    CHECK(counters_of(0).hits == 2 && counters_of(0).misses == 2 + 2 + 6, "what is on its way is no hit");
    fake_let_reads_go();
    for (uint32_t i = 0; i < 8; i++) {
        wait_for(&hold, i);
        gp_wave_done(pager, &hold, i);
    }
    ends_well(&hold);
    CHECK(counters_of(0).bytes_read == 8 * expert_bytes(0), "what is on its way is not read again");
    gp_hold_release(pager, &other);
    end();
}

/* Slot by slot: who is done with one has the next read into it. */
static void slots_turn_over(void) {
    begin((model_shape) { .n_slots = 2, .n_layers = 2, .n_used = 2 });     /* too few to keep any */
    const gp_demand demand = demand_of(0, all, 5, 6);
    start(&hold, &demand);
    CHECK(hold.n_open == 2 && hold.next == 2, "as many as there are slots");
    for (uint32_t i = 0; i < 5; i++) {
        wait_for(&hold, i);
        CHECK(slot_of(&hold, i)->users == UINT64_C(1) << hold.bit, "held");
        model_check_invariants(pager);
        gp_wave_done(pager, &hold, i);
        model_check_invariants(pager);
        const uint32_t next = i + 3 < 5 ? i + 3 : 5;
        CHECK(hold.next == next && hold.n_open == next - 1 - i, "the next is on its way at once");
    }
    ends_well(&hold);
    end();
}

/* Whoever wants the least number of slots there can be, and one at a time. */
static void a_slice_is_enough_to_begin(void) {
    begin((model_shape) { .n_slots = 1, .n_layers = 1, .n_readers = 1, .piece_bytes = 64 << 10 });
    fake_hold_reads();
    fake_let_some_go(1);
    const gp_demand demand = demand_of(0, all, 1, 1);
    start(&hold, &demand);
    for (bool is_there = false; !is_there;) {
        const unsigned n_arrived = gp_wave_n_arrived(&hold);
        is_there = gp_wave_has(pager, &hold, 0, 1);
        CHECK(is_there || gp_wave_wait(pager, &hold, n_arrived, true), "the first slice comes");
    }
    CHECK(!gp_wave_has(pager, &hold, 0, 2) && !gp_wave_has(pager, &hold, 0, 3), "the second has not");
    CHECK(memcmp(gp_wave_slice(pager, &hold, 0, 0), model_truth(&m, 0, 0, 0), m.layers[0].slices[0].slice_bytes) == 0,
          "and lies where it is said to");
    fake_let_reads_go();
    wait_for(&hold, 0);
    gp_wave_done(pager, &hold, 0);
    ends_well(&hold);
    end();
}

/* ---- kept and transient -------------------------------------------------------------------------------------------- */

/* What a large batch reads passes through so many slots; what decoding has kept stays beside them. */
static void a_batch_leaves_the_kept_ones(void) {
    begin((model_shape) { .n_slots = 40, .n_layers = MODEL_LAYERS, .n_used = 2 });
    for (int token = 0; token < 30; token++) {
        for (uint32_t l = 0; l < MODEL_LAYERS; l++) {
            model_use(&m, pager, &hold, l, (int32_t[]) { token % EXPERTS, (token + 1) % EXPERTS }, 2, 1);
        }
    }
    gp_class *c = &pager->classes[0];
    CHECK(c->n_free == 0 && c->n_transient == 0, "every slot holds what a token wanted");
    pthread_mutex_lock(&pager->lock);
    c->transient_limit = 3;     /* a real one is larger than all there is here */
    c->batch_share = 4;
    pthread_mutex_unlock(&pager->lock);
    uint32_t n_kept = 0;
    const gp_demand demand = demand_of(0, all, EXPERTS, 6);
    start(&hold, &demand);
    CHECK(c->n_transient <= 3, "no more are pushed out than the limit says");
    CHECK(hold.next < EXPERTS, "what is missing comes later");
    for (uint32_t i = 0; i < EXPERTS; i++) {
        wait_for(&hold, i);
        gp_wave_done(pager, &hold, i);
        CHECK(c->n_transient <= 3, "as long as there is something to wait for");
    }
    ends_well(&hold);
    for (uint32_t l = 0; l < MODEL_LAYERS; l++) {
        n_kept += pager->layers[l].kept;
    }
    CHECK(counters_of(0).misses > EXPERTS && n_kept >= 40 - 3, "the others are where they were");
    end();
}

/* A wave that holds nothing has nothing to wait for: it takes a kept one, whatever the limit. */
static void who_holds_nothing_takes_any_slot(void) {
    begin((model_shape) { .n_slots = 4, .n_layers = 4, .n_used = 1 });
    for (uint32_t l = 0; l < 4; l++) {
        model_use(&m, pager, &hold, l, (int32_t[]) { 1 }, 1, 1);
    }
    pthread_mutex_lock(&pager->lock);
    pager->classes[0].transient_limit = 0;
    pthread_mutex_unlock(&pager->lock);
    const gp_demand demand = demand_of(0, (int32_t[]) { 3, 4, 5 }, 3, 6);
    start(&hold, &demand);
    CHECK(hold.n_open == 1 && pager->classes[0].n_transient == 1, "one, and no more than one");
    gp_hold_release(pager, &hold);
    comes(&hold, &demand, 1, 0);
    end();
}

static void the_most_named_are_kept(void) {
    begin((model_shape) { .n_slots = 36, .n_layers = 4, .n_used = 2 });
    const gp_class *c = &pager->classes[0];
    CHECK(c->batch_share > 0 && c->batch_share < EXPERTS, "a layer may keep some of a batch's experts");
    uint32_t counts[EXPERTS];
    for (uint32_t i = 0; i < EXPERTS; i++) {
        counts[i] = 1 + (i * 5) % EXPERTS;      /* all different */
    }
    const gp_demand demand = { .layer = 1, .experts = all, .counts = counts, .n_experts = EXPERTS, .n_tokens = 50 };
    comes(&hold, &demand, 2, 0);
    for (uint32_t i = 0; i < EXPERTS; i++) {
        const int32_t index = pager->layers[1].slot_of[i];
        CHECK(index >= 0, "there was room for all");
        CHECK(pager->slots[index].is_transient == (counts[i] <= EXPERTS - c->batch_share), "the others are transient");
    }
    CHECK(pager->layers[1].kept == c->batch_share, "as many as a layer may keep");
    end();
}

/* They came in no order of worth: read ahead, all of them. */
static void the_most_named_of_what_is_there_are_kept(void) {
    begin((model_shape) { .n_slots = 36, .n_layers = 4, .n_used = 2, .read_ahead = true });
    const gp_class *c = &pager->classes[0];
    const gp_demand before = demand_of(0, all, EXPERTS, 6);
    comes(&hold, &before, 1, 0);
    model_settle(pager);
    CHECK(pager->layers[1].counters.resident == EXPERTS && pager->layers[1].kept == 0, "the next layer was read ahead");
    const uint32_t counts[EXPERTS] = { 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12 };
    const gp_demand demand = { .layer = 1, .experts = all, .counts = counts, .n_experts = EXPERTS, .n_tokens = 50 };
    comes(&hold, &demand, 2, 0);
    model_settle(pager);
    CHECK(counters_of(1).hits == EXPERTS && pager->layers[1].kept == c->batch_share, "as many as a layer may keep");
    for (uint32_t i = 0; i < EXPERTS; i++) {
        CHECK(pager->slots[pager->layers[1].slot_of[i]].is_transient == (counts[i] <= EXPERTS - c->batch_share),
              "those that most rows wanted");
    }
    end();
}

static void too_few_slots_keep_nothing_of_a_batch(void) {
    begin((model_shape) { .n_slots = 7, .n_layers = 4, .n_used = 2 });
    CHECK(pager->classes[0].share < 2, "fewer slots than one token wants of all layers");
    const gp_demand demand = demand_of(0, all, EXPERTS, 6);
    comes(&hold, &demand, 2, 0);
    CHECK(pager->classes[0].n_transient == 7 && pager->layers[0].kept == 0, "all that a batch has left there is transient");
    end();
}

/* ---- two contexts -------------------------------------------------------------------------------------------------- */

typedef struct {
    gp_hold  *hold;
    uint32_t  n_turns, n_threads, most_us, seed;
    pthread_t thread;
} context;

static void *take_turns(void *data) {
    const context *c = data;
    for (uint32_t turn = 0; turn < c->n_turns; turn++) {
        int32_t experts[EXPERTS];
        const uint32_t n = 1 + fake_random(EXPERTS), layer = fake_random(m.shape.n_layers);
        model_draw(&m, experts, n);
        const gp_demand demand = demand_of(layer, experts, n, 1 + fake_random(2) * 5);
        comes(c->hold, &demand, c->n_threads, c->most_us);
    }
    return NULL;
}

static void two_contexts_on_few_slots(void) {
    for (uint32_t n_slots = 1; n_slots <= 3; n_slots++) {
        for (uint32_t n_layers = 1; n_layers <= 3; n_layers += 2) {
            begin((model_shape) { .n_slots = n_slots, .n_layers = n_layers, .piece_bytes = 1024, .read_ahead = true });
            fake_set_weather((fake_weather) { .delay_us = 20, .short_one_in = 9 });
            context contexts[] = { { .hold = &hold, .n_turns = 30, .n_threads = 3, .most_us = 40 },
                                   { .hold = &other, .n_turns = 30, .n_threads = 2, .most_us = 200 } };
            for (int i = 0; i < 2; i++) {
                CHECK(pthread_create(&contexts[i].thread, NULL, take_turns, &contexts[i]) == 0, "the test has threads");
            }
            for (int i = 0; i < 2; i++) {
                pthread_join(contexts[i].thread, NULL);
            }
            model_settle(pager);
            end();
        }
    }
}

static void *done_with_first(void *data) {
    (void) data;
    pause_us(20000);        /* whoever decodes sleeps by now */
    gp_wave_done(pager, &hold, 0);
    pause_us(20000);
    gp_wave_done(pager, &other, 0);
    return NULL;
}

/* The only slot: a helper is done with it, but another context is not. Whoever decodes had something to wait for, and now waits
 * for a slot. */
static void a_slot_that_another_still_uses_is_waited_for(void) {
    begin((model_shape) { .n_slots = 1, .n_layers = 1 });
    const gp_demand two = demand_of(0, (int32_t[]) { 5, 6 }, 2, 1), one = demand_of(0, (int32_t[]) { 5 }, 1, 1);
    start(&hold, &two);
    wait_for(&hold, 0);
    start(&other, &one);
    CHECK(hold.n_open == 1 && other.n_open == 1, "both hold the slot");
    pthread_t helper;
    CHECK(pthread_create(&helper, NULL, done_with_first, NULL) == 0, "the test has threads");
    wait_for(&hold, 1);
    pthread_join(helper, NULL);
    gp_wave_done(pager, &hold, 1);
    ends_well(&hold);
    ends_well(&other);
    end();
}

static int bring_what_is_wanted_next(void *data, uint32_t file, uint64_t offset, const void *memory, uint64_t bytes) {
    (void) data, (void) file, (void) offset, (void) memory, (void) bytes;
    int32_t slot;
    gp_failure failure;
    gp_hold_release(pager, &other);
    CHECK(model_acquire(pager, &other, 0, (int32_t[]) { 6 }, 1, 1, &slot, &failure) == 0, "another reads it");
    return GP_SAME;
}

/* What another context has read meanwhile is there at once, and nothing will arrive: whoever waits must look. */
static void what_another_has_read_is_seen(void) {
    begin((model_shape) { .n_slots = 2, .n_layers = 2 });
    gp_pager_compare_with(pager, bring_what_is_wanted_next, NULL);
    model_use(&m, pager, &hold, 1, (int32_t[]) { 1 }, 1, 1);
    fake_file_touch(m.paths[0]);
    const gp_demand away = demand_of(1, (int32_t[]) { 1 }, 1, 1), two = demand_of(0, (int32_t[]) { 5, 6 }, 2, 1);
    start(&other, &away);
    start(&hold, &two);
    wait_for(&hold, 0);
    gp_wave_done(pager, &hold, 0);
    CHECK(hold.n_open == 1 && hold.next == 1, "it must be compared before its slot may go");
    wait_for(&hold, 1);
    gp_wave_done(pager, &hold, 1);
    ends_well(&hold);
    gp_hold_release(pager, &other);
    end();
}

/* A context that holds all slots may wait for this very wave, in a callback, say: after a while the rest does without. */
static void who_gets_no_slot_does_without(void) {
    begin((model_shape) { .n_slots = 1, .n_layers = 2 });
    const gp_demand theirs = demand_of(1, all, 1, 1), three = demand_of(0, (int32_t[]) { 5, 6, 7 }, 3, 6);
    start(&other, &theirs);
    start(&hold, &three);
    CHECK(hold.next == 0 && hold.n_open == 0, "there is no slot");
    const uint64_t begun_ns = fake_os.now_ns();
    for (uint32_t i = 0; i < 3; i++) {
        wait_for(&hold, i);
        CHECK(atomic_load(&hold.wanted[i].slot) == GP_NO_SLOT && !gp_wave_slice(pager, &hold, i, 0), "nor will there be");
        model_check_invariants(pager);
        gp_wave_done(pager, &hold, i);
    }
    CHECK(fake_os.now_ns() - begun_ns >= UINT64_C(1900000000), "it has waited for longer than anybody computes a layer");
    ends_well(&hold);
    CHECK(counters_of(0).left_alone == 1 && counters_of(0).bytes_read == 0, "they are counted as left alone, and not read");
    CHECK(counters_of(0).stall_ns > 0, "and the time as a stall");
    wait_for(&other, 0);
    gp_wave_done(pager, &other, 0);
    ends_well(&other);
    comes(&hold, &three, 2, 0);
    end();
}

/* ---- ends ---------------------------------------------------------------------------------------------------------- */

static void *let_reads_go(void *data) {
    (void) data;
    pause_us(30000);
    fake_let_reads_go();
    return NULL;
}

/* Two experts are being read, and the first read fails: the wave stops at once, and its slots go once all is quiet. */
static void release_waits_for_what_is_read_after_a_failure(void) {
    begin((model_shape) { .n_slots = 4, .n_layers = 1, .n_readers = 1, .piece_bytes = 64 << 10 });
    fake_fail(FAKE_FILE_READ, 1, -EIO);
    fake_hold_reads();
    const gp_demand demand = demand_of(0, (int32_t[]) { 5, 6 }, 2, 1);
    start(&hold, &demand);
    fake_let_some_go(1);
    while (!gp_wave_stops(&hold, true)) {
        const unsigned n_arrived = gp_wave_n_arrived(&hold);
        if (!gp_wave_stops(&hold, true)) {
            CHECK(gp_wave_wait(pager, &hold, n_arrived, true), "no watch ends the wait");
        }
    }
    gp_failure failure;
    CHECK(gp_wave_end(pager, &hold, &failure) == -EIO && failure.error == -EIO, "the wave fails");
    CHECK(hold.n_open == 2 && hold.n_pending > 0, "and gives nothing back by itself");
    model_check_invariants(pager);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, let_reads_go, NULL) == 0, "the test has threads");
    gp_hold_release(pager, &hold);
    CHECK(pager->n_in_flight == 0 && hold.n_open == 0, "its release waits for all of its reads");
    pthread_join(thread, NULL);
    model_check_invariants(pager);
    model_use(&m, pager, &hold, 0, (int32_t[]) { 5, 6 }, 2, 1);
    end();
}

/* One of three has failed. Whoever was at another is done with it later, and others may still compute with it. */
static void nothing_goes_on_after_a_failure(void) {
    begin((model_shape) { .n_slots = 2, .n_layers = 2, .n_used = 2, .n_readers = 1, .piece_bytes = 64 << 10 });
    fake_fail_at(m.paths[0], model_offset(&m, 0, 0, 6), -EIO);
    const gp_demand demand = demand_of(0, (int32_t[]) { 5, 6, 7 }, 3, 6);
    start(&hold, &demand);
    wait_for(&hold, 0);
    while (!gp_wave_stops(&hold, true)) {
        pause_us(100);
    }
    gp_wave_done(pager, &hold, 0);
    CHECK(hold.n_open == 2 && hold.next == 2, "5: nothing is given back, and nothing more is read");
    model_check_invariants(pager);
    gp_failure failure;
    CHECK(gp_wave_end(pager, &hold, &failure) == -EIO, "the wave fails");
    gp_hold_release(pager, &hold);
    CHECK(model_is_resident(pager, &m, 0, 5) && !model_is_resident(pager, &m, 0, 6), "what could be read is kept");
    end();
}

static void the_first_failure_wins(void) {
    begin((model_shape) { .n_slots = 4, .n_layers = 1, .n_readers = 1, .piece_bytes = 64 << 10 });
    fake_fail_at(m.paths[0], model_offset(&m, 0, 1, 6), -EIO);
    fake_fail(FAKE_FILE_READ, 1, -ENXIO);
    const gp_demand demand = demand_of(0, (int32_t[]) { 5, 6, 7 }, 3, 5);
    gp_failure failure;
    CHECK(compute_wave(&hold, &demand, 3, 50, &failure) == -ENXIO && failure.error == -ENXIO, "what failed first is told");
    CHECK(failure.offset_bytes == model_offset(&m, 0, 0, 5), "with its place");
    CHECK(!model_is_resident(pager, &m, 0, 5) && !model_is_resident(pager, &m, 0, 6), "neither is kept");
    fake_fail_at(m.paths[0], 0, 0);
    comes(&hold, &demand, 3, 0);
    end();
}

/* Experts of a large batch, through few slots, one of which cannot be read: threads end, nothing hangs, the next one works. */
static void a_bad_block_in_a_long_wave(void) {
    for (uint32_t n_slots = 1; n_slots <= 4; n_slots++) {
        begin((model_shape) { .n_slots = n_slots, .n_layers = 2, .piece_bytes = 512 });
        fake_set_weather((fake_weather) { .delay_us = 30 });
        const gp_demand demand = demand_of(0, all, EXPERTS, 6);
        for (int32_t bad = 0; bad < EXPERTS; bad += 3) {
            fake_fail_at(m.paths[0], model_offset(&m, 0, 2, bad) + 10, -EIO);
            gp_failure failure;
            model_use(&m, pager, &hold, 1, all, EXPERTS, 6);
            CHECK(compute_wave(&hold, &demand, 3, 30, &failure) == -EIO && failure.error == -EIO, "it fails");
            CHECK(hold.n_open == 0 && !model_is_resident(pager, &m, 0, bad), "and what could not be read is not kept");
            model_check_invariants(pager);
            fake_fail_at(m.paths[0], 0, 0);
            comes(&hold, &demand, 3, 0);
        }
        end();
    }
}

/* ---- the watch ----------------------------------------------------------------------------------------------------- */

static atomic_bool shall_stop;

static bool ask(void *data) {
    (void) data;
    return atomic_load(&shall_stop);
}

static void *stop_soon(void *data) {
    (void) data;
    pause_us(50000);
    atomic_store(&shall_stop, true);
    return NULL;
}

static gp_watch watch;

static void begin_watched(model_shape shape) {
    begin(shape);
    atomic_store(&shall_stop, false);
    watch = (gp_watch) { .os = &fake_os, .ask = ask };
    hold.watch = &watch;
}

/* All threads of a wave come to an end although nothing ever arrives. */
static void reads_that_do_not_come_can_be_stopped(void) {
    begin_watched((model_shape) { .n_slots = 3, .n_layers = 2, .piece_bytes = 64 << 10 });
    fake_hold_reads();
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, stop_soon, NULL) == 0, "the test has threads");
    const gp_demand demand = demand_of(0, all, EXPERTS, 6);
    gp_failure failure;
    CHECK(compute_wave(&hold, &demand, 3, 0, &failure) == -EINTR && failure.error == -EINTR, "it is stopped");
    pthread_join(thread, NULL);
    CHECK(hold.n_open == 0 && pager->n_in_flight == 3, "what is being read is nobody's");
    model_check_invariants(pager);
    fake_let_reads_go();
    model_settle(pager);
    hold.watch = NULL;
    CHECK(counters_of(0).resident == 3, "it comes all the same");
    comes(&hold, &demand, 3, 0);
    end();
}

/* The other context holds all slots, for as long as it likes. */
static void slots_that_do_not_come_free_can_be_stopped(void) {
    begin_watched((model_shape) { .n_slots = 1, .n_layers = 2 });
    const gp_demand theirs = demand_of(1, all, 1, 1), demand = demand_of(0, all, EXPERTS, 6);
    start(&other, &theirs);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, stop_soon, NULL) == 0, "the test has threads");
    gp_failure failure;
    CHECK(compute_wave(&hold, &demand, 3, 0, &failure) == -EINTR && failure.error == -EINTR, "it is stopped");
    pthread_join(thread, NULL);
    model_check_invariants(pager);
    gp_hold_release(pager, &other);
    hold.watch = NULL;
    comes(&hold, &demand, 3, 0);
    end();
}

/* After a failure, while others' reads are waited for. */
static void a_release_can_be_stopped(void) {
    begin_watched((model_shape) { .n_slots = 4, .n_layers = 1, .n_readers = 1, .piece_bytes = 64 << 10 });
    fake_fail(FAKE_FILE_READ, 1, -EIO);
    fake_hold_reads();
    const gp_demand demand = demand_of(0, (int32_t[]) { 5, 6 }, 2, 1);
    start(&hold, &demand);
    fake_let_some_go(1);
    while (!gp_wave_stops(&hold, true)) {
        pause_us(100);
    }
    gp_failure failure;
    CHECK(gp_wave_end(pager, &hold, &failure) == -EIO, "the wave fails");
    atomic_store(&shall_stop, true);
    gp_hold_release(pager, &hold);
    CHECK(hold.n_open == 0 && pager->n_in_flight > 0, "it waits for them no longer than it shall");
    model_check_invariants(pager);
    fake_let_reads_go();
    model_settle(pager);
    CHECK(!model_is_resident(pager, &m, 0, 5), "what has failed is not kept, although nobody waited");
    end();
}

/* Threads may have left something undone: what is there then is no result. Nor does anything go on. */
static void a_stopped_wave_is_no_result(void) {
    begin_watched((model_shape) { .n_slots = 2, .n_layers = 1 });
    const gp_demand demand = demand_of(0, all, 3, 6);
    start(&hold, &demand);
    wait_for(&hold, 0);
    atomic_store(&watch.has_stopped, true);
    gp_wave_done(pager, &hold, 0);
    CHECK(hold.n_open == 2 && hold.next == 2, "5: nothing is given back, and nothing more is read");
    gp_failure failure;
    CHECK(gp_wave_end(pager, &hold, &failure) == -EINTR && failure.error == -EINTR, "it was interrupted");
    gp_hold_release(pager, &hold);
    model_check_invariants(pager);
    hold.watch = NULL;
    end();
}

int main(void) {
    check_begin();
    any_number_of_slots_will_do();
    hits_are_held_before_misses_take_slots();
    the_order_keeps_threads_busy();
    slots_turn_over();
    a_slice_is_enough_to_begin();
    a_batch_leaves_the_kept_ones();
    who_holds_nothing_takes_any_slot();
    the_most_named_are_kept();
    the_most_named_of_what_is_there_are_kept();
    too_few_slots_keep_nothing_of_a_batch();
    two_contexts_on_few_slots();
    a_slot_that_another_still_uses_is_waited_for();
    what_another_has_read_is_seen();
    who_gets_no_slot_does_without();
    release_waits_for_what_is_read_after_a_failure();
    nothing_goes_on_after_a_failure();
    the_first_failure_wins();
    a_bad_block_in_a_long_wave();
    reads_that_do_not_come_can_be_stopped();
    slots_that_do_not_come_free_can_be_stopped();
    a_release_can_be_stopped();
    a_stopped_wave_is_no_result();
    return 0;
}
