/* A few tokens' feed-forwards an expert at a time: once seen to be the same, whatever arrives when, and nothing else. */
#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <time.h>

#include "check.h"
#include "fake_os.h"
#include "graph.h"

enum { N_USED = 4, N_TOKENS = 3, N_MATMULS = 9, PLENTY = 1 << 20 };

static model m;
static weights w;
static graph g;
static gp_pager *pager;
static gp_tap *tap;

static void begin(bool is_right, size_t batch_bytes) {
    graph_set_kernels(KERNELS);
    graph_set_small_graphs(true, is_right);
    model_make(&m, (model_shape) { .n_used = N_USED, .n_slots = 16 });
    weights_map(&w, &m);
    pager = model_open(&m);
    CHECK(gp_tap_open(&tap, &graph_ggml, 64, batch_bytes, ROW_BYTES, NULL, NULL, NULL, NULL) == 0, "a tap opens");
    CHECK(gp_tap_attach(tap, pager) == 0, "a tap is attached");
    g.has_glu = true;
    graph_build(&g, &w, N_TOKENS, TOP_K_VIEW);
}

static void end(void) {
    gp_tap_close(tap);
    model_check_invariants(pager);
    gp_pager_close(pager);
    model_end(&m);
    g.has_glu = false;
}

static void run(void) {
    graph_route(&g);
    CHECK(graph_run(&g, tap) == 0, "the graph is computed");
    gp_tap_idle(tap);
    CHECK(g.n_from_slots == N_MATMULS, "from slots");
    model_check_invariants(pager);
}

static void check_shapes(uint32_t n_same, uint32_t n_other) {
    uint32_t same, other;
    gp_tap_count_ffns(tap, &same, &other);
    CHECK(same == n_same && other == n_other, "so many shapes were judged");
}

static void shape_is_tried_once(void) {
    begin(true, PLENTY);
    run();
    check_shapes(1, 0);
    CHECK(g.n_products == 1 + 3 + 3, "in layer 0 the first node is the trial's, the others are all taken");
    for (int i = 0; i < 50; i++) {
        run();
        CHECK(g.n_products == N_MATMULS && g.n_callbacks == m.shape.n_layers, "no stop but at the routers");
    }
    graph_build(&g, &w, N_TOKENS - 1, TOP_K_VIEW);
    run();
    CHECK(g.n_products == N_MATMULS, "fewer tokens are the same shape");
    check_shapes(1, 0);
    end();
}

/* As llama.cpp does it: in the same memory, so that what makes the last input is known from the tokens before. */
static void shape_is_tried_after_single_tokens(void) {
    begin(true, PLENTY);
    for (int i = 0; i < 3; i++) {
        graph_build(&g, &w, 1, TOP_K_VIEW);
        run();
    }
    check_shapes(1, 0);
    fake_set_weather((fake_weather) { .delay_us = 200 });
    graph_build(&g, &w, N_TOKENS, TOP_K_VIEW);
    run();
    check_shapes(2, 0);
    run();
    CHECK(g.n_products == N_MATMULS, "of one token, and of several");
    end();
}

static void other_bits_are_never_ours(void) {
    begin(false, PLENTY);
    for (int i = 0; i < 10; i++) {
        run();
        check_shapes(0, 1);
        CHECK(g.n_products == (i == 0), "but for the trial all are left to ggml");
    }
    end();
}

/* What memory there is decides, for those that were computed here before as well. */
static void large_batches_are_left_to_ggml(void) {
    const size_t row_bytes = 4 * (2 * GRAPH_COLUMNS + 3 * GRAPH_ROWS);
    begin(true, row_bytes * N_USED * N_TOKENS);
    run();
    run();
    CHECK(g.n_products == N_MATMULS, "these fit");
    graph_build(&g, &w, GRAPH_TOKENS, TOP_K_VIEW);
    for (int i = 0; i < 3; i++) {
        run();
        CHECK(g.n_products == 0, "these do not");
    }
    graph_build(&g, &w, N_TOKENS, TOP_K_VIEW);
    run();
    CHECK(g.n_products == N_MATMULS, "which says nothing of these");
    end();
    begin(true, 64);
    run();
    check_shapes(0, 0);
    CHECK(g.n_products == 0, "nothing fits");
    end();
    begin(true, 0);
    run();
    CHECK(g.n_products == 0, "there is no memory for it");
    end();
}

/* The nodes were expected, so nothing of theirs was waited for. */
static void nodes_that_do_not_come_together_are_computed_alone(void) {
    begin(true, PLENTY);
    run();
    run();
    fake_set_weather((fake_weather) { .delay_us = 200 });
    for (uint32_t l = 0; l < m.shape.n_layers; l++) {
        g.layers[l].activation.op = OP_OTHER;
        memset(g.layers[l].activations, 0, sizeof g.layers[l].activations);
    }
    run();
    CHECK(g.n_products == 2, "of the first layer, gate and up; the others are not expected any more");
    for (int i = 0; i < 5; i++) {
        run();
        CHECK(g.n_products == 0, "nor are they the next time");
    }
    end();
}

static void slow_reads_give_the_same(void) {
    begin(true, PLENTY);
    run();
    fake_set_weather((fake_weather) { .delay_us = 200, .short_one_in = 5 });
    for (int i = 0; i < 60; i++) {
        run();
        CHECK(g.n_products == N_MATMULS, "all are taken");
    }
    end();
}

static void failed_reads_end_the_graph(void) {
    begin(true, PLENTY);
    run();
    fake_set_weather((fake_weather) { .delay_us = 100 });
    graph_fail_reads(&g, tap, pager, 12);
    run();
    end();
}

static void small_graph_that_fails_ends_the_graph(void) {
    begin(true, PLENTY);
    run();
    run();
    graph_fail_small_graph(6);
    graph_route(&g);
    CHECK(graph_run(&g, tap) == 2, "the result would be wrong");
    gp_tap_idle(tap);
    CHECK(gp_tap_take_failure(tap).error == -ENOTRECOVERABLE, "and it is said why");
    run();
    end();
}

static void *run_graph(void *unused) {
    CHECK(graph_run(&g, tap) == 0, "the graph is computed");
    return unused;
}

/* What this is for: an expert that is there is done, for all tokens, before the first byte of another has come. */
static void nobody_waits_for_others(void) {
    begin(true, PLENTY);
    run();
    run();
    model_settle(pager);
    graph_route(&g);
    gp_hold hold;
    CHECK(gp_hold_open(&hold, pager, N_USED) == 0, "a hold opens");
    const int32_t there[N_USED] = { 1, 2, 3, 5 };
    model_use(&m, pager, &hold, 0, there, N_USED, 1);
    gp_hold_close(&hold, pager);
    int32_t missing = 0;
    while (model_is_resident(pager, &m, 0, missing)) {
        missing++;
    }
    for (uint32_t t = 0; t < N_TOKENS; t++) {
        memcpy(g.layers[0].chosen[t], there, sizeof there);
    }
    g.layers[0].chosen[1][2] = missing;
    fake_hold_reads();
    const uint64_t before = graph_rows_multiplied();
    uint64_t rows = 0;
    for (uint32_t s = 0; s < m.shape.n_slices; s++) {
        rows += (uint64_t) m.layers[0].slices[s].ne[1] * (N_USED * N_TOKENS - 1);
    }
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, run_graph, NULL) == 0, "the test has threads");
    while (graph_rows_multiplied() < before + rows) {       /* until the alarm */
        nanosleep(&(struct timespec) { .tv_nsec = 100000 }, NULL);
    }
    nanosleep(&(struct timespec) { .tv_nsec = 20000000 }, NULL);
    CHECK(graph_rows_multiplied() == before + rows, "all matrices of those that are there, and no others");
    fake_let_reads_go();
    pthread_join(thread, NULL);
    gp_tap_idle(tap);
    CHECK(gp_tap_take_failure(tap).error == 0, "the missing one came after");
    end();
}

int main(void) {
    check_begin();
    shape_is_tried_once();
    shape_is_tried_after_single_tokens();
    other_bits_are_never_ours();
    large_batches_are_left_to_ggml();
    nodes_that_do_not_come_together_are_computed_alone();
    slow_reads_give_the_same();
    failed_reads_end_the_graph();
    small_graph_that_fails_ends_the_graph();
    nobody_waits_for_others();
    return 0;
}
