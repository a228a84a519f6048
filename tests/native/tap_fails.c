/* When experts do not come, the graph is aborted, what it computed is thrown away, and the reason is kept until it is
 * taken. Then everything works again. */
#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

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
    CHECK(gp_tap_open(&tap, &graph_ggml, 64, BATCH_BYTES, ROW_BYTES, NULL, NULL, NULL, NULL) == 0, "a tap opens");
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
    CHECK(graph_run(&g, tap) == 0 && g.n_ours == 9, "every node is served");
}

static void bad_block_aborts(bool is_used_again) {
    begin();
    graph_build(&g, &w, 2, TOP_K_VIEW);
    serves();
    for (uint32_t layer = 0; layer < m.shape.n_layers; layer++) {
        /* All of this layer's second slices are bad. */
        if (!is_used_again) {
            graph_build(&g, &w, 2, TOP_K_VIEW);
        }
        graph_route(&g);
        int32_t absent = -1;
        for (int32_t e = 0; e < (int32_t) m.shape.n_experts; e++) {
            absent = model_is_resident(pager, &m, layer, e) ? absent : e;
        }
        CHECK(absent >= 0, "not every expert is in a slot");
        graph_choose(&g, layer, 0, (int32_t[]) { absent, (absent + 1) % 9, (absent + 2) % 9 });
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
        CHECK(graph_run(&g, tap) == 0 && g.n_ours == 9, "once the file is well, so is the graph");
        serves();
    }
    end();
}

/* The failure is taken, and nothing else is done before the next decode: slots and routings of the aborted graph are
 * still as they were. */
static void decode_right_after_an_abort(void) {
    begin();
    int n_aborted = 0, n_missed = 0;
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
        CHECK(result == 0 || has_struck, "nothing but a failing read aborts the graph");
        CHECK(gp_tap_take_failure(tap).error == (result == 2 ? -ENXIO : 0), "the error is the read's own");
        n_aborted += result == 2;
        n_missed += result == 0 && has_struck;
        serves();
    }
    /* A slice that no node has waited for is read again when one does: how many those are is a matter of time. */
    CHECK(n_aborted > 5 && n_aborted + n_missed > 15, "a failing read does");
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

/* A graph of which no more is heard leaves nothing that the next one could take for its own. */
static void given_up_in_the_middle(void) {
    begin();
    graph_build(&g, &w, 2, TOP_K_VIEW);
    serves();
    serves();
    fake_set_weather((fake_weather) { .delay_us = 300 });
    for (uint32_t i = 0; i < 30; i++) {
        graph_route(&g);
        memcpy(g.layers[0].ranking_data, g.layers[0].chosen, sizeof g.layers[0].chosen);
        for (uint32_t at = 0; at < 1 + i % 8; at++) {
            if (gp_tap_eval(g.nodes[at], true, tap)) {
                (void) gp_tap_eval(g.nodes[at], false, tap);
            }
        }
        if (i % 3 == 0) {
            graph_build(&g, &w, 1 + i % 4, TOP_K_VIEW);
        }
        serves();
        model_check_invariants(pager);
    }
    end();
}

static void *let_go(void *unused) {
    nanosleep(&(struct timespec) { .tv_nsec = 20 * 1000000 }, NULL);
    fake_let_reads_go();
    return unused;
}

/* The context is freed with no more ado: what is still being read is nobody's. */
static void closed_after_an_abort(bool is_idle, uint32_t n_tokens, uint32_t n_slots) {
    for (unsigned nth = 1; nth < 8; nth++) {
        model_make(&m, (model_shape) { .n_slots = n_slots, .n_used = 3 });
        weights_map(&w, &m);
        pager = model_open(&m);
        CHECK(gp_tap_open(&tap, &graph_ggml, 64, BATCH_BYTES, ROW_BYTES, NULL, NULL, NULL, NULL) == 0, "a tap opens");
        CHECK(gp_tap_attach(tap, pager) == 0, "a tap is attached");
        graph_build(&g, &w, n_tokens, TOP_K_VIEW);
        serves();
        gp_tap_idle(tap);
        fake_set_weather((fake_weather) { .delay_us = 400 });
        fake_fail(FAKE_FILE_READ, nth, -EIO);
        graph_route(&g);
        const int result = graph_run(&g, tap);
        CHECK(result == 0 || !fake_is_armed(), "nothing but a failed read aborts");
        fake_fail(FAKE_FILE_READ, 0, 0);
        if (is_idle) {
            gp_tap_idle(tap);
        }
        gp_tap_close(tap);
        model_check_invariants(pager);
        CHECK(gp_tap_open(&tap, &graph_ggml, 64, BATCH_BYTES, ROW_BYTES, NULL, NULL, NULL, NULL) == 0, "another opens");
        CHECK(gp_tap_attach(tap, pager) == 0, "and is attached");
        graph_build(&g, &w, n_tokens, TOP_K_VIEW);
        model_settle(pager);
        serves();
        end();
    }
}

/* The same before anything has come. */
static void closed_while_reads_hang(void) {
    begin();
    graph_build(&g, &w, 3, TOP_K_VIEW);
    serves();
    serves();
    gp_tap_idle(tap);
    model_settle(pager);
    fake_hold_reads();
    graph_route(&g);
    memcpy(g.layers[0].ranking_data, g.layers[0].chosen, sizeof g.layers[0].chosen);
    for (uint32_t at = 0; at < 7; at++) {
        if (gp_tap_eval(g.nodes[at], true, tap)) {
            (void) gp_tap_eval(g.nodes[at], false, tap);
        }
    }
    gp_tap_close(tap);
    tap = NULL;
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, let_go, NULL) == 0, "the test has threads");
    model_settle(pager);
    pthread_join(thread, NULL);
    end();
}

/* A fork of a process that decodes: its graphs are aborted, and nothing hangs. */
static void fork_does_not_decode(void) {
    begin();
    graph_build(&g, &w, 2, TOP_K_VIEW);
    serves();
    gp_tap_idle(tap);
    model_settle(pager);
    const pid_t child = fork();
    CHECK(child >= 0, "the test can fork");
    if (child == 0) {
        alarm(10);
        for (int i = 0; i < 2; i++) {
            graph_route(&g);
            if (graph_run(&g, tap) != 2 || gp_tap_take_failure(tap).error != -ECHILD) {
                _exit(1);
            }
            gp_tap_idle(tap);
        }
        gp_tap_close(tap);
        _exit(0);
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0,
          "a fork is told that it cannot, and can close");
    serves();
    end();
}

static void all(void) {
    bad_block_aborts(false);
    bad_block_aborts(true);
    decode_right_after_an_abort();
    changed_file_aborts();
    given_up_in_the_middle();
}

int main(void) {
    check_begin();
    graph_set_kernels(KERNELS);
    graph_set_small_graphs(true, true);
    all();
    g.steps = STEPS_GLU;        /* as a whole, mostly */
    all();
    for (uint32_t n_slots = 3; n_slots < 8; n_slots += 2) {
        closed_after_an_abort(n_slots == 5, 1, n_slots);
        closed_after_an_abort(n_slots == 3, 5, n_slots);
    }
    closed_while_reads_hang();
    fork_does_not_decode();
    return 0;
}
