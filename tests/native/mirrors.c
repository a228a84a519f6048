/* Copies of the model on other disks: every byte is right whichever it came from, and a copy that fails or changes is named. How
 * reads are divided is in pace.c. */
#include <errno.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/wait.h>

#include "check.h"
#include "fake_os.h"
#include "model.h"
#include "reads/copies.h"

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

static void use_all(uint32_t n_rounds) {
    for (uint32_t round = 0; round < n_rounds; round++) {
        for (uint32_t l = 0; l < m.shape.n_layers; l++) {
            for (int32_t e = 0; e < (int32_t) m.shape.n_experts; e += 3) {
                model_use(&m, pager, &hold, l, (int32_t[]) { e, e + 1, e + 2 }, 3, 1);
            }
        }
    }
}

/* Per hundred of all bytes, what a copy has given; the sum is what the layers count. */
static double percent_of(uint32_t copy) {
    uint64_t bytes_read[GP_MAX_COPIES], sum = 0, counted = 0;
    gp_counters counters[MODEL_LAYERS];
    gp_pager_copies(pager, bytes_read);
    gp_pager_counters(pager, counters);
    for (uint32_t i = 0; i <= m.shape.n_mirrors; i++) {
        sum += bytes_read[i];
    }
    for (uint32_t l = 0; l < m.shape.n_layers; l++) {
        counted += counters[l].bytes_read;
    }
    CHECK(sum == counted && sum > 0, "all bytes came from some copy, and are counted once");
    return 100.0 * (double) bytes_read[copy] / (double) sum;
}

static void every_copy_is_read(model_shape shape) {
    begin(shape);
    use_all(4);
    for (uint32_t i = 0; i <= shape.n_mirrors; i++) {
        CHECK(percent_of(i) > 0, "every copy gives something");
    }
    end();
}

/* A copy on a file system without direct reads is read through the page cache beside one that is read directly. */
static void copies_are_read_each_in_its_way(bool is_mirror_direct) {
    model_make(&m, (model_shape) { .n_mirrors = 1, .n_files = 2, .offset_align = 512, .memory_align = 512 });
    m.config.direct = !is_mirror_direct;
    m.mirrors[0].direct = is_mirror_direct;
    for (uint32_t f = 0; f < 2; f++) {
        fake_file_refuse_direct(is_mirror_direct ? m.paths[f] : m.mirror_paths[0][f]);
    }
    pager = model_open(&m);
    CHECK(gp_hold_open(&hold, pager) == 0 && gp_hold_open(&other, pager) == 0, "two holds open");
    use_all(3);
    CHECK(percent_of(0) > 0 && percent_of(1) > 0, "both were read");
    end();
}

/* ---- failures ---------------------------------------------------------------------------------------------------- */

static int use(gp_hold *by, int32_t expert, gp_failure *failure) {
    const gp_demand demand = { .layer = 1, .experts = &expert, .n_experts = 1, .n_tokens = 1 };
    return model_wave(&m, pager, by, &demand, failure);
}

static gp_failure fails(int32_t expert, int error) {
    gp_failure failure;
    CHECK(use(&hold, expert, &failure) == error && failure.error == error,
          "the demand fails with what went wrong");
    CHECK(hold.n_open == 0 && !model_is_resident(pager, &m, 1, expert), "and nothing of it is kept");
    return failure;
}

/* Of the first demand's three slices the second is the one that the mirror is tried with; it lies in the second file. */
static void error_of_a_mirror_names_its_file(void) {
    begin((model_shape) { .n_mirrors = 2, .n_files = 2 });
    fake_fail_at(m.mirror_paths[0][1], model_offset(&m, 1, 1, 7) + 100, -EIO);
    const gp_failure failure = fails(7, -EIO);
    CHECK(failure.file == 3, "the files of the copies before it are counted, too");
    CHECK(failure.offset_bytes <= model_offset(&m, 1, 1, 7) + 100, "and the place is told");
    fake_fail_at(m.mirror_paths[0][1], 0, 0);
    model_use(&m, pager, &hold, 1, (int32_t[]) { 7 }, 1, 1);
    end();
}

static void changed_mirror_is_refused(void) {
    begin((model_shape) { .n_mirrors = 2, .n_files = 2 });
    model_use(&m, pager, &hold, 1, (int32_t[]) { 2 }, 1, 1);
    memset(m.mirror_files[1][0], 0x5a, 4096);
    fake_file_touch(m.mirror_paths[1][0]);
    for (int again = 0; again < 2; again++) {
        CHECK(fails(3, -ESTALE).file == 4, "the failure names the mirror's file");
    }
    model_use(&m, pager, &hold, 1, (int32_t[]) { 2 }, 1, 1);        /* read before the change */
    end();
}

typedef struct {
    gp_hold    *hold;
    int         error;
    gp_failure  failure;
} waiter;

static void *wait_for_3(void *data) {
    waiter *w = data;
    w->error = use(w->hold, 3, &w->failure);
    return NULL;
}

/* Whoever finds the change tells the other what has changed. */
static void both_who_wait_hear_of_the_mirror(void) {
    for (int round = 0; round < 20; round++) {
        begin((model_shape) { .n_mirrors = 1, .piece_bytes = 64 << 10 });
        fake_file_touch(m.mirror_paths[0][0]);
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
            CHECK(waiters[i].error == -ESTALE && waiters[i].failure.file == 1, "both hear which file has changed");
        }
        end();
    }
}

/* It comes when another has found what is wrong, who still holds the slot. */
static void who_comes_later_hears_of_the_mirror(void) {
    begin((model_shape) { .n_mirrors = 1 });
    int32_t slot;
    gp_failure failure;
    CHECK(model_acquire(pager, &other, 1, (int32_t[]) { 3 }, 1, 1, &slot, &failure) == 0, "the expert comes");
    fake_fail(FAKE_FILE_IDENTIFY, 2, -EIO);     /* the first is the model's own */
    gp_wave_done(pager, &other, 0);
    CHECK(use(&hold, 3, &failure) == -ESTALE && failure.file == 1, "who comes later hears of it, by name");
    CHECK(gp_wave_end(pager, &other, &failure) == -EIO && failure.file == 1, "a mirror that cannot be identified is refused");
    gp_hold_release(pager, &other);
    CHECK(!model_is_resident(pager, &m, 1, 3), "and nothing of it is kept");
    model_use(&m, pager, &hold, 1, (int32_t[]) { 3 }, 1, 1);
    end();
}

/* ---- order and end ----------------------------------------------------------------------------------------------- */

enum { N_READS = 12, READ_BYTES = 512 };

static gp_copies *copies;
static gp_read reads[N_READS];
static char memory[N_READS][READ_BYTES];
static atomic_uint n_turns, n_done;
static uint32_t done_as[N_READS];
static atomic_uint n_cancelled;

static void note_done(gp_read *read, int error, uint64_t error_offset_bytes) {
    (void) error_offset_bytes;
    gp_copies_note(copies, read, error);
    atomic_fetch_add(&n_cancelled, error == -ECANCELED);
    done_as[read->tag] = atomic_fetch_add(&n_turns, 1);
    atomic_fetch_add(&n_done, 1);
}

static void submit_all(void) {
    gp_read *wanted[N_READS];
    atomic_store(&n_turns, 0);
    atomic_store(&n_done, 0);
    for (uint32_t i = 0; i < N_READS; i++) {
        reads[i] = (gp_read) { .offset_bytes = i * READ_BYTES, .bytes = READ_BYTES, .into = memory[i], .region = memory[i],
                               .region_bytes = READ_BYTES, .done = note_done, .tag = i };
        wanted[i] = &reads[i];
    }
    gp_copies_submit(copies, wanted, N_READS);
}

static void open_copies(uint32_t n_readers) {
    model_make(&m, (model_shape) { .n_mirrors = 1, .n_readers = n_readers, .piece_bytes = 64 << 10 });
    CHECK(gp_copies_open(&copies, &fake_os, &m.config, &(gp_open_failure) { 0 }) == 0, "the copies open");
}

static void wait_for_all(void) {
    while (atomic_load(&n_done) < N_READS) {
        pthread_testcancel();
    }
}

/* What is wanted first is read first, of each copy. */
static void order_is_kept(void) {
    open_copies(1);
    uint32_t n_of[2] = { 0 };
    for (int round = 0; round < 20; round++) {
        submit_all();
        wait_for_all();
        for (uint32_t i = 0; i < N_READS; i++) {
            n_of[reads[i].file]++;
            CHECK(memcmp(memory[i], m.truth[0] + i * READ_BYTES, READ_BYTES) == 0, "the bytes are those of the model");
            for (uint32_t j = 0; j < i; j++) {
                CHECK(reads[i].file != reads[j].file || done_as[j] < done_as[i], "a copy is read in the order of wanting");
            }
        }
    }
    CHECK(n_of[0] > 0 && n_of[1] > 0, "both were read");
    gp_copies_close(copies);
    model_end(&m);
}

static void *let_go(void *data) {
    (void) data;
    fake_let_reads_go();
    return NULL;
}

/* Of the first reads one goes to the mirror, so each copy has one in flight; the others wait their turn. */
static void closing_waits_for_all_copies(void) {
    open_copies(1);
    fake_hold_reads();
    submit_all();
    fake_wait_for_reads(2);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, let_go, NULL) == 0, "the test has threads");
    gp_copies_close(copies);
    CHECK(atomic_load(&n_done) == N_READS, "every read was done before the copies were closed");
    pthread_join(thread, NULL);
    model_end(&m);
}

/* Reads are taken back from the copy that each of them went to; those that have begun come. */
static void reads_are_taken_back_from_all_copies(void) {
    open_copies(1);
    for (int round = 0; round < 20; round++) {
        submit_all();       /* so that something is known of both */
        wait_for_all();
    }
    fake_hold_reads();
    gp_read *unwanted[N_READS];
    uint32_t n_of[2] = { 0 };
    do {
        submit_all();
        n_of[0] = n_of[1] = 0;
        for (uint32_t i = 0; i < N_READS; i++) {
            unwanted[i] = &reads[i];
            n_of[reads[i].file]++;
        }
        const uint32_t n_begun = (n_of[0] > 0) + (n_of[1] > 0);
        fake_wait_for_reads(n_begun);
        atomic_store(&n_cancelled, 0);
        gp_copies_withdraw(copies, unwanted, N_READS);
        CHECK(atomic_load(&n_cancelled) == N_READS - n_begun, "all are taken back but those in flight");
        fake_let_some_go(n_begun);
        wait_for_all();
    } while (n_of[0] < 2 || n_of[1] < 2);
    fake_let_reads_go();
    submit_all();
    wait_for_all();
    for (uint32_t i = 0; i < N_READS; i++) {
        CHECK(memcmp(memory[i], m.truth[0] + i * READ_BYTES, READ_BYTES) == 0, "and read anew when they are wanted again");
    }
    gp_copies_close(copies);
    model_end(&m);
}

static void fork_closes_what_it_inherited(void) {
    begin((model_shape) { .n_mirrors = 2, .n_files = 2 });
    const pid_t pid = fork();
    if (pid == 0) {
        alarm(5);
        uint64_t bytes_read[GP_MAX_COPIES];
        gp_pager_copies(pager, bytes_read);
        gp_hold_close(&hold, pager);
        gp_hold_close(&other, pager);
        gp_pager_close(pager);
        _exit(fake_open_files() != 0);
    }
    int status = 0;
    CHECK(pid > 0 && waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 0,
          "a fork closes all copies' files and hangs nowhere");
    use_all(1);
    end();
}

int main(void) {
    check_begin();
    every_copy_is_read((model_shape) { .n_mirrors = 1, .piece_bytes = 64 << 10 });
    every_copy_is_read((model_shape) { .n_mirrors = 2, .n_files = 2, .offset_align = 512, .memory_align = 512 });
    copies_are_read_each_in_its_way(false);
    copies_are_read_each_in_its_way(true);
    error_of_a_mirror_names_its_file();
    changed_mirror_is_refused();
    both_who_wait_hear_of_the_mirror();
    who_comes_later_hears_of_the_mirror();
    order_is_kept();
    closing_waits_for_all_copies();
    reads_are_taken_back_from_all_copies();
    fork_closes_what_it_inherited();
    return 0;
}
