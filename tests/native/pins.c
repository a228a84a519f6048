/* Pinned experts stay; pins leave room to compute, and what they take is counted once. */
#include <errno.h>

#include "check.h"
#include "fake_os.h"
#include "model.h"

static model m;
static gp_pager *pager;
static gp_hold hold;

static void begin(uint32_t n_slots) {
    model_make(&m, (model_shape) { .n_slots = n_slots });
    pager = model_open(&m);
    CHECK(gp_hold_open(&hold, pager) == 0, "a hold opens");
}

static void end(void) {
    model_check_invariants(pager);
    gp_hold_close(&hold, pager);
    gp_pager_close(pager);
    model_end(&m);
}

static int pin(uint32_t layer, const int32_t *experts, uint32_t n) {
    gp_failure failure;
    const int error = gp_pager_pin(pager, layer, experts, n, NULL, NULL, &failure);
    model_check_invariants(pager);
    return error;
}

static void decode(int n_tokens) {
    for (int token = 0; token < n_tokens; token++) {
        for (uint32_t l = 0; l < m.shape.n_layers; l++) {
            int32_t experts[2];
            model_draw(&m, experts, 2);
            model_use(&m, pager, &hold, l, experts, 2, 1);
        }
    }
}

static uint8_t state(uint32_t layer, int32_t expert) {
    uint8_t resident[16];
    CHECK(gp_pager_resident(pager, layer, resident) == 0, "the layer exists");
    return resident[expert];
}

static void pinned_expert_outlives_any_pressure(void) {
    begin(7);
    const int32_t experts[] = { 8, 6 };
    CHECK(pin(1, experts, 2) == 0, "there is room for two pins");
    decode(100);
    CHECK(state(1, 8) == 2 && state(1, 6) == 2, "a pinned expert stays");
    model_use(&m, pager, &hold, 1, experts, 2, 1);
    gp_pager_unpin_all(pager);
    CHECK(state(1, 8) == 1, "it is in its slot until another needs that");
    for (int e = 0; e < 6; e++) {
        model_use(&m, pager, &hold, 0, (int32_t[]) { e }, 1, 1);
        model_use(&m, pager, &hold, 2, (int32_t[]) { e }, 1, 1);
    }
    CHECK(state(1, 8) + state(1, 6) < 2 + 2, "unpinned experts may go");
    end();
}

static void pins_leave_room(void) {
    begin(7);        /* one token wants two slots */
    const int32_t experts[] = { 0, 1, 2, 3, 4, 5 };
    CHECK(pin(0, experts, 6) == -ENOSPC, "six of seven slots leave one");
    CHECK(state(0, 0) == 0, "pins that are refused read nothing");
    CHECK(pin(0, experts, 5) == 0, "five leave two");
    CHECK(pin(1, experts, 1) == -ENOSPC, "pins of all layers count");
    decode(30);
    end();
}

/* A batch needs no more slots than a token: it passes through what the pins leave. */
static void batches_pass_through_what_is_left(void) {
    begin(7);
    const int32_t experts[] = { 0, 1, 2, 3, 4 }, all[] = { 0, 1, 2, 3, 4, 5, 6, 7, 8 };
    CHECK(pin(0, experts, 5) == 0, "two slots are left");
    for (uint32_t l = 0; l < m.shape.n_layers; l++) {
        model_use(&m, pager, &hold, l, all, 9, 20);
        model_check_invariants(pager);
    }
    for (int32_t e = 0; e < 5; e++) {
        CHECK(state(0, e) == 2, "and the pins are where they were");
    }
    end();
}

/* All slots are used by what others want, some of it by nobody now: pins take the place of that, one after the other. */
static void pins_take_slots_as_they_come_free(void) {
    begin(6);
    gp_hold other;
    int32_t slots[3];
    gp_failure failure;
    CHECK(gp_hold_open(&other, pager) == 0, "another hold opens");
    for (uint32_t l = 0; l < 3; l++) {
        model_use(&m, pager, &hold, l, (int32_t[]) { 0, 1 }, 2, 1);
    }
    CHECK(model_acquire(pager, &other, 1, (int32_t[]) { 0, 1, 2 }, 3, 1, slots, &failure) == 0, "another context computes");
    CHECK(pin(2, (int32_t[]) { 5, 6, 7 }, 3) == 0, "three slots are enough for three pins");
    CHECK(state(2, 5) == 2 && state(2, 6) == 2 && state(2, 7) == 2, "they are pinned");
    CHECK(model_slot_holds(&m, pager, (uint32_t) slots[2], 1, 2), "and took nothing that was computed with");
    gp_hold_release(pager, &other);
    gp_hold_close(&other, pager);
    end();
}

/* Others hold what the last one needs, and give nothing back: in the end all are unpinned. */
static void pins_are_all_or_none_when_slots_are_wanting(void) {
    begin(6);
    gp_hold other;
    int32_t slots[3];
    gp_failure failure;
    CHECK(gp_hold_open(&other, pager) == 0, "another hold opens");
    CHECK(pin(0, (int32_t[]) { 4 }, 1) == 0, "one is pinned before");
    CHECK(model_acquire(pager, &other, 1, (int32_t[]) { 0, 1, 2 }, 3, 1, slots, &failure) == 0, "another context computes");
    CHECK(pin(0, (int32_t[]) { 4, 5, 6, 7 }, 4) == -EBUSY, "three of four would need one of its slots");
    CHECK(state(0, 4) == 2, "what was pinned before is pinned");
    CHECK(state(0, 5) < 2 && state(0, 6) < 2 && state(0, 7) < 2, "and no other");
    gp_hold_release(pager, &other);
    CHECK(pin(0, (int32_t[]) { 4, 5, 6 }, 3) == 0, "later there is room");
    gp_hold_close(&other, pager);
    end();
}

static void pins_are_all_or_none_when_one_cannot_be_read(void) {
    begin(7);
    CHECK(pin(1, (int32_t[]) { 3 }, 1) == 0, "one is pinned before");
    fake_fail_at(m.paths[0], model_offset(&m, 1, 2, 6) + 9, -EIO);
    gp_failure failure;
    CHECK(gp_pager_pin(pager, 1, (int32_t[]) { 3, 4, 5, 6 }, 4, NULL, NULL, &failure) == -EIO && failure.error == -EIO,
          "one cannot be read");
    CHECK(failure.offset_bytes >= model_offset(&m, 1, 2, 6), "and its place is told");
    model_check_invariants(pager);
    CHECK(state(1, 3) == 2 && state(1, 4) < 2 && state(1, 5) < 2 && state(1, 6) == 0, "the others are not pinned, either");
    fake_fail_at(m.paths[0], 0, 0);
    CHECK(pin(1, (int32_t[]) { 3, 4, 5, 6 }, 4) == 0, "later all are");
    end();
}

static int refuse(void *data, uint32_t file, uint64_t offset_bytes, const void *memory, uint64_t bytes) {
    (void) data, (void) file, (void) offset_bytes, (void) memory, (void) bytes;
    return -ESTALE;
}

static void what_is_of_a_changed_file_is_not_pinned(void) {
    begin(7);
    gp_pager_compare_with(pager, refuse, NULL);
    fake_file_touch(m.paths[0]);
    CHECK(pin(1, (int32_t[]) { 3, 4 }, 2) == -ESTALE, "a changed file is refused");
    CHECK(state(1, 3) < 2 && state(1, 4) < 2, "and nothing of it is pinned");
    end();
}

static bool stop(void *data) {
    (void) data;
    return true;
}

static void a_pin_can_be_stopped(void) {
    begin(7);
    fake_hold_reads();
    gp_failure failure;
    CHECK(gp_pager_pin(pager, 1, (int32_t[]) { 3, 4 }, 2, stop, NULL, &failure) == -EINTR && failure.error == -EINTR,
          "it is stopped");
    model_check_invariants(pager);
    fake_let_reads_go();
    model_settle(pager);
    CHECK(state(1, 3) == 1 && state(1, 4) == 1, "what was being read is there, and not pinned");
    end();
}

static void pinning_again_takes_nothing(void) {
    begin(7);
    const int32_t experts[] = { 0, 1, 2, 3, 4 };
    for (int again = 0; again < 3; again++) {
        CHECK(pin(0, experts, 5) == 0, "what is pinned already can be pinned again");
    }
    end();
}

static void naming_an_expert_twice_pins_it_once(void) {
    begin(7);
    const int32_t experts[] = { 3, 3, 5, 3, 3, 5, 5, 3, 3, 3, 5, 5 };
    CHECK(pin(0, experts, 12) == 0, "a list may name an expert twice");
    CHECK(state(0, 3) == 2 && state(0, 5) == 2, "it is pinned");
    uint32_t n_pinned = 0;
    for (uint32_t i = 0; i < pager->n_slots; i++) {
        n_pinned += pager->slots[i].is_pinned;
    }
    CHECK(n_pinned == 2, "once");
    end();
}

static void pinning_counts_no_use(void) {
    begin(7);
    CHECK(pin(0, (int32_t[]) { 1, 2 }, 2) == 0, "there is room for two pins");
    gp_counters counters[MODEL_LAYERS];
    gp_pager_counters(pager, counters);
    CHECK(counters[0].hits + counters[0].misses + counters[0].tokens + counters[0].visits == 0,
          "a pin is no token's demand");
    CHECK(counters[0].bytes_read > 0 && counters[0].resident == 2, "but its bytes were read");
    end();
}

int main(void) {
    check_begin();
    pinned_expert_outlives_any_pressure();
    pins_leave_room();
    batches_pass_through_what_is_left();
    pins_take_slots_as_they_come_free();
    pins_are_all_or_none_when_slots_are_wanting();
    pins_are_all_or_none_when_one_cannot_be_read();
    what_is_of_a_changed_file_is_not_pinned();
    a_pin_can_be_stopped();
    pinning_again_takes_nothing();
    naming_an_expert_twice_pins_it_once();
    pinning_counts_no_use();
    return 0;
}
