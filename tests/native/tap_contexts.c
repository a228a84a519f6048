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
    for (uint32_t l = 0; l < m.shape.n_layers; l++) {   /* the rest of a token's experts waits for its turn */
        m.layers[l].n_used = m.layers[l].n_used < m.shape.n_slots ? m.layers[l].n_used : m.shape.n_slots;
    }
    weights_map(&w, &m);
    pager = model_open(&m);
    for (int i = 0; i < 2; i++) {
        contexts[i].n_from_mapping = 0;
        CHECK(gp_tap_open(&contexts[i].tap, &graph_ggml, 256, BATCH_BYTES, ROW_BYTES, NULL, NULL, NULL, NULL) == 0, "a tap opens");
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
        graph_build(&c->g, &w, 1 + fake_random(c->n_tokens), TOP_K_VIEW);
    }
    graph_route(&c->g);
    CHECK(graph_run(&c->g, c->tap) == 0, "the graph is computed");
    c->n_from_mapping += c->g.n_from_mapping;
}

static void *decode_many(void *data) {
    context *c = data;
    graph_build(&c->g, &w, c->n_tokens, TOP_K_VIEW);
    for (int i = 0; i < 25; i++) {
        decode(c);
        gp_tap_idle(c->tap);    /* as llama_decode's wrapper does */
    }
    return NULL;
}

static void side_by_side(model_shape shape, graph_steps steps, uint32_t n_tokens) {
    shape.piece_bytes = 4096;
    begin(shape);
    fake_set_weather((fake_weather) { .delay_us = 50, .short_one_in = 6 });
    for (uint32_t i = 0; i < 2; i++) {
        contexts[i].n_tokens = 1 + i * n_tokens;
        contexts[i].g.steps = steps;
        CHECK(pthread_create(&contexts[i].thread, NULL, decode_many, &contexts[i]) == 0, "the test has threads");
    }
    for (int i = 0; i < 2; i++) {
        pthread_join(contexts[i].thread, NULL);
        CHECK(contexts[i].n_from_mapping == 0, "every node of both was served");
    }
    gp_counters counters[MODEL_LAYERS];
    gp_pager_counters(pager, counters);
    for (uint32_t l = 0; l < m.shape.n_layers; l++) {
        CHECK(counters[l].left_alone == 0, "and nobody has waited for a slot in vain");
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
    CHECK(n_held() == 0, "nor does one whose graph is done, for the last layer's end ends a piece");
    gp_tap_idle(c->tap);
    CHECK(n_held() == 0, "an idle context holds no slot");
    gp_tap_idle(c->tap);
    /* The last layer is not paged, or computes nothing: then that call is what it takes. */
    c->g.n_nodes = c->g.n_nodes / 3 * 2;
    for (int i = 0; i < 3; i++) {
        graph_route(&c->g);
        CHECK(graph_run(&c->g, c->tap) == 0 && c->g.n_ours == 6, "two layers of three are served");
        gp_tap_idle(c->tap);
        CHECK(n_held() == 0, "an idle context holds no slot");
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

/* Slots that never come: what they were for is computed from the mapping, after a wait, and counted. */
static void no_slots_to_be_had(void) {
    begin((model_shape) { .n_layers = 1, .n_slots = 3, .n_used = 3 });
    context *c = &contexts[1];
    graph_build(&c->g, &w, 1, TOP_K_VIEW);
    for (int i = 0; i < 2; i++) {       /* what is tried at first is trusted by now */
        graph_route(&c->g);
        CHECK(graph_run(&c->g, c->tap) == 0, "the graph is computed");
        gp_tap_idle(c->tap);
    }
    graph_route(&c->g);
    graph_choose(&c->g, 0, 0, (int32_t[]) { 3, 4, 5 });
    gp_hold owner;      /* somebody else who never comes back */
    CHECK(gp_hold_open(&owner, pager) == 0, "a hold opens");
    int32_t slots[3];
    gp_failure failure;
    CHECK(model_acquire(pager, &owner, 0, (int32_t[]) { 0, 1, 2 }, 3, 1, slots, &failure) == 0, "the owner gets all slots");
    gp_counters before, after;
    gp_pager_counters(pager, &before);
    const uint64_t bytes = before.bytes_read;
    struct timespec begun, ended;
    clock_gettime(CLOCK_MONOTONIC, &begun);
    CHECK(graph_run(&c->g, c->tap) == 0, "the graph is computed all the same");
    clock_gettime(CLOCK_MONOTONIC, &ended);
    gp_tap_idle(c->tap);
    gp_pager_counters(pager, &after);
    CHECK(after.bytes_read == bytes && after.left_alone > before.left_alone, "from the mapping, which is counted");
    CHECK(after.tokens == before.tokens + 1, "as one token");
    const uint32_t n_waves = c->g.steps == STEPS_UNKNOWN ? 3 : 1;
    CHECK(ended.tv_sec - begun.tv_sec <= 3 * n_waves, "each wave waits once");
    gp_hold_close(&owner, pager);
    CHECK(graph_run(&c->g, c->tap) == 0 && c->g.n_ours == 3, "the graph is computed");
    gp_tap_idle(c->tap);
    gp_counters last;
    gp_pager_counters(pager, &last);
    CHECK(last.left_alone == after.left_alone && last.bytes_read > bytes, "once there are slots it is from slots");
    end();
}

int main(void) {
    check_begin();
    graph_set_kernels(KERNELS);
    graph_set_small_graphs(true, true);
    static const uint32_t slots[] = { 1, 2, 3, 5, 9 };
    for (uint32_t i = 0; i < sizeof slots / sizeof *slots; i++) {
        for (graph_steps steps = STEPS_UNKNOWN; steps <= STEPS_GLU; steps++) {
            side_by_side((model_shape) { .n_slots = slots[i], .n_used = 3 }, steps, 1 + 5 * i);
        }
    }
    side_by_side((model_shape) { .n_slots = 4, .n_used = 3, .n_layers = 4, .n_classes = 2 }, STEPS_BIAS, 3);
    side_by_side((model_shape) { .n_slots = 12, .n_used = 3, .n_experts = 12, .read_ahead = true, .policy = "lfru" }, STEPS_GLU, 8);
    resting_context_holds_nothing();
    closing_one_frees_its_slots();
    contexts[1].g.steps = STEPS_GLU;
    no_slots_to_be_had();
    return 0;
}
