/* llama.cpp uses a graph again for the next token, or builds another one in the same memory. A node may still be ours, or left
 * out, or an address may mean something else than it did. */
#include "check.h"
#include "fake_os.h"
#include "graph.h"

static model m;
static weights w;
static gp_pager *pager;
static gp_tap *tap;
static graph_steps steps;
static uint32_t n_whole;

static void begin(void) {
    model_make(&m, (model_shape) { .n_slots = 9, .n_used = 3 });
    weights_map(&w, &m);
    pager = model_open(&m);
    CHECK(gp_tap_open(&tap, &graph_ggml, 64, BATCH_BYTES, ROW_BYTES, NULL, NULL, NULL, NULL) == 0, "a tap opens");
    CHECK(gp_tap_attach(tap, pager) == 0, "a tap is attached");
}

static void end(void) {
    gp_counters counters[MODEL_LAYERS];
    gp_pager_counters(pager, counters);
    CHECK(counters[0].left_alone + counters[1].left_alone + counters[2].left_alone == 0, "no node was left alone");
    CHECK((n_whole > 0) == (steps != STEPS_UNKNOWN), "some were computed as a whole");
    n_whole = 0;
    gp_tap_close(tap);
    model_check_invariants(pager);
    gp_pager_close(pager);
    model_end(&m);
}

static void serves(graph *g) {
    graph_route(g);
    CHECK(graph_run(g, tap) == 0 && g->n_ours == m.shape.n_layers * m.shape.n_slices, "every node is served");
    n_whole += g->n_whole;
}

static void used_again_with_other_ids(void) {
    begin();
    static graph g;
    g.steps = steps;
    for (int n_tokens = 1; n_tokens < 4; n_tokens++) {
        graph_build(&g, &w, (uint32_t) n_tokens, TOP_K_VIEW);
        for (int i = 0; i < 15; i++) {
            serves(&g);
        }
    }
    gp_counters counters[MODEL_LAYERS];
    gp_pager_counters(pager, counters);
    CHECK(counters[0].visits == 45 && counters[0].tokens == 15 + 30 + 45, "each time is a visit");
    end();
}

static void built_anew_at_the_same_addresses(void) {
    begin();
    static graph g;
    g.steps = steps;
    for (int i = 0; i < 40; i++) {
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
    prompt.steps = token.steps = steps;
    graph_build(&prompt, &w, 3, TOP_K_VIEW);
    graph_build(&token, &w, 1, TOP_K_VIEW);
    for (int i = 0; i < 30; i++) {
        serves(fake_random(3) == 0 ? &prompt : &token);
    }
    end();
}

/* However many there are: what they were can be read off them. */
static void many_graphs_in_turns(void) {
    begin();
    static graph graphs[3];
    for (int i = 0; i < 3; i++) {
        graphs[i].steps = steps;
        graph_build(&graphs[i], &w, 1 + 4 * (uint32_t) i, TOP_K_VIEW);
        serves(&graphs[i]);
    }
    for (int i = 0; i < 12; i++) {
        serves(&graphs[fake_random(3)]);
    }
    end();
}

/* What was a layer's ids, or its gate, is now another layer's, or its down. */
static void addresses_change_places(void) {
    begin();
    static graph g;
    g.steps = steps;
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
    many_graphs_in_turns();
    addresses_change_places();
}

int main(void) {
    check_begin();
    graph_set_small_graphs(true, true);
    graph_set_kernels(KERNELS);
    for (steps = STEPS_UNKNOWN; steps <= STEPS_BIAS; steps++) {
        all();
    }
    return 0;
}
