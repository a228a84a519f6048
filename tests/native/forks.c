/* A fork has the parent's memory and none of its threads. It may not decode; to close what it inherited must neither
 * hang nor disturb the parent, even when a thread of the parent was waiting at the time. */
#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <stdatomic.h>
#include <sys/wait.h>
#include <time.h>

#include "check.h"
#include "fake_os.h"
#include "model.h"

static model m;
static gp_pager *pager;
static gp_hold hold, other;

enum { CHILD_SECONDS = 5 };

static void *wait_for_expert(void *data) {
    (void) data;
    model_use(&m, pager, &hold, 0, (int32_t[]) { 1, 2 }, 2, 1);
    return NULL;
}

static void *wait_for_slots(void *data) {
    (void) data;
    int32_t slots[2];
    gp_failure failure;
    /* In vain, if the test takes long. */
    (void) model_acquire(pager, &other, 1, (int32_t[]) { 1, 2 }, 2, 1, slots, &failure);
    gp_hold_release(pager, &other);
    return NULL;
}

static int child(void) {
    alarm(CHILD_SECONDS);
    int32_t slots[2];
    gp_failure failure;
    CHECK(model_acquire(pager, &other, 0, (int32_t[]) { 1, 2 }, 2, 1, slots, &failure) == -ECHILD,
          "a fork does not decode with its parent's pager");
    CHECK(failure.error == -ECHILD, "and says why");
    gp_hold_close(&hold, pager);
    gp_hold_close(&other, pager);
    gp_pager_close(pager);
    return 0;
}

static bool child_ends_well(int (*child)(void)) {
    const pid_t pid = fork();
    if (pid == 0) {
        _exit(child());
    }
    int status = 0;
    CHECK(pid > 0 && waitpid(pid, &status, 0) == pid, "the test can fork");
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

static void begin(void) {
    model_make(&m, (model_shape) { .n_slots = 2, .n_readers = 3, .piece_bytes = 64 << 10 });
    pager = model_open(&m);
    CHECK(gp_hold_open(&hold, pager) == 0 && gp_hold_open(&other, pager) == 0, "two holds open");
}

static void end(void) {
    model_use(&m, pager, &hold, 2, (int32_t[]) { 1, 2 }, 2, 1);
    model_check_invariants(pager);
    gp_hold_close(&hold, pager);
    gp_hold_close(&other, pager);
    gp_pager_close(pager);
    model_end(&m);
}

static void fork_of_an_idle_parent(void) {
    begin();
    CHECK(child_ends_well(child), "a fork can close what it inherited");
    end();
}

static atomic_bool is_over;

static void *decode(void *data) {
    (void) data;
    for (uint32_t turn = 0; !atomic_load(&is_over); turn++) {
        int32_t slots[2];
        gp_failure failure;
        (void) model_acquire(pager, &hold, turn % 3, (int32_t[]) { 1, 2 }, 2, 1, slots, &failure);
        gp_hold_release(pager, &hold);
    }
    return NULL;
}

static int curious_child(void) {
    alarm(CHILD_SECONDS);
    gp_counters counters[MODEL_LAYERS];
    uint8_t resident[16];
    gp_failure failure;
    gp_pager_counters(pager, counters);
    CHECK(gp_pager_resident(pager, 1, resident) == 0, "a fork may look");
    CHECK(gp_pager_pin(pager, 1, (int32_t[]) { 1 }, 1, NULL, NULL, &failure) == -ECHILD, "but not read");
    gp_pager_unpin_all(pager);
    gp_pager_count_left_alone(pager, 0);
    gp_hold_release(pager, &hold);
    return 0;
}

/* Some of these forks happen while a thread of the parent has the lock. */
static void forks_of_a_busy_parent(void) {
    begin();
    atomic_store(&is_over, false);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, decode, NULL) == 0, "the test has threads");
    for (int i = 0; i < 60; i++) {
        CHECK(child_ends_well(curious_child), "a fork never waits for a lock that it inherited");
    }
    atomic_store(&is_over, true);
    pthread_join(thread, NULL);
    end();
}

static void fork_while_the_parent_waits(void) {
    begin();
    fake_hold_reads();
    pthread_t reading, waiting;
    CHECK(pthread_create(&reading, NULL, wait_for_expert, NULL) == 0, "the test has threads");
    fake_wait_for_reads(3);
    CHECK(pthread_create(&waiting, NULL, wait_for_slots, NULL) == 0, "the test has threads");
    nanosleep(&(struct timespec) { .tv_nsec = 50000000 }, NULL);    /* both are asleep by now */
    const bool is_well = child_ends_well(child);
    fake_let_reads_go();
    pthread_join(reading, NULL);
    pthread_join(waiting, NULL);
    CHECK(is_well, "also when threads of the parent were waiting");
    end();
}

int main(void) {
    check_begin();
    fork_of_an_idle_parent();
    fork_while_the_parent_waits();
    forks_of_a_busy_parent();
    return 0;
}
