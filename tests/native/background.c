/* Reads that the system does in the background: in order, no more at a time than was said, and every byte comes also
 * when the queue refuses a piece, takes a part of what it is offered, or is not to be had. */
#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "check.h"
#include "fake_os.h"
#include "reads/fetch.h"

enum { FILE_BYTES = 64 << 10, MAX_READS = 64, READERS = 3, PIECE_BYTES = 1024 };

typedef struct {
    gp_read     read;
    atomic_int  n_done;
    int         error;
    uint64_t    error_offset;
} one_read;

static uint8_t *file;
static int fd;
static gp_fetch *fetch;
static uint8_t *region;
static one_read reads[MAX_READS];
static gp_queues queues;        /* the fake's, looked at */
static gp_os os;

enum { MAX_SEEN = 1024 };
static uint64_t seen[MAX_SEEN];
static atomic_uint n_seen;

/* One thread fills the queue at a time, so this needs no lock; the thread sanitizer would tell. */
static int note_and_submit(gp_queue *queue, const gp_request *requests, uint32_t n_requests) {
    const int begun = fake_os.queues->submit(queue, requests, n_requests);
    for (int i = 0; i < begun; i++) {
        CHECK(atomic_load(&n_seen) < MAX_SEEN, "the test reads little");
        seen[atomic_fetch_add(&n_seen, 1)] = requests[i].offset_bytes;
    }
    return begun;
}

static void note_done(gp_read *read, int error, uint64_t error_offset_bytes) {
    one_read *r = read->owner;
    r->error = error;
    r->error_offset = error_offset_bytes;
    atomic_fetch_add(&r->n_done, 1);
}

static void begin(fake_weather weather) {
    file = fake_file_add("file", FILE_BYTES);
    fake_direct_align(512, 512);
    CHECK(fake_os.file_open("file", true, &fd) == 0, "the file opens");
    CHECK(posix_memalign((void **) &region, 4096, FILE_BYTES) == 0, "the test has memory");
    memset(region, 0, FILE_BYTES);
    atomic_store(&n_seen, 0);
    queues = *fake_os.queues;
    queues.submit = note_and_submit;
    os = fake_os;
    os.queues = &queues;
    fake_set_weather(weather);
    const gp_fetch_config config = { .direct = true, .offset_align = 512, .memory_align = 512, .n_readers = READERS,
                                     .piece_bytes = PIECE_BYTES, .fd = fd };
    CHECK(gp_fetch_open(&fetch, &os, &config, &(bool) { false }) == 0, "fetch opens");
}

static void end(void) {
    gp_fetch_close(fetch);
    free(region);
    (void) fake_os.file_close(fd);
    fake_reset();
}

static bool is_ahead;

/* The file in n equal parts, each at its own place. */
static void submit_parts(uint32_t from, uint32_t to, uint32_t n) {
    const uint64_t bytes = FILE_BYTES / n;
    for (uint32_t i = from; i < to; i++) {
        reads[i].read = (gp_read) {
            .fd = fd, .offset_bytes = i * bytes, .bytes = bytes, .into = (char *) region + i * bytes,
            .region = (char *) region + i * bytes, .region_bytes = bytes, .done = note_done, .owner = &reads[i],
            .is_ahead = is_ahead,
        };
        atomic_store(&reads[i].n_done, 0);
        reads[i].read.next = i + 1 < to ? &reads[i + 1].read : NULL;
    }
    gp_fetch_submit(fetch, from < to ? &reads[from].read : NULL);
}

static void wait_for(uint32_t from, uint32_t to) {
    for (uint32_t i = from; i < to; i++) {
        while (atomic_load(&reads[i].n_done) == 0) {
            nanosleep(&(struct timespec) { .tv_nsec = 100000 }, NULL);
        }
        CHECK(atomic_load(&reads[i].n_done) == 1, "a read is done once");
    }
}

static void all_arrives(uint32_t n) {
    submit_parts(0, n, n);
    wait_for(0, n);
    for (uint32_t i = 0; i < n; i++) {
        CHECK(reads[i].error == 0, "no read fails");
    }
    CHECK(memcmp(region, file, FILE_BYTES) == 0, "every byte has come");
}

static void many_reads_arrive(void) {
    static const fake_weather weathers[] = {
        { 0 },
        { .short_one_in = 2 },
        { .interrupted_one_in = 2, .delay_us = 50 },
        { .short_one_in = 2, .interrupted_one_in = 3, .delay_us = 50, .is_ragged = true },
    };
    for (size_t w = 0; w < sizeof weathers / sizeof weathers[0]; w++) {
        for (uint32_t n = 1; n <= MAX_READS; n *= 4) {
            begin(weathers[w]);
            CHECK(fake_count(FAKE_THREAD_START) == 1, "one thread is enough");
            all_arrives(n);
            end();
        }
    }
}

static void pieces_go_in_order(void) {
    begin((fake_weather) { .short_one_in = 3, .delay_us = 100 });
    submit_parts(0, 10, 16);
    submit_parts(10, 16, 16);
    wait_for(0, 16);
    CHECK(atomic_load(&n_seen) == FILE_BYTES / PIECE_BYTES, "every piece goes to the queue once");
    for (uint32_t i = 1; i < atomic_load(&n_seen); i++) {
        CHECK(seen[i] == seen[i - 1] + PIECE_BYTES, "in the order in which the reads were submitted");
    }
    end();
}

static void few_are_in_flight(void) {
    begin((fake_weather) { 0 });
    fake_hold_reads();
    submit_parts(0, 4, 4);
    fake_wait_for_reads(READERS);
    nanosleep(&(struct timespec) { .tv_nsec = 20000000 }, NULL);
    CHECK(fake_count(FAKE_FILE_READ) == READERS, "as many as there would be threads");
    fake_let_reads_go();
    wait_for(0, 4);
    end();
}

/* Each submission refused in turn: the piece is read in the foreground. */
static void refused_pieces_are_read(void) {
    for (unsigned k = 1;; k++) {
        begin((fake_weather) { 0 });
        fake_fail(FAKE_QUEUE_SUBMIT, k, -EAGAIN);
        all_arrives(4);
        const bool is_armed = fake_is_armed();
        CHECK(atomic_load(&n_seen) == FILE_BYTES / PIECE_BYTES - (is_armed ? 0u : 1u), "only the one that was refused");
        end();
        if (is_armed) {
            CHECK(k > 2, "those of both threads were");
            break;
        }
    }
}

static int refuse(gp_queue *queue, const gp_request *requests, uint32_t n_requests) {
    (void) queue, (void) requests, (void) n_requests;
    return -EBADF;
}

static void all_pieces_refused(void) {
    begin((fake_weather) { 0 });
    queues.submit = refuse;
    all_arrives(4);
    fake_fail_at("file", 5000, -EIO);
    submit_parts(0, 4, 4);
    wait_for(0, 4);
    CHECK(reads[0].error == -EIO && reads[0].error_offset == 5000 / PIECE_BYTES * PIECE_BYTES, "errors are the read's own");
    CHECK(reads[1].error == 0 && reads[2].error == 0, "and its alone");
    end();
}

static void a_bad_block_is_named(void) {
    begin((fake_weather) { .short_one_in = 2, .delay_us = 20 });
    fake_fail_at("file", 40000, -EIO);
    submit_parts(0, 4, 4);
    wait_for(0, 4);
    for (uint32_t i = 0; i < 4; i++) {
        CHECK(reads[i].error == (i == 2 ? -EIO : 0), "the read that covers it fails, the others do not");
    }
    CHECK(reads[2].error_offset <= 40000 && reads[2].error_offset + PIECE_BYTES > 40000, "with the piece's place");
    fake_fail_at("file", 0, 0);
    all_arrives(4);
    end();
}

static void a_truncated_file_is_noticed(void) {
    begin((fake_weather) { 0 });
    fake_file_truncate("file", 40100);
    submit_parts(0, 4, 4);
    wait_for(0, 4);
    CHECK(reads[0].error == 0 && reads[1].error == 0, "what there is comes");
    CHECK(reads[2].error == -ENODATA && reads[3].error == -ENODATA, "what is not there does not");
    CHECK(reads[2].error_offset + 512 > 40100, "and the place is behind the end");
    end();
}

/* Also with reads that nobody has put in flight yet. */
static void close_waits_for_all(void) {
    begin((fake_weather) { .delay_us = 200 });
    submit_parts(0, 16, 16);
    gp_fetch_close(fetch);
    for (uint32_t i = 0; i < 16; i++) {
        CHECK(atomic_load(&reads[i].n_done) == 1, "a closed fetch has nothing in flight");
    }
    CHECK(memcmp(region, file, FILE_BYTES) == 0, "every byte has come");
    fetch = NULL;
    end();
}

/* Nobody says that what is ahead is wanted by now, and there is always something else to read. */
static void what_is_ahead_does_not_wait_for_ever(void) {
    begin((fake_weather) { 0 });
    fake_hold_reads();
    submit_parts(0, 2, 16);
    is_ahead = true;
    submit_parts(15, 16, 16);
    is_ahead = false;
    submit_parts(2, 15, 16);
    fake_let_reads_go();
    wait_for(0, 16);
    uint32_t at = 0;
    while (seen[at] != 15 * FILE_BYTES / 16) {
        at++;
    }
    CHECK(at >= 2 * FILE_BYTES / 16 / PIECE_BYTES, "what is wanted goes first");
    CHECK(at < FILE_BYTES / PIECE_BYTES - 16, "but not all of it");
    end();
}

static void *submit_second_half(void *unused) {
    submit_parts(8, 16, 16);
    return unused;
}

static void two_submit(void) {
    for (int round = 0; round < 50; round++) {
        begin((fake_weather) { .short_one_in = 5 });
        pthread_t thread;
        CHECK(pthread_create(&thread, NULL, submit_second_half, NULL) == 0, "the test has threads");
        submit_parts(0, 8, 16);
        wait_for(0, 8);
        pthread_join(thread, NULL);
        wait_for(8, 16);
        CHECK(memcmp(region, file, FILE_BYTES) == 0, "every byte has come");
        end();
    }
}

static void pool_takes_its_place(void) {
    fake_fail(FAKE_QUEUE_OPEN, 1, -EPERM);      /* as from seccomp */
    begin((fake_weather) { .short_one_in = 3 });
    CHECK(fake_count(FAKE_QUEUE_OPEN) == 1 && fake_count(FAKE_THREAD_START) == READERS, "threads read instead");
    all_arrives(16);
    CHECK(fake_count(FAKE_QUEUE_SUBMIT) == 0, "all of it");
    end();
}

static void nothing_is_left_of_a_failed_open(void) {
    for (unsigned k = 1;; k++) {
        CHECK(k < 10, "the calls come to an end");
        (void) fake_file_add("file", FILE_BYTES);
        CHECK(fake_os.file_open("file", true, &fd) == 0, "the file opens");
        const gp_fetch_config config = { .direct = true, .offset_align = 512, .memory_align = 512, .n_readers = READERS,
                                         .piece_bytes = PIECE_BYTES, .fd = fd };
        fake_fail_any(k, -EAGAIN);
        const int error = gp_fetch_open(&fetch, &fake_os, &config, &(bool) { false });
        const bool is_armed = fake_is_armed();
        CHECK(is_armed == (error == 0) && (error == 0 || !fetch), "a fetch opens or stores NULL");
        fake_fail_any(0, 0);
        gp_fetch_close(fetch);
        (void) fake_os.file_close(fd);
        fake_reset();
        if (is_armed) {
            CHECK(k == 4, "two allocations and a thread were refused");
            break;
        }
    }
}

int main(void) {
    check_begin();
    fake_allow_queue(true);
    many_reads_arrive();
    pieces_go_in_order();
    few_are_in_flight();
    refused_pieces_are_read();
    all_pieces_refused();
    a_bad_block_is_named();
    a_truncated_file_is_noticed();
    close_waits_for_all();
    what_is_ahead_does_not_wait_for_ever();
    two_submit();
    pool_takes_its_place();
    nothing_is_left_of_a_failed_open();
    return 0;
}
