/* Look-ahead where reads fail, files change, slots are given back and the pager closes: it fails nobody who did not ask for it. */
#include <errno.h>

#include "foretold.h"

static int try(uint32_t layer, some wanted) {
    const gp_demand demand = { .layer = layer, .experts = wanted.experts, .n_experts = wanted.n, .n_tokens = 1 };
    gp_failure failure;
    const int error = model_wave(&m, pager, &hold, &demand, &failure);
    CHECK(error == failure.error, "the failure says why");
    return error;
}

/* It fails nobody who did not ask for it; who does, has it read anew. */
static void a_failed_guess_fails_nothing(bool is_healed) {
    begin((model_shape) { .n_slots = 3 * EXPERTS });
    fake_fail_at(m.paths[0], model_offset(&m, 1, 1, 3) + 5, -EIO);
    pass(&hold, 0, SOME(0, 1), SOME(3, 4));
    model_settle(pager);
    CHECK(!is_here(1, 3) && is_here(1, 4) && count_foretold() == 1, "what could not be read is in no slot");
    use(&hold, 2, SOME(0, 1));
    use(&other, 1, SOME(4));
    if (is_healed) {
        fake_fail_at(m.paths[0], 0, 0);
        CHECK(try(1, SOME(3, 4)) == 0, "it is read anew");
    } else {
        CHECK(try(1, SOME(3, 4)) == -EIO, "it is read anew, and fails who wants it");
        fake_fail_at(m.paths[0], 0, 0);
        CHECK(try(1, SOME(3, 4)) == 0, "and only once");
    }
    const gp_counters c = counters_of(1);
    CHECK(c.foreseen <= 1 && c.in_vain == 0, "it was neither foreseen nor in vain");
    end();
}

/* Its turn comes while the read that will fail is on its way. */
static void a_guess_that_fails_when_it_is_wanted(void) {
    begin((model_shape) { .n_slots = 3 * EXPERTS, .n_readers = 1, .piece_bytes = WHOLE_SLICE });
    use(&hold, 0, SOME(0, 1));
    fake_hold_reads();
    foretell(&hold, SOME(3, 4));
    fake_wait_for_reads(1);
    fake_fail_at(m.paths[0], model_offset(&m, 1, 2, 3), -EIO);
    CHECK(begin_wave(&hold, 1, SOME(3), 1) == 0, "a wave begins");
    fake_let_reads_go();
    CHECK(finish_wave(&hold) == -EIO, "who waits for it hears of it");
    model_settle(pager);
    fake_fail_at(m.paths[0], 0, 0);
    CHECK(!is_here(1, 3) && try(1, SOME(3, 4)) == 0, "and the next has it read anew");
    end();
}

static unsigned n_compared;
static int answer;

static int compare(void *data, uint32_t file, uint64_t offset_bytes, const void *memory, uint64_t bytes) {
    (void) data;
    n_compared++;
    CHECK(memcmp(memory, m.truth[file] + offset_bytes, bytes) == 0, "bytes of the file are compared, at their place");
    if (answer == GP_SAME) {
        const gp_file_times times = { fake_file_time(m.paths[file]), 0 };
        CHECK(gp_pager_accept(pager, &times) == 0, "the new times are taken over");
    }
    return answer;
}

/* The file changes after, or while, something foretold was read. */
static void a_changed_file_is_seen(bool is_read, int answered) {
    begin((model_shape) { .n_slots = 3 * EXPERTS });
    gp_pager_compare_with(pager, compare, NULL);
    answer = answered;
    n_compared = 0;
    use(&hold, 0, SOME(0, 1));
    if (!is_read) {
        fake_hold_reads();
    }
    foretell(&hold, SOME(3, 4));
    if (is_read) {
        model_settle(pager);
    } else {
        fake_wait_for_reads(1);
    }
    fake_file_touch(m.paths[0]);
    fake_let_reads_go();
    model_settle(pager);
    CHECK(n_compared == 0, "nobody asks about what is only likely");
    CHECK(try(1, SOME(3, 4)) == (answered == GP_SAME ? 0 : answered), "who computes with it does");
    CHECK(n_compared > 0, "by its bytes");
    end();
}

/* The times are taken over between the forecast and its turn: what came meanwhile goes, foretold or not. */
static void accepted_times_drop_what_was_foretold(void) {
    begin((model_shape) { .n_slots = 3 * EXPERTS });
    use(&hold, 0, SOME(0, 1));
    foretell(&hold, SOME(3, 4));
    model_settle(pager);
    fake_file_touch(m.paths[0]);
    const gp_file_times times = { fake_file_time(m.paths[0]), 0 };
    CHECK(gp_pager_accept(pager, &times) == 0 && !is_here(1, 3) && count_foretold() == 0, "it is dropped");
    use(&hold, 1, SOME(3, 4));
    const gp_counters c = counters_of(1);
    CHECK(c.misses == 2 && c.foreseen == 0 && experts_read(1) == 4, "and read anew");
    end();
}

static void slots_given_back_are_forgotten(void) {
    begin((model_shape) { .n_slots = 8 });
    use(&hold, 0, SOME(0, 1));
    foretell(&hold, SOME(3, 4, 5, 6, 7, 8));
    model_settle(pager);
    CHECK(count_foretold() == 6 && gp_pager_shrink(pager, 0, 2) == 0, "foretold or not, slots can be given back");
    use(&hold, 1, SOME(3, 4));
    CHECK(counters_of(1).misses == 2, "and it goes on");
    end();
}

static void close_while_reading(void) {
    begin((model_shape) { .n_slots = 3 * EXPERTS, .piece_bytes = 256 });
    fake_set_weather((fake_weather) { .delay_us = 200 });
    pass(&hold, 0, SOME(0, 1), (some) { all, EXPERTS });
    gp_hold_close(&hold, pager);
    gp_hold_close(&other, pager);
    gp_pager_close(pager);      /* waits for the reads: their memory and files are about to go */
    model_end(&m);
}

int main(void) {
    check_begin();
    a_failed_guess_fails_nothing(true);
    a_failed_guess_fails_nothing(false);
    a_guess_that_fails_when_it_is_wanted();
    a_changed_file_is_seen(true, GP_SAME);
    a_changed_file_is_seen(false, GP_SAME);
    a_changed_file_is_seen(true, -ESTALE);
    a_changed_file_is_seen(false, -ESTALE);
    accepted_times_drop_what_was_foretold();
    slots_given_back_are_forgotten();
    close_while_reading();
    return 0;
}
