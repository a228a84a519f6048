/* A read that fails ends in one error, with its errno, file and place; the slot is not served, and the next try reads
 * again. */
#include <errno.h>

#include "check.h"
#include "fake_os.h"
#include "model.h"

static model m;
static gp_pager *pager;
static gp_hold hold, other;

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

static const int32_t wanted[] = { 4, 7 };

static gp_failure fails(uint32_t layer, int error) {
    int32_t slots[2];
    gp_failure failure;
    CHECK(model_acquire(pager, &hold, layer, wanted, 2, 1, slots, &failure) == error, "the error is the read's own");
    CHECK(failure.error == error, "and stands in the failure");
    CHECK(hold.n_open == 0 && hold.n_pending == 0, "on failure nothing is held");
    model_check_invariants(pager);
    return failure;
}

static void bad_block(model_shape shape) {
    begin(shape);
    /* In the second file, in the middle of expert 7's slice. */
    const uint32_t slice = 1;
    const uint64_t from = model_offset(&m, 1, slice, 7);
    const uint64_t align = m.config.direct ? m.config.offset_align : 1;
    fake_fail_at(m.paths[1], from + 700, -EIO);
    for (int again = 0; again < 2; again++) {
        const gp_failure failure = fails(1, -EIO);
        CHECK(failure.file == 1, "the failure names the file");
        CHECK(failure.offset_bytes <= from + 700 && failure.offset_bytes + m.config.piece_bytes > from + 700
              && failure.offset_bytes + align > from, "the failure names the piece that was being read");
        CHECK(!model_is_resident(pager, &m, 1, 7), "a slot with bytes that did not come is not kept");
        CHECK(model_is_resident(pager, &m, 1, 4), "an expert that did come stays");
    }
    fake_fail_at(m.paths[1], 0, 0);
    model_use(&m, pager, &hold, 1, wanted, 2, 1);
    end();
}

/* Each read of a demand fails in turn; the demand after it works. */
static void any_read_fails(model_shape shape) {
    begin(shape);
    unsigned k = 1;
    for (;; k++) {
        const uint32_t layer = k % 3;
        const int32_t first = (int32_t) (k % 8), experts[] = { first, first + 1 };
        int32_t slots[2];
        gp_failure failure;
        fake_fail(FAKE_FILE_READ, k, -ENXIO);
        const int error = model_acquire(pager, &hold, layer, experts, 2, 1, slots, &failure);
        gp_hold_release(pager, &hold);
        if (fake_is_armed()) {
            fake_fail(FAKE_FILE_READ, 0, 0);
            if (error == 0 && k > 30) {
                break;
            }
        } else {
            CHECK(error == -ENXIO && failure.error == -ENXIO, "the error is the read's own");
        }
        model_check_invariants(pager);
        model_use(&m, pager, &hold, layer, experts, 2, 1);
    }
    end();
}

/* The file was short from the start: nothing changed, the bytes are not there. */
static void file_too_short(model_shape shape) {
    begin(shape);
    gp_hold_close(&hold, pager);
    gp_hold_close(&other, pager);
    gp_pager_close(pager);
    const uint64_t from = model_offset(&m, 2, 0, 7);
    fake_file_truncate(m.paths[0], from + 100);
    pager = model_open(&m);
    CHECK(gp_hold_open(&hold, pager) == 0 && gp_hold_open(&other, pager) == 0, "two holds open");
    for (int again = 0; again < 2; again++) {
        const gp_failure failure = fails(2, -ENODATA);
        CHECK(failure.file == 0 && failure.offset_bytes + m.config.offset_align > from + 100,
              "the failure names a place behind the file's end");
        CHECK(!model_is_resident(pager, &m, 2, 7), "a slot with bytes that did not come is not kept");
    }
    end();
}

typedef struct {
    gp_hold    *hold;
    int         error;
    gp_failure  failure;
} waiter;

static void *wait_for_7(void *data) {
    waiter *w = data;
    int32_t slot;
    w->error = model_acquire(pager, w->hold, 1, (int32_t[]) { 7 }, 1, 1, &slot, &w->failure);
    return NULL;
}

/* Two contexts wait for the same read: both hear of its failure, with its errno and place. */
static void both_who_wait_hear_of_it(void) {
    begin((model_shape) { .n_readers = 3, .piece_bytes = 64 << 10 });
    fake_fail_at(m.paths[0], model_offset(&m, 1, 2, 7), -EIO);
    fake_hold_reads();
    waiter waiters[] = { { .hold = &hold }, { .hold = &other } };
    pthread_t threads[2];
    CHECK(pthread_create(&threads[0], NULL, wait_for_7, &waiters[0]) == 0, "the test has threads");
    fake_wait_for_reads(3);
    CHECK(pthread_create(&threads[1], NULL, wait_for_7, &waiters[1]) == 0, "the test has threads");
    for (bool has_joined = false; !has_joined;) {
        pthread_mutex_lock(&pager->lock);
        has_joined = other.n_pending == 1;
        pthread_mutex_unlock(&pager->lock);
    }
    fake_let_reads_go();
    for (int i = 0; i < 2; i++) {
        pthread_join(threads[i], NULL);
        CHECK(waiters[i].error == -EIO && waiters[i].failure.error == -EIO, "both hear of the failure");
        CHECK(waiters[i].failure.offset_bytes == model_offset(&m, 1, 2, 7), "and of its place");
    }
    CHECK(!model_is_resident(pager, &m, 1, 7), "a slot with bytes that did not come is not kept");
    fake_fail_at(m.paths[0], 0, 0);
    model_use(&m, pager, &hold, 1, wanted, 2, 1);
    end();
}

/* One slice has failed, another is still being read, when a second context comes to wait: it hears the same. */
static void late_comer_hears_of_it(void) {
    begin((model_shape) { .n_readers = 1, .piece_bytes = 64 << 10 });
    fake_fail(FAKE_FILE_READ, 1, -ENXIO);
    fake_hold_reads();
    waiter waiters[] = { { .hold = &hold }, { .hold = &other } };
    pthread_t threads[2];
    CHECK(pthread_create(&threads[0], NULL, wait_for_7, &waiters[0]) == 0, "the test has threads");
    fake_wait_for_reads(1);
    pthread_mutex_lock(&pager->lock);
    const int32_t index = pager->layers[1].slot_of[7];
    pthread_mutex_unlock(&pager->lock);
    CHECK(index >= 0, "the expert is being read");
    fake_let_some_go(1);
    for (bool has_failed = false; !has_failed;) {
        pthread_mutex_lock(&pager->lock);
        has_failed = atomic_load(&pager->missing[index]) != (1u << m.shape.n_slices) - 1;
        pthread_mutex_unlock(&pager->lock);
    }
    CHECK(pthread_create(&threads[1], NULL, wait_for_7, &waiters[1]) == 0, "the test has threads");
    for (bool has_joined = false; !has_joined;) {
        pthread_mutex_lock(&pager->lock);
        has_joined = other.n_open == 1;
        pthread_mutex_unlock(&pager->lock);
    }
    fake_let_reads_go();
    for (int i = 0; i < 2; i++) {
        pthread_join(threads[i], NULL);
        CHECK(waiters[i].error == -ENXIO, "both hear of the failure, with its errno");
        CHECK(waiters[i].failure.offset_bytes == model_offset(&m, 1, 0, 7), "and of its place");
    }
    end();
}

/* Nobody waits for read-ahead: its failure is dropped, and whoever wants the expert reads again and hears of it. */
static void read_ahead_fails(void) {
    begin((model_shape) { .n_slots = 24, .read_ahead = true });
    const int32_t all[] = { 0, 1, 2, 3, 4, 5, 6, 7, 8 };
    fake_fail_at(m.paths[0], model_offset(&m, 1, 1, 7), -EIO);
    model_use(&m, pager, &hold, 0, all, 9, 9);
    model_settle(pager);
    model_check_invariants(pager);
    CHECK(model_is_resident(pager, &m, 1, 4), "the next layer was read ahead");
    CHECK(!model_is_resident(pager, &m, 1, 7), "a read-ahead that failed leaves nothing");
    const gp_failure failure = fails(1, -EIO);
    CHECK(failure.offset_bytes >= model_offset(&m, 1, 1, 7), "the failure names its place");
    fake_fail_at(m.paths[0], 0, 0);
    model_use(&m, pager, &hold, 1, all, 9, 9);
    end();
}

#define DIRECT .n_files = 2, .offset_align = 512, .memory_align = 512, .piece_bytes = 1024
#define BUFFERED .n_files = 2, .piece_bytes = 1024

int main(void) {
    check_begin();
    bad_block((model_shape) { BUFFERED });
    bad_block((model_shape) { DIRECT });
    any_read_fails((model_shape) { BUFFERED });
    any_read_fails((model_shape) { DIRECT });
    file_too_short((model_shape) { BUFFERED });
    file_too_short((model_shape) { DIRECT });
    both_who_wait_hear_of_it();
    late_comer_hears_of_it();
    read_ahead_fails();
    return 0;
}
