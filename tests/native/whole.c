/* A feed-forward is computed as a whole once what lies between its matrices has been seen to be the same, and while nobody looks
 * at what is left out; else its matrices one by one. The graph checks every row. */
#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <time.h>

#include "check.h"
#include "compute/shape.h"
#include "fake_os.h"
#include "graph.h"

enum { N_USED = 4, N_MATMULS = 9, N_LAYERS = 3 };

static model m;
static weights w;
static graph g;
static gp_pager *pager;
static gp_tap *tap;

static void begin_with(model_shape shape, bool is_right, gp_eval_callback eval) {
    graph_set_kernels(KERNELS);
    graph_set_small_graphs(true, is_right);
    shape.n_used = N_USED;
    shape.piece_bytes = 4096;
    model_make(&m, shape);
    weights_map(&w, &m);
    pager = model_open(&m);
    CHECK(gp_tap_open(&tap, &graph_ggml, GRAPH_IDS, BATCH_BYTES, ROW_BYTES, eval, NULL, NULL, NULL) == 0, "a tap opens");
    CHECK(gp_tap_attach(tap, pager) == 0, "a tap is attached");
    g.steps = STEPS_GLU;
    g.compute_other = NULL;
    graph_build(&g, &w, 2, TOP_K_VIEW);
}

static void begin(void) {
    begin_with((model_shape) { .n_slots = 9 }, true, NULL);
}

static void end(void) {
    gp_tap_close(tap);
    model_check_invariants(pager);
    gp_pager_close(pager);
    model_end(&m);
}

static void run(void) {
    graph_route(&g);
    CHECK(graph_run(&g, tap) == 0, "the graph is computed");
    gp_tap_idle(tap);
    CHECK(g.n_ours == m.shape.n_layers * m.shape.n_slices, "every node is ours");
    model_check_invariants(pager);
}

static void runs_with(uint32_t n_whole, const char *what) {
    run();
    CHECK(g.n_whole == n_whole, what);
}

static void check_shapes(uint32_t n_same, uint32_t n_other) {
    uint32_t same, other;
    gp_tap_count_ffns(tap, &same, &other);
    CHECK(same == n_same && other == n_other, "so many shapes were judged");
}

/* In layer 0 it is computed one by one, and compared; all is ours after. */
static void shape_is_tried_once(graph_steps steps, uint32_t n_tokens) {
    begin();
    g.steps = steps;
    graph_build(&g, &w, n_tokens, TOP_K_VIEW);
    runs_with(N_LAYERS - 1, "the first one is compared");
    check_shapes(1, 0);
    for (int i = 0; i < 30; i++) {
        runs_with(N_LAYERS, "all are computed as a whole");
        CHECK(g.n_callbacks == N_LAYERS + 1, "no stop but at the routers, and at the end");
    }
    graph_build(&g, &w, n_tokens == 1 ? 9 : 1, COMPUTED_IDS);
    runs_with(N_LAYERS, "in another graph, and of other batches, too");
    check_shapes(1, 0);
    end();
}

static void other_bits_are_never_ours(graph_steps steps, uint32_t n_tokens) {
    begin_with((model_shape) { .n_slots = 9 }, false, NULL);
    g.steps = steps;
    for (int i = 0; i < 10; i++) {
        if (i % 3 == 0) {
            graph_build(&g, &w, n_tokens, TOP_K_VIEW);
        }
        if (i == 5) {
            graph_set_small_graphs(true, true);     /* too late */
        }
        runs_with(0, "all matrices are computed one by one, for good");
        check_shapes(0, 1);
    }
    end();
}

static void unknown_operations_are_not_left_out(void) {
    begin();
    g.steps = STEPS_UNKNOWN;
    graph_build(&g, &w, 2, TOP_K_VIEW);
    for (int i = 0; i < 3; i++) {
        runs_with(0, "what is made by something else is not traced");
    }
    check_shapes(0, 0);
    end();
}

/* What trace is given: nodes as they were built, changed in one way each. */
static void what_is_not_traced(void) {
    begin();
    g.steps = STEPS_BIAS;
    for (int change = 0; change < 11; change++) {
        graph_build(&g, &w, 2, TOP_K_VIEW);
        graph_layer *l = graph_layer_of(&g, 0);
        ggml_tensor *up = graph_matmul(&g, 0, 1), *gate = graph_matmul(&g, 0, 0);
        gp_nodes nodes = { .shape = { .n_first = 2 }, .n_ranks = N_USED, .n_tokens = 2, .first = { up, gate },
                           .last = graph_matmul(&g, 0, 2), .ids = l->ids };
        ggml_tensor view = *gate;
        view.op = OP_VIEW;
        view.view_src = gate;
        l->activation.src[1] = change >= 8 ? &view : gate;
        switch (change) {
            case 0: break;
            case 1: l->activation.op = OP_OTHER; break;
            case 2: l->activation.src[1] = &l->other; break;        /* one row for all ranks */
            case 3: l->activation.src[3] = up; break;               /* more than are known */
            case 4: l->activation.type = TYPE_I32; break;
            case 5: l->biased.src[2] = &l->ranking; break;          /* other ids */
            case 6: l->biased.src[1] = up; break;                   /* a bias that is computed */
            case 7: l->activation.ne[2] = 1; break;                 /* other tokens */
            case 8: break;
            case 9: view.nb[1] += 4; break;                         /* other rows */
            case 10: view.view_offs = 4; break;                     /* beyond their end */
        }
        CHECK(gp_trace(&nodes, &graph_ggml, INT64_MAX) == (change == 0 || change == 8), "what is not understood is not traced");
        if (change == 0) {
            CHECK(nodes.shape.n_steps == 2 && nodes.steps[0] == &l->biased && nodes.steps[1] == &l->activation,
                  "sources come before those who take them in");
        }
    }
    end();
}

/* ---- who looks at what is left out ------------------------------------------------------------------------------- */

static ggml_tensor looker, looked_at_view;
static uint32_t looked_layer, looked_slice, n_looked;

static void look(graph *of, ggml_tensor *node) {
    if (node == &looker) {
        graph_check_rows(of, looked_layer, looked_slice, "who looks finds what the graph says");
        n_looked++;
    }
}

/* Puts a node that takes in a first matrix' result of a layer before or behind its last matrix. */
static void put_looker(uint32_t layer, uint32_t slice, bool is_behind, bool is_through_view) {
    graph_build(&g, &w, 2, TOP_K_VIEW);
    ggml_tensor *looked_at = graph_matmul(&g, layer, slice);
    looked_layer = layer;
    looked_slice = slice;
    static float result[4];
    looker = (ggml_tensor) { .op = OP_OTHER, .type = TYPE_F32, .buffer = &graph_host_buffer, .flags = FLAG_COMPUTE,
                             .ne = { 1, 1, 1, 1 }, .nb = { 4, 4, 4, 4 }, .data = result };
    looker.src[0] = looked_at;
    const uint32_t at = graph_index(&g, graph_matmul(&g, layer, 2)) + is_behind;
    if (is_through_view) {
        looked_at_view = *looked_at;
        looked_at_view.op = OP_VIEW;
        looked_at_view.src[0] = looked_at_view.view_src = looked_at;
        looker.src[0] = &looked_at_view;
        graph_insert(&g, at, &looker);
        graph_insert(&g, at, &looked_at_view);
    } else {
        graph_insert(&g, at, &looker);
    }
    g.compute_other = look;
}

static void who_looks_gets_what_they_look_at(void) {
    for (int i = 0; i < 8; i++) {
        begin();
        run();
        runs_with(N_LAYERS, "all are computed as a whole");
        n_looked = 0;
        put_looker(i % 2, i % 4 / 2, i < 4, i % 3 == 0);
        for (int k = 0; k < 3; k++) {
            run();
            CHECK(n_looked == (uint32_t) k + 1, "who looks is computed");
            CHECK(g.n_whole <= N_LAYERS - 1, "and what they look at as well");
        }
        graph_build(&g, &w, 3, TOP_K_VIEW);
        run();      /* without */
        end();
    }
}

/* A result of the graph, or whatever else a flag may mean. */
static void nodes_with_other_flags_are_computed(void) {
    begin();
    run();
    for (int i = 0; i < 3; i++) {
        graph_build(&g, &w, 2, TOP_K_VIEW);
        graph_layer *l = graph_layer_of(&g, 1);
        ggml_tensor *node = i < 2 ? graph_matmul(&g, 1, (uint32_t) i) : &l->activation;
        node->flags |= FLAG_OUTPUT;
        runs_with(N_LAYERS - 1, "the others are computed as a whole");
        CHECK(node->flags == (FLAG_COMPUTE | FLAG_OUTPUT), "flags are not touched");
    }
    end();
}

static uint32_t n_of_layer_1;

/* Of layer 1 each node alone is a piece: what was computed is there to be seen. */
static bool eval(void *tensor, bool ask, void *data) {
    (void) data;
    for (uint32_t s = 0; s < 3; s++) {
        if (tensor == graph_matmul(&g, 1, s)) {
            if (!ask) {
                graph_check_rows(&g, 1, s, "what a user stops at is computed");
                n_of_layer_1++;
            }
            return true;
        }
    }
    return tensor == &graph_layer_of(&g, 2)->activation;
}

static void user_who_stops_between_gets_nodes_one_by_one(void) {
    begin_with((model_shape) { .n_slots = 9 }, true, eval);
    for (int i = 0; i < 6; i++) {
        if (i % 2) {
            graph_build(&g, &w, 1 + (uint32_t) i, TOP_K_VIEW);
        }
        n_of_layer_1 = 0;
        runs_with(i > 0, "only the layer that nobody looks into is computed as a whole");
        CHECK(n_of_layer_1 == 3, "each node was stopped at");
    }
    end();
}

/* ---- what else a piece of graph may hold --------------------------------------------------------------------------- */

static void move(const ggml_tensor *node, uint32_t to) {
    uint32_t from = graph_index(&g, node);
    ggml_tensor *moved = g.nodes[from];
    memmove(&g.nodes[from], &g.nodes[from + 1], (--g.n_nodes - from) * sizeof g.nodes[0]);
    graph_insert(&g, to, moved);
}

/* The routers of the first two layers stand in front of both. */
static void build_two_in_one_piece(uint32_t n_tokens) {
    graph_build(&g, &w, n_tokens, TOP_K_VIEW);
    move(&graph_layer_of(&g, 1)->ranking, 2);
    move(&graph_layer_of(&g, 1)->top_k, 3);
}

static void two_in_one_piece(void) {
    begin();
    for (uint32_t i = 0; i < 8; i++) {
        build_two_in_one_piece(1 + i);
        run();
        run();
        CHECK(g.n_whole >= 2, "one of the two, and that of the last layer, are computed as a whole");
    }
    gp_counters counters[MODEL_LAYERS];
    gp_pager_counters(pager, counters);
    CHECK(counters[0].visits == 16 && counters[1].visits == 16, "each batch is counted once");
    end();
}

static void chains_interleaved(void) {
    begin();
    run();
    static const int orders[3][7] = { { 0, 5, 1, 2, 6, 3, 4 }, { 5, 0, 6, 1, 2, 3, 4 }, { 0, 1, 2, 5, 6, 3, 4 } };
    for (uint32_t i = 0; i < 6; i++) {
        build_two_in_one_piece(1 + i);
        /* other, up, gate, activation, down of layer 0; in between other and up of layer 1 */
        ggml_tensor *nodes[7];
        memcpy(nodes, &g.nodes[4], sizeof nodes);
        for (int k = 0; k < 7; k++) {
            g.nodes[4 + k] = nodes[orders[i % 3][k]];
        }
        graph_insert(&g, g.n_nodes - 1, g.nodes[g.n_nodes - 1]);    /* the order is another: */
        g.n_nodes--;
        run();
        run();
    }
    end();
}

/* A split of llama.cpp's ends without a word to anybody. */
static void pieces_end_anywhere(void) {
    begin();
    run();
    for (uint32_t i = 1; i < 24; i++) {
        graph_build(&g, &w, 1 + i % 3, i % 2 ? TOP_K_VIEW : COMPUTED_IDS);
        g.split_at = i;
        run();
        run();
        g.split_at = 0;
        g.chunk = 1 + i / 2;
        run();
        g.chunk = 0;
        runs_with(N_LAYERS, "in one split all are computed as a whole");
    }
    end();
}

static float second_result[GRAPH_IDS * GRAPH_ROWS];
static ggml_tensor second;
static uint32_t n_second;

static void compute_second(graph *of, ggml_tensor *node) {
    if (node == &second) {
        CHECK(node->op == OP_MUL_MAT_ID && node->src[0] == &of->w->tensors[1][0], "the second one is left alone");
        n_second++;
    }
}

/* One matrix twice in a piece of graph: only one of the nodes can be ours. */
static void matrix_that_stands_in_a_piece_twice(void) {
    begin();
    run();
    for (uint32_t i = 0; i < 8; i++) {
        graph_build(&g, &w, 2, TOP_K_VIEW);
        second = *graph_matmul(&g, 1, 0);
        second.data = second_result;
        g.compute_other = compute_second;
        n_second = 0;
        graph_insert(&g, graph_index(&g, graph_matmul(&g, 1, 0)) + 1 + i % 4 / 2 * 2, &second);
        run();
        run();
        CHECK(n_second == 2, "it is computed");
    }
    end();
}

/* ---- waiting, failing ------------------------------------------------------------------------------------------------ */

static void slow_reads_give_the_same(void) {
    begin_with((model_shape) { .n_slots = 5 }, true, NULL);
    run();
    fake_set_weather((fake_weather) { .delay_us = 200, .short_one_in = 5 });
    for (int i = 0; i < 40; i++) {
        runs_with(N_LAYERS, "all are computed as a whole");
    }
    end();
}

static void failed_reads_end_the_graph(uint32_t n_tokens, uint32_t n_slots) {
    begin_with((model_shape) { .n_slots = n_slots }, true, NULL);
    run();
    graph_build(&g, &w, n_tokens, TOP_K_VIEW);
    run();
    fake_set_weather((fake_weather) { .delay_us = 100 });
    graph_fail_reads(&g, tap, pager, 12 + 6 * n_tokens);
    run();
    end();
}

static void small_graph_that_fails_ends_the_graph(uint32_t n_tokens) {
    begin();
    run();
    graph_build(&g, &w, n_tokens, TOP_K_VIEW);
    run();
    for (unsigned nth = 1; nth < 6; nth++) {
        graph_fail_small_graph(nth);
        graph_route(&g);
        CHECK(graph_run(&g, tap) == 2, "the result would be wrong");
        gp_tap_idle(tap);
        CHECK(gp_tap_take_failure(tap).error == -ENOTRECOVERABLE, "and it is said why");
        runs_with(N_LAYERS, "the next graph is computed");
    }
    end();
}

static void *run_graph(void *unused) {
    CHECK(graph_run(&g, tap) == 0, "the graph is computed");
    return unused;
}

/* What this is for: an expert that is there is done before the first byte of another has come. */
static void nobody_waits_for_others(uint32_t n_tokens) {
    begin_with((model_shape) { .n_slots = 16 }, true, NULL);
    graph_build(&g, &w, n_tokens, TOP_K_VIEW);
    run();
    run();
    model_settle(pager);
    graph_route(&g);
    const int32_t there[N_USED] = { 1, 2, 3, 5 };
    gp_hold hold;
    CHECK(gp_hold_open(&hold, pager) == 0, "a hold opens");
    model_use(&m, pager, &hold, 0, there, N_USED, 1);
    gp_hold_close(&hold, pager);
    int32_t missing = 0;
    while (model_is_resident(pager, &m, 0, missing)) {
        missing++;
    }
    for (uint32_t t = 0; t < n_tokens; t++) {
        graph_choose(&g, 0, t, t > 0 ? there : (int32_t[]) { 1, 2, missing, 5 });
    }
    fake_hold_reads();
    uint64_t rows = 0;
    for (uint32_t s = 0; s < m.shape.n_slices; s++) {
        rows += (uint64_t) m.layers[0].slices[s].ne[1] * (N_USED * n_tokens - 1);
    }
    const uint64_t before = graph_rows_multiplied();
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

static void *let_all_go(void *unused) {
    fake_wait_for_reads(1);
    fake_let_reads_go();
    return unused;
}

/* Nothing is waited for before the node's own time. */
static void reads_are_only_begun(void) {
    begin();
    graph_build(&g, &w, 1, TOP_K_VIEW);
    run();
    model_settle(pager);
    graph_route(&g);
    graph_layer *l = graph_layer_of(&g, 0);
    int32_t absent[N_USED];
    for (uint32_t e = 0, n = 0; n < N_USED; e++) {
        absent[n] = (int32_t) e;
        n += !model_is_resident(pager, &m, 0, (int32_t) e) || e + N_USED - n >= m.shape.n_experts;
    }
    graph_choose(&g, 0, 0, absent);
    fake_hold_reads();
    uint32_t at = 0;
    while (!gp_tap_eval(g.nodes[at], true, tap)) {
        at++;
    }
    memcpy(l->ranking_data, l->chosen, sizeof l->chosen);
    memcpy(l->other.data, l->inputs, GRAPH_COLUMNS * sizeof(float));
    (void) gp_tap_eval(g.nodes[at], false, tap);
    const ggml_tensor *up = graph_matmul(&g, 0, 1);
    while (g.nodes[++at] != up) {
        (void) gp_tap_eval(g.nodes[at], true, tap);
    }
    const unsigned n_before = fake_count(FAKE_FILE_READ);
    CHECK(!gp_tap_eval(g.nodes[at], true, tap) && up->op == OP_CUSTOM, "the node is ours while no read has come");
    fake_wait_for_reads(1);
    CHECK(fake_count(FAKE_FILE_READ) >= n_before, "but they are on their way");
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, let_all_go, NULL) == 0, "the test has threads");
    gp_custom custom;
    memcpy(&custom, up->op_params, sizeof custom);
    custom.compute(g.nodes[at], 0, 1, custom.data);
    pthread_join(thread, NULL);
    graph_check_rows(&g, 0, 1, "the reads were waited for");
    gp_tap_idle(tap);
    CHECK(gp_tap_take_failure(tap).error == 0, "and have come");
    end();
}

int main(void) {
    check_begin();
    shape_is_tried_once(STEPS_GLU, 1);
    shape_is_tried_once(STEPS_GLU, 5);
    shape_is_tried_once(STEPS_BIAS, 1);
    shape_is_tried_once(STEPS_BIAS, 12);
    other_bits_are_never_ours(STEPS_GLU, 1);
    other_bits_are_never_ours(STEPS_BIAS, 10);
    unknown_operations_are_not_left_out();
    what_is_not_traced();
    who_looks_gets_what_they_look_at();
    nodes_with_other_flags_are_computed();
    user_who_stops_between_gets_nodes_one_by_one();
    two_in_one_piece();
    chains_interleaved();
    pieces_end_anywhere();
    matrix_that_stands_in_a_piece_twice();
    slow_reads_give_the_same();
    failed_reads_end_the_graph(1, 9);
    failed_reads_end_the_graph(4, 4);
    failed_reads_end_the_graph(12, 4);
    small_graph_that_fails_ends_the_graph(1);
    small_graph_that_fails_ends_the_graph(6);
    nobody_waits_for_others(1);
    nobody_waits_for_others(3);
    reads_are_only_begun();
    return 0;
}
