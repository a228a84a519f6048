/* Reads of the last slices go on while the first ones are computed with; what depends on them waits. */
#include <string.h>

#include "check.h"
#include "fake_os.h"
#include "graph.h"

static model m;
static weights w;
static graph g;
static gp_pager *pager;
static gp_tap *tap;

static void begin(uint32_t n_tokens) {
    model_make(&m, (model_shape) { .n_used = 3, .n_slots = 9, .n_readers = 1, .piece_bytes = 4096 });
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

static gp_counters counted(uint32_t layer) {
    gp_counters counters[MODEL_LAYERS];
    gp_pager_counters(pager, counters);
    return counters[layer];
}

/* The scheduler's part, by hand: asks for one node after the other until the tap wants a call. */
static uint32_t ask_from(uint32_t at) {
    while (at < g.n_nodes && !gp_tap_eval(g.nodes[at], true, tap)) {
        at++;
    }
    return at;
}

/* Computes up to the first router's result; returns the node after it. */
static uint32_t run_first_router(void) {
    const uint32_t router = ask_from(0);
    graph_layer *l = graph_layer_of(&g, 0);
    memcpy(l->ranking_data[0], l->chosen[0], sizeof l->chosen[0]);
    CHECK(gp_tap_eval(g.nodes[router], false, tap), "the tap goes on");
    return router + 1;
}

static void *let_first_slices_go(void *unused) {
    fake_wait_for_reads(1);             /* one reader, three experts: six slices before the last three */
    fake_let_some_go(6);
    return unused;
}

static void first_slices_are_computed_with_before_the_last_are_read(void) {
    begin(1);
    CHECK(graph_run(&g, tap) == 0, "the tap gets to know the graph");
    graph_route(&g);
    CHECK(graph_run(&g, tap) == 0, "and what makes the last input");
    gp_tap_idle(tap);
    model_settle(pager);
    for (uint32_t e = 0; e < 3; e++) {  /* experts that are in no slot of layer 0 */
        int32_t expert = 0;
        while (model_is_resident(pager, &m, 0, expert) || (e > 0 && expert <= graph_layer_of(&g, 0)->chosen[0][e - 1])) {
            expert++;
        }
        graph_layer_of(&g, 0)->chosen[0][e] = expert;
    }
    const graph_layer *l = graph_layer_of(&g, 0);
    const uint64_t misses = counted(0).misses, bytes = counted(0).bytes_read;
    fake_hold_reads();
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, let_first_slices_go, NULL) == 0, "the test has threads");
    const uint32_t pause = ask_from(run_first_router());
    pthread_join(thread, NULL);
    CHECK(g.nodes[pause] == &l->activation, "it stops where the last slices are needed");
    CHECK(counted(0).misses == misses + 3, "all three are missing");
    CHECK(counted(0).bytes_read < bytes + 3 * (m.layers[0].slices[0].slice_bytes + m.layers[0].slices[1].slice_bytes
                                               + m.layers[0].slices[2].slice_bytes), "not all of them is read");
    model_check_invariants(pager);
    CHECK(gp_tap_eval(g.nodes[pause], false, tap), "the tap goes on");
    model_check_invariants(pager);
    for (uint32_t e = 0; e < 3; e++) {
        CHECK(model_is_resident(pager, &m, 0, l->chosen[0][e]), "the slots are kept");
    }
    fake_let_reads_go();
    (void) gp_tap_eval(g.nodes[pause + 1], true, tap);     /* waits for them */
    const ggml_tensor *last = g.nodes[pause + 1];
    for (uint32_t e = 0; e < 3; e++) {
        const int32_t id = ((const int32_t *) last->src[2]->data)[e];
        const char *row = (const char *) last->src[0]->data + (uint64_t) id * last->src[0]->nb[2];
        CHECK(memcmp(row, model_truth(&m, 0, 2, l->chosen[0][e]), m.layers[0].slices[2].slice_bytes) == 0,
              "and is pointed at them");
    }
    gp_tap_idle(tap);
    end();
}

/* Everything at once, with slow reads and any order of events; the graph checks every byte. */
static void slow_reads_give_the_same(void) {
    begin(1);
    fake_set_weather((fake_weather) { .delay_us = 200 });
    uint64_t callbacks = 0;
    for (int i = 0; i < 60; i++) {
        graph_route(&g);
        CHECK(graph_run(&g, tap) == 0, "the graph is computed");
        CHECK(g.n_from_slots == m.shape.n_layers * m.shape.n_slices, "from slots");
        callbacks += g.n_callbacks - m.shape.n_layers;
        gp_tap_idle(tap);
        model_check_invariants(pager);
    }
    CHECK(callbacks > 0, "now and then in two pieces");
    end();
}

/* The last slice cannot be read: the graph ends, the next one works. */
static void last_slice_fails(void) {
    begin(1);
    CHECK(graph_run(&g, tap) == 0, "the tap gets to know the graph");
    gp_tap_idle(tap);
    fake_set_weather((fake_weather) { .delay_us = 300 });
    graph_fail_reads(&g, tap, pager, 9);
    graph_route(&g);
    CHECK(graph_run(&g, tap) == 0, "the next graph is computed");
    end();
}

/* A graph that was given up between its two pieces leaves nothing that the next one could take for its own. */
static void given_up_in_the_middle(void) {
    begin(1);
    CHECK(graph_run(&g, tap) == 0, "the tap gets to know the graph");
    fake_set_weather((fake_weather) { .delay_us = 2000 });
    for (int i = 0; i < 20; i++) {
        graph_route(&g);
        (void) ask_from(run_first_router());    /* and no more is heard of it */
        graph_route(&g);
        CHECK(graph_run(&g, tap) == 0, "the next graph is computed, with its own ids");
        model_check_invariants(pager);
    }
    end();
}

int main(void) {
    check_begin();
    first_slices_are_computed_with_before_the_last_are_read();
    slow_reads_give_the_same();
    last_slice_fails();
    given_up_in_the_middle();
    return 0;
}
