/* While a batch computes, what the next layer will probably want is read: into slots whose loss costs nothing, and never
 * a second time; and let go again where it is not wanted after all. */
#define _POSIX_C_SOURCE 200809L
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
    CHECK(gp_hold_open(&hold, pager, EXPERTS) == 0, "a hold opens");
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
    begin((model_shape) { .n_slots = 3 * EXPERTS, .piece_bytes = 64 << 10 });
    fake_hold_reads();
    fake_let_some_go(EXPERTS * 3);      /* the slices of layer 0 */
    model_use(&m, pager, &hold, 0, all, EXPERTS, 5);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, use_next_layer, NULL) == 0, "the test has threads");
    for (uint32_t n_pending = 0; n_pending == 0;) {
        pthread_mutex_lock(&pager->lock);
        n_pending = hold.pending;
        pthread_mutex_unlock(&pager->lock);
    }
    fake_let_reads_go();
    pthread_join(thread, NULL);
    CHECK(counters_of(1).hits == 0 && counters_of(1).misses == EXPERTS, "an expert that must be waited for is no hit");
    end();
}

static void nothing_is_read_ahead(const char *why, uint32_t layer, uint32_t n_experts, uint32_t n_tokens) {
    begin((model_shape) { .n_slots = 3 * EXPERTS });
    model_use(&m, pager, &hold, layer, all, n_experts, n_tokens);
    model_settle(pager);
    CHECK(resident(0) + resident(1) + resident(2) == n_experts, why);
    end();
}

static void set_uses(uint32_t layer, int32_t expert, float uses) {
    pthread_mutex_lock(&pager->lock);
    pager->layers[layer].uses[expert] = (gp_uses) { .lasting = uses };
    pthread_mutex_unlock(&pager->lock);
}

static void most_used_come_first(void) {
    begin((model_shape) { .n_slots = 3 * EXPERTS });
    set_uses(1, 3, 3);
    set_uses(1, 7, 5);
    model_use(&m, pager, &hold, 0, all, EXPERTS, 5);
    for (uint32_t i = 0; i < EXPERTS; i++) {
        const gp_slot *s = &pager->slots[pager->ahead_reads[i * m.shape.n_slices]->tag];
        const int32_t expected[EXPERTS] = { 7, 3, 0, 1, 2, 4, 5, 6, 8, 9 };
        CHECK(s->layer == 1 && s->expert == expected[i], "the most used are read first, then in the file's order");
    }
    model_settle(pager);
    end();
}

static void improbable_ones_are_not_read(void) {
    begin((model_shape) { .n_slots = 3 * EXPERTS });
    set_uses(1, 3, 3);
    set_uses(1, 7, 5);
    model_use(&m, pager, &hold, 0, all, EXPERTS / 2, 5);    /* 0.5 * 1 / 1.8 for those never used */
    model_settle(pager);
    CHECK(resident(1) == 2 && model_is_resident(pager, &m, 1, 3) && model_is_resident(pager, &m, 1, 7),
          "of a layer that half is wanted of, only what was used more than others is read");
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

/* Layer 1 is being read ahead: a slice by each of two readers, all others in the list. */
static void begin_in_flight_ahead(void) {
    begin((model_shape) { .n_slots = 3 * EXPERTS, .n_readers = 2, .piece_bytes = 64 << 10 });
    fake_hold_reads();
    fake_let_some_go(EXPERTS * 3);      /* the slices of layer 0 */
    model_use(&m, pager, &hold, 0, all, EXPERTS, 5);
    fake_wait_for_reads(2);
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
    CHECK(counters_of(1).bytes_read >= 2 * expert_bytes(1) && counters_of(1).bytes_read < 3 * expert_bytes(1),
          "the others' reads never began");
    CHECK(count_leaving(true) + count_leaving(false) == 0 && resident(1) == 2, "and their slots are free");
    CHECK(pager->classes[0].n_free == 3 * EXPERTS - EXPERTS - 2, "for whoever comes");
    model_use(&m, pager, &hold, 1, all, EXPERTS, 5);
    end();
}

/* Its reads go on into a slot that nobody looks at; whoever wants the expert meanwhile has it read anew. */
static void leaving_expert_is_wanted(void) {
    begin_in_flight_ahead();
    gp_hold other;
    CHECK(gp_hold_open(&other, pager, EXPERTS) == 0, "another hold opens");
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
    CHECK(gp_hold_open(&other, pager, EXPERTS) == 0, "another hold opens");
    visitor another = { .hold = &other, .experts = { 9 }, .n_experts = 1 };
    start(&another);
    for (uint32_t n_pending = 0; n_pending == 0;) {
        pthread_mutex_lock(&pager->lock);
        n_pending = other.pending;
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
    CHECK(gp_hold_open(&hold, pager, EXPERTS) == 0, "a hold opens");
    model_use(&m, pager, &hold, 0, all, EXPERTS, 5);
    model_settle(pager);
    CHECK(resident(1) == 0, "nothing is read ahead when it is off");
    end();
}

/* Three layers of ten in 15 slots: what decoding has kept may not go for read-ahead. */
static void kept_experts_are_not_given_up(void) {
    begin((model_shape) { .n_slots = 15, .policy = "lfru" });
    for (int token = 0; token < 30; token++) {
        for (uint32_t l = 0; l < m.shape.n_layers; l++) {
            model_use(&m, pager, &hold, l, (int32_t[]) { token % 5, 5 }, 2, 1);
        }
    }
    for (int round = 0; round < 3; round++) {
        for (uint32_t l = 0; l < m.shape.n_layers; l++) {
            int32_t slots[EXPERTS];
            gp_failure failure;
            CHECK(model_acquire(pager, &hold, l, all, EXPERTS, 5, slots, &failure) == 0, "the experts come");
            uint32_t kept[MODEL_LAYERS];
            pthread_mutex_lock(&pager->lock);
            for (uint32_t i = 0; i < m.shape.n_layers; i++) {
                kept[i] = pager->layers[i].kept;
            }
            CHECK(pager->classes[0].n_transient <= pager->classes[0].transient_limit, "the limit holds for it too");
            pthread_mutex_unlock(&pager->lock);
            model_settle(pager);
            for (uint32_t i = 0; i < m.shape.n_layers; i++) {
                CHECK(pager->layers[i].kept == kept[i], "read-ahead gives up no expert that is kept");
            }
            gp_pager_release(pager, &hold);
        }
    }
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

/* Layers are visited whose next ones never are: what was read for these may not fill the arena, free slots or not. */
static void unused_read_ahead_is_limited(void) {
    begin((model_shape) { .n_layers = 7, .n_slots = 70 });
    for (uint32_t l = 0; l < 6; l += 2) {
        model_use(&m, pager, &hold, l, all, EXPERTS, 5);
        model_settle(pager);
    }
    CHECK(resident(5) == EXPERTS, "the last one's next layer is there");
    CHECK(resident(1) + resident(3) == EXPERTS && pager->classes[0].n_free == 2 * EXPERTS,
          "in the place of another's, though there are free slots");
    end();
}

static void *use_last_layer(void *data) {
    int32_t slots[EXPERTS];
    gp_failure failure;
    *(int *) data = model_acquire(pager, &hold, 2, all, 4, 1, slots, &failure);
    return NULL;
}

static void slots_being_read_are_not_given_up(void) {
    begin((model_shape) { .n_layers = 3, .n_slots = 14, .n_used = 4, .n_readers = 2, .piece_bytes = 64 << 10 });
    fake_hold_reads();
    fake_let_some_go(EXPERTS * 3);      /* the slices of layer 0 */
    int32_t slots[EXPERTS];
    gp_failure failure;
    CHECK(model_acquire(pager, &hold, 0, all, EXPERTS, 5, slots, &failure) == 0, "the experts come");
    fake_wait_for_reads(2);
    pthread_mutex_lock(&pager->lock);
    uint32_t n_in_flight = 0;
    for (uint32_t i = 0; i < pager->n_slots; i++) {
        n_in_flight += pager->slots[i].state == READING;
    }
    CHECK(n_in_flight == 4 && gp_slot_choose(pager, &pager->layers[1], false) < 0,
          "2: all slots are in use or being read: none can be given up");
    pthread_mutex_unlock(&pager->lock);
    pthread_t thread;
    int error = -1;
    CHECK(pthread_create(&thread, NULL, use_last_layer, &error) == 0, "the test has threads");
    nanosleep(&(struct timespec) { .tv_nsec = 20000000 }, NULL);
    fake_let_reads_go();
    pthread_join(thread, NULL);
    CHECK(error == 0, "once they are read, they can be: it was worth waiting");
    gp_pager_release(pager, &hold);
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
    most_used_come_first();
    improbable_ones_are_not_read();
    unwanted_reads_are_withdrawn();
    leaving_expert_is_wanted();
    others_leave_it_alone();
    close_while_leaving();
    off_is_off();
    kept_experts_are_not_given_up();
    its_own_layer_is_not_given_up();
    unused_read_ahead_is_limited();
    slots_being_read_are_not_given_up();
    close_while_reading();
    return 0;
}
