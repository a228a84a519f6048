/* Feed-forwards an expert at a time: once they have been seen to be the same, whatever arrives when, and nothing else. */
#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <time.h>

#include "check.h"
#include "compute/product.h"
#include "fake_os.h"
#include "graph.h"

enum { N_USED = 4, N_PRODUCTS = 9 };

static model m;
static weights w;
static graph g;
static gp_pager *pager;
static gp_tap *tap;

static void begin_with(gp_eval_callback eval) {
    graph_set_kernels(KERNELS);
    model_make(&m, (model_shape) { .n_used = N_USED, .n_slots = 9 });
    weights_map(&w, &m);
    pager = model_open(&m);
    CHECK(gp_tap_open(&tap, &graph_ggml, 64, 0, ROW_BYTES, eval, NULL, NULL, NULL) == 0, "a tap opens");
    CHECK(gp_tap_attach(tap, pager) == 0, "a tap is attached");
    g.has_glu = true;
    graph_build(&g, &w, 1, TOP_K_VIEW);
}

static void begin(bool is_right) {
    graph_set_small_graphs(true, is_right);
    begin_with(NULL);
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
    CHECK(g.n_from_slots == N_PRODUCTS, "from slots");
    model_check_invariants(pager);
}

static void check_shapes(uint32_t n_same, uint32_t n_other) {
    uint32_t same, other;
    gp_tap_count_ffns(tap, &same, &other);
    CHECK(same == n_same && other == n_other, "so many shapes were judged");
}

/* Nodes that are computed here, but not as products of their own. */
static uint32_t n_taken(void) {
    uint32_t n = 0;
    for (uint32_t l = 0; l < m.shape.n_layers; l++) {
        for (uint32_t s = 0; s < m.shape.n_slices; s++) {
            gp_custom custom;
            memcpy(&custom, g.layers[l].matmuls[s].op_params, sizeof custom);
            n += g.layers[l].matmuls[s].op == OP_CUSTOM && custom.compute != gp_product_compute;
        }
    }
    return n;
}

/* In layer 0 the two kinds of matrices are tried, in layer 1 the feed-forward; all is ours after. */
static void shape_is_tried_once(void) {
    begin(true);
    run();
    check_shapes(1, 0);
    CHECK(g.n_products == N_PRODUCTS - 2 && n_taken() == 1 + 3, "the first node of layer 1, all of layer 2");
    for (int i = 0; i < 50; i++) {
        run();
        CHECK(g.n_products == N_PRODUCTS && n_taken() == N_PRODUCTS, "all are taken");
        CHECK(g.n_callbacks == m.shape.n_layers, "no stop but at the routers");
    }
    graph_build(&g, &w, 1, TOP_K_VIEW);
    run();
    CHECK(n_taken() == N_PRODUCTS, "in a new graph, too");
    check_shapes(1, 0);
    end();
}

static void other_bits_are_never_ours(void) {
    begin(false);
    for (int i = 0; i < 10; i++) {
        run();
        check_shapes(0, 1);
        CHECK(n_taken() == (i == 0), "but for the trial all are products of their own");
    }
    CHECK(g.n_products == N_PRODUCTS, "and stay so");
    end();
}

static void without_small_graphs_matrices_are_ours(void) {
    graph_set_small_graphs(false, true);
    begin_with(NULL);
    for (int i = 0; i < 10; i++) {
        run();
        check_shapes(0, 0);
        CHECK(n_taken() == 0, "all are products of their own");
    }
    end();
}

static void unknown_operations_are_left_alone(void) {
    begin(true);
    run();
    for (uint32_t l = 0; l < m.shape.n_layers; l++) {
        g.layers[l].activation.op = OP_OTHER;
        memset(g.layers[l].activations, 0, sizeof g.layers[l].activations);
    }
    run();
    CHECK(n_taken() == 0, "what is made by something else is not traced");
    for (uint32_t l = 0; l < m.shape.n_layers; l++) {
        g.layers[l].activation.op = OP_GLU;
        g.layers[l].activation.src[1] = &g.layers[l].other;
    }
    run();
    CHECK(n_taken() == 0, "nor what is made of something else");
    end();
}

static bool wants_all(void *tensor, bool ask, void *data) {
    (void) tensor;
    (void) ask;
    (void) data;
    return true;
}

/* Every node is computed before the next is asked about. */
static void user_who_looks_at_every_node_gets_them_one_by_one(void) {
    graph_set_small_graphs(true, true);
    begin_with(wants_all);
    for (int i = 0; i < 10; i++) {
        run();
        CHECK(n_taken() == 0, "none is computed ahead");
    }
    check_shapes(0, 0);
    end();
}

static void slow_reads_give_the_same(void) {
    begin(true);
    run();
    fake_set_weather((fake_weather) { .delay_us = 200, .short_one_in = 5 });
    for (int i = 0; i < 60; i++) {
        run();
        CHECK(n_taken() == N_PRODUCTS, "all are taken");
    }
    end();
}

static void failed_reads_end_the_graph(void) {
    begin(true);
    run();
    fake_set_weather((fake_weather) { .delay_us = 100 });
    graph_fail_reads(&g, tap, pager, 12);
    run();
    end();
}

static void small_graph_that_fails_ends_the_graph(void) {
    begin(true);
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

/* What this is for: an expert that is there is done before the first byte of another has come. */
static void nobody_waits_for_others(void) {
    begin(true);
    run();
    run();
    model_settle(pager);
    graph_route(&g);
    int32_t *chosen = g.layers[0].chosen[0];
    gp_hold hold;
    CHECK(gp_hold_open(&hold, pager, N_USED) == 0, "a hold opens");
    const uint32_t n_there = N_USED - 1;
    model_use(&m, pager, &hold, 0, chosen + 1, n_there, 1);
    gp_hold_close(&hold, pager);
    chosen[0] = 0;
    while (model_is_resident(pager, &m, 0, chosen[0])) {
        chosen[0]++;
    }
    fake_hold_reads();
    const uint64_t before = graph_rows_multiplied();
    uint64_t rows = 0;
    for (uint32_t s = 0; s < m.shape.n_slices; s++) {
        rows += (uint64_t) m.layers[0].slices[s].ne[1] * n_there;
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
    other_bits_are_never_ours();
    without_small_graphs_matrices_are_ours();
    unknown_operations_are_left_alone();
    user_who_looks_at_every_node_gets_them_one_by_one();
    slow_reads_give_the_same();
    failed_reads_end_the_graph();
    small_graph_that_fails_ends_the_graph();
    nobody_waits_for_others();
    return 0;
}
