/* Reads are divided by what each disk gives. Disks and time are simulated here: what a busy machine does to either is not what is
 * asked. */
#include "check.h"
#include "reads/pace.h"

enum { DISKS = 3, AT_ONCE = 6, MOST_WAITING = 64, SECOND = 1000000000, READ_BYTES = 1 << 20, REST_NS = 500000 };

/* ---- one choice -------------------------------------------------------------------------------------------------- */

static const gp_pace unknown, tried = { .waiting_bytes = 100 };

static gp_pace pace_of(uint64_t bytes_per_s, uint64_t waiting_bytes) {
    return (gp_pace) { .waiting_bytes = waiting_bytes, .n_done = 1, .done_bytes = bytes_per_s, .busy_ns = SECOND };
}

static void soonest_is_chosen(void) {
#define CHOICE(bytes, ...) gp_pace_choose((gp_pace[]) { __VA_ARGS__ }, sizeof (gp_pace[]) { __VA_ARGS__ } / sizeof (gp_pace), bytes)
    CHECK(CHOICE(100, pace_of(1000, 0)) == 0, "there is but one");
    CHECK(CHOICE(100, pace_of(1000, 200), pace_of(1000, 100)) == 1, "of equals the one with less to do");
    CHECK(CHOICE(100, pace_of(1000, 0), pace_of(1000, 0)) == 0, "of idle equals the model's own");
    CHECK(CHOICE(100, pace_of(4000, 200), pace_of(1000, 0)) == 0, "a fast disk with work to do is sooner done than a slow one");
    CHECK(CHOICE(100, pace_of(4000, 400), pace_of(1000, 0)) == 1, "until it has too much of it");
    CHECK(CHOICE(100, pace_of(1000, 100), pace_of(1000, 100), pace_of(3000, 100)) == 2, "of three it is the same");
    CHECK(CHOICE(100, pace_of(4000, 0), unknown) == 1, "a disk of which nothing is known is tried");
    CHECK(CHOICE(100, pace_of(4000, 900), tried) == 0, "with one read at a time");
    CHECK(CHOICE(100, tried, pace_of(10, 900)) == 1, "be it the model's own");
    CHECK(CHOICE(100, tried, tried) == 0, "before anything is known the model's own does the rest");
}

/* ---- disks that take their time ---------------------------------------------------------------------------------- */

/* Reads one after the other; each takes `ns`, and is done at the times in `ends_ns`, of which `n_waiting` are to come. */
typedef struct {
    uint64_t ns, free_ns;
    uint64_t ends_ns[MOST_WAITING];
    uint32_t n_waiting, n_reads;
    bool     fails;
} disk;

typedef struct {
    disk     disks[DISKS];
    gp_pace  paces[DISKS];
    uint32_t n_disks, n_noted;
    uint64_t now_ns;
} world;

static void submit(world *w) {
    const uint32_t chosen = gp_pace_choose(w->paces, w->n_disks, READ_BYTES);
    disk *d = &w->disks[chosen];
    gp_pace_begin(&w->paces[chosen], READ_BYTES, w->now_ns);
    d->free_ns = (d->free_ns > w->now_ns ? d->free_ns : w->now_ns) + d->ns;
    CHECK(d->n_waiting < MOST_WAITING, "the test has room");
    d->ends_ns[d->n_waiting++] = d->free_ns;
    d->n_reads++;
}

/* The next read of all disks comes. False: there is none. */
static bool step(world *w) {
    uint32_t next = w->n_disks;
    for (uint32_t i = 0; i < w->n_disks; i++) {
        if (w->disks[i].n_waiting > 0 && (next == w->n_disks || w->disks[i].ends_ns[0] < w->disks[next].ends_ns[0])) {
            next = i;
        }
    }
    if (next == w->n_disks) {
        return false;
    }
    disk *d = &w->disks[next];
    w->now_ns = d->ends_ns[0];
    d->n_waiting--;
    for (uint32_t i = 0; i < d->n_waiting; i++) {
        d->ends_ns[i] = d->ends_ns[i + 1];
    }
    gp_pace_end(&w->paces[next], READ_BYTES, !d->fails, w->now_ns);
    if (++w->n_noted % GP_PACE_SPAN_READS == 0) {
        for (uint32_t i = 0; i < w->n_disks; i++) {
            gp_pace_forget_half(&w->paces[i]);
        }
    }
    return true;
}

/* Layers, of which each waits for its reads and then computes. */
static void read_layers(world *w, uint32_t n_layers) {
    for (uint32_t l = 0; l < n_layers; l++) {
        for (uint32_t i = 0; i < AT_ONCE; i++) {
            submit(w);
        }
        while (step(w)) {
        }
        w->now_ns += REST_NS;
    }
}

static world world_of(uint32_t n_disks, uint64_t first_ns, uint64_t second_ns, uint64_t third_ns) {
    return (world) { .n_disks = n_disks, .disks = { { .ns = first_ns }, { .ns = second_ns }, { .ns = third_ns } } };
}

static double share_of(const world *w, uint32_t index) {
    uint32_t sum = 0;
    for (uint32_t i = 0; i < w->n_disks; i++) {
        sum += w->disks[i].n_reads;
    }
    return (double) w->disks[index].n_reads / sum;
}

static bool is_near(double value, double expected) {
    return value > expected - 0.03 && value < expected + 0.03;
}

static void reads_are_divided(void) {
    world two = world_of(2, 400000, 400000, 0), three = world_of(3, 400000, 400000, 400000), uneven = world_of(2, 800000, 400000, 0);
    read_layers(&two, 500);
    CHECK(is_near(share_of(&two, 0), 0.5), "equals give the same");
    read_layers(&three, 500);
    CHECK(is_near(share_of(&three, 0), 1 / 3.0) && is_near(share_of(&three, 2), 1 / 3.0), "of three, too");
    read_layers(&uneven, 500);
    CHECK(is_near(share_of(&uneven, 1), 2 / 3.0), "one twice as fast gives twice as much");
    const uint64_t took_ns = (uneven.now_ns - 500 * (uint64_t) REST_NS) / 500;
    CHECK(took_ns < 1700000, "so that both are done at the same time");
}

static void slow_disk_is_spared(uint32_t slow) {
    world w = world_of(2, slow == 0 ? 100000000 : 400000, slow == 1 ? 100000000 : 400000, 0);
    read_layers(&w, 1000);
    const uint32_t at_first = slow == 0 ? AT_ONCE - 1 : 1;  /* before anything was known of either */
    CHECK(w.disks[slow].n_reads >= at_first && w.disks[slow].n_reads <= at_first + 1, "a slow disk is tried, and then spared");
}

/* It was busy with something else. */
static void slow_disk_is_tried_again(void) {
    world w = world_of(2, 400000, 100000000, 0);
    read_layers(&w, 100);
    w.disks[1].ns = 400000;
    const uint32_t before = w.disks[1].n_reads;
    read_layers(&w, 12 * GP_PACE_SPAN_READS / AT_ONCE);
    CHECK(w.disks[1].n_reads > before + GP_PACE_SPAN_READS, "and gets its part again when it is fast");
}

static void disk_that_fails_is_not_fast(void) {
    world w = world_of(2, 400000, 1000, 0);
    w.disks[1].fails = true;
    read_layers(&w, 500);
    CHECK(share_of(&w, 1) < 0.2, "nothing is known of it, so it is tried with one read at a time");
}

static void what_is_known_is_forgotten_by_halves(void) {
    gp_pace pace = { 0 };
    for (uint64_t i = 0; i < 8; i++) {
        gp_pace_begin(&pace, 100, i * 50);
        gp_pace_end(&pace, 100, true, i * 50 + 20);
    }
    CHECK(pace.n_done == 8 && pace.done_bytes == 800 && pace.busy_ns == 160, "eight reads are known, and the time they took");
    gp_pace_forget_half(&pace);
    CHECK(pace.n_done == 4 && pace.done_bytes == 400 && pace.busy_ns == 80, "then four, as fast as they were");
    for (int i = 0; i < 3; i++) {
        gp_pace_forget_half(&pace);
    }
    CHECK(pace.n_done == 0, "and in the end nothing");
}

static void time_never_runs_backwards(void) {
    gp_pace pace = { 0 };
    gp_pace_begin(&pace, 100, 2000);
    gp_pace_end(&pace, 100, true, 1000);
    CHECK(pace.busy_ns == 0 && pace.n_done == 1 && pace.waiting_bytes == 0, "an earlier time, from another thread, counts as none");
}

int main(void) {
    check_begin();
    soonest_is_chosen();
    reads_are_divided();
    slow_disk_is_spared(0);
    slow_disk_is_spared(1);
    slow_disk_is_tried_again();
    disk_that_fails_is_not_fast();
    what_is_known_is_forgotten_by_halves();
    time_never_runs_backwards();
    return 0;
}
