/* Look-ahead stands in nobody's way: what is foretold is read behind all that is wanted, and what is wanted after all goes before the rest. */
#define _POSIX_C_SOURCE 200809L  /* nanosleep */
#include <time.h>

#include "foretold.h"

static void *finish_other(void *data) {
    (void) data;
    CHECK(finish_wave(&other) == 0, "the wave ends well");
    return NULL;
}

/* What is in flight when demand comes is waited for, and no more of what is ahead. */
static void demand_goes_first(void) {
    begin((model_shape) { .n_slots = 3 * EXPERTS, .n_readers = 1, .piece_bytes = WHOLE_SLICE });
    use(&hold, 0, SOME(0, 1));
    fake_hold_reads();
    foretell(&hold, SOME(3, 4, 5));
    fake_wait_for_reads(1);
    CHECK(begin_wave(&other, 2, SOME(7, 8), 1) == 0, "another context wants something");
    fake_let_some_go(1 + 2 * m.shape.n_slices);
    CHECK(finish_wave(&other) == 0, "it comes as soon as its own reads, and the one in flight, are done");
    CHECK(counters_of(1).bytes_read == m.layers[1].slices[0].slice_bytes, "what is ahead has waited");
    fake_let_reads_go();
    model_settle(pager);
    CHECK(experts_read(1) == 3, "and comes after all");
    use(&hold, 1, SOME(3, 4, 5));
    CHECK(counters_of(1).foreseen == 3, "for its own layer's turn");
    end();
}

/* Its own layer's demand is not behind what is foretold while it is being read. */
static void its_own_demand_goes_first(void) {
    begin((model_shape) { .n_slots = 3 * EXPERTS, .n_readers = 1, .piece_bytes = WHOLE_SLICE });
    fake_hold_reads();
    CHECK(begin_wave(&hold, 0, SOME(0, 1), 1) == 0, "a wave begins");
    foretell(&hold, SOME(3, 4));
    fake_let_some_go(2 * m.shape.n_slices);
    CHECK(finish_wave(&hold) == 0 && counters_of(1).bytes_read == 0, "all of it comes before any of the next");
    fake_let_reads_go();
    model_settle(pager);
    CHECK(experts_read(1) == 2, "which follows");
    end();
}

/* Foretold last, wanted first. */
static void what_becomes_wanted_goes_before_what_is_ahead(void) {
    begin((model_shape) { .n_slots = 3 * EXPERTS, .n_readers = 1, .piece_bytes = WHOLE_SLICE });
    use(&hold, 0, SOME(0, 1));
    use(&other, 0, SOME(0, 1));
    fake_hold_reads();
    foretell(&hold, SOME(2, 3, 4));
    foretell(&other, SOME(5));
    fake_wait_for_reads(1);
    CHECK(begin_wave(&other, 1, SOME(5), 1) == 0, "the turn of the last of them comes");
    fake_let_some_go(1 + m.shape.n_slices);
    CHECK(finish_wave(&other) == 0, "it comes next");
    CHECK(counters_of(1).bytes_read == m.layers[1].slices[0].slice_bytes + expert_bytes(1), "and only the one in flight before");
    fake_let_reads_go();
    model_settle(pager);
    CHECK(experts_read(1) == 4, "nothing is read twice, and the rest is read");
    end();
}

/* With many readers: what is ahead leaves room for demand, which begins at once. */
static void what_is_ahead_leaves_readers_free(void) {
    begin((model_shape) { .n_slots = 3 * EXPERTS, .n_readers = 8, .piece_bytes = WHOLE_SLICE });
    use(&hold, 0, SOME(0, 1));
    fake_hold_reads();
    const unsigned n_before = fake_count(FAKE_FILE_READ);
    foretell(&hold, SOME(2, 3, 4, 5, 6));
    fake_wait_for_reads(1);
    nanosleep(&(struct timespec) { .tv_nsec = 20000000 }, NULL);
    const unsigned n_ahead = fake_count(FAKE_FILE_READ) - n_before;
    CHECK(n_ahead >= 1 && n_ahead < 8, "not all readers read what is only likely");
    CHECK(begin_wave(&other, 2, SOME(7), 1) == 0, "demand comes");
    fake_wait_for_reads(n_ahead + 1);       /* although none of those is done */
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, finish_other, NULL) == 0, "the test has threads");
    fake_let_reads_go();
    pthread_join(thread, NULL);
    model_settle(pager);
    CHECK(experts_read(1) == 5, "all of what is ahead is read, though nothing else wakes a reader");
    end();
}

/* Nobody waits for what is ahead; it is read to the end all the same, at every number of readers. */
static void nothing_is_forgotten(void) {
    for (uint32_t n_readers = 1; n_readers < 10; n_readers += 2) {
        begin((model_shape) { .n_slots = 3 * EXPERTS, .n_readers = n_readers, .piece_bytes = 256, .n_mirrors = n_readers % 3 });
        fake_set_weather((fake_weather) { .delay_us = 50, .short_one_in = 5, .interrupted_one_in = 7 });
        pass(&hold, 0, SOME(0, 1), (some) { all, EXPERTS });
        model_settle(pager);
        CHECK(experts_read(1) == EXPERTS, "all of it comes");
        use(&hold, 1, (some) { all, EXPERTS });
        CHECK(counters_of(1).foreseen == EXPERTS, "with the right bytes");
        end();
    }
}

static void what_was_not_chosen_is_withdrawn(void) {
    begin((model_shape) { .n_slots = 3 * EXPERTS, .n_readers = 1, .piece_bytes = WHOLE_SLICE });
    use(&hold, 0, SOME(0, 1));
    fake_hold_reads();
    foretell(&hold, SOME(2, 3, 4, 5));
    fake_wait_for_reads(1);
    CHECK(begin_wave(&hold, 1, SOME(4, 9), 1) == 0, "one of them is wanted, and another");
    CHECK(counters_of(1).in_vain == 3 && counters_of(1).foreseen == 1 && counters_of(1).resident == 2, "the others are nobody's");
    fake_let_reads_go();
    CHECK(finish_wave(&hold) == 0, "the wave ends well");
    model_settle(pager);
    CHECK(counters_of(1).bytes_read == 2 * expert_bytes(1) + m.layers[1].slices[0].slice_bytes, "what had not begun is not read");
    CHECK(counters_of(1).bytes_wasted == m.layers[1].slices[0].slice_bytes, "what had, was wasted");
    CHECK(pager->classes[0].n_free == 3 * EXPERTS - 4, "and their slots are free");
    use(&hold, 1, SOME(2, 3, 5));   /* read anew */
    end();
}

int main(void) {
    check_begin();
    demand_goes_first();
    its_own_demand_goes_first();
    what_becomes_wanted_goes_before_what_is_ahead();
    what_is_ahead_leaves_readers_free();
    nothing_is_forgotten();
    what_was_not_chosen_is_withdrawn();
    return 0;
}
