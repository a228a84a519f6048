/* A feed-forward of any number of tokens, with any number of slots: every row is right, each expert is read once, and what
 * decoding lives on stays. The graph checks every row. */
#include <string.h>

#include "check.h"
#include "fake_os.h"
#include "graph.h"

static model m;
static weights w;
static graph g;
static gp_pager *pager;
static gp_tap *tap;

static void begin_with(model_shape shape, size_t batch_bytes) {
    shape.piece_bytes = shape.piece_bytes ? shape.piece_bytes : 2048;
    model_make(&m, shape);
    for (uint32_t l = 0; l < m.shape.n_layers; l++) {   /* the rest of a token's experts waits for its turn */
        m.layers[l].n_used = m.layers[l].n_used < m.shape.n_slots ? m.layers[l].n_used : m.shape.n_slots;
    }
    weights_map(&w, &m);
    pager = model_open(&m);
    CHECK(gp_tap_open(&tap, &graph_ggml, GRAPH_IDS, batch_bytes, ROW_BYTES, NULL, NULL, NULL, NULL) == 0, "a tap opens");
    CHECK(gp_tap_attach(tap, pager) == 0, "a tap is attached");
}

static void begin(model_shape shape) {
    begin_with(shape, BATCH_BYTES);
}

static void end(void) {
    gp_tap_close(tap);
    model_settle(pager);
    model_check_invariants(pager);
    gp_pager_close(pager);
    model_end(&m);
}

/* All nodes are ours, so many feed-forwards whole. */
static void run(uint32_t n_whole) {
    graph_route(&g);
    CHECK(graph_run(&g, tap) == 0, "the graph is computed");
    gp_tap_idle(tap);
    CHECK(g.n_from_mapping == 0 && g.n_ours == m.shape.n_layers * m.shape.n_slices, "every node is ours");
    CHECK(g.n_whole == n_whole, "so many feed-forwards are computed as a whole");
    model_check_invariants(pager);
}

/* Until everything has been tried. */
static void get_to_know(uint32_t n_tokens) {
    graph_build(&g, &w, n_tokens, TOP_K_VIEW);
    for (int i = 0; i < 2; i++) {
        graph_route(&g);
        CHECK(graph_run(&g, tap) == 0, "the graph is computed");
        gp_tap_idle(tap);
    }
}

static uint64_t sum_of(uint64_t (*value)(const gp_counters *)) {
    gp_counters counters[MODEL_LAYERS];
    uint64_t sum = 0;
    gp_pager_counters(pager, counters);
    for (uint32_t l = 0; l < m.shape.n_layers; l++) {
        sum += value(&counters[l]);
    }
    return sum;
}

static uint64_t bytes_read(const gp_counters *c) { return c->bytes_read; }
static uint64_t misses(const gp_counters *c)     { return c->misses; }
static uint64_t hits(const gp_counters *c)       { return c->hits; }
static uint64_t evictions(const gp_counters *c)  { return c->evictions; }
static uint64_t visits(const gp_counters *c)     { return c->visits; }
static uint64_t tokens(const gp_counters *c)     { return c->tokens; }
static uint64_t left_alone(const gp_counters *c) { return c->left_alone; }

/* From one slot up, batches of any width in turn. */
static void any_slots_any_tokens(graph_steps steps, model_shape shape, const uint32_t *widths, uint32_t n_widths) {
    begin(shape);
    g.steps = steps;
    get_to_know(8);
    const uint64_t tokens_before = sum_of(tokens), visits_before = sum_of(visits);
    uint64_t n_tokens = 0;
    for (uint32_t i = 0; i < n_widths; i++) {
        fake_set_weather((fake_weather) { .delay_us = i % 2 ? 60 : 0, .short_one_in = 7 });
        graph_build(&g, &w, widths[i], i % 3 ? TOP_K_VIEW : COMPUTED_IDS);
        run(steps == STEPS_UNKNOWN ? 0 : m.shape.n_layers);
        n_tokens += widths[i];
    }
    CHECK(sum_of(visits) - visits_before == (uint64_t) n_widths * m.shape.n_layers, "each batch counts once");
    CHECK(sum_of(tokens) - tokens_before == n_tokens * m.shape.n_layers, "with its tokens");
    CHECK(sum_of(left_alone) == 0, "nothing is left alone");
    end();
}

static void all_numbers_of_slots(void) {
    static const uint32_t widths[] = { 1, 2, 7, 1, 9, 24 };
    static const uint32_t slots[] = { 1, 2, 3, 5, 9, 27 };
    for (uint32_t i = 0; i < sizeof slots / sizeof *slots; i++) {
        for (graph_steps steps = STEPS_UNKNOWN; steps <= STEPS_BIAS; steps += 1 + i % 2) {
            any_slots_any_tokens(steps, (model_shape) { .n_slots = slots[i], .n_used = 3, .read_ahead = i % 2 }, widths,
                                 sizeof widths / sizeof *widths);
        }
    }
}

static void other_shapes(void) {
    static const uint32_t widths[] = { 1, 4, 16, 1, 2 };
    const uint32_t n = sizeof widths / sizeof *widths;
    any_slots_any_tokens(STEPS_GLU, (model_shape) { .n_slots = 2, .n_slices = 2, .slice_bytes = { 4160, 1184 } }, widths, n);
    any_slots_any_tokens(STEPS_BIAS, (model_shape) { .n_slots = 5, .n_slices = 2, .slice_bytes = { 4160, 6112 } }, widths, n);
    any_slots_any_tokens(STEPS_UNKNOWN, (model_shape) { .n_slots = 2, .n_slices = 1, .slice_bytes = { 4160 } }, widths, n);
    any_slots_any_tokens(STEPS_BIAS, (model_shape) { .n_slots = 3, .n_layers = 4, .n_classes = 2, .n_files = 2, .n_used = 4 }, widths, n);
    any_slots_any_tokens(STEPS_GLU, (model_shape) { .n_slots = 3, .slice_bytes = { 1120, 1120, 2208 }, .n_slices = 3,
                                                    .offset_align = 512, .memory_align = 4 }, widths, n);
    any_slots_any_tokens(STEPS_GLU, (model_shape) { .n_slots = 1, .n_used = 1, .n_experts = 2 }, widths, n);
    any_slots_any_tokens(STEPS_GLU, (model_shape) { .n_slots = 4, .n_slices = 4, .slice_bytes = { 1184, 1184, 1696, 1184 } },
                         widths, n);
}

/* However few slots there are, and however the threads come along. */
static void each_expert_is_read_once(uint32_t n_slots) {
    begin((model_shape) { .n_slots = n_slots, .n_used = 3, .policy = "lfru" });
    g.steps = STEPS_GLU;
    get_to_know(16);
    graph_build(&g, &w, 24, TOP_K_VIEW);
    fake_set_weather((fake_weather) { .delay_us = 50 });
    for (int i = 0; i < 10; i++) {
        model_settle(pager);
        const uint64_t bytes = sum_of(bytes_read), before = sum_of(misses), found = sum_of(hits);
        run(m.shape.n_layers);
        const uint64_t expert_bytes = 1184 + 1184 + 1696, n_missed = sum_of(misses) - before;
        CHECK(sum_of(bytes_read) - bytes <= n_missed * expert_bytes, "no expert is read twice in a batch");
        CHECK(n_missed + sum_of(hits) - found <= m.shape.n_layers * m.shape.n_experts, "each expert counts once");
        CHECK(n_missed >= m.shape.n_layers * (m.shape.n_experts - n_slots) / 2, "most of them had to be read");
    }
    CHECK(sum_of(evictions) > 0, "slots are turned over");
    end();
}

/* A token chooses two of the four favourites of each layer. */
static void decode_favourites(graph *single, int n_tokens) {
    for (int i = 0; i < n_tokens; i++) {
        graph_route(single);
        for (uint32_t l = 0; l < m.shape.n_layers; l++) {
            const int32_t first = (int32_t) fake_random(4);
            graph_choose(single, l, 0, (int32_t[]) { first, (first + 1) % 4 });
        }
        CHECK(graph_run(single, tap) == 0 && single->n_ours == 12, "a token is computed");
        gp_tap_idle(tap);
    }
}

/* A batch that wants nearly every expert leaves those that decoding lives on, where there are slots for both. */
static void decode_set_outlives_batches(model_shape shape) {
    static graph single;
    shape.n_layers = 4;
    shape.n_experts = 16;
    shape.n_used = 2;
    begin(shape);
    g.steps = single.steps = STEPS_GLU;
    graph_build(&single, &w, 1, TOP_K_VIEW);
    graph_build(&g, &w, 64, TOP_K_VIEW);
    decode_favourites(&single, 20);
    for (int round = 0; round < 3; round++) {
        const uint64_t before = sum_of(bytes_read);
        graph_route(&g);
        for (uint32_t l = 0; l < m.shape.n_layers; l++) {
            for (int32_t t = 0; t < 8; t++) {
                graph_choose(&g, l, (uint32_t) t, (int32_t[]) { 2 * t, 2 * t + 1 });
            }
        }
        CHECK(graph_run(&g, tap) == 0 && g.n_ours == 12, "the batch is computed");
        gp_tap_idle(tap);
        CHECK(sum_of(bytes_read) > before, "the batch wanted more");
        const uint64_t after = sum_of(misses);
        decode_favourites(&single, 20);
        CHECK(sum_of(misses) == after, "what decoding lives on is still there after a batch");
    }
    end();
}

/* A slot is given back while others of the wave still compute; one context with one slot and many threads goes on. */
static void slow_reads_give_the_same(void) {
    for (uint32_t n_slots = 1; n_slots < 6; n_slots++) {
        begin((model_shape) { .n_slots = n_slots, .n_used = 3, .n_readers = 1 });
        g.steps = STEPS_GLU;
        get_to_know(9);
        for (int i = 0; i < 8; i++) {
            fake_set_weather((fake_weather) { .delay_us = fake_random(4) * 100, .short_one_in = 5 });
            graph_build(&g, &w, 1 + fake_random(12), TOP_K_VIEW);
            run(m.shape.n_layers);
        }
        end();
    }
}

/* Too little memory for an expert's rows: the node is left alone, and right. */
static void memory_that_does_not_do(void) {
    begin_with((model_shape) { .n_slots = 3, .n_used = 3 }, 0);
    g.steps = STEPS_GLU;
    graph_build(&g, &w, 2, TOP_K_VIEW);
    for (int i = 0; i < 3; i++) {
        graph_route(&g);
        CHECK(graph_run(&g, tap) == 0 && g.n_from_mapping == 9, "without memory nothing is ours");
    }
    CHECK(sum_of(left_alone) == 27, "and it is counted");
    end();
    /* One row's inputs, a byte each, take a line; and those of a feed-forward more. */
    begin_with((model_shape) { .n_slots = 3, .n_used = 3 }, 64);
    graph_build(&g, &w, 1, TOP_K_VIEW);
    for (int i = 0; i < 4; i++) {
        run(0);
    }
    graph_build(&g, &w, 3, TOP_K_VIEW);
    graph_route(&g);
    for (uint32_t l = 0; l < m.shape.n_layers; l++) {
        for (uint32_t t = 0; t < 3; t++) {
            graph_choose(&g, l, t, (int32_t[]) { 4, (int32_t) t, (int32_t) t + 5 });
        }
    }
    CHECK(graph_run(&g, tap) == 0 && g.n_from_mapping == 9, "three rows of an expert have no room");
    gp_tap_idle(tap);
    graph_build(&g, &w, 1, TOP_K_VIEW);
    run(0);
    end();
    /* Memory for some experts of a batch at a time, round and round. */
    for (size_t bytes = 4000; bytes < 12000; bytes += 1700) {
        begin_with((model_shape) { .n_slots = 27, .n_used = 3 }, bytes);
        get_to_know(8);
        uint32_t n_whole = 0;
        for (uint32_t n = 1; n < 6; n++) {
            graph_build(&g, &w, n, TOP_K_VIEW);
            for (int i = 0; i < 3; i++) {
                graph_route(&g);
                CHECK(graph_run(&g, tap) == 0 && g.n_ours == 9, "the graph is computed");
                gp_tap_idle(tap);
                n_whole += g.n_whole;
            }
        }
        CHECK(n_whole >= 9, "single tokens at least have room as a whole");
        end();
    }
}

int main(void) {
    check_begin();
    graph_set_kernels(KERNELS);
    graph_set_small_graphs(true, true);
    all_numbers_of_slots();
    other_shapes();
    graph_set_flags(false);
    any_slots_any_tokens(STEPS_BIAS, (model_shape) { .n_slots = 3 }, (uint32_t[]) { 1, 12, 2 }, 3);
    graph_set_flags(true);
    for (uint32_t n_slots = 1; n_slots < 7; n_slots += 2) {
        each_expert_is_read_once(n_slots);
    }
    decode_set_outlives_batches((model_shape) { .policy = "lru", .n_slots = 40 });
    decode_set_outlives_batches((model_shape) { .policy = "lfru", .n_slots = 40 });
    decode_set_outlives_batches((model_shape) { .policy = "lfru", .n_slots = 52, .read_ahead = true });
    slow_reads_give_the_same();
    memory_that_does_not_do();
    return 0;
}
