/* Warm-up: the most used experts come first, into free slots alone; demand goes first; what fails fails nothing. */
#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>

#include "check.h"
#include "fake_os.h"
#include "model.h"

enum { EXPERTS = 9, SLICES = 3 };

static model m;
static gp_pager *pager;
static gp_hold hold;

/* 24 slots for 3 layers of 9, half of which a batch's experts pass through: 12 are for guesses, 4 per layer. */
static const model_shape roomy = { .n_experts = EXPERTS, .n_slots = 24, .piece_bytes = 64 << 10 };
enum { GUESSES = 12 };

static void begin(model_shape shape) {
    model_make(&m, shape);
    pager = model_open(&m);
    CHECK(gp_hold_open(&hold, pager) == 0, "a hold opens");
}

static void end(void) {
    model_check_invariants(pager);
    gp_hold_close(&hold, pager);
    gp_pager_close(pager);
    model_end(&m);
}

static uint32_t count_resident(void) {
    gp_counters counters[MODEL_LAYERS];
    gp_pager_counters(pager, counters);
    uint32_t n = 0;
    for (uint32_t l = 0; l < m.shape.n_layers; l++) {
        n += counters[l].resident;
    }
    return n;
}

/* All experts: expert 8 of every layer, then 7, ... */
static uint32_t list_all(gp_expert *experts) {
    uint32_t n = 0;
    for (int32_t e = EXPERTS - 1; e >= 0; e--) {
        for (uint32_t l = 0; l < m.shape.n_layers; l++) {
            experts[n++] = (gp_expert) { l, e, (float) e / EXPERTS };
        }
    }
    return n;
}

static void warm_up_all(void) {
    gp_expert experts[EXPERTS * MODEL_LAYERS];
    CHECK(gp_pager_warm_up(pager, experts, list_all(experts)) == 0, "a warm-up begins");
}

static void most_used_come_into_free_slots(void) {
    begin(roomy);
    warm_up_all();
    model_settle(pager);
    model_check_invariants(pager);
    CHECK(count_resident() == GUESSES, "what a batch passes through stays free");
    for (uint32_t l = 0; l < m.shape.n_layers; l++) {
        for (int32_t e = 0; e < EXPERTS; e++) {
            CHECK(model_is_resident(pager, &m, l, e) == (e > 4), "the first of the list have come, the last have not");
        }
    }
    const uint64_t bytes_read = fake_bytes_read();
    for (uint32_t l = 0; l < m.shape.n_layers; l++) {
        model_use(&m, pager, &hold, l, (int32_t[]) { 8, 5 }, 2, 1);
    }
    gp_counters counters[MODEL_LAYERS];
    gp_pager_counters(pager, counters);
    CHECK(counters[0].hits == 2 && counters[0].misses == 0 && counters[0].tokens == 1, "they are hits; coming was no use");
    CHECK(fake_bytes_read() == bytes_read, "and are not read again");
    CHECK(pager->layers[0].kept == 2, "what was wanted is kept from then on");
    CHECK(gp_pager_warm_up(pager, NULL, 0) == -EALREADY, "once");
    end();
}

/* The one that is least likely to be wanted, and what is used stays before what is only likely to be. */
static void guesses_go_first(void) {
    begin((model_shape) { .n_layers = 1, .n_experts = EXPERTS, .n_slots = 8, .policy = "lfru" });
    warm_up_all();
    model_settle(pager);
    CHECK(count_resident() == 4 && model_is_resident(pager, &m, 0, 5), "5 to 8 have come");
    for (int32_t e = 0; e < 5; e++) {
        model_use(&m, pager, &hold, 0, &e, 1, 1);
    }
    for (int32_t e = 0; e < EXPERTS; e++) {
        CHECK(model_is_resident(pager, &m, 0, e) == (e != 5), "the least likely has made room for what is used");
    }
    end();
}

static void each_class_fills_its_own_slots(void) {
    model_shape shape = roomy;
    shape.n_classes = 2;
    begin(shape);
    warm_up_all();
    model_settle(pager);
    /* Two layers share the 12 slots that a batch leaves of 24; one has 12 for its 9 experts. */
    CHECK(count_resident() == 12 + 9, "and none takes another's");
    end();
}

static void nothing_is_given_up(void) {
    begin((model_shape) { .n_experts = EXPERTS, .n_slots = 6, .n_layers = 3 });
    for (uint32_t l = 0; l < 3; l++) {
        model_use(&m, pager, &hold, l, (int32_t[]) { 0, 1 }, 2, 1);
    }
    const uint64_t bytes_read = fake_bytes_read();
    warm_up_all();
    model_settle(pager);
    CHECK(fake_bytes_read() == bytes_read && count_resident() == 6, "without free slots nothing is read");
    end();
}

/* One expert is in flight at a time; it and no other can be in the way of a demand. */
static void *use_two(void *data) {
    (void) data;
    model_use(&m, pager, &hold, 0, (int32_t[]) { 0, 1 }, 2, 1);
    return NULL;
}

static uint32_t count_reading(void) {
    pthread_mutex_lock(&pager->lock);
    const uint32_t n = pager->n_in_flight;
    pthread_mutex_unlock(&pager->lock);
    return n;
}

/* The two of use_two are being read; checks that but for the one that was before them nothing else is. */
static bool is_demand_waiting(void) {
    pthread_mutex_lock(&pager->lock);
    const gp_layer *l = &pager->layers[0];
    const bool is_waiting = pager->slots[l->slot_of[0]].state == READING || pager->slots[l->slot_of[1]].state == READING;
    uint32_t n_resident = 0;
    for (uint32_t i = 0; i < m.shape.n_layers; i++) {
        n_resident += pager->layers[i].counters.resident;
    }
    pthread_mutex_unlock(&pager->lock);
    CHECK(!is_waiting || n_resident == 3, "no other is sent while somebody waits");
    return is_waiting;
}

static void demand_goes_first(void) {
    begin(roomy);
    fake_hold_reads();
    warm_up_all();
    fake_wait_for_reads(SLICES);
    nanosleep(&(struct timespec) { .tv_nsec = 20000000 }, NULL);
    CHECK(count_reading() == 1, "one expert at a time");
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, use_two, NULL) == 0, "the test has threads");
    while (count_reading() < 3) {
        nanosleep(&(struct timespec) { .tv_nsec = 100000 }, NULL);
    }
    while (is_demand_waiting()) {
        fake_let_some_go(1);
        nanosleep(&(struct timespec) { .tv_nsec = 2000000 }, NULL);
    }
    fake_let_reads_go();
    pthread_join(thread, NULL);
    model_settle(pager);
    while (count_resident() < GUESSES) {
        nanosleep(&(struct timespec) { .tv_nsec = 100000 }, NULL);
    }
    model_settle(pager);
    CHECK(count_resident() == GUESSES, "afterwards it goes on");
    end();
}

/* A token that wants what is just coming waits for it, and reads nothing twice. */
static void *use_guess(void *data) {
    (void) data;
    model_use(&m, pager, &hold, 0, (int32_t[]) { 8, 7 }, 2, 1);
    return NULL;
}

static void a_guess_in_flight_is_joined(void) {
    begin(roomy);
    fake_hold_reads();
    warm_up_all();
    fake_wait_for_reads(SLICES);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, use_guess, NULL) == 0, "the test has threads");
    while (count_reading() < 2) {
        nanosleep(&(struct timespec) { .tv_nsec = 100000 }, NULL);
    }
    fake_let_reads_go();
    pthread_join(thread, NULL);
    while (count_resident() < GUESSES) {
        nanosleep(&(struct timespec) { .tv_nsec = 100000 }, NULL);
    }
    model_settle(pager);
    uint64_t expert_bytes = 0;
    for (uint32_t s = 0; s < SLICES; s++) {
        expert_bytes += m.layers[0].slices[s].slice_bytes;
    }
    CHECK(fake_bytes_read() == GUESSES * expert_bytes, "each is read once");
    end();
}

/* Tokens at once, in all kinds of weather: model_use checks every byte. */
static void tokens_are_right_meanwhile(void) {
    for (uint32_t n_slots = 6; n_slots <= 27; n_slots += 7) {
        begin((model_shape) { .n_experts = EXPERTS, .n_slots = n_slots, .policy = "lfru", .read_ahead = true });
        fake_set_weather((fake_weather) { .short_one_in = 4, .interrupted_one_in = 5, .delay_us = 100 });
        warm_up_all();
        for (int token = 0; token < 60; token++) {
            const uint32_t n = token % 20 == 19 && n_slots > EXPERTS ? EXPERTS : 2;
            for (uint32_t l = 0; l < m.shape.n_layers; l++) {
                int32_t experts[EXPERTS];
                model_draw(&m, experts, n);
                model_use(&m, pager, &hold, l, experts, n, n > 2 ? 5 : 1);
                model_check_invariants(pager);
            }
        }
        model_settle(pager);
        end();
    }
}

/* What was last in flight may have been withdrawn: then nobody finishes a read and sends the next. */
static void a_context_goes_on_with_it(void) {
    begin(roomy);
    model_use(&m, pager, &hold, 0, (int32_t[]) { 0, 1 }, 2, 1);
    model_settle(pager);
    pthread_mutex_lock(&pager->lock);
    pager->n_in_flight++;
    pthread_mutex_unlock(&pager->lock);
    warm_up_all();
    model_settle(pager);
    pthread_mutex_lock(&pager->lock);
    pager->n_in_flight--;
    CHECK(pager->layers[0].counters.resident == 2, "nothing is sent while something is in flight");
    pthread_mutex_unlock(&pager->lock);
    model_use(&m, pager, &hold, 0, (int32_t[]) { 0, 1 }, 2, 1);
    while (count_resident() < GUESSES) {
        nanosleep(&(struct timespec) { .tv_nsec = 100000 }, NULL);
    }
    model_settle(pager);
    end();
}

static void a_failed_read_fails_nothing(void) {
    begin(roomy);
    fake_fail_at(m.paths[0], model_offset(&m, 1, 1, 8) + 5, -EIO);
    warm_up_all();      /* layer 0, then layer 1, whose read fails */
    model_settle(pager);
    CHECK(count_resident() == 1 && model_is_resident(pager, &m, 0, 8), "it ends with the first failure");
    const gp_demand demand = { .layer = 1, .experts = (int32_t[]) { 8, 1 }, .n_experts = 2, .n_tokens = 1 };
    gp_failure failure;
    CHECK(model_wave(&m, pager, &hold, &demand, &failure) == -EIO && failure.error == -EIO, "who wants that expert hears of it");
    fake_fail_at(m.paths[0], 0, 0);
    model_use(&m, pager, &hold, 1, (int32_t[]) { 8, 1 }, 2, 1);
    end();
}

/* Bytes that came before the file was changed are not computed with. */
static void a_changed_file_is_noticed(void) {
    begin(roomy);
    warm_up_all();
    model_settle(pager);
    fake_file_touch(m.paths[0]);
    const gp_demand demand = { .layer = 0, .experts = (int32_t[]) { 8, 7 }, .n_experts = 2, .n_tokens = 1 };
    gp_failure failure;
    CHECK(model_wave(&m, pager, &hold, &demand, &failure) == -ESTALE, "guesses are checked");
    end();
}

/* Also while whoever finished a read of one copy is about to submit to the other. */
static void close_in_the_middle(void) {
    for (long wait_ns = 0; wait_ns < 6000000; wait_ns += 300000) {
        model_shape shape = roomy;
        shape.n_mirrors = wait_ns / 300000 % 2;
        begin(shape);
        fake_set_weather((fake_weather) { .delay_us = 200 });
        warm_up_all();
        nanosleep(&(struct timespec) { .tv_nsec = wait_ns }, NULL);
        end();
    }
    begin(roomy);
    fake_set_weather((fake_weather) { .delay_us = 500 });
    warm_up_all();
    gp_hold_close(&hold, pager);
    const uint64_t before = fake_bytes_read();
    gp_pager_close(pager);
    CHECK(fake_bytes_read() - before < 3 * 8192, "closing waits for what is in flight and sends nothing after it");
    model_end(&m);
}

static void fork_in_the_middle(void) {
    begin(roomy);
    fake_hold_reads();
    warm_up_all();
    fake_wait_for_reads(SLICES);
    const pid_t pid = fork();
    if (pid == 0) {
        alarm(5);
        const bool is_refused = gp_pager_warm_up(pager, NULL, 0) == -ECHILD;
        gp_hold_close(&hold, pager);
        gp_pager_close(pager);
        _exit(!is_refused);
    }
    int status = 0;
    CHECK(pid > 0 && waitpid(pid, &status, 0) == pid, "the test can fork");
    fake_let_reads_go();
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a fork can close what it inherited");
    while (count_resident() < GUESSES) {
        nanosleep(&(struct timespec) { .tv_nsec = 100000 }, NULL);
    }
    model_settle(pager);
    end();
}

static void nonsense_is_refused(void) {
    begin(roomy);
    CHECK(gp_pager_warm_up(pager, &(gp_expert) { 3, 0, 1 }, 1) == -EINVAL, "no such layer");
    CHECK(gp_pager_warm_up(pager, &(gp_expert) { 0, EXPERTS, 1 }, 1) == -EINVAL, "no such expert");
    CHECK(gp_pager_warm_up(pager, &(gp_expert) { 0, -1, 1 }, 1) == -EINVAL, "no such expert");
    fake_fail(FAKE_ALLOCATE, 1, -ENOMEM);
    CHECK(gp_pager_warm_up(pager, &(gp_expert) { 0, 1, 1 }, 1) == -ENOMEM, "a list needs memory");
    model_settle(pager);
    CHECK(count_resident() == 0, "and nothing was read");
    CHECK(gp_pager_warm_up(pager, &(gp_expert) { 0, 1, 1 }, 1) == 0, "what was refused can be asked for again");
    model_settle(pager);
    CHECK(count_resident() == 1, "and is read");
    end();
}

int main(void) {
    check_begin();
    most_used_come_into_free_slots();
    guesses_go_first();
    each_class_fills_its_own_slots();
    nothing_is_given_up();
    demand_goes_first();
    a_guess_in_flight_is_joined();
    tokens_are_right_meanwhile();
    a_context_goes_on_with_it();
    a_failed_read_fails_nothing();
    a_changed_file_is_noticed();
    close_in_the_middle();
    fork_in_the_middle();
    nonsense_is_refused();
    return 0;
}
