/* The user's own callbacks are called as llama.cpp would have called them, and see the nodes as llama.cpp made them. */
#include <string.h>

#include "check.h"
#include "fake_os.h"
#include "graph.h"

typedef enum { NOTHING, EVERY_NODE, MATMULS, DOWN_OF_LAYER_1, ACTIVATIONS } interest;

static model m;
static weights w;
static graph g;
static gp_pager *pager;
static gp_tap *tap;
static interest wanted;
static unsigned n_asked, n_computed;
static const ggml_tensor *last_asked, *stop_at;
static int32_t params[GP_MAX_SLICES][GGML_OP_PARAMS_BYTES / sizeof(int32_t)];    /* of each slice's nodes, as they are built */
static int tag;     /* its address is the user's data */

static bool is_wanted(const ggml_tensor *node) {
    switch (wanted) {
        case EVERY_NODE:      return true;
        case MATMULS:         return node->op == OP_MUL_MAT_ID;
        case DOWN_OF_LAYER_1: return node == &g.layers[1].matmuls[2];
        case ACTIVATIONS:     return node->op == OP_GLU;
        default:              return false;
    }
}

static void check_node(const ggml_tensor *node) {
    for (uint32_t l = 0; l < m.shape.n_layers; l++) {
        for (uint32_t s = 0; s < m.shape.n_slices; s++) {
            if (node == &g.layers[l].matmuls[s]) {
                CHECK(node->src[0] == &w.tensors[l][s], "the user sees the model's own tensor");
                CHECK(node->src[2] == g.layers[l].ids, "and the expert ids");
                CHECK(node->op == OP_MUL_MAT_ID, "the operation");
                for (uint32_t i = 0; i < sizeof node->op_params / sizeof *node->op_params; i++) {
                    CHECK(node->op_params[i] == params[s][i], "and its parameters");
                }
            }
        }
    }
    CHECK(node->flags == FLAG_COMPUTE, "and flags");
}

static bool eval(void *tensor, bool ask, void *data) {
    const ggml_tensor *node = tensor;
    CHECK(data == &tag, "the user's data are passed on");
    check_node(node);
    if (ask) {
        n_asked++;
        last_asked = node;
        return is_wanted(node);
    }
    n_computed++;
    CHECK(node == last_asked && is_wanted(node), "the user is called back for what they asked for, and nothing else");
    return node != stop_at;
}

static bool wants_abort;
static unsigned n_abort_calls;

static bool abort_callback(void *data) {
    CHECK(data == &tag, "the user's data are passed on");
    n_abort_calls++;
    return wants_abort;
}

static void begin(gp_abort_callback abort) {
    model_make(&m, (model_shape) { .n_slots = 9, .n_used = 3 });
    weights_map(&w, &m);
    pager = model_open(&m);
    CHECK(gp_tap_open(&tap, &graph_ggml, 64, BATCH_BYTES, ROW_BYTES, eval, &tag, abort, abort ? &tag : NULL) == 0, "a tap opens");
    CHECK(gp_tap_attach(tap, pager) == 0, "a tap is attached");
    stop_at = NULL;
}

static void end(void) {
    gp_tap_close(tap);
    model_check_invariants(pager);
    gp_pager_close(pager);
    model_end(&m);
}

/* Each slice's nodes have parameters of their own. */
static void build(void) {
    g.steps = STEPS_GLU;
    graph_build(&g, &w, 2, TOP_K_VIEW);
    for (uint32_t s = 0; s < m.shape.n_slices; s++) {
        for (uint32_t i = 0; i < sizeof params[s] / sizeof params[s][0]; i++) {
            params[s][i] = (int32_t) fake_random(1000) - 500;
        }
        for (uint32_t l = 0; l < m.shape.n_layers; l++) {
            memcpy(g.layers[l].matmuls[s].op_params, params[s], sizeof params[s]);
        }
    }
}

static void run(interest i, unsigned n_wanted) {
    wanted = i;
    n_asked = n_computed = 0;
    graph_route(&g);
    CHECK(graph_run(&g, tap) == 0 && g.n_ours == 9, "every node is served, whatever the user looks at");
    CHECK(n_asked == g.n_nodes, "the user is asked about every node once");
    CHECK(n_computed == n_wanted, "and called back after each that they want");
    gp_counters counters[MODEL_LAYERS];
    gp_pager_counters(pager, counters);
    CHECK(counters[0].left_alone == 0, "no node is left alone");
}

static void sees_what_llama_cpp_made(void) {
    begin(NULL);
    for (int i = 0; i < 8; i++) {
        if (i % 4 != 3) {       /* built anew, or used again */
            build();
        }
        run(NOTHING, 0);
        CHECK(i == 0 || g.n_whole == 3, "all are computed as a whole while nobody looks");
        run(EVERY_NODE, g.n_nodes);
        CHECK(g.n_whole == 0, "and one by one while somebody does");
        run(ACTIVATIONS, 3);
        run(NOTHING, 0);
        run(MATMULS, 9);
        run(DOWN_OF_LAYER_1, 1);
    }
    gp_counters counters[MODEL_LAYERS];
    gp_pager_counters(pager, counters);
    CHECK(counters[0].visits == 8 * 6 && counters[0].tokens == 8 * 6 * 2, "a layer cut into pieces is one visit");
    end();
}

static void may_end_the_graph(void) {
    begin(NULL);
    build();
    wanted = EVERY_NODE;
    graph_route(&g);
    stop_at = &g.layers[1].matmuls[0];
    n_computed = 0;
    CHECK(graph_run(&g, tap) == 0 && g.n_ours < 9, "false from the user ends the graph, as without us");
    stop_at = NULL;
    run(EVERY_NODE, g.n_nodes);
    end();
}

static void may_abort(void) {
    begin(abort_callback);
    build();
    wants_abort = false;
    n_abort_calls = 0;
    run(NOTHING, 0);
    CHECK(n_abort_calls > 0, "the user's abort callback is called");
    wants_abort = true;
    graph_route(&g);
    CHECK(graph_run(&g, tap) == 2, "and obeyed");
    CHECK(gp_tap_take_failure(tap).error == 0, "an abort by the user is no failure of ours");
    gp_tap_chain_abort(tap, NULL, NULL);
    run(NOTHING, 0);
    gp_tap_chain_abort(tap, abort_callback, &tag);
    CHECK(gp_tap_abort(tap), "a callback can be set later");
    wants_abort = false;
    CHECK(!gp_tap_abort(tap), "and decides each time");
    end();
}

static void all(void) {
    sees_what_llama_cpp_made();
    may_end_the_graph();
    may_abort();
}

int main(void) {
    check_begin();
    graph_set_small_graphs(true, true);
    graph_set_kernels(KERNELS);
    all();
    return 0;
}
