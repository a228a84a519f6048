/* Two contexts of one model, each with its tap, on one arena: both right, neither in the other's way for longer than it
 * computes. */
#define _POSIX_C_SOURCE 200809L
#include <string.h>
#include <time.h>

#include "check.h"
#include "fake_os.h"
#include "graph.h"

static model m;
static weights w;
static gp_pager *pager;

typedef struct {
    pthread_t thread;
    gp_tap   *tap;
    graph     g;
    uint32_t  n_tokens;
    uint32_t  n_from_mapping;
} context;

static context contexts[2];

static void begin(model_shape shape) {
    model_make(&m, shape);
    weights_map(&w, &m);
    pager = model_open(&m);
    for (int i = 0; i < 2; i++) {
        contexts[i].n_from_mapping = 0;
        CHECK(gp_tap_open(&contexts[i].tap, &graph_ggml, 64, 0, ROW_BYTES, NULL, NULL, NULL, NULL) == 0, "a tap opens");
        CHECK(gp_tap_attach(contexts[i].tap, pager) == 0, "a tap is attached");
    }
}

static void end(void) {
    for (int i = 0; i < 2; i++) {
        gp_tap_close(contexts[i].tap);
    }
    model_check_invariants(pager);
    gp_pager_close(pager);
    model_end(&m);
}

static void decode(context *c) {
    if (fake_random(3) == 0) {
        graph_build(&c->g, &w, c->n_tokens, TOP_K_VIEW);
    }
    graph_route(&c->g);
    CHECK(graph_run(&c->g, c->tap) == 0, "the graph is computed");
    c->n_from_mapping += c->g.n_from_mapping;
}

static void *decode_many(void *data) {
    context *c = data;
    graph_build(&c->g, &w, c->n_tokens, TOP_K_VIEW);
    for (int i = 0; i < 40; i++) {
        decode(c);
        gp_tap_idle(c->tap);    /* as llama_decode's wrapper does */
    }
    return NULL;
}

static void side_by_side(model_shape shape) {
    begin(shape);
    fake_set_weather((fake_weather) { .delay_us = 50, .short_one_in = 6 });
    for (uint32_t i = 0; i < 2; i++) {
        contexts[i].n_tokens = 1 + i;
        CHECK(pthread_create(&contexts[i].thread, NULL, decode_many, &contexts[i]) == 0, "the test has threads");
    }
    for (int i = 0; i < 2; i++) {
        pthread_join(contexts[i].thread, NULL);
        CHECK(contexts[i].n_from_mapping == 0, "every node of both was served");
    }
    end();
}

static uint32_t n_held(void) {
    uint32_t n = 0;
    pthread_mutex_lock(&pager->lock);
    for (uint32_t i = 0; i < pager->n_slots; i++) {
        n += pager->slots[i].users != 0;
    }
    pthread_mutex_unlock(&pager->lock);
    return n;
}

static void resting_context_holds_nothing(void) {
    begin((model_shape) { .n_slots = 9, .n_used = 3 });
    context *c = &contexts[0];
    c->n_tokens = 1;
    graph_build(&c->g, &w, 1, TOP_K_VIEW);
    decode(c);
    CHECK(gp_pager_n_taps(pager) == 2, "there are two taps");
    gp_tap_idle(c->tap);
    CHECK(n_held() == 0, "an idle context holds no slot");
    gp_tap_idle(c->tap);
    /* Without that call, the stop after a graph's last node does it, once the tap has seen which that is. */
    for (int i = 0; i < 4; i++) {
        decode(c);
    }
    CHECK(n_held() == 0, "nor does one whose graph is done, when there are others");
    end();
}

/* The last layer is not paged, or computes nothing: the last node is another than at first thought. */
static void graph_that_ends_earlier(void) {
    begin((model_shape) { .n_slots = 9, .n_used = 3 });
    context *c = &contexts[0];
    graph_build(&c->g, &w, 1, TOP_K_VIEW);
    c->g.n_nodes = c->g.n_nodes / 3 * 2;
    for (int i = 0; i < 3; i++) {
        graph_route(&c->g);
        CHECK(graph_run(&c->g, c->tap) == 0 && c->g.n_from_slots == 6, "two layers of three are served");
    }
    CHECK(n_held() == 0, "the tap has seen where this graph ends");
    end();
}

static void alone_a_context_is_not_stopped_at_the_end(void) {
    begin((model_shape) { .n_slots = 27, .n_used = 3 });    /* all experts: no stop for one that is being read */
    gp_tap_close(contexts[1].tap);
    contexts[1].tap = NULL;
    context *c = &contexts[0];
    c->n_tokens = 1;
    graph_build(&c->g, &w, 1, TOP_K_VIEW);
    for (int i = 0; i < 60; i++) {
        decode(c);
    }
    for (int i = 0; i < 4; i++) {
        decode(c);
        CHECK(c->g.n_callbacks == m.shape.n_layers, "one stop per layer and no more");
    }
    end();
}

static void closing_one_frees_its_slots(void) {
    begin((model_shape) { .n_slots = 3, .n_used = 3 });
    for (int i = 0; i < 2; i++) {
        contexts[i].n_tokens = 1;
        graph_build(&contexts[i].g, &w, 1, TOP_K_VIEW);
        graph_route(&contexts[i].g);
    }
    graph *g = &contexts[0].g;      /* as far as the first matmul */
    for (uint32_t i = 0; g->nodes[i]->op != OP_MUL_MAT_ID; i++) {
        if (gp_tap_eval(g->nodes[i], true, contexts[0].tap)) {
            CHECK(gp_tap_eval(g->nodes[i], false, contexts[0].tap), "the graph goes on");
        }
    }
    memcpy(g->layers[0].ranking_data, g->layers[0].chosen, sizeof g->layers[0].chosen);
    (void) gp_tap_eval(&g->layers[0].matmuls[1], true, contexts[0].tap);
    CHECK(n_held() == 3, "a context that computes holds its slots");
    gp_tap_close(contexts[0].tap);
    contexts[0].tap = NULL;
    CHECK(n_held() == 0, "a closed tap holds nothing");
    decode(&contexts[1]);
    CHECK(contexts[1].n_from_mapping == 0, "the other gets all slots");
    end();
}

/* Slots that never come: the nodes of the layer are computed from the mapping, after one wait and not three. */
static void no_slots_to_be_had(void) {
    begin((model_shape) { .n_layers = 1, .n_slots = 3, .n_used = 3 });
    for (int i = 0; i < 2; i++) {
        contexts[i].n_tokens = 1;
        graph_build(&contexts[i].g, &w, 1, TOP_K_VIEW);
        graph_route(&contexts[i].g);
    }
    for (int32_t r = 0; r < 3; r++) {
        contexts[0].g.layers[0].chosen[0][r] = r;
        contexts[1].g.layers[0].chosen[0][r] = r + 3;
    }
    graph_layer *l = &contexts[0].g.layers[0];
    gp_hold owner;      /* somebody else who never comes back */
    CHECK(gp_hold_open(&owner, pager, 3) == 0, "a hold opens");
    int32_t slots[3];
    gp_failure failure;
    CHECK(model_acquire(pager, &owner, 0, l->chosen[0], 3, 1, slots, &failure) == 0, "the owner gets all slots");
    struct timespec before, after;
    clock_gettime(CLOCK_MONOTONIC, &before);
    CHECK(graph_run(&contexts[1].g, contexts[1].tap) == 0, "the graph is computed all the same");
    clock_gettime(CLOCK_MONOTONIC, &after);
    CHECK(contexts[1].g.n_from_mapping == 3, "from the mapping");
    gp_counters counters;
    gp_pager_counters(pager, &counters);
    CHECK(counters.left_alone == 3, "and counted");
    CHECK(counters.tokens == 1 + 1 && counters.visits == 2, "as one token");
    CHECK(after.tv_sec - before.tv_sec < 4, "one layer waits once");
    gp_hold_close(&owner, pager);
    CHECK(graph_run(&contexts[1].g, contexts[1].tap) == 0, "the graph is computed");
    CHECK(contexts[1].g.n_from_slots == 3, "once there are slots it is served");
    end();
}

static void all(void) {
    side_by_side((model_shape) { .n_slots = 9, .n_used = 3 });
    side_by_side((model_shape) { .n_slots = 6, .n_used = 3, .n_layers = 4, .n_classes = 2 });
    side_by_side((model_shape) { .n_slots = 12, .n_used = 3, .n_experts = 12, .read_ahead = true, .policy = "lfru" });
    resting_context_holds_nothing();
    graph_that_ends_earlier();
    alone_a_context_is_not_stopped_at_the_end();
    closing_one_frees_its_slots();
    no_slots_to_be_had();
}

int main(void) {
    check_begin();
    all();
    graph_set_kernels(KERNELS);     /* most nodes of single tokens are products then */
    all();
    return 0;
}
