/* Which nodes become ours, and which are left as llama.cpp made them. The graph checks every row. */
#include <string.h>

#include "check.h"
#include "fake_os.h"
#include "graph.h"

static model m;
static weights w;
static graph g;
static gp_pager *pager;
static gp_tap *tap;

static void begin_with(model_shape shape, uint32_t max_ids) {
    shape.n_used = shape.n_used ? shape.n_used : 3;
    model_make(&m, shape);
    weights_map(&w, &m);
    pager = model_open(&m);
    CHECK(gp_tap_open(&tap, &graph_ggml, max_ids, BATCH_BYTES, ROW_BYTES, NULL, NULL, NULL, NULL) == 0, "a tap opens");
    CHECK(gp_tap_attach(tap, pager) == 0, "a tap is attached");
}

static void begin(void) {
    begin_with((model_shape) { .n_slots = 9 }, 64);
}

static void end(void) {
    gp_tap_close(tap);
    model_check_invariants(pager);
    gp_pager_close(pager);
    model_end(&m);
}

static uint64_t left_alone(uint32_t layer) {
    gp_counters counters[MODEL_LAYERS];
    gp_pager_counters(pager, counters);
    return counters[layer].left_alone;
}

static uint32_t n_matmuls(void) {
    return m.shape.n_layers * m.shape.n_slices;
}

static void build(uint32_t n_tokens, id_source source) {
    graph_build(&g, &w, n_tokens, source);
    graph_route(&g);
}

/* Builds, routes, runs; all the matmuls go one way. */
static void all_served(uint32_t n_tokens, id_source source, int n_runs) {
    for (int i = 0; i < n_runs; i++) {
        graph_build(&g, &w, n_tokens, source);
        graph_route(&g);
        CHECK(graph_run(&g, tap) == 0, "the graph is computed");
        CHECK(g.n_ours == n_matmuls(), "every paged node is served");
        CHECK(left_alone(0) == 0, "none is left alone");
        model_check_invariants(pager);
    }
}

static void all_left_alone(const char *why) {
    const uint64_t before = left_alone(0);
    CHECK(graph_run(&g, tap) == 0, "the graph is computed");
    CHECK(g.n_from_mapping == n_matmuls(), why);
    CHECK(left_alone(0) == before + m.shape.n_slices, "each is counted");
}

static void tokens_and_batches(void) {
    begin();
    all_served(1, TOP_K_VIEW, 40);
    all_served(3, TOP_K_VIEW, 40);      /* rows of the ranking lie n_experts apart */
    all_served(1, TOP_K_RESHAPED, 10);
    all_served(2, COMPUTED_IDS, 20);
    gp_tap_idle(tap);
    all_served(1, GIVEN_IDS, 1);
    gp_counters counters[MODEL_LAYERS];
    gp_pager_counters(pager, counters);
    CHECK(counters[0].visits == 111 && counters[0].tokens == 40 + 120 + 10 + 40 + 1, "three nodes are one visit");
    CHECK(counters[1].evictions > 0, "there were fewer slots than experts");
    end();
}

static void shapes_of_layers(void) {
    begin_with((model_shape) { .n_slots = 9, .n_classes = 2, .n_files = 2, .n_layers = 4 }, 64);
    all_served(2, TOP_K_VIEW, 30);
    end();
    begin_with((model_shape) { .n_slots = 9, .n_slices = 2, .slice_bytes = { 2080, 1184 } }, 64);
    all_served(2, TOP_K_VIEW, 10);
    end();
    begin_with((model_shape) { .n_slots = 9, .n_slices = 3, .slice_bytes = { 1120, 1120, 2208 }, .offset_align = 512,
                               .memory_align = 4 }, 64);
    all_served(2, TOP_K_VIEW, 10);
    end();
}

/* What the tap answers decides how a graph is cut into pieces. */
static void answers(void) {
    begin();
    build(1, TOP_K_VIEW);
    CHECK(graph_run(&g, tap) == 0 && g.n_callbacks == m.shape.n_layers + 1, "one stop per layer, and at the end");
    build(1, TOP_K_VIEW);
    graph_layer *l = &g.layers[0];
    memcpy(l->ranking_data, l->chosen, sizeof l->chosen);
    CHECK(!gp_tap_eval(&l->ranking, true, tap), "no stop at a ranking, for its view follows");
    CHECK(gp_tap_eval(&l->top_k, true, tap), "a stop at the router's result");
    CHECK(gp_tap_eval(&l->top_k, false, tap), "true after it: false would end the graph in silence");
    CHECK(!gp_tap_eval(&l->other, true, tap), "no stop at any other node");
    CHECK(!gp_tap_eval(&l->matmuls[1], true, tap) && !gp_tap_eval(&l->matmuls[0], true, tap)
          && !gp_tap_eval(&l->activation, true, tap) && !gp_tap_eval(&l->matmuls[2], true, tap), "nor at a served one");
    CHECK(gp_tap_eval(&l->other, false, tap), "true whatever was computed");
    gp_tap_idle(tap);
    end();
}

/* Two graphs with nothing in between: what the first leaves must not be the second's. */
static void given_ids_end_with_each_layer(void) {
    begin();
    build(2, GIVEN_IDS);
    CHECK(graph_run(&g, tap) == 0 && g.n_callbacks == m.shape.n_layers, "each layer ends a piece");
    end();
}

static void a_split_may_end_anywhere(void) {
    begin();
    for (uint32_t at = 1; at < 18; at++) {
        graph_build(&g, &w, 2, TOP_K_VIEW);
        graph_route(&g);
        g.split_at = at;
        CHECK(graph_run(&g, tap) == 0 && g.n_ours == n_matmuls(), "a split ends without a call back");
    }
    end();
}

/* Ids that are an input: no stop tells where one graph ends and the next begins, and both use the same tensors. */
static void given_ids_of_one_graph_after_another(void) {
    begin();
    for (int i = 0; i < 20; i++) {
        build(1 + i % 2, GIVEN_IDS);
        CHECK(graph_run(&g, tap) == 0 && g.n_ours == n_matmuls(), "the graph is computed, with the right bytes");
        if (i % 5 == 4) {
            gp_tap_idle(tap);
        }
    }
    build(1, GIVEN_IDS);
    CHECK(graph_run(&g, tap) == 0 && g.n_ours == n_matmuls(), "after a decode the next one is served");
    for (int i = 0; i < 5; i++) {       /* the same graph, used again */
        graph_route(&g);
        CHECK(graph_run(&g, tap) == 0, "the graph is computed, with the right bytes");
    }
    end();
}

/* ---- left alone ------------------------------------------------------------------------------------------------- */

static void ids_that_may_not_be_computed(void) {
    begin();
    build(2, UNNAMED_VIEW);
    all_left_alone("ids that are not known to be computed are not read");
    build(2, TOP_K_VIEW);
    CHECK(graph_run(&g, tap) == 0 && g.n_ours == n_matmuls(), "the next graph is served");
    build(2, UNNAMED_VIEW);
    all_left_alone("known ids at the same address in an earlier graph say nothing of these");
    end();
}

static void ids_elsewhere(void) {
    begin();
    build(2, TOP_K_VIEW);
    for (uint32_t i = 0; i < m.shape.n_layers; i++) {
        g.layers[i].top_k.buffer = &graph_device_buffer;
    }
    all_left_alone("ids on a device are not read");
    build(2, TOP_K_VIEW);
    for (uint32_t i = 0; i < m.shape.n_layers; i++) {
        g.layers[i].top_k.buffer = NULL;
    }
    all_left_alone("ids without a buffer are not read");
    build(2, TOP_K_VIEW);
    for (uint32_t i = 0; i < m.shape.n_layers; i++) {
        g.layers[i].top_k.ne[2] = 2;
    }
    all_left_alone("ids in three dimensions are not understood");
    end();
}

static void more_ids_than_foreseen(void) {
    begin_with((model_shape) { .n_slots = 9 }, 6);
    build(2, TOP_K_VIEW);
    CHECK(graph_run(&g, tap) == 0 && g.n_ours == n_matmuls(), "as many ids as foreseen are served");
    build(3, TOP_K_VIEW);
    all_left_alone("more have no room");
    end();
}

/* One id is nonsense. The graph would check the bytes of an expert that is not there: so its nodes are asked alone. */
static void ids_out_of_range(void) {
    begin();
    const int32_t bad[] = { -1, 9, INT32_MIN, INT32_MAX };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        build(2, TOP_K_VIEW);
        graph_layer *l = &g.layers[0];
        memcpy(l->ranking_data, l->chosen, sizeof l->ranking_data);
        l->ranking_data[1][2] = bad[i];
        const uint64_t before = left_alone(0);
        (void) gp_tap_eval(&l->ranking, true, tap);
        (void) gp_tap_eval(&l->top_k, true, tap);
        (void) gp_tap_eval(&l->top_k, false, tap);
        CHECK(!gp_tap_eval(&l->matmuls[0], true, tap), "no stop");
        CHECK(l->matmuls[0].op == OP_MUL_MAT_ID, "ids that name no expert are left to llama.cpp");
        CHECK(left_alone(0) == before + 1, "and counted");
        CHECK(!gp_tap_abort(tap), "and are no failure");
    }
    build(2, TOP_K_VIEW);
    CHECK(graph_run(&g, tap) == 0 && g.n_ours == n_matmuls(), "the next graph is served");
    end();
}

static void no_tokens(void) {
    begin();
    all_served(1, TOP_K_VIEW, 1);
    graph_build(&g, &w, 0, TOP_K_VIEW);
    CHECK(graph_run(&g, tap) == 0 && g.n_from_mapping == n_matmuls() && left_alone(0) == 0,
          "a node without tokens is not touched, and no loss");
    all_served(1, TOP_K_VIEW, 1);
    end();
}

static void another_tensor_with_these_ids(void) {
    begin();
    build(2, TOP_K_VIEW);
    ggml_tensor low_rank = w.tensors[0][1];
    strcat(low_rank.name, ".lora_a");
    graph_layer *l = &g.layers[0];
    l->lora = l->matmuls[1];
    l->lora.src[0] = &low_rank;
    static float result[GRAPH_IDS * GRAPH_ROWS];
    l->lora.data = result;
    graph_insert(&g, 3, &l->lora);      /* right before the layer's own */
    CHECK(graph_run(&g, tap) == 0, "the graph is computed");
    CHECK(l->lora.op == OP_MUL_MAT_ID && l->lora.src[0] == &low_rank, "LoRA's own multiply is not touched");
    CHECK(g.n_ours == n_matmuls() && left_alone(0) == 0, "the layer's is served all the same");
    end();
}

static void changed_weights(void (*change)(ggml_tensor *), const char *why) {
    begin();
    for (uint32_t s = 0; s < m.shape.n_slices; s++) {
        change(&w.tensors[0][s]);
    }
    build(1, TOP_K_VIEW);
    for (int again = 0; again < 2; again++) {
        for (uint32_t l = 0; l < m.shape.n_layers; l++) {
            memcpy(g.layers[l].ranking_data, g.layers[l].chosen, sizeof g.layers[l].chosen);
        }
        for (uint32_t i = 0; i < g.n_nodes; i++) {
            if (gp_tap_eval(g.nodes[i], true, tap)) {
                CHECK(gp_tap_eval(g.nodes[i], false, tap), "the graph goes on");
            }
        }
        for (uint32_t s = 0; s < m.shape.n_slices; s++) {
            const ggml_tensor *node = &g.layers[0].matmuls[s];
            CHECK(node->op == OP_MUL_MAT_ID, why);
            CHECK(g.layers[1].matmuls[s].op == OP_CUSTOM, "the other layers are served");
        }
    }
    end();
}

static void of_another_type(ggml_tensor *t)  { t->type++; }
static void on_a_device(ggml_tensor *t)      { t->buffer = &graph_device_buffer; }
static void without_a_buffer(ggml_tensor *t) { t->buffer = NULL; }
static void of_other_rows(ggml_tensor *t)    { t->ne[1]--; }
static void of_other_columns(ggml_tensor *t) { t->ne[0]--; }
static void of_fewer_experts(ggml_tensor *t) { t->ne[2]--; }
static void of_four_dimensions(ggml_tensor *t) { t->ne[3] = 2; }
static void of_another_stride(ggml_tensor *t)  { t->nb[2] += 32; }
static void that_are_computed(ggml_tensor *t)  { t->op = OP_OTHER; }

static void before_the_pager_is_there(void) {
    model_make(&m, (model_shape) { .n_slots = 9, .n_used = 3 });
    weights_map(&w, &m);
    CHECK(gp_tap_open(&tap, &graph_ggml, 64, BATCH_BYTES, ROW_BYTES, NULL, NULL, NULL, NULL) == 0, "a tap opens");
    build(2, TOP_K_VIEW);
    CHECK(graph_run(&g, tap) == 0 && g.n_from_mapping == n_matmuls(), "without a pager every node is left as it is");
    gp_tap_idle(tap);
    CHECK(!gp_tap_abort(tap) && gp_tap_take_failure(tap).error == 0, "and nothing has failed");
    pager = model_open(&m);
    CHECK(gp_tap_attach(tap, pager) == 0, "a tap is attached");
    all_served(2, TOP_K_VIEW, 3);
    end();
}

static void all(void) {
    tokens_and_batches();
    shapes_of_layers();
    answers();
    given_ids_end_with_each_layer();
    a_split_may_end_anywhere();
    given_ids_of_one_graph_after_another();
    ids_that_may_not_be_computed();
    ids_elsewhere();
    more_ids_than_foreseen();
    ids_out_of_range();
    no_tokens();
    another_tensor_with_these_ids();
    changed_weights(of_another_type, "weights of another type are not ours");
    changed_weights(on_a_device, "weights on a device are not ours");
    changed_weights(without_a_buffer, "weights without a buffer are not ours");
    changed_weights(of_other_rows, "weights of another shape are not ours");
    changed_weights(of_other_columns, "weights of another shape are not ours");
    changed_weights(of_fewer_experts, "weights of fewer experts are not ours");
    changed_weights(of_four_dimensions, "weights of four dimensions are not ours");
    changed_weights(of_another_stride, "weights with gaps are not ours");
    changed_weights(that_are_computed, "weights that are computed are not ours");
    before_the_pager_is_there();
}

int main(void) {
    check_begin();
    graph_set_kernels(KERNELS);
    graph_set_small_graphs(true, true);
    all();
    g.steps = STEPS_GLU;        /* as a whole, mostly */
    all();
    return 0;
}
