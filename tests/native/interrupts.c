/* A decode that shall stop does so although reads hang: nothing waits for them, no slot that is being read is given away,
 * and what comes later works. */
#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <string.h>
#include <time.h>

#include "check.h"
#include "fake_os.h"
#include "graph.h"

static model m;
static weights w;
static graph g;
static gp_pager *pager;
static gp_tap *tap;
static pthread_t decoding;
static atomic_uint n_asked, stops_at;

/* The nth question from when it was set is answered with yes. 0: none. */
static void stop_at(unsigned nth) {
    atomic_store(&n_asked, 0);
    atomic_store(&stops_at, nth);
}

static bool shall_stop(void *data) {
    CHECK(data == &m, "the caller's data comes along");
    CHECK(pthread_equal(pthread_self(), decoding), "only the thread that decodes asks");
    int error = pthread_mutex_trylock(&pager->lock);     /* another thread may have it for a moment */
    for (int i = 0; error != 0 && i < 2000; i++) {
        nanosleep(&(struct timespec) { .tv_nsec = 1000000 }, NULL);
        error = pthread_mutex_trylock(&pager->lock);
    }
    CHECK(error == 0, "and holds no lock");
    pthread_mutex_unlock(&pager->lock);
    return atomic_fetch_add(&n_asked, 1) + 1 == atomic_load(&stops_at);
}

static double now_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double) now.tv_sec + (double) now.tv_nsec / 1e9;
}

static void begin(model_shape shape) {
    model_make(&m, shape);
    weights_map(&w, &m);
    pager = model_open(&m);
    decoding = pthread_self();
    CHECK(gp_tap_open(&tap, &graph_ggml, 64, 1 << 20, ROW_BYTES, NULL, NULL, NULL, NULL) == 0, "a tap opens");
    gp_tap_watch(tap, &fake_os, shall_stop, &m);
    CHECK(gp_tap_attach(tap, pager) == 0, "a tap is attached");
}

static void end(void) {
    gp_tap_close(tap);
    gp_pager_close(pager);
    model_end(&m);
}

static void works(const char *when) {
    stop_at(0);
    graph_route(&g);
    CHECK(graph_run(&g, tap) == 0 && g.n_ours == 9 && g.n_from_mapping == 0, when);
    gp_tap_idle(tap);
    CHECK(gp_tap_take_failure(tap).error == 0, when);
}

static void *let_go(void *data) {
    nanosleep(data, NULL);
    fake_let_reads_go();
    return NULL;
}

/* Stops while reads hang, whatever waits for them: a trial, a matrix, a feed-forward, of one token or several, with slots for all
 * or not. */
static void stops_while_reads_hang(graph_steps steps, uint32_t n_tokens, uint32_t n_slots, unsigned n_before) {
    begin((model_shape) { .n_slots = n_slots, .n_used = 3 });
    g.steps = steps;
    graph_build(&g, &w, n_tokens, TOP_K_VIEW);
    for (unsigned i = 0; i < n_before; i++) {       /* what is tried at first is trusted by now */
        works("a graph runs before");
    }
    fake_hold_reads();
    stop_at(2);
    const double begun_s = now_s();
    int result = 0;
    for (int i = 0; i < 20 && result == 0; i++) {   /* one of them misses */
        graph_route(&g);
        result = graph_run(&g, tap);
    }
    CHECK(result == 2, "the graph is aborted");
    CHECK(now_s() - begun_s < 2, "within a second or two");
    CHECK(gp_tap_abort(tap), "and stays so");
    CHECK(graph_run(&g, tap) == 2, "until the failure is taken");
    gp_tap_idle(tap);
    CHECK(now_s() - begun_s < 2, "giving the slots back waits for no read either");
    model_check_invariants(pager);
    uint32_t n_reading = 0;
    for (uint32_t i = 0; i < pager->n_slots; i++) {
        CHECK(pager->slots[i].users == 0, "nobody uses a slot");
        n_reading += pager->slots[i].state == READING;
    }
    CHECK(n_reading > 0, "and some are still being read");
    CHECK(gp_tap_take_failure(tap).error == -EINTR, "the failure says that it was no read");
    pthread_t helper;
    struct timespec soon = { .tv_nsec = 50 * 1000000 };
    CHECK(pthread_create(&helper, NULL, let_go, &soon) == 0, "the test has threads");
    for (int i = 0; i < 5; i++) {
        works("the next decode waits for the reads, and is right");
    }
    pthread_join(helper, NULL);
    model_settle(pager);
    model_check_invariants(pager);
    end();
}

/* Slots that are on their way belong to whoever wants them next; a read among them that fails is his to hear of, or nobody's. */
static void reads_that_fail_afterwards(void) {
    g.steps = STEPS_GLU;
    begin((model_shape) { .n_slots = 12, .n_used = 3 });
    graph_build(&g, &w, 1, TOP_K_VIEW);
    graph_route(&g);
    fake_fail_at(m.paths[0], model_offset(&m, 0, 0, g.layers[0].chosen[0][0]), -EIO);
    fake_hold_reads();
    stop_at(2);
    CHECK(graph_run(&g, tap) == 2, "the graph is aborted");
    gp_tap_idle(tap);
    CHECK(gp_tap_take_failure(tap).error == -EINTR, "because it was to stop");
    fake_let_reads_go();
    model_settle(pager);
    model_check_invariants(pager);
    CHECK(!model_is_resident(pager, &m, 0, g.layers[0].chosen[0][0]), "what could not be read is nowhere");
    stop_at(0);
    CHECK(graph_run(&g, tap) == 2, "who wants it next reads again");
    gp_tap_idle(tap);
    CHECK(gp_tap_take_failure(tap).error == -EIO, "and hears of it");
    fake_fail_at(m.paths[0], 0, 0);
    works("afterwards all is well");
    end();
}

/* A read failed, and of the same experts another hangs: giving up waits for that, but not for ever. */
static void stops_while_giving_up(void) {
    g.steps = STEPS_GLU;
    begin((model_shape) { .n_slots = 12, .n_used = 3, .n_readers = 2 });
    graph_build(&g, &w, 1, TOP_K_VIEW);
    graph_route(&g);
    fake_fail(FAKE_FILE_READ, 1, -EIO);
    fake_hold_reads();
    stop_at(3);
    pthread_t helper;
    struct timespec soon = { .tv_nsec = 20 * 1000000 };
    CHECK(pthread_create(&helper, NULL, let_go, &soon) == 0, "the test has threads");
    CHECK(graph_run(&g, tap) == 2, "the graph is aborted");
    pthread_join(helper, NULL);
    gp_tap_idle(tap);
    CHECK(gp_tap_take_failure(tap).error != 0, "there is a reason");
    model_settle(pager);
    works("afterwards all is well");
    end();
}

/* Nobody asks more often than five times a second, and nothing changes for one who is told to go on. */
static void asks_seldom(void) {
    begin((model_shape) { .n_slots = 12, .n_used = 3 });
    graph_build(&g, &w, 1, TOP_K_VIEW);
    const double begun_s = now_s();
    stop_at(0);
    for (int i = 0; i < 30; i++) {
        graph_route(&g);
        CHECK(graph_run(&g, tap) == 0, "a graph runs");
        gp_tap_idle(tap);
    }
    const unsigned most = (unsigned) ((now_s() - begun_s) * 1000 / GP_ASK_MS) + 1;
    CHECK(atomic_load(&n_asked) >= 1 && atomic_load(&n_asked) <= most, "it is asked, and seldom");
    CHECK(gp_tap_take_failure(tap).error == 0, "nothing has failed");
    end();
}

/* Waiting for slots that another context holds, of which some are to come before. */
static void stops_while_others_hold_the_slots(unsigned n_before) {
    begin((model_shape) { .n_slots = 3, .n_used = 3 });
    g.steps = STEPS_GLU;
    graph_build(&g, &w, 1, TOP_K_VIEW);
    for (unsigned i = 0; i < n_before; i++) {
        works("a graph runs before");
    }
    gp_hold other;
    CHECK(gp_hold_open(&other, pager) == 0, "a hold opens");
    int32_t slots[3];
    gp_failure failure;
    CHECK(model_acquire(pager, &other, 1, (int32_t[]) { 0, 1, 2 }, 3, 1, slots, &failure) == 0, "another takes all slots");
    graph_route(&g);
    stop_at(2);
    const double begun_s = now_s();
    CHECK(graph_run(&g, tap) == 2, "the graph is aborted");
    CHECK(now_s() - begun_s < 1.5, "before the two seconds are over");
    gp_tap_idle(tap);
    CHECK(gp_tap_take_failure(tap).error == -EINTR, "because it was to stop");
    gp_hold_release(pager, &other);
    works("afterwards all is well");
    gp_hold_close(&other, pager);
    end();
}

static void pin_stops(void) {
    begin((model_shape) { .n_slots = 12, .n_used = 3 });
    fake_hold_reads();
    stop_at(2);
    gp_failure failure;
    const int error = gp_pager_pin(pager, 1, (int32_t[]) { 2, 5 }, 2, shall_stop, &m, &failure);
    CHECK(error == -EINTR && failure.error == -EINTR, "a pin stops");
    fake_let_reads_go();
    model_settle(pager);
    model_check_invariants(pager);
    for (uint32_t i = 0; i < pager->n_slots; i++) {
        CHECK(!pager->slots[i].is_pinned, "and pins nothing");
    }
    CHECK(gp_pager_pin(pager, 1, (int32_t[]) { 2, 5 }, 2, shall_stop, &m, &failure) == 0, "the next one does");
    end();
}

/* It is seen between two nodes: those that are asked about next compute nothing, from no mapping. */
static void stops_between_nodes(graph_steps steps) {
    begin((model_shape) { .n_slots = 12, .n_used = 3 });
    g.steps = steps;
    graph_build(&g, &w, 2, TOP_K_VIEW);
    works("a graph runs before");
    for (uint32_t nth = 0; nth < 3; nth++) {
        graph_route(&g);
        memcpy(g.layers[0].ranking_data, g.layers[0].chosen, sizeof g.layers[0].chosen);
        const uint32_t up = graph_index(&g, graph_matmul(&g, 0, 1)), stop = graph_index(&g, graph_matmul(&g, 0, graph_slice(&g, nth)));
        const uint32_t down = graph_index(&g, graph_matmul(&g, 0, 2));
        for (uint32_t at = 0; at <= down; at++) {
            if (at == stop) {
                nanosleep(&(struct timespec) { .tv_nsec = (GP_ASK_MS + 10) * 1000000 }, NULL);
                stop_at(1);
            }
            if (gp_tap_eval(g.nodes[at], true, tap) && at < up) {
                CHECK(gp_tap_eval(g.nodes[at], false, tap), "the graph goes on");
            }
            CHECK(at < stop || g.nodes[at]->type != TYPE_F32 || g.nodes[at]->src[2] == NULL || g.nodes[at]->op == OP_CUSTOM,
                  "what is asked about after is not left alone");
        }
        CHECK(gp_tap_abort(tap), "the graph is aborted");
        gp_custom custom;
        memcpy(&custom, g.nodes[down]->op_params, sizeof custom);
        memset(g.nodes[down]->data, 0xff, sizeof(float));
        custom.compute(g.nodes[down], 0, 1, custom.data);
        CHECK(*(uint8_t *) g.nodes[down]->data == 0xff, "and computes nothing any more");
        gp_tap_idle(tap);
        CHECK(gp_tap_take_failure(tap).error == -EINTR, "because it was to stop");
        works("afterwards all is well");
    }
    end();
}

/* Of what is queued for nobody, closing reads only what has begun. */
static void closing_reads_no_queue(void) {
    g.steps = STEPS_GLU;
    begin((model_shape) { .n_slots = 16, .n_used = 3, .n_readers = 2, .piece_bytes = 64 << 10 });
    graph_build(&g, &w, 4, TOP_K_VIEW);
    graph_route(&g);
    fake_hold_reads();
    stop_at(2);
    CHECK(graph_run(&g, tap) == 2, "the graph is aborted");
    gp_tap_idle(tap);
    (void) gp_tap_take_failure(tap);
    const uint32_t n_queued = pager->n_in_flight;
    CHECK(n_queued >= 3, "several experts were wanted");
    gp_tap_close(tap);
    pthread_t helper;
    struct timespec soon = { .tv_nsec = 50 * 1000000 };
    CHECK(pthread_create(&helper, NULL, let_go, &soon) == 0, "the test has threads");
    gp_pager_close(pager);
    pthread_join(helper, NULL);
    CHECK(fake_count(FAKE_FILE_READ) <= 2 + 2, "two reads had begun, and perhaps as many before the rest was withdrawn");
    model_end(&m);
}

int main(void) {
    check_begin();
    graph_set_kernels(KERNELS);
    graph_set_small_graphs(true, true);
    for (graph_steps steps = STEPS_UNKNOWN; steps <= STEPS_GLU; steps++) {
        stops_while_reads_hang(steps, 1, 12, 0);
        stops_while_reads_hang(steps, 1, 12, 2);
        stops_while_reads_hang(steps, 10, 12, 2);
        stops_while_reads_hang(steps, 10, 3, 2);
        stops_while_reads_hang(steps, 10, 3, 0);
    }
    reads_that_fail_afterwards();
    stops_while_giving_up();
    asks_seldom();
    stops_while_others_hold_the_slots(0);
    stops_while_others_hold_the_slots(2);
    pin_stops();
    stops_between_nodes(STEPS_UNKNOWN);
    stops_between_nodes(STEPS_GLU);
    closing_reads_no_queue();
    return 0;
}
