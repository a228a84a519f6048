/* While a batch computes, what the next layer will probably want is read, by the evidence of the batch before: once nothing of its
 * own layer is left to be read, into slots whose loss costs nothing, and never a second time; and let go again where it is not
 * wanted after all. What was read in vain is counted, to the byte. */
#define _POSIX_C_SOURCE 200809L
#include <string.h>
#include <time.h>

#include "check.h"
#include "fake_os.h"
#include "model.h"

enum { EXPERTS = 10 };

static const int32_t all[EXPERTS] = { 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 };

static model m;
static gp_pager *pager;
static gp_hold hold;

static void begin(model_shape shape) {
    shape.n_experts = EXPERTS;
    shape.read_ahead = true;
    model_make(&m, shape);
    pager = model_open(&m);
    CHECK(gp_hold_open(&hold, pager) == 0, "a hold opens");
}

static void end(void) {
    model_check_invariants(pager);
    gp_hold_close(&hold, pager);
    gp_pager_close(pager);
    model_end(&m);
}

static gp_counters counters_of(uint32_t layer) {
    gp_counters counters[MODEL_LAYERS];
    gp_pager_counters(pager, counters);
    return counters[layer];
}

static uint32_t resident(uint32_t layer) {
    return counters_of(layer).resident;
}

static void next_layer_is_read(void) {
    begin((model_shape) { .n_slots = 3 * EXPERTS });
    model_use(&m, pager, &hold, 0, all, EXPERTS, 5);
    model_settle(pager);
    CHECK(resident(1) == EXPERTS && resident(2) == 0, "the next layer is read, and no other");
    CHECK(counters_of(1).tokens == 0 && counters_of(1).misses == 0, "nothing is counted as wanted yet");
    const uint64_t bytes_read = counters_of(1).bytes_read;
    model_use(&m, pager, &hold, 1, all, EXPERTS, 5);
    CHECK(counters_of(1).bytes_read == bytes_read, "what was read ahead is not read again");
    CHECK(counters_of(1).hits == EXPERTS, "and is a hit");
    model_settle(pager);
    model_use(&m, pager, &hold, 2, all, EXPERTS, 5);    /* the last: nothing follows */
    model_settle(pager);
    CHECK(counters_of(0).evictions + counters_of(1).evictions == 0, "there was room");
    end();
}

/* The next layer comes before its reads are done: it waits for them, and reads nothing twice. */
static void reads_in_flight_are_joined(void) {
    begin((model_shape) { .n_slots = 3 * EXPERTS });
    fake_set_weather((fake_weather) { .delay_us = 300, .short_one_in = 4 });
    for (int round = 0; round < 5; round++) {
        for (uint32_t l = 0; l < m.shape.n_layers; l++) {
            model_use(&m, pager, &hold, l, all, EXPERTS, 5);
        }
    }
    for (uint32_t l = 0; l < m.shape.n_layers; l++) {
        uint64_t expert_bytes = 0;
        for (uint32_t s = 0; s < m.shape.n_slices; s++) {
            expert_bytes += m.layers[l].slices[s].slice_bytes;
        }
        CHECK(counters_of(l).bytes_read == EXPERTS * expert_bytes, "with room for all, each is read once");
    }
    end();
}

/* Mixed quantisation: the next layer has slots of its own. */
static void next_layer_of_another_class_is_read(void) {
    begin((model_shape) { .n_classes = 2, .n_slots = 2 * EXPERTS });
    model_use(&m, pager, &hold, 0, all, EXPERTS, 5);
    model_settle(pager);
    CHECK(resident(1) == EXPERTS, "the next layer is read, whatever its shape");
    model_use(&m, pager, &hold, 1, all, EXPERTS, 5);
    CHECK(counters_of(1).hits == EXPERTS, "and is a hit");
    end();
}

static void *use_next_layer(void *data) {
    (void) data;
    model_use(&m, pager, &hold, 1, all, EXPERTS, 5);
    return NULL;
}

static void what_is_still_coming_is_a_miss(void) {
    begin((model_shape) { .n_slots = 3 * EXPERTS, .n_readers = 1, .piece_bytes = 64 << 10 });
    fake_hold_reads();
    fake_let_some_go(EXPERTS * 3);      /* the slices of layer 0 */
    model_use(&m, pager, &hold, 0, all, EXPERTS, 5);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, use_next_layer, NULL) == 0, "the test has threads");
    for (uint32_t n_pending = 0; n_pending == 0;) {
        pthread_mutex_lock(&pager->lock);
        n_pending = hold.n_pending;
        pthread_mutex_unlock(&pager->lock);
    }
    fake_let_reads_go();
    pthread_join(thread, NULL);
    CHECK(counters_of(1).hits == 0 && counters_of(1).misses == EXPERTS, "an expert that must be waited for is no hit");
    CHECK(counters_of(1).bytes_wasted == 0, "nor was it read in vain");
    end();
}

static void nothing_is_read_ahead(const char *why, uint32_t layer, uint32_t n_experts, uint32_t n_tokens) {
    begin((model_shape) { .n_slots = 3 * EXPERTS });
    model_use(&m, pager, &hold, layer, all, n_experts, n_tokens);
    model_settle(pager);
    CHECK(resident(0) + resident(1) + resident(2) == n_experts, why);
    end();
}

static void begin_wave(uint32_t layer, const int32_t *experts, const uint32_t *counts, uint32_t n, uint32_t n_tokens) {
    const gp_demand demand = { .layer = layer, .experts = experts, .counts = counts, .n_experts = n, .n_tokens = n_tokens };
    gp_failure failure;
    CHECK(gp_wave_begin(pager, &hold, &demand, &failure) == 0, "a wave begins");
}

/* In the place of a batch that chose so at layer 1 and whose experts are gone. */
static void remember(const uint32_t *counts) {
    memcpy(hold.routed[1], counts, EXPERTS * sizeof *counts);
}

static const uint32_t once[EXPERTS] = { 1, 1, 1, 1, 1, 1, 1, 1, 1, 1 };

/* A batch of which nothing is known there: it is taken for one that chooses as much of a layer everywhere. */
static void a_first_batch_reads_all_or_nothing(void) {
    for (uint32_t n = 4; n <= 8; n++) {
        begin((model_shape) { .n_slots = 3 * EXPERTS });
        model_use(&m, pager, &hold, 0, all, n, 5);
        model_settle(pager);
        CHECK(resident(1) == (n >= 6 ? EXPERTS : 0), "from six tenths on the next layer is read, all of it");
        CHECK(resident(2) == 0, "and no other");
        end();
    }
}

static void what_was_chosen_before_is_read(void) {
    begin((model_shape) { .n_slots = 3 * EXPERTS });
    remember((uint32_t[EXPERTS]) { 0, 0, 0, 2, 0, 0, 0, 5, 0, 1 });
    begin_wave(0, all, once, EXPERTS, 5);
    static const int32_t expected[] = { 7, 3, 9 };
    CHECK(hold.n_ahead == 3 && memcmp(hold.ahead, expected, sizeof expected) == 0,
          "what the batch before chose, what most of its rows wanted first");
    gp_hold_release(pager, &hold);
    model_settle(pager);
    CHECK(resident(1) == 3, "and no more, however much of this layer is wanted");
    for (uint32_t i = 0; i < 3; i++) {
        CHECK(model_is_resident(pager, &m, 1, expected[i]), "they are read");
    }
    end();
}

static void most_of_a_layer_is_all_of_it(void) {
    begin((model_shape) { .n_slots = 3 * EXPERTS });
    remember((uint32_t[EXPERTS]) { 1, 0, 3, 2, 0, 1, 0, 5, 0, 1 });
    begin_wave(0, all, once, 1, 5);
    static const int32_t expected[EXPERTS] = { 7, 2, 3, 0, 5, 9, 1, 4, 6, 8 };
    CHECK(hold.n_ahead == EXPERTS && memcmp(hold.ahead, expected, sizeof expected) == 0,
          "where it was six tenths the others are read, too, after them");
    gp_hold_release(pager, &hold);
    model_settle(pager);
    end();
}

/* Batches of another context say nothing of this one's. */
static void contexts_remember_for_themselves(void) {
    begin((model_shape) { .n_slots = 3 * EXPERTS });
    gp_hold other;
    CHECK(gp_hold_open(&other, pager) == 0, "another hold opens");
    model_use(&m, pager, &other, 1, (int32_t[]) { 3, 4 }, 2, 5);
    model_settle(pager);
    CHECK(hold.routed[1][3] == 0 && other.routed[1][3] == 1 && other.routed[1][5] == 0, "each has its own");
    model_use(&m, pager, &other, 1, (int32_t[]) { 5 }, 1, 5);
    CHECK(other.routed[1][3] == 0 && other.routed[1][5] == 1, "of its last batch there");
    model_use(&m, pager, &other, 1, (int32_t[]) { 6 }, 1, 1);
    CHECK(other.routed[1][6] == 0 && other.routed[1][5] == 1, "not of a token");
    gp_hold_close(&other, pager);
    end();
}

/* Fewer slots than the layer has experts: its own come first. */
static void its_own_layer_is_read_first(void) {
    begin((model_shape) { .n_slots = 4, .n_layers = 2, .n_used = 4 });
    remember((uint32_t[EXPERTS]) { 1, 1, 1 });
    begin_wave(0, all, once, EXPERTS, 5);
    for (uint32_t i = 0; i < EXPERTS; i++) {
        CHECK(hold.next == EXPERTS || (hold.next_ahead == 0 && resident(1) == 0), "nothing else while own ones are to be read");
        while (!gp_wave_has(pager, &hold, i, 7)) {
            const unsigned n_arrived = gp_wave_n_arrived(&hold);
            if (!gp_wave_has(pager, &hold, i, 7)) {
                CHECK(gp_wave_wait(pager, &hold, n_arrived, true), "nothing ends the wait");
            }
        }
        gp_wave_done(pager, &hold, i);
        model_check_invariants(pager);
        const uint32_t n_idle = 4 - hold.n_open, n_ahead = n_idle < 3 ? n_idle : 3;
        CHECK(hold.next < EXPERTS || hold.next_ahead == n_ahead, "then into each slot that is done with");
    }
    gp_failure failure;
    CHECK(gp_wave_end(pager, &hold, &failure) == 0, "the wave ends well");
    model_settle(pager);
    CHECK(resident(1) == 3, "all of it has come");
    end();
}

static void again_plans_nothing(void) {
    begin((model_shape) { .n_slots = 3 * EXPERTS });
    gp_failure failure;
    const gp_demand demand = { .layer = 0, .experts = all, .n_experts = EXPERTS, .n_tokens = 5, .is_again = true };
    CHECK(model_wave(&m, pager, &hold, &demand, &failure) == 0, "the experts come");
    model_settle(pager);
    CHECK(resident(1) == 0 && hold.routed[0][3] == 0, "a demand made again neither reads ahead nor is remembered");
    end();
}

static uint32_t count_leaving(bool is_withdrawing) {
    uint32_t n = 0;
    pthread_mutex_lock(&pager->lock);
    for (uint32_t i = 0; i < pager->n_slots; i++) {
        n += pager->slots[i].state == LEAVING && pager->slots[i].is_withdrawing == is_withdrawing;
    }
    pthread_mutex_unlock(&pager->lock);
    return n;
}

/* A context and what it wants of layer 1, in a thread of its own. */
typedef struct {
    gp_hold  *hold;
    int32_t   experts[2];
    uint32_t  n_experts;
    pthread_t thread;
} visitor;

static void *visit(void *data) {
    visitor *v = data;
    model_use(&m, pager, v->hold, 1, v->experts, v->n_experts, 5);
    return NULL;
}

static void start(visitor *v) {
    CHECK(pthread_create(&v->thread, NULL, visit, v) == 0, "the test has threads");
}

/* Layer 1 is being read ahead: a slice by the only reader, all others in the list. */
static void begin_in_flight_ahead(void) {
    begin((model_shape) { .n_slots = 3 * EXPERTS, .n_readers = 1, .piece_bytes = 64 << 10 });
    fake_hold_reads();
    fake_let_some_go(EXPERTS * 3);      /* the slices of layer 0 */
    model_use(&m, pager, &hold, 0, all, EXPERTS, 5);
    fake_wait_for_reads(1);
    CHECK(resident(1) == EXPERTS, "all of the next layer is being read");
}

static uint64_t expert_bytes(uint32_t layer) {
    uint64_t bytes = 0;
    for (uint32_t s = 0; s < m.shape.n_slices; s++) {
        bytes += m.layers[layer].slices[s].slice_bytes;
    }
    return bytes;
}

static void unwanted_reads_are_withdrawn(void) {
    begin_in_flight_ahead();
    visitor mine = { .hold = &hold, .experts = { 8, 9 }, .n_experts = 2 };
    start(&mine);
    while (count_leaving(false) == 0) {
    }
    CHECK(resident(1) == 2, "what is not wanted is nobody's at once");
    CHECK(count_leaving(false) == 1, "only what has been begun must be waited for");
    fake_let_reads_go();
    pthread_join(mine.thread, NULL);
    model_settle(pager);
    CHECK(counters_of(1).bytes_read == 2 * expert_bytes(1) + m.layers[1].slices[0].slice_bytes, "the others' reads never began");
    CHECK(counters_of(1).bytes_wasted == m.layers[1].slices[0].slice_bytes, "what came of the one that had was read in vain");
    CHECK(count_leaving(true) + count_leaving(false) == 0 && resident(1) == 2, "and their slots are free");
    CHECK(pager->classes[0].n_free == 3 * EXPERTS - EXPERTS - 2, "for whoever comes");
    model_use(&m, pager, &hold, 1, all, EXPERTS, 5);
    end();
}

/* Its reads go on into a slot that nobody looks at; whoever wants the expert meanwhile has it read anew. */
static void leaving_expert_is_wanted(void) {
    begin_in_flight_ahead();
    gp_hold other;
    CHECK(gp_hold_open(&other, pager) == 0, "another hold opens");
    visitor mine = { .hold = &hold, .experts = { 8, 9 }, .n_experts = 2 };
    visitor another = { .hold = &other, .experts = { 0 }, .n_experts = 1 };
    start(&mine);
    while (count_leaving(false) == 0) {
    }
    start(&another);
    while (resident(1) < 3) {
    }
    CHECK(count_leaving(false) == 1, "the slot that leaves is not taken back");
    fake_let_reads_go();
    pthread_join(mine.thread, NULL);
    pthread_join(another.thread, NULL);
    model_settle(pager);
    CHECK(resident(1) == 3 && count_leaving(false) == 0, "both have what they wanted, and nothing is left");
    gp_hold_close(&other, pager);
    end();
}

static void others_leave_it_alone(void) {
    begin_in_flight_ahead();
    gp_hold other;
    CHECK(gp_hold_open(&other, pager) == 0, "another hold opens");
    visitor another = { .hold = &other, .experts = { 9 }, .n_experts = 1 };
    start(&another);
    for (uint32_t n_pending = 0; n_pending == 0;) {
        pthread_mutex_lock(&pager->lock);
        n_pending = other.n_pending;
        pthread_mutex_unlock(&pager->lock);
    }
    fake_let_reads_go();
    pthread_join(another.thread, NULL);
    model_settle(pager);
    CHECK(resident(1) == EXPERTS, "what was read ahead for one context is not withdrawn by another");
    gp_hold_close(&other, pager);
    end();
}

static void close_while_leaving(void) {
    begin_in_flight_ahead();
    visitor mine = { .hold = &hold, .experts = { 8, 9 }, .n_experts = 2 };
    start(&mine);
    while (count_leaving(false) == 0) {
    }
    fake_let_reads_go();
    pthread_join(mine.thread, NULL);
    gp_hold_close(&hold, pager);
    gp_pager_close(pager);
    model_end(&m);
}

static void off_is_off(void) {
    begin((model_shape) { .n_slots = 3 * EXPERTS });
    gp_hold_close(&hold, pager);
    gp_pager_close(pager);
    m.config.read_ahead = false;
    pager = model_open(&m);
    CHECK(gp_hold_open(&hold, pager) == 0, "a hold opens");
    model_use(&m, pager, &hold, 0, all, EXPERTS, 5);
    model_settle(pager);
    CHECK(resident(1) == 0, "nothing is read ahead when it is off");
    end();
}

/* What decoding has kept may not go for read-ahead, even if the whole next layer is wanted. */
static void kept_experts_are_not_given_up(void) {
    begin((model_shape) { .n_slots = 16, .policy = "lfru" });
    for (int32_t e = 0; e < EXPERTS; e++) {
        model_use(&m, pager, &hold, 0, &e, 1, 1);
    }
    for (int32_t e = 0; e < 3; e++) {
        model_use(&m, pager, &hold, 1, &e, 1, 1);
        model_use(&m, pager, &hold, 2, &e, 1, 1);
    }
    CHECK(pager->classes[0].n_free == 0 && resident(0) == EXPERTS, "all slots are full of what tokens wanted");
    model_use(&m, pager, &hold, 0, all, EXPERTS, 5);
    model_settle(pager);
    CHECK(resident(0) == EXPERTS && resident(1) == 3 && resident(2) == 3, "none goes for what is only likely");
    /* What a batch has left there can be spared. */
    pthread_mutex_lock(&pager->lock);
    gp_slot *s = &pager->slots[pager->layers[2].slot_of[1]];
    s->is_transient = true;
    pager->classes[0].n_transient++;
    pager->layers[2].kept--;
    pthread_mutex_unlock(&pager->lock);
    model_use(&m, pager, &hold, 0, all, EXPERTS, 5);
    model_settle(pager);
    CHECK(resident(0) == EXPERTS && resident(1) == 4 && resident(2) == 2, "but for what a batch has left");
    end();
}

/* Reading one of the next layer's experts ahead by giving up another of them gains nothing. */
static void its_own_layer_is_not_given_up(void) {
    begin((model_shape) { .n_layers = 2, .n_slots = 14, .policy = "lru" });
    model_use(&m, pager, &hold, 1, all, EXPERTS, 5);        /* the last layer: nothing is read ahead */
    model_use(&m, pager, &hold, 0, all, 4, 1);
    pthread_mutex_lock(&pager->lock);
    CHECK(pager->classes[0].n_free == 0 && pager->classes[0].n_transient > 0, "only the batch's slots can be spared");
    const int32_t for_other = gp_slot_choose_spare(pager, &pager->layers[0]);
    CHECK(for_other >= 0 && pager->slots[for_other].layer == 1, "they can be, for another layer");
    CHECK(gp_slot_choose_spare(pager, &pager->layers[1]) < 0, "but not for the layer whose experts they hold");
    pthread_mutex_unlock(&pager->lock);
    end();
}

static void *use_last_layer(void *data) {
    model_use(&m, pager, data, 2, all, 4, 1);
    return NULL;
}

static void slots_being_read_are_not_given_up(void) {
    begin((model_shape) { .n_layers = 3, .n_slots = 14, .n_used = 4, .n_readers = 1, .piece_bytes = 64 << 10 });
    gp_hold other;
    CHECK(gp_hold_open(&other, pager) == 0, "another hold opens");
    fake_hold_reads();
    fake_let_some_go(EXPERTS * 3);      /* the slices of layer 0 */
    int32_t slots[EXPERTS];
    gp_failure failure;
    CHECK(model_acquire(pager, &hold, 0, all, EXPERTS, 5, slots, &failure) == 0, "the experts come");
    fake_wait_for_reads(1);
    pthread_mutex_lock(&pager->lock);
    uint32_t n_in_flight = 0;
    for (uint32_t i = 0; i < pager->n_slots; i++) {
        n_in_flight += pager->slots[i].state == READING;
    }
    CHECK(n_in_flight == 4 && gp_slot_choose(pager, &pager->layers[1], false, true) < 0,
          "2: all slots are in use or being read: none can be given up");
    pthread_mutex_unlock(&pager->lock);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, use_last_layer, &other) == 0, "the test has threads");
    nanosleep(&(struct timespec) { .tv_nsec = 20000000 }, NULL);
    fake_let_reads_go();
    pthread_join(thread, NULL);     /* once they are read, they can be: it was worth waiting */
    const uint64_t wasted = counters_of(1).bytes_wasted;
    CHECK(counters_of(2).left_alone == 0 && wasted >= expert_bytes(1) && wasted <= 4 * expert_bytes(1)
          && wasted % expert_bytes(1) == 0, "and those that were had been read in vain");
    gp_hold_release(pager, &hold);
    gp_hold_close(&other, pager);
    end();
}

/* ---- what was read in vain ----------------------------------------------------------------------------------------- */

/* Ten are read ahead, three of them wanted; then others want their slots. */
static void what_is_given_up_unused_is_counted(void) {
    begin((model_shape) { .n_slots = 3 * EXPERTS });
    model_use(&m, pager, &hold, 0, all, EXPERTS, 5);
    model_settle(pager);
    CHECK(resident(1) == EXPERTS && counters_of(1).bytes_wasted == 0, "nothing is in vain while it may still be wanted");
    model_use(&m, pager, &hold, 1, (int32_t[]) { 2, 5, 8 }, 3, 1);
    CHECK(counters_of(1).bytes_wasted == 0, "also after a token that did not");
    CHECK(gp_pager_shrink(pager, 0, 2) == 0, "their slots go");
    const uint64_t n_left = resident(0) + resident(1);
    CHECK(n_left == 2, "with nearly all that was in them");
    uint64_t n_unused_left = 0;
    for (int32_t e = 0; e < EXPERTS; e++) {
        const int32_t index = pager->layers[1].slot_of[e];
        n_unused_left += index >= 0 && pager->slots[index].ahead_for != 0;
    }
    CHECK(counters_of(1).bytes_wasted == (7 - n_unused_left) * expert_bytes(1), "seven were read in vain");
    CHECK(counters_of(0).bytes_wasted == 0, "and none of those that were wanted");
    end();
}

/* Batches and tokens anywhere, with too few slots for all: what was read is what was used, and what was read in vain, and what
 * lies there unused. */
static void the_books_balance(uint32_t n_slots) {
    begin((model_shape) { .n_slots = n_slots, .n_layers = 4, .policy = "lfru", .piece_bytes = 1024 });
    uint64_t n_used[4] = { 0 }, n_wasted = 0;
    for (int step = 0; step < 400; step++) {
        const uint32_t l = fake_random(4), n = 1 + fake_random(EXPERTS);
        int32_t experts[EXPERTS];
        model_draw(&m, experts, n);
        for (uint32_t i = 0; i < n; i++) {
            const int32_t index = pager->layers[l].slot_of[experts[i]];
            n_used[l] += index < 0 || pager->slots[index].ahead_for != 0;
        }
        model_use(&m, pager, &hold, l, experts, n, 1 + fake_random(3));
        model_settle(pager);
        for (uint32_t k = 0; k < 4; k++) {
            uint64_t n_unused = 0;
            for (int32_t e = 0; e < EXPERTS; e++) {
                const int32_t index = pager->layers[k].slot_of[e];
                n_unused += index >= 0 && pager->slots[index].ahead_for != 0;
            }
            const gp_counters c = counters_of(k);
            CHECK(c.bytes_read == (n_used[k] + n_unused) * expert_bytes(k) + c.bytes_wasted, "every byte is accounted for");
        }
    }
    for (uint32_t k = 0; k < 4; k++) {
        n_wasted += counters_of(k).bytes_wasted;
    }
    CHECK(n_wasted > 0, "the test reads in vain");
    end();
}

static void close_while_reading(void) {
    begin((model_shape) { .n_slots = 3 * EXPERTS, .piece_bytes = 256 });
    fake_set_weather((fake_weather) { .delay_us = 200 });
    model_use(&m, pager, &hold, 0, all, EXPERTS, 5);
    gp_hold_close(&hold, pager);
    gp_pager_close(pager);      /* waits for the reads: their memory and files are about to go */
    model_end(&m);
}

int main(void) {
    check_begin();
    next_layer_is_read();
    next_layer_of_another_class_is_read();
    reads_in_flight_are_joined();
    what_is_still_coming_is_a_miss();
    nothing_is_read_ahead("a single token reads nothing ahead", 0, EXPERTS, 1);
    nothing_is_read_ahead("a batch that wants two tenths of a layer reads nothing ahead", 0, 2, 5);
    nothing_is_read_ahead("behind the last layer there is nothing to read", 2, EXPERTS, 5);
    a_first_batch_reads_all_or_nothing();
    what_was_chosen_before_is_read();
    most_of_a_layer_is_all_of_it();
    contexts_remember_for_themselves();
    its_own_layer_is_read_first();
    again_plans_nothing();
    unwanted_reads_are_withdrawn();
    leaving_expert_is_wanted();
    others_leave_it_alone();
    close_while_leaving();
    off_is_off();
    kept_experts_are_not_given_up();
    its_own_layer_is_not_given_up();
    slots_being_read_are_not_given_up();
    what_is_given_up_unused_is_counted();
    the_books_balance(3);
    the_books_balance(12);
    the_books_balance(25);
    close_while_reading();
    return 0;
}
