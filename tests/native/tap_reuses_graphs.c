/* llama.cpp uses a graph again for the next token, or builds another one in the same memory. A node may still point at
 * our tensors, or an address may mean something else than it did. */
#include <errno.h>

#include "check.h"
#include "fake_os.h"
#include "graph.h"

static model m;
static weights w;
static gp_pager *pager;
static gp_tap *tap;

static void begin(void) {
    model_make(&m, (model_shape) { .n_slots = 9, .n_used = 3 });
    weights_map(&w, &m);
    pager = model_open(&m);
    CHECK(gp_tap_open(&tap, &graph_ggml, 64, 0, ROW_BYTES, NULL, NULL, NULL, NULL) == 0, "a tap opens");
    CHECK(gp_tap_attach(tap, pager) == 0, "a tap is attached");
}

static void end(void) {
    gp_counters counters[MODEL_LAYERS];
    gp_pager_counters(pager, counters);
    CHECK(counters[0].left_alone + counters[1].left_alone + counters[2].left_alone == 0, "no node was left alone");
    gp_tap_close(tap);
    model_check_invariants(pager);
    gp_pager_close(pager);
    model_end(&m);
}

static void serves(graph *g) {
    graph_route(g);
    CHECK(graph_run(g, tap) == 0 && g->n_from_slots == m.shape.n_layers * m.shape.n_slices, "every node is served");
}

static void used_again_with_other_ids(void) {
    begin();
    static graph g;
    for (int n_tokens = 1; n_tokens < 4; n_tokens++) {
        graph_build(&g, &w, (uint32_t) n_tokens, TOP_K_VIEW);
        for (int i = 0; i < 30; i++) {
            serves(&g);
        }
    }
    gp_counters counters[MODEL_LAYERS];
    gp_pager_counters(pager, counters);
    CHECK(counters[0].visits == 90 && counters[0].tokens == 30 + 60 + 90, "each time is a visit");
    end();
}

static void built_anew_at_the_same_addresses(void) {
    begin();
    static graph g;
    for (int i = 0; i < 60; i++) {
        graph_build(&g, &w, 1 + fake_random(3), fake_random(2) ? TOP_K_VIEW : COMPUTED_IDS);
        serves(&g);
        if (fake_random(2)) {
            serves(&g);
        }
        if (fake_random(4) == 0) {
            gp_tap_idle(tap);
        }
    }
    end();
}

/* A graph for prompts and one for tokens, kept side by side. */
static void two_graphs_in_turns(void) {
    begin();
    static graph prompt, token;
    graph_build(&prompt, &w, 3, TOP_K_VIEW);
    graph_build(&token, &w, 1, TOP_K_VIEW);
    for (int i = 0; i < 30; i++) {
        serves(fake_random(3) == 0 ? &prompt : &token);
    }
    end();
}

/* Two are remembered. A third makes the oldest unknown: it still has our tensors and nobody knows its own. That is an
 * error that says so, not a wrong token. */
static void graph_that_was_forgotten(void) {
    begin();
    static graph graphs[3];
    for (int i = 0; i < 3; i++) {
        graph_build(&graphs[i], &w, 1, TOP_K_VIEW);
        serves(&graphs[i]);
    }
    serves(&graphs[2]);
    serves(&graphs[1]);
    graph_route(&graphs[0]);
    CHECK(graph_run(&graphs[0], tap) == 2, "a forgotten graph is aborted");
    gp_tap_idle(tap);
    CHECK(gp_tap_take_failure(tap).error == -ENOTRECOVERABLE, "the failure says that it cannot be used again");
    graph_build(&graphs[0], &w, 1, TOP_K_VIEW);
    serves(&graphs[0]);     /* built anew it can */
    serves(&graphs[0]);
    end();
}

/* What was a layer's ids, or its gate, is now another layer's, or its down. */
static void addresses_change_places(void) {
    begin();
    static graph g;
    for (int i = 0; i < 40; i++) {
        g.shift = fake_random(m.shape.n_layers);
        graph_build(&g, &w, 1 + fake_random(2), TOP_K_VIEW);
        serves(&g);
        serves(&g);
    }
    end();
}

static void all(void) {
    used_again_with_other_ids();
    built_anew_at_the_same_addresses();
    two_graphs_in_turns();
    graph_that_was_forgotten();
    addresses_change_places();
}

int main(void) {
    check_begin();
    all();
    graph_set_kernels(KERNELS);     /* most nodes of single tokens are products then */
    all();
    return 0;
}
