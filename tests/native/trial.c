/* Kinds of matrices are ours once a trial has given the bits of ggml's MUL_MAT_ID, few rows and many apart, and left as they are
 * where it has not. */
#include <errno.h>
#include <string.h>

#include "check.h"
#include "fake_os.h"
#include "graph.h"

enum { N_MATMULS = 9, MANY = 24 };

static model m;
static weights w;
static graph g;
static gp_pager *pager;
static gp_tap *tap;

static void begin_with(graph_kernels kernels, model_shape shape) {
    graph_set_kernels(kernels);
    graph_set_small_graphs(true, true);
    shape.n_used = shape.n_used ? shape.n_used : 3;
    shape.piece_bytes = 4096;
    model_make(&m, shape);
    for (uint32_t l = 0; l < m.shape.n_layers; l++) {
        m.layers[l].n_used = m.layers[l].n_used < m.shape.n_slots ? m.layers[l].n_used : m.shape.n_slots;
    }
    weights_map(&w, &m);
    pager = model_open(&m);
    CHECK(gp_tap_open(&tap, &graph_ggml, GRAPH_IDS, BATCH_BYTES, ROW_BYTES, NULL, NULL, NULL, NULL) == 0, "a tap opens");
    CHECK(gp_tap_attach(tap, pager) == 0, "a tap is attached");
    g.steps = STEPS_UNKNOWN;
}

static void begin(graph_kernels kernels) {
    begin_with(kernels, (model_shape) { .n_slots = 9 });
}

static void end(void) {
    gp_tap_close(tap);
    model_check_invariants(pager);
    gp_pager_close(pager);
    model_end(&m);
}

static void build(uint32_t n_tokens) {
    graph_build(&g, &w, n_tokens, TOP_K_VIEW);
    graph_route(&g);
}

static void run(void) {
    CHECK(graph_run(&g, tap) == 0, "the graph is computed");
    gp_tap_idle(tap);
    model_check_invariants(pager);
}

static void ours(uint32_t n_tokens) {
    build(n_tokens);
    run();
    CHECK(g.n_ours == N_MATMULS, "every node is ours");
}

static gp_counters total(void) {
    gp_counters counters[MODEL_LAYERS], sum = { 0 };
    gp_pager_counters(pager, counters);
    for (uint32_t l = 0; l < m.shape.n_layers; l++) {
        sum.left_alone += counters[l].left_alone;
        sum.bytes_read += counters[l].bytes_read;
    }
    return sum;
}

/* llama.cpp computes it from its own mapping, and it is counted. */
static void left_alone(uint32_t n_tokens) {
    const gp_counters before = total();
    build(n_tokens);
    run();
    CHECK(g.n_from_mapping == N_MATMULS, "every node is left alone");
    CHECK(total().left_alone == before.left_alone + N_MATMULS, "and counted");
}

static void check_kinds(uint32_t n_same, uint32_t n_other) {
    uint32_t same, other;
    gp_tap_count_kinds(tap, &same, &other);
    CHECK(same == n_same && other == n_other, "so many kinds were judged");
}

/* Every expert that many rows want has eight of them, and one has more. */
static void route_many(void) {
    for (uint32_t l = 0; l < m.shape.n_layers; l++) {
        for (uint32_t t = 0; t < g.n_tokens; t++) {
            const int32_t first = (int32_t) (t / 8) * 2 % 8;
            graph_choose(&g, l, t, (int32_t[]) { first, first + 1, 8 });
        }
    }
}

/* Gate and up are of one kind, down of another. */
static void each_kind_is_tried_once(void) {
    begin(KERNELS);
    check_kinds(0, 0);
    ours(1);
    check_kinds(2, 0);
    const uint64_t before = graph_rows_multiplied();
    ours(1);
    const uint64_t rows = m.layers[0].slices[0].ne[1] * 2 + m.layers[0].slices[2].ne[1];
    CHECK(graph_rows_multiplied() - before == rows * m.shape.n_used * m.shape.n_layers, "what is known is not tried again");
    ours(MANY);
    check_kinds(2, 0);
    CHECK(total().left_alone == 0, "nothing was left alone");
    end();
}

static void other_bits_are_never_ours(void) {
    begin(OTHER_KERNELS);
    left_alone(1);
    check_kinds(0, 2);
    model_settle(pager);
    const uint64_t bytes = total().bytes_read;
    left_alone(1);
    left_alone(MANY);
    left_alone(2);
    check_kinds(0, 2);
    CHECK(total().bytes_read == bytes, "what is left alone is not read");
    end();
}

static void what_cannot_be_tried_is_left_alone(void) {
    begin(NO_KERNELS);
    left_alone(1);
    left_alone(MANY);
    check_kinds(0, 0);
    CHECK(total().bytes_read == 0, "what is left alone is not read");
    end();
    graph_set_kernels(KERNELS);
    graph_set_small_graphs(false, true);
    model_make(&m, (model_shape) { .n_slots = 9, .n_used = 3 });
    weights_map(&w, &m);
    pager = model_open(&m);
    CHECK(gp_tap_open(&tap, &graph_ggml, GRAPH_IDS, BATCH_BYTES, ROW_BYTES, NULL, NULL, NULL, NULL) == 0, "a tap opens");
    CHECK(gp_tap_attach(tap, pager) == 0, "also without small graphs");
    left_alone(1);
    left_alone(2);
    end();
}

/* Few rows of an expert have the bits of ggml's, many have not, or with other kernels. */
static void few_rows_and_many_are_judged_apart(void) {
    begin(OTHER_TILED_KERNELS);
    ours(1);
    check_kinds(2, 0);
    build(MANY);
    route_many();
    run();
    CHECK(g.n_from_mapping == N_MATMULS && total().left_alone == N_MATMULS, "many are left alone");
    check_kinds(0, 2);
    ours(1);
    ours(7);
    build(8);       /* no expert has eight */
    for (uint32_t l = 0; l < m.shape.n_layers; l++) {
        for (int32_t t = 0; t < 8; t++) {
            graph_choose(&g, l, (uint32_t) t, (int32_t[]) { t, (t + 1) % 8, (t + 2) % 8 });
        }
    }
    run();
    CHECK(g.n_ours == N_MATMULS, "few rows of each expert are ours, however many tokens there are");
    build(MANY);
    route_many();
    run();
    CHECK(g.n_from_mapping == N_MATMULS, "many stay left alone");
    end();
    static const graph_kernels kernels[] = { TILED_KERNELS, GGML_KERNELS, KERNELS };
    for (uint32_t i = 0; i < sizeof kernels / sizeof *kernels; i++) {
        begin(kernels[i]);
        for (int k = 0; k < 2; k++) {
            ours(1);
            build(MANY);
            route_many();
            run();
            CHECK(g.n_ours == N_MATMULS, "with ggml's own kernels many rows are ours");
        }
        check_kinds(2, 0);
        end();
    }
}

/* Ids may name an expert twice in a token: more rows than tokens. */
static void ids_that_name_an_expert_twice(void) {
    begin(TILED_KERNELS);
    for (uint32_t n_tokens = 1; n_tokens < 8; n_tokens++) {
        build(n_tokens);
        for (uint32_t l = 0; l < m.shape.n_layers; l++) {
            for (uint32_t t = 0; t < n_tokens; t++) {
                graph_choose(&g, l, t, (int32_t[]) { 4, (int32_t) t, 4 });
            }
        }
        run();
        CHECK(g.n_ours == N_MATMULS, "eight rows of one expert are many, and tried");
    }
    end();
}

static void with_any_number_of_slots(void) {
    for (uint32_t n_slots = 1; n_slots < 4; n_slots++) {
        begin_with(TILED_KERNELS, (model_shape) { .n_slots = n_slots, .n_layers = 2 });
        fake_set_weather((fake_weather) { .delay_us = 100, .short_one_in = 5 });
        build(MANY);
        run();
        CHECK(g.n_ours == 6, "one expert is enough to try with");
        check_kinds(2, 0);
        end();
    }
}

/* Rows of an expert that are computed in several parts, of matrices that are; and few. */
static void experts_with_many_rows(graph_kernels kernels, uint32_t n_slots) {
    begin_with(kernels, (model_shape) { .n_slots = n_slots, .n_experts = 5, .n_layers = 2, .n_slices = 3,
                                        .slice_bytes = { 4480, 4480, 6112 } });
    g.steps = STEPS_GLU;
    static const uint32_t widths[] = { GRAPH_TOKENS, GRAPH_TOKENS, 130, 1, 2, 9 };
    for (uint32_t i = 0; i < sizeof widths / sizeof *widths; i++) {
        build(widths[i]);
        run();
        CHECK(g.n_ours == 6 && (i == 0 || g.n_whole == 2), "every node is ours, and all as a whole");
    }
    end();
}

static void inputs_of_another_type_are_left_alone(void) {
    begin(KERNELS);
    ours(1);
    build(1);
    for (uint32_t l = 0; l < m.shape.n_layers; l++) {
        graph_layer_of(&g, l)->other.type = TYPE_BYTES;
    }
    uint32_t n_ours = 0;
    for (uint32_t i = 0; i < g.n_nodes; i++) {
        if (gp_tap_eval(g.nodes[i], true, tap)) {
            for (uint32_t l = 0; l < m.shape.n_layers; l++) {
                memcpy(g.layers[l].ranking_data, g.layers[l].chosen, sizeof g.layers[l].chosen);
            }
            CHECK(gp_tap_eval(g.nodes[i], false, tap), "the graph goes on");
        }
        n_ours += g.nodes[i]->op == OP_CUSTOM;
    }
    CHECK(n_ours == m.shape.n_layers, "only down has floats");
    gp_tap_idle(tap);
    end();
}

/* The trial's own experts cannot be read: it is made again. */
static void trial_that_is_given_up_is_made_again(void) {
    begin(KERNELS);
    fake_fail(FAKE_FILE_READ, 1, -EIO);
    build(1);
    CHECK(graph_run(&g, tap) == 2, "the first read fails");
    gp_tap_idle(tap);
    CHECK(gp_tap_take_failure(tap).error == -EIO, "and the failure says so");
    model_settle(pager);
    ours(1);
    check_kinds(2, 0);
    end();
    begin_with(KERNELS, (model_shape) { .n_slots = 2 });
    unsigned n_ended = 0;
    for (unsigned nth = 1; nth < 12; nth++) {
        gp_tap_close(tap);
        CHECK(gp_tap_open(&tap, &graph_ggml, GRAPH_IDS, BATCH_BYTES, ROW_BYTES, NULL, NULL, NULL, NULL) == 0, "a tap opens");
        CHECK(gp_tap_attach(tap, pager) == 0, "a tap is attached");
        build(MANY);
        fake_fail(FAKE_FILE_READ, nth, -EIO);
        const int result = graph_run(&g, tap);
        CHECK(result == 0 || !fake_is_armed(), "nothing but a failed read ends the graph");
        n_ended += result == 2;
        fake_fail(FAKE_FILE_READ, 0, 0);
        gp_tap_idle(tap);
        CHECK(gp_tap_take_failure(tap).error == (result == 2 ? -EIO : 0), "and the failure says so");
        ours(MANY);
        check_kinds(2, 0);
    }
    CHECK(n_ended > 5, "a failed read does, but of a slice that no node has waited for");
    end();
}

int main(void) {
    check_begin();
    each_kind_is_tried_once();
    other_bits_are_never_ours();
    what_cannot_be_tried_is_left_alone();
    few_rows_and_many_are_judged_apart();
    ids_that_name_an_expert_twice();
    with_any_number_of_slots();
    experts_with_many_rows(KERNELS, 5);
    experts_with_many_rows(TILED_KERNELS, 1);
    experts_with_many_rows(GGML_KERNELS, 2);
    inputs_of_another_type_are_left_alone();
    trial_that_is_given_up_is_made_again();
    return 0;
}
