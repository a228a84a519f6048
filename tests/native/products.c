/* Our own products: only once ggml's have been seen to be the same, of the right bytes, whatever arrives when. */
#include <errno.h>
#include <pthread.h>
#include <string.h>

#include "check.h"
#include "compute/product.h"
#include "fake_os.h"
#include "graph.h"

static model m;
static weights w;
static graph g;
static gp_pager *pager;
static gp_tap *tap;

static void begin(graph_kernels kernels, uint32_t n_tokens) {
    graph_set_kernels(kernels);
    model_make(&m, (model_shape) { .n_used = 4, .n_slots = 9 });
    weights_map(&w, &m);
    pager = model_open(&m);
    CHECK(gp_tap_open(&tap, &graph_ggml, 64, 0, ROW_BYTES, NULL, NULL, NULL, NULL) == 0, "a tap opens");
    CHECK(gp_tap_attach(tap, pager) == 0, "a tap is attached");
    graph_build(&g, &w, n_tokens, TOP_K_VIEW);
}

static void end(void) {
    gp_tap_close(tap);
    model_check_invariants(pager);
    gp_pager_close(pager);
    model_end(&m);
}

static uint32_t n_products(void) {
    graph_route(&g);
    CHECK(graph_run(&g, tap) == 0, "the graph is computed");
    gp_tap_idle(tap);
    CHECK(g.n_from_slots == m.shape.n_layers * m.shape.n_slices, "from slots");
    model_check_invariants(pager);
    return g.n_products;
}

/* Gate and up are of one kind, down of another: a trial each, and all is ours after. */
static void each_kind_is_tried_once(void) {
    begin(KERNELS, 1);
    CHECK(n_products() == 9 - 2, "two nodes are left to MUL_MAT_ID, and compared");
    for (int i = 0; i < 50; i++) {
        CHECK(n_products() == 9, "every node is a product");
        CHECK(g.n_callbacks == m.shape.n_layers, "no stop but at the routers");
    }
    end();
}

static void other_bits_are_never_ours(void) {
    begin(OTHER_KERNELS, 1);
    for (int i = 0; i < 10; i++) {
        CHECK(n_products() == 0, "what differs from MUL_MAT_ID is not used");
    }
    end();
}

static void without_kernels_all_is_left_to_ggml(void) {
    begin(NO_KERNELS, 1);
    for (int i = 0; i < 10; i++) {
        CHECK(n_products() == 0, "MUL_MAT_ID computes");
    }
    end();
}

static void batches_are_left_to_ggml(void) {
    begin(KERNELS, 2);
    for (int i = 0; i < 10; i++) {
        CHECK(n_products() == 0, "several tokens are MUL_MAT_ID's");
    }
    graph_build(&g, &w, 1, TOP_K_VIEW);
    CHECK(n_products() == 7 && n_products() == 9, "the next single token is ours");
    graph_build(&g, &w, 2, TOP_K_VIEW);
    CHECK(n_products() == 0, "and none of these");
    end();
}

static void inputs_of_another_type_are_left_to_ggml(void) {
    begin(KERNELS, 1);
    (void) n_products();
    for (uint32_t l = 0; l < m.shape.n_layers; l++) {
        graph_layer_of(&g, l)->other.type = TYPE_BYTES;
    }
    CHECK(n_products() == 3, "only down's are floats");
    end();
}

/* Room is made for as many experts per token as the model's header names. */
static void more_experts_than_foreseen_are_left_to_ggml(void) {
    begin(KERNELS, 1);
    (void) n_products();
    gp_tap_close(tap);
    gp_pager_close(pager);
    for (uint32_t l = 0; l < m.shape.n_layers; l++) {
        m.layers[l].n_used = 3;
    }
    pager = model_open(&m);
    CHECK(gp_tap_open(&tap, &graph_ggml, 64, 0, ROW_BYTES, NULL, NULL, NULL, NULL) == 0, "a tap opens");
    CHECK(gp_tap_attach(tap, pager) == 0, "a tap is attached");
    graph_build(&g, &w, 1, TOP_K_VIEW);
    CHECK(n_products() == 0 && n_products() == 0, "four experts are more than three");
    end();
}

/* In every order of arrival, by several threads: the graph compares each row. */
static void slow_reads_give_the_same(void) {
    begin(KERNELS, 1);
    (void) n_products();
    fake_set_weather((fake_weather) { .delay_us = 200, .short_one_in = 5 });
    for (int i = 0; i < 60; i++) {
        CHECK(n_products() == 9, "every node is a product");
    }
    end();
}

static void *let_all_go(void *unused) {
    fake_wait_for_reads(1);
    fake_let_reads_go();
    return unused;
}

/* Nothing is waited for before the product itself. */
static void reads_are_only_begun(void) {
    begin(KERNELS, 1);
    (void) n_products();
    fake_hold_reads();
    graph_route(&g);
    uint32_t at = 0;
    while (!gp_tap_eval(g.nodes[at], true, tap)) {
        at++;
    }
    memcpy(graph_layer_of(&g, 0)->ranking_data[0], graph_layer_of(&g, 0)->chosen[0], sizeof g.layers[0].chosen[0]);
    (void) gp_tap_eval(g.nodes[at], false, tap);
    while (g.nodes[++at]->op != OP_MUL_MAT_ID && g.nodes[at]->op != OP_CUSTOM) {
        (void) gp_tap_eval(g.nodes[at], true, tap);
    }
    CHECK(!gp_tap_eval(g.nodes[at], true, tap), "the node is asked about while no read has come");
    CHECK(g.nodes[at]->op == OP_CUSTOM, "and is ours");
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, let_all_go, NULL) == 0, "the test has threads");
    gp_custom custom;
    memcpy(&custom, g.nodes[at]->op_params, sizeof custom);
    custom.compute(g.nodes[at], 0, 1, custom.data);
    pthread_join(thread, NULL);
    gp_tap_idle(tap);
    CHECK(gp_tap_take_failure(tap).error == 0, "the reads were waited for");
    end();
}

static void failed_reads_end_the_graph(void) {
    begin(KERNELS, 1);
    (void) n_products();
    fake_set_weather((fake_weather) { .delay_us = 100 });
    graph_fail_reads(&g, tap, pager, 12);
    CHECK(n_products() == 9, "the next graph is computed");
    end();
}

/* The trial's own node is not computed: it is tried again. */
static void trial_that_is_given_up_is_made_again(void) {
    begin(KERNELS, 1);
    fake_fail(FAKE_FILE_READ, 1, -EIO);
    graph_route(&g);
    CHECK(graph_run(&g, tap) == 2, "the first read fails");
    gp_tap_idle(tap);
    (void) gp_tap_take_failure(tap);
    model_settle(pager);
    const uint32_t n_next = n_products();   /* the first kind's trial may have come before the failure */
    CHECK((n_next == 7 || n_next == 8) && n_products() == 9, "the next graph has the trial");
    end();
}

/* One matrix twice in a piece of graph, as with an adapter: only one of the nodes can be ours. */
static void second_node_of_a_matrix_is_left_to_ggml(void) {
    begin(KERNELS, 1);
    (void) n_products();
    graph_layer *l = graph_layer_of(&g, 0);
    graph_route(&g);
    uint32_t at = 0;
    while (!gp_tap_eval(g.nodes[at], true, tap)) {
        at++;
    }
    memcpy(l->ranking_data[0], l->chosen[0], sizeof l->chosen[0]);
    (void) gp_tap_eval(g.nodes[at], false, tap);
    ggml_tensor second = l->matmuls[1];
    second.op = OP_MUL_MAT_ID;
    memset(second.op_params, 0, sizeof second.op_params);
    second.src[0] = &w.tensors[0][1];
    second.src[2] = l->ids;
    (void) gp_tap_eval(&l->matmuls[1], true, tap);
    (void) gp_tap_eval(&second, true, tap);
    CHECK(l->matmuls[1].op == OP_CUSTOM && second.op == OP_MUL_MAT_ID, "the first is ours, the second is not");
    CHECK(second.src[0] == l->matmuls[1].src[0], "but from slots");
    gp_tap_idle(tap);
    end();
}

/* Units and chunks that do not come out even, without a graph around them. */
static void any_number_of_threads_computes_the_same(void) {
    graph_set_kernels(KERNELS);
    model_make(&m, (model_shape) { .n_used = 4, .n_slots = 9, .n_slices = 1, .slice_bytes = { 32 * 101 } });
    weights_map(&w, &m);
    pager = model_open(&m);
    gp_hold hold;
    gp_failure failure;
    CHECK(gp_hold_open(&hold, pager, 4) == 0, "a hold opens");
    const int32_t experts[] = { 3, 8, 0, 5 };
    int32_t slots[4];
    CHECK(model_acquire(pager, &hold, 1, experts, 4, 1, slots, &failure) == 0, "four experts are there");
    uint32_t n_slots;
    ggml_tensor matrices = w.tensors[1][0];
    matrices.data = gp_pager_slots(pager, 0, &n_slots, &matrices.nb[2]);
    float inputs[4 * GRAPH_COLUMNS], out[4 * 101];
    char converted[4 * GRAPH_COLUMNS];
    for (uint32_t i = 0; i < 4 * GRAPH_COLUMNS; i++) {
        inputs[i] = (float) fake_random(256);
    }
    for (uint32_t n_inputs = 1; n_inputs <= 4; n_inputs += 3) {
        ggml_tensor input = { .type = TYPE_F32, .buffer = &graph_host_buffer, .data = inputs,
                              .ne = { GRAPH_COLUMNS, n_inputs, 1, 1 }, .nb = { 4, 128, 128 * n_inputs, 128 * n_inputs } };
        ggml_tensor ids = { .type = TYPE_I32, .data = slots, .ne = { 4, 1, 1, 1 }, .nb = { 4, 16, 16, 16 } };
        ggml_tensor node = { .type = TYPE_F32, .data = out, .ne = { 101, 4, 1, 1 }, .nb = { 4, 404, 1616, 1616 },
                             .src = { &matrices, &input, &ids } };
        gp_kind kind;
        CHECK(gp_kind_find(&kind, &graph_ggml, TYPE_WEIGHTS, GRAPH_COLUMNS, 101), "ggml has functions for it");
        CHECK(gp_product_fits(&kind, &graph_ggml, &node), "it is a product of one token");
        CHECK(kind.input_bytes == GRAPH_COLUMNS, "an input is as large as its blocks");
        kind.unit = kind.unit_bytes = 12;
        gp_product product = { .pager = pager, .hold = &hold, .failure = &failure, .kind = &kind, .layer = 1,
                               .inputs = converted };
        memset(out, 0xff, sizeof out);
        memset(converted, 0xff, sizeof converted);
        gp_product_begin(&product, &node);
        gp_product_compute(&node, 0, 1, &product);
        for (uint32_t r = 0; r < 4; r++) {
            for (uint32_t i = 0; i < 101; i++) {
                uint32_t sum = 0;
                for (uint32_t c = 0; c < GRAPH_COLUMNS; c++) {
                    sum += model_truth(&m, 1, 0, experts[r])[i * GRAPH_COLUMNS + c]
                         * (uint32_t) inputs[(n_inputs == 1 ? 0 : r) * GRAPH_COLUMNS + c];
                }
                CHECK(out[r * 101 + i] == (float) sum, "each row is its own sum");
            }
        }
        node.op_params[2] = 1;
        CHECK(!gp_product_fits(&kind, &graph_ggml, &node), "parameters that are not known are not lost");
    }
    gp_hold_close(&hold, pager);
    gp_pager_close(pager);
    model_end(&m);
}

int main(void) {
    check_begin();
    each_kind_is_tried_once();
    other_bits_are_never_ours();
    without_kernels_all_is_left_to_ggml();
    batches_are_left_to_ggml();
    inputs_of_another_type_are_left_to_ggml();
    more_experts_than_foreseen_are_left_to_ggml();
    slow_reads_give_the_same();
    reads_are_only_begun();
    failed_reads_end_the_graph();
    trial_that_is_given_up_is_made_again();
    second_node_of_a_matrix_is_left_to_ggml();
    any_number_of_threads_computes_the_same();
    return 0;
}
