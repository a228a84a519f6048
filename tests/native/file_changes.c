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

static const int32_t all[] = { 0, 1, 2, 3, 4, 5, 6, 7, 8 };

static void begin(model_shape shape) {
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

static int use(gp_hold *by, uint32_t layer, const int32_t *experts, uint32_t n_experts, uint32_t n_tokens, gp_failure *failure) {
    const gp_demand demand = { .layer = layer, .experts = experts, .n_experts = n_experts, .n_tokens = n_tokens };
    return model_wave(&m, pager, by, &demand, failure);
}

static gp_failure is_refused(gp_hold *by, uint32_t layer, int32_t expert, int error) {
    gp_failure failure;
    CHECK(use(by, layer, &expert, 1, 1, &failure) == error, "a changed file is refused");
    CHECK(failure.error == error && by->n_open == 0, "the failure says so, and nothing is held");
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
    gp_failure failure;
    CHECK(use(&hold, 1, (int32_t[]) { 4, 3 }, 2, 1, &failure) < 0, "the demand fails");
    fake_fail_at(m.paths[0], 0, 0);
    is_refused(&hold, 1, 3, -ESTALE);       /* and nobody is served what came of it */
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
    w->error = use(w->hold, 1, (int32_t[]) { 3 }, 1, 1, &w->failure);
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
    begin((model_shape) { .n_slots = 24, .n_readers = 1, .piece_bytes = 64 << 10, .read_ahead = true });
    gp_failure failure;
    fake_hold_reads();
    fake_let_some_go(9 * 3);        /* the slices of layer 0 */
    model_use(&m, pager, &hold, 0, all, 9, 9);
    fake_wait_for_reads(1);         /* the only reader, before the file changes under it */
    rewrite_file(0, 1, 3);
    fake_let_reads_go();
    model_settle(pager);
    CHECK(model_is_resident(pager, &m, 1, 3), "the next layer was read ahead");
    CHECK(use(&hold, 1, all, 9, 9, &failure) == -ESTALE, "what was read ahead is refused");
    is_refused(&hold, 1, 3, -ESTALE);       /* and never served */
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
        n_waiting = hold.n_pending + other.n_pending;
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

/* Its slot is still held when another comes, who asks for himself. */
static void an_interrupted_comparison_says_nothing_to_others(void) {
    begin((model_shape) { 0 });
    gp_pager_compare_with(pager, compare, &asked);
    fake_file_touch(m.paths[0]);
    int32_t slot;
    gp_failure failure;
    CHECK(model_acquire(pager, &other, 1, (int32_t[]) { 3 }, 1, 1, &slot, &failure) == 0, "the expert comes");
    gp_wave_done(pager, &other, 0);
    asked.answer = -EINTR;
    CHECK(gp_wave_end(pager, &other, &failure) == -EINTR, "its comparison is interrupted");
    asked.answer = GP_SAME;
    model_use(&m, pager, &hold, 1, (int32_t[]) { 3 }, 1, 1);
    gp_hold_release(pager, &other);
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

static gp_hold *decoding;       /* in this thread */
static pthread_t decoding_thread;

static int compare_here(void *data, uint32_t file, uint64_t offset_bytes, const void *memory, uint64_t bytes) {
    CHECK(pthread_equal(pthread_self(), decoding_thread), "only the thread that decodes compares");
    model_check_invariants(pager);      /* and holds no lock meanwhile */
    pthread_mutex_lock(&pager->lock);
    const uint32_t n_open = decoding->n_open;
    pthread_mutex_unlock(&pager->lock);
    CHECK(n_open > 0, "while the slot is held");
    return compare(data, file, offset_bytes, memory, bytes);
}

typedef struct {
    uint32_t    first, step;
    atomic_uint n_done;
} share;

static void *be_done(void *data) {
    share *s = data;
    const uint32_t slices = (1u << m.shape.n_slices) - 1;
    for (uint32_t i = s->first; i < 9; i += s->step) {
        while (!gp_wave_has(pager, decoding, i, slices) && !gp_wave_stops(decoding, false)) {
            const unsigned n_arrived = gp_wave_n_arrived(decoding);
            if (!gp_wave_has(pager, decoding, i, slices) && !gp_wave_stops(decoding, false)) {
                (void) gp_wave_wait(pager, decoding, n_arrived, false);
            }
        }
        if (gp_wave_stops(decoding, false)) {
            break;
        }
        gp_wave_done(pager, decoding, i);
    }
    atomic_store(&s->n_done, 1);
    gp_wave_tell(pager, decoding);
    return NULL;
}

/* All experts of a layer, through few slots, computed by two threads neither of which decodes. */
static int use_with_helpers(uint32_t layer, gp_failure *failure) {
    static const uint32_t counts[] = { 9, 8, 7, 6, 5, 4, 3, 2, 1 };
    const gp_demand demand = { .layer = layer, .experts = all, .counts = counts, .n_experts = 9, .n_tokens = 9 };
    decoding = &hold;
    decoding_thread = pthread_self();
    CHECK(gp_wave_begin(pager, &hold, &demand, failure) == 0, "a wave begins");
    share shares[] = { { .first = 0, .step = 2 }, { .first = 1, .step = 2 } };
    pthread_t threads[2];
    for (int i = 0; i < 2; i++) {
        CHECK(pthread_create(&threads[i], NULL, be_done, &shares[i]) == 0, "the test has threads");
    }
    for (bool is_over = false; !is_over;) {
        const unsigned n_arrived = gp_wave_n_arrived(&hold);
        is_over = (atomic_load(&shares[0].n_done) && atomic_load(&shares[1].n_done)) || gp_wave_stops(&hold, true)
            || !gp_wave_wait(pager, &hold, n_arrived, true);
    }
    for (int i = 0; i < 2; i++) {
        pthread_join(threads[i], NULL);
    }
    const int error = gp_wave_end(pager, &hold, failure);
    gp_hold_release(pager, &hold);
    model_check_invariants(pager);
    return error;
}

static void the_thread_that_decodes_compares(void) {
    for (uint32_t n_slots = 3; n_slots <= 27; n_slots += 6) {
        begin((model_shape) { .n_slots = n_slots });
        gp_pager_compare_with(pager, compare_here, &asked);
        fake_file_touch(m.paths[0]);
        asked.answer = GP_SAME;
        asked.is_same = true;
        asked.n_asked = 0;
        gp_failure failure;
        CHECK(use_with_helpers(0, &failure) == 0 && failure.error == 0, "what is the same serves");
        CHECK(asked.n_asked >= m.shape.n_slices && asked.n_asked % m.shape.n_slices == 0 && asked.is_same, "it was compared");
        asked.n_asked = 0;
        CHECK(use_with_helpers(1, &failure) == 0 && asked.n_asked == 0, "and is as good as any from then on");
        end();
    }
}

static void the_thread_that_decodes_refuses(int answer, int error) {
    begin((model_shape) { .n_slots = 4 });
    if (answer != 0) {
        gp_pager_compare_with(pager, compare_here, &asked);
    }
    rewrite_file(0, 0, 3);
    asked.answer = answer;
    gp_failure failure;
    CHECK(use_with_helpers(0, &failure) == error && failure.error == error && failure.file == 0, "what is not is refused");
    CHECK(hold.n_open == 0, "and nothing of it is held");
    end();
}

/* All that a wave has read before the times were taken over is compared, not only what the first comparison was about. */
static void each_expert_that_was_read_before_is_compared(void) {
    begin((model_shape) { .n_slots = 27 });
    gp_pager_compare_with(pager, compare, &asked);
    fake_file_touch(m.paths[0]);
    int32_t slots[9];
    gp_failure failure;
    CHECK(model_acquire(pager, &hold, 0, all, 9, 9, slots, &failure) == 0, "the experts come");
    asked.answer = GP_SAME;
    asked.is_same = true;
    asked.n_asked = 0;
    for (uint32_t i = 0; i < 9; i++) {
        gp_wave_done(pager, &hold, i);
        (void) gp_wave_wait(pager, &hold, gp_wave_n_arrived(&hold) - 1, true);
    }
    CHECK(gp_wave_end(pager, &hold, &failure) == 0, "the wave ends well");
    CHECK(asked.n_asked == 9 * m.shape.n_slices && asked.is_same, "each was compared");
    gp_hold_release(pager, &hold);
    end();
}

/* What is being read ahead when times are taken over may have begun before: it is read anew when it is wanted, and nobody fails. */
static void what_is_being_read_ahead_meanwhile_is_read_anew(void) {
    begin((model_shape) { .n_slots = 27, .n_readers = 1, .piece_bytes = 64 << 10, .read_ahead = true });
    fake_hold_reads();
    fake_let_some_go(9 * 3);        /* the slices of layer 0 */
    model_use(&m, pager, &hold, 0, all, 9, 9);
    fake_wait_for_reads(1);
    fake_file_touch(m.paths[0]);
    const gp_file_times times = { fake_file_time(m.paths[0]), 0 };
    CHECK(gp_pager_accept(pager, &times) == 0, "the times are taken over");
    model_check_invariants(pager);
    CHECK(!model_is_resident(pager, &m, 1, 3), "what is being read is nobody's any more");
    fake_let_reads_go();
    model_use(&m, pager, &hold, 1, all, 9, 9);
    model_settle(pager);
    gp_counters counters[MODEL_LAYERS];
    gp_pager_counters(pager, counters);
    uint64_t expert_bytes = 0;
    for (uint32_t s = 0; s < m.shape.n_slices; s++) {
        expert_bytes += m.layers[1].slices[s].slice_bytes;
    }
    CHECK(counters[1].bytes_read == 2 * 9 * expert_bytes && counters[1].bytes_wasted == 9 * expert_bytes,
          "it was read in vain, and again");
    end();
}

int main(void) {
    check_begin();
    touched_file_serves_if_its_bytes_are_the_same();
    touched_file_is_refused_if_the_caller_says_so();
    interrupted_comparison_leaves_the_answer_to_the_next(-EINTR, GP_SAME);
    interrupted_comparison_leaves_the_answer_to_the_next(-EINTR, -ESTALE);
    an_interrupted_comparison_says_nothing_to_others();
    interrupted_comparison_leaves_the_answer_to_the_next(0, GP_SAME);  /* no answer of ours: it did not come to one */
    what_nobody_has_looked_at_is_dropped_when_times_are_taken_over();
    newer_file_is_refused();
    shorter_file_is_refused();
    unidentifiable_file_is_refused();
    failing_read_does_not_hide_the_change();
    change_during_the_read_is_refused();
    read_ahead_of_a_changed_file_is_refused();
    both_who_wait_are_refused();
    the_thread_that_decodes_compares();
    the_thread_that_decodes_refuses(0, -ESTALE);
    the_thread_that_decodes_refuses(-ESTALE, -ESTALE);
    the_thread_that_decodes_refuses(-EIO, -EIO);
    the_thread_that_decodes_refuses(-EINTR, -EINTR);
    each_expert_that_was_read_before_is_compared();
    what_is_being_read_ahead_meanwhile_is_read_anew();
    return 0;
}
