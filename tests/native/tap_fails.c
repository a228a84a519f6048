/* When experts do not come, the graph is aborted, what it computed is thrown away, and the reason is kept until it is
 * taken. Then everything works again. */
#include <errno.h>

#include "check.h"
#include "fake_os.h"
#include "graph.h"

static model m;
static weights w;
static graph g;
static gp_pager *pager;
static gp_tap *tap;

static void begin(void) {
    model_make(&m, (model_shape) { .n_slots = 9, .n_used = 3, .n_files = 2 });
    weights_map(&w, &m);
    pager = model_open(&m);
    CHECK(gp_tap_open(&tap, &graph_ggml, 64, 0, ROW_BYTES, NULL, NULL, NULL, NULL) == 0, "a tap opens");
    CHECK(gp_tap_attach(tap, pager) == 0, "a tap is attached");
}

static void end(void) {
    gp_tap_close(tap);
    model_check_invariants(pager);
    gp_pager_close(pager);
    model_end(&m);
}

static void serves(void) {
    graph_route(&g);
    CHECK(graph_run(&g, tap) == 0 && g.n_from_slots == 9, "every node is served");
}

static void bad_block_aborts(bool is_used_again) {
    begin();
    graph_build(&g, &w, 2, TOP_K_VIEW);
    serves();
    for (uint32_t layer = 0; layer < m.shape.n_layers; layer++) {
        /* All of this layer's second slices are bad. */
        graph_layer *l = &g.layers[layer];
        if (!is_used_again) {
            graph_build(&g, &w, 2, TOP_K_VIEW);
        }
        graph_route(&g);
        int32_t absent = -1;
        for (int32_t e = 0; e < (int32_t) m.shape.n_experts; e++) {
            absent = model_is_resident(pager, &m, layer, e) ? absent : e;
        }
        CHECK(absent >= 0, "not every expert is in a slot");
        for (int r = 0; r < 3; r++) {
            l->chosen[0][r] = (absent + r) % (int32_t) m.shape.n_experts;
        }
        fake_fail_at(m.paths[1], model_offset(&m, layer, 1, absent) + 3, -EIO);
        CHECK(graph_run(&g, tap) == 2, "the graph is aborted");
        CHECK(gp_tap_abort(tap), "and stays so until the failure is taken");
        CHECK(graph_run(&g, tap) == 2, "also the next time");
        gp_tap_idle(tap);
        const gp_failure failure = gp_tap_take_failure(tap);
        CHECK(failure.error == -EIO && failure.file == 1, "the failure says what happened in which file");
        CHECK(failure.offset_bytes <= model_offset(&m, layer, 1, absent) + 3
              && failure.offset_bytes + m.config.piece_bytes > model_offset(&m, layer, 1, absent) + 3, "and where");
        CHECK(gp_tap_take_failure(tap).error == 0 && !gp_tap_abort(tap), "it is taken once");
        CHECK(graph_run(&g, tap) == 2 && gp_tap_take_failure(tap).error == -EIO, "the next try reads again and fails");
        fake_fail_at(m.paths[1], 0, 0);
        CHECK(graph_run(&g, tap) == 0 && g.n_from_slots == 9, "once the file is well, so is the graph");
        serves();
    }
    end();
}

/* The failure is taken, and nothing else is done before the next decode: slots and routings of the aborted graph are
 * still as they were. */
static void decode_right_after_an_abort(void) {
    begin();
    for (int i = 0; i < 30; i++) {
        if (i % 2) {
            graph_build(&g, &w, 2, TOP_K_VIEW);
        } else {
            graph_build(&g, &w, 1, COMPUTED_IDS);
        }
        graph_route(&g);
        fake_fail(FAKE_FILE_READ, 1 + fake_random(12), -ENXIO);
        const int result = graph_run(&g, tap);
        const bool has_struck = !fake_is_armed();
        fake_fail(FAKE_FILE_READ, 0, 0);
        CHECK(result == (has_struck ? 2 : 0), "a failing read aborts the graph, and only that");
        CHECK(gp_tap_take_failure(tap).error == (has_struck ? -ENXIO : 0), "the error is the read's own");
        serves();
    }
    end();
}

static void changed_file_aborts(void) {
    begin();
    graph_build(&g, &w, 2, TOP_K_VIEW);
    serves();
    fake_file_touch(m.paths[0]);
    graph_route(&g);
    int result = 0;
    for (int i = 0; i < 20 && result == 0; i++) {   /* until an expert is missing */
        graph_route(&g);
        result = graph_run(&g, tap);
    }
    CHECK(result == 2, "a changed file aborts the graph");
    CHECK(gp_tap_take_failure(tap).error == -ESTALE, "the failure says so");
    end();
}

static void all(void) {
    bad_block_aborts(false);
    bad_block_aborts(true);
    decode_right_after_an_abort();
    changed_file_aborts();
}

int main(void) {
    check_begin();
    all();
    graph_set_kernels(KERNELS);     /* most nodes of single tokens are products then */
    all();
    return 0;
}
