/* A file that is changed while the model is open: the decode ends with -ESTALE, and no byte that was read after the
 * change is served, then or later, whoever read it. What was read before stays good. */
#include <errno.h>
#include <stdatomic.h>
#include <string.h>

#include "check.h"
#include "fake_os.h"
#include "model.h"

static model m;
static gp_pager *pager;
static gp_hold hold, other;

static void begin(model_shape shape) {
    model_make(&m, shape);
    pager = model_open(&m);
    CHECK(gp_hold_open(&hold, pager, 2) == 0 && gp_hold_open(&other, pager, 2) == 0, "two holds open");
}

static void end(void) {
    model_check_invariants(pager);
    gp_hold_close(&hold, pager);
    gp_hold_close(&other, pager);
    gp_pager_close(pager);
    model_end(&m);
}

/* Other bytes in place of an expert's. */
static void overwrite(uint32_t layer, int32_t expert) {
    for (uint32_t s = 0; s < m.shape.n_slices; s++) {
        const gp_slice_spec *slice = &m.layers[layer].slices[s];
        memset(m.files[slice->file] + model_offset(&m, layer, s, expert), 0x5a, slice->slice_bytes);
    }
}

static void rewrite_file(uint32_t file, uint32_t layer, int32_t expert) {
    overwrite(layer, expert);
    fake_file_touch(m.paths[file]);
}

static gp_failure is_refused(gp_hold *by, uint32_t layer, int32_t expert, int error) {
    int32_t slot;
    gp_failure failure;
    CHECK(model_acquire(pager, by, layer, &expert, 1, 1, &slot, &failure) == error, "a changed file is refused");
    CHECK(failure.error == error && by->n_slots == 0, "the failure says so, and nothing is held");
    CHECK(!model_is_resident(pager, &m, layer, expert), "and what was read of it is not kept");
    return failure;
}

static void newer_file_is_refused(void) {
    begin((model_shape) { .n_files = 2 });
    model_use(&m, pager, &hold, 0, (int32_t[]) { 1, 2 }, 2, 1);
    rewrite_file(1, 0, 3);
    for (int again = 0; again < 2; again++) {
        const gp_failure failure = is_refused(&hold, 0, 3, -ESTALE);
        CHECK(failure.file == 1, "the failure names the file that changed");
    }
    model_use(&m, pager, &hold, 0, (int32_t[]) { 1, 2 }, 2, 1);     /* read before the change */
    end();
}

static void shorter_file_is_refused(void) {
    begin((model_shape) { .n_readers = 1 });
    fake_file_truncate(m.paths[0], model_offset(&m, 2, 2, 7) + 100);
    CHECK(is_refused(&hold, 0, 3, -ESTALE).file == 0, "also for an expert that is still there");
    is_refused(&hold, 2, 7, -ESTALE);       /* not -ENODATA: the change explains the missing bytes */
    end();
}

/* What came intact besides a read that failed is of the changed file all the same. */
static void failing_read_does_not_hide_the_change(void) {
    begin((model_shape) { 0 });
    rewrite_file(0, 1, 3);
    fake_fail_at(m.paths[0], model_offset(&m, 1, 0, 4), -EIO);
    int32_t slots[2];
    gp_failure failure;
    CHECK(model_acquire(pager, &hold, 1, (int32_t[]) { 4, 3 }, 2, 1, slots, &failure) < 0, "the demand fails");
    CHECK(!model_is_resident(pager, &m, 1, 3), "bytes of a changed file are not kept");
    end();
}

static void unidentifiable_file_is_refused(void) {
    begin((model_shape) { 0 });
    fake_fail(FAKE_FILE_IDENTIFY, 1, -EIO);
    is_refused(&hold, 0, 3, -EIO);
    model_use(&m, pager, &hold, 0, (int32_t[]) { 3 }, 1, 1);
    end();
}

typedef struct {
    gp_hold    *hold;
    int         error;
    gp_failure  failure;
} waiter;

static void *wait_for_3(void *data) {
    waiter *w = data;
    int32_t slot;
    w->error = model_acquire(pager, w->hold, 1, (int32_t[]) { 3 }, 1, 1, &slot, &w->failure);
    gp_pager_release(pager, w->hold);
    return NULL;
}

/* The file changes after the demand has begun and before its reads have. */
static void change_during_the_read_is_refused(void) {
    begin((model_shape) { .n_readers = 3, .piece_bytes = 64 << 10 });
    fake_hold_reads();
    waiter w = { .hold = &hold };
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, wait_for_3, &w) == 0, "the test has threads");
    fake_wait_for_reads(3);
    rewrite_file(0, 1, 3);
    fake_let_reads_go();
    pthread_join(thread, NULL);
    CHECK(w.error == -ESTALE, "a change during the read is seen");
    CHECK(!model_is_resident(pager, &m, 1, 3), "and what was read is not kept");
    end();
}

/* Nobody waits for read-ahead, so nobody looked at the file for it. */
static void read_ahead_of_a_changed_file_is_refused(void) {
    begin((model_shape) { .n_slots = 24, .piece_bytes = 64 << 10, .read_ahead = true });
    const int32_t all[] = { 0, 1, 2, 3, 4, 5, 6, 7, 8 };
    int32_t slots[9];
    gp_failure failure;
    fake_hold_reads();
    fake_let_some_go(9 * 3);        /* the slices of layer 0 */
    model_use(&m, pager, &hold, 0, all, 9, 9);
    fake_wait_for_reads(3);         /* every reader, before the file changes under them */
    rewrite_file(0, 1, 3);
    fake_let_reads_go();
    model_settle(pager);
    CHECK(model_is_resident(pager, &m, 1, 3), "the next layer was read ahead");
    CHECK(model_acquire(pager, &hold, 1, all, 9, 9, slots, &failure) == -ESTALE, "what was read ahead is refused");
    CHECK(!model_is_resident(pager, &m, 1, 3), "and not kept");
    end();
}

/* Two contexts want the same expert, and both wait for the one read of it: each comes to `error`. */
static void both_wait_and_come_to(int error, const char *claim) {
    fake_hold_reads();
    waiter waiters[] = { { .hold = &hold }, { .hold = &other } };
    pthread_t threads[2];
    for (int i = 0; i < 2; i++) {
        CHECK(pthread_create(&threads[i], NULL, wait_for_3, &waiters[i]) == 0, "the test has threads");
    }
    for (uint32_t n_waiting = 0; n_waiting < 2;) {
        pthread_mutex_lock(&pager->lock);
        n_waiting = hold.pending + other.pending;
        pthread_mutex_unlock(&pager->lock);
    }
    fake_wait_for_reads(3);
    fake_let_reads_go();
    for (int i = 0; i < 2; i++) {
        pthread_join(threads[i], NULL);
        CHECK(waiters[i].error == error, claim);
    }
}

/* Neither may compute with what was read of a changed file. */
static void both_who_wait_are_refused(void) {
    for (int round = 0; round < 30; round++) {
        begin((model_shape) { .n_readers = 3, .piece_bytes = 64 << 10 });
        rewrite_file(0, 1, 3);
        both_wait_and_come_to(-ESTALE, "neither of two who wait for a read is served from a changed file");
        end();
    }
}

static struct {
    int         answer;
    atomic_uint n_asked;
    atomic_bool is_same;    /* all that was read is what the file holds */
} asked;

/* As the caller does: compares with the file, and takes over its times. */
static int compare(void *data, uint32_t file, uint64_t offset_bytes, const void *memory, uint64_t bytes) {
    CHECK(data == &asked, "the caller's own data come back");
    asked.n_asked++;        /* two threads may ask at once */
    if (memcmp(m.files[file] + offset_bytes, memory, bytes) != 0) {
        asked.is_same = false;
    }
    if (asked.answer == GP_SAME) {
        const gp_file_times times = { fake_file_time(m.paths[file]), 0 };
        CHECK(gp_pager_accept(pager, &times) == 0, "the new times are taken over");
    }
    return asked.answer;
}

/* Times alone are no change: whoever can compare decides. */
static void touched_file_serves_if_its_bytes_are_the_same(void) {
    begin((model_shape) { 0 });
    gp_pager_compare_with(pager, compare, &asked);
    asked.is_same = true;
    asked.answer = GP_SAME;
    model_use(&m, pager, &hold, 0, (int32_t[]) { 1, 2 }, 2, 1);
    CHECK(asked.n_asked == 0, "nobody asks about a file that was left alone");
    fake_file_touch(m.paths[0]);
    model_use(&m, pager, &hold, 0, (int32_t[]) { 3 }, 1, 1);
    CHECK(asked.n_asked == m.shape.n_slices && asked.is_same, "each slice that was read is compared, at its place");
    model_use(&m, pager, &hold, 0, (int32_t[]) { 4 }, 1, 1);
    CHECK(asked.n_asked == m.shape.n_slices, "once: the times are known now");
    const gp_file_times wrong = { 0, 0 };
    CHECK(gp_pager_accept(pager, &wrong) == -ESTALE, "times that the file does not have are refused");
    end();
}

static void touched_file_is_refused_if_the_caller_says_so(void) {
    static const int answers[] = { -ESTALE, -EIO };
    for (int i = 0; i < 2; i++) {
        begin((model_shape) { 0 });
        gp_pager_compare_with(pager, compare, &asked);
        asked.answer = answers[i];
        rewrite_file(0, 0, 3);
        is_refused(&hold, 0, 3, answers[i]);
        end();
    }
}

/* An interrupted comparison has found nothing out: it said of what another context was waiting for that the file had changed. */
static void interrupted_comparison_leaves_the_answer_to_the_next(int answer, int then) {
    begin((model_shape) { .n_readers = 3, .piece_bytes = 64 << 10 });
    gp_pager_compare_with(pager, compare, &asked);
    fake_file_touch(m.paths[0]);
    asked.answer = answer;
    asked.n_asked = 0;
    both_wait_and_come_to(-EINTR, "each was interrupted, and nobody says that the file has changed");
    CHECK(asked.n_asked == 2, "each has asked for himself");
    asked.answer = then;
    if (then == GP_SAME) {
        model_use(&m, pager, &hold, 1, (int32_t[]) { 3 }, 1, 1);
    } else {
        is_refused(&hold, 1, 3, then);
    }
    end();
}

/* It was read before the file was compared, and nobody has looked at it since. */
static void what_nobody_has_looked_at_is_dropped_when_times_are_taken_over(void) {
    begin((model_shape) { .n_slots = 24 });
    const gp_expert expert = { .layer = 0, .expert = 3, .share = 0.5f };
    rewrite_file(0, 0, 3);
    CHECK(gp_pager_warm_up(pager, &expert, 1) == 0, "an expert is read before anybody wants it");
    model_settle(pager);
    CHECK(model_is_resident(pager, &m, 0, 3), "and came");
    const gp_file_times times = { fake_file_time(m.paths[0]), 0 };
    CHECK(gp_pager_accept(pager, &times) == 0, "the times are taken over");
    CHECK(!model_is_resident(pager, &m, 0, 3), "what came meanwhile is not kept");
    end();
}

int main(void) {
    check_begin();
    touched_file_serves_if_its_bytes_are_the_same();
    touched_file_is_refused_if_the_caller_says_so();
    interrupted_comparison_leaves_the_answer_to_the_next(-EINTR, GP_SAME);
    interrupted_comparison_leaves_the_answer_to_the_next(-EINTR, -ESTALE);
    interrupted_comparison_leaves_the_answer_to_the_next(0, GP_SAME);  /* no answer of ours: it did not come to one */
    what_nobody_has_looked_at_is_dropped_when_times_are_taken_over();
    newer_file_is_refused();
    shorter_file_is_refused();
    unidentifiable_file_is_refused();
    failing_read_does_not_hide_the_change();
    change_during_the_read_is_refused();
    read_ahead_of_a_changed_file_is_refused();
    both_who_wait_are_refused();
    return 0;
}
