/* A node that looks up rows of a table is computed with the bytes that we have read, and with those of the rows it wants,
 * whatever its ids; what cannot be served is left as it is; a read that fails ends the graph. */
#include <errno.h>
#include <string.h>

#include "check.h"
#include "fake_os.h"
#include "graph.h"

enum { IDS = 24, N_LOOK_UPS = 3, MAX_ROW_BYTES = 256 };

/* Where the ids of a look-up come from. */
typedef enum { INPUT, CAST, UNKNOWN_VIEW, FIRST_ROW } source;

typedef struct {
    source      from;
    uint32_t    table;
    bool        is_unwanted;        /* of another kind of batch: in the graph, but not computed */
    ggml_tensor row_view, ranking, ids, node;
    ggml_tensor *table_tensor, *ids_tensor;     /* what the node has as sources when it is built */
    int32_t     ids_data[2 * IDS], wanted[IDS];
    uint32_t    n_ids;
    uint8_t     result[IDS][MAX_ROW_BYTES];
} look_up;

static model m;
static weights w;
static graph g;
static gp_pager *pager;
static gp_tap *tap;
static ggml_tensor tables[MODEL_TABLES];
static look_up look_ups[N_LOOK_UPS];
static uint32_t n_look_ups, n_served, n_from_mapping;
static ggml_tensor *nodes[GRAPH_NODES];

static void set_ids(ggml_tensor *ids, int32_t *data, size_t stride, uint32_t n) {
    *ids = (ggml_tensor) { .type = TYPE_I32, .op = OP_NONE, .buffer = &graph_host_buffer, .data = data,
                           .ne = { n, 1, 1, 1 }, .nb = { stride, n * stride, n * stride, n * stride } };
}

static void map_tables(void) {
    for (uint32_t t = 0; t < m.shape.n_tables; t++) {
        const gp_table_spec *spec = &m.tables[t];
        const size_t bytes = spec->row_bytes, all = bytes * (size_t) spec->ne[1];
        tables[t] = (ggml_tensor) { .type = spec->type, .op = OP_NONE, .buffer = &graph_host_buffer,
                                    .ne = { spec->ne[0], spec->ne[1], 1, 1 }, .nb = { 1, bytes, all, all },
                                    .data = m.files[spec->file] + spec->offset_bytes };
        strcpy(tables[t].name, spec->name);
    }
}

static void begin(model_shape shape, size_t row_bytes) {
    shape.n_tables = MODEL_TABLES;
    model_make(&m, shape);
    weights_map(&w, &m);
    map_tables();
    pager = model_open(&m);
    CHECK(gp_tap_open(&tap, &graph_ggml, 64, 0, row_bytes, NULL, NULL, NULL, NULL) == 0, "a tap opens");
    CHECK(gp_tap_attach(tap, pager) == 0, "a tap is attached");
    memset(look_ups, 0, sizeof look_ups);
    n_look_ups = 0;
}

static void end(void) {
    gp_tap_close(tap);
    model_check_invariants(pager);
    gp_pager_close(pager);
    model_end(&m);
}

static gp_row_counters counted(void) {
    gp_row_counters counters;
    gp_pager_row_counters(pager, &counters);
    return counters;
}

static look_up *add(source from, uint32_t table, uint32_t n_ids) {
    look_up *l = &look_ups[n_look_ups++];
    *l = (look_up) { .from = from, .table = table, .n_ids = n_ids };
    return l;
}

/* As llama.cpp builds a graph: nodes at the same addresses, with nothing of the last one in them. */
static void build(void) {
    uint32_t n = 0;
    for (look_up *l = look_ups; l < look_ups + n_look_ups; l++) {
        const size_t stride = (l->from == CAST ? 2 : 1) * sizeof *l->ids_data;
        set_ids(&l->ids, l->ids_data, stride, l->n_ids);
        l->table_tensor = &tables[l->table];
        l->ids_tensor = &l->ids;
        if (l->from == CAST) {
            l->ids.op = OP_CAST;
            nodes[n++] = &l->ids;
        } else if (l->from == UNKNOWN_VIEW) {       /* of a ranking, which is not stopped at */
            set_ids(&l->ranking, l->ids_data, stride, l->n_ids);
            l->ranking.op = OP_ARGSORT;
            nodes[n++] = &l->ranking;
            l->ids.op = OP_VIEW;
            l->ids.view_src = &l->ranking;
            nodes[n++] = &l->ids;
        } else if (l->from == FIRST_ROW) {
            l->row_view = tables[l->table];
            l->row_view.op = OP_VIEW;
            l->row_view.ne[1] = 1;
            l->row_view.view_src = l->row_view.src[0] = &tables[l->table];
            nodes[n++] = &l->row_view;
            l->table_tensor = &l->row_view;
            l->ids_tensor = &l->node;               /* a copy is its own second source */
        }
        l->node = (ggml_tensor) { .type = TYPE_F32, .op = l->from == FIRST_ROW ? OP_OTHER : OP_GET_ROWS,
                                  .flags = l->is_unwanted ? 0 : FLAG_COMPUTE, .buffer = &graph_host_buffer,
                                  .ne = { tables[l->table].ne[0], l->n_ids, 1, 1 }, .data = l->result };
        l->node.src[0] = l->table_tensor;
        l->node.src[1] = l->ids_tensor;
        nodes[n++] = &l->node;
    }
    g.before = nodes;
    g.n_before = n;
    graph_build(&g, &w, 2, TOP_K_VIEW);
}

static int32_t draw_row(const look_up *l) {
    return (int32_t) fake_random((uint32_t) m.tables[l->table].ne[1]);
}

/* What the next batch looks up; some rows twice. Computed ids are not there before their node is. */
static void draw(void) {
    for (look_up *l = look_ups; l < look_ups + n_look_ups; l++) {
        for (uint32_t i = 0; i < l->n_ids; i++) {
            l->wanted[i] = l->from == FIRST_ROW ? 0 : i % 3 == 2 ? l->wanted[i / 2] : draw_row(l);
        }
        if (l->from == INPUT && !l->is_unwanted) {
            memcpy(l->ids_data, l->wanted, sizeof l->wanted);
        }
        memset(l->result, 0xee, sizeof l->result);
    }
    graph_route(&g);
}

static bool is_in_mapping(const look_up *l, const void *data) {
    const uint8_t *table = tables[l->table].data;
    return (const uint8_t *) data >= table && (const uint8_t *) data < table + tables[l->table].nb[2];
}

static void compute(ggml_tensor *node, bool is_void) {
    for (look_up *l = look_ups; l < look_ups + n_look_ups; l++) {
        if (node == &l->ids || node == &l->ranking) {
            for (uint32_t i = 0; i < l->n_ids; i++) {
                l->ids_data[i * (l->from == CAST ? 2 : 1)] = l->wanted[i];
            }
        }
        if (node != &l->node || l->is_unwanted || node->op == OP_NONE) {
            continue;
        }
        const ggml_tensor *rows = node->src[0], *ids = node->src[1];
        const bool is_mapping = is_in_mapping(l, rows->data);
        CHECK(is_mapping == (rows == l->table_tensor), "rows that are not the table's own are not in the mapping");
        CHECK(!is_void || !is_mapping, "after a failure the mapping is not touched");
        for (uint32_t i = 0; i < l->n_ids; i++) {
            const int32_t id = l->from == FIRST_ROW ? 0
                : *(const int32_t *) ((const char *) ids->data + i * ids->nb[0]);
            CHECK(id >= 0 && id < rows->ne[1] && rows->ne[0] == tables[l->table].ne[0], "an id lies within the rows");
            memcpy(l->result[i], (const char *) rows->data + (size_t) id * rows->nb[1], (size_t) rows->ne[0]);
            static const uint8_t zeros[MAX_ROW_BYTES];
            CHECK(memcmp(l->result[i], model_row(&m, l->table, l->wanted[i]), (size_t) rows->ne[0]) == 0
                  || (is_void && memcmp(l->result[i], zeros, (size_t) rows->ne[0]) == 0),
                  "a look-up finds the row it wants, or zeros after a failure");
        }
        n_served += !is_mapping;
        n_from_mapping += is_mapping;
    }
}

/* Decodes once; returns what llama_decode does. */
static int run(void) {
    n_served = n_from_mapping = 0;
    g.compute_before = compute;
    return graph_run(&g, tap);
}

static void serves(uint32_t n) {
    draw();
    CHECK(run() == 0 && n_served == n && n_from_mapping == 0, "every look-up is served");
    gp_tap_idle(tap);
}

static uint32_t count_distinct(const look_up *l) {
    uint32_t n = 0;
    for (uint32_t i = 0; i < l->n_ids; i++) {
        uint32_t first = 0;
        while (l->wanted[first] != l->wanted[i]) {
            first++;
        }
        n += first == i;
    }
    return n;
}

static void each_row_is_read_once(void) {
    begin((model_shape) { .n_files = 2, .n_mirrors = 1 }, ROW_BYTES);
    const look_up *l = add(INPUT, 1, IDS);
    build();
    serves(1);
    const uint32_t n = count_distinct(l);
    CHECK(n < IDS && fake_expected() == n, "the system is told of every row that will be read, and of each once");
    CHECK(counted().rows_read == n && counted().bytes_read == n * m.tables[1].row_bytes, "and each is counted once");
    look_ups[0].n_ids = 1;
    build();
    serves(1);
    CHECK(fake_expected() == n && counted().rows_read == n + 1, "a single row is just read");
    CHECK(counted().left_alone == 0, "nothing is left to llama.cpp");
    end();
}

static void every_source_of_ids(void) {
    for (int i = 0; i < 40; i++) {
        begin((model_shape) { .n_files = 1 + fake_random(2) }, ROW_BYTES);
        fake_set_weather((fake_weather) { .short_one_in = 3, .interrupted_one_in = 5 });
        add(INPUT, fake_random(2), 1 + fake_random(IDS));
        add(CAST, fake_random(2), 1 + fake_random(IDS));
        add(FIRST_ROW, fake_random(2), 1);
        for (int round = 0; round < 6; round++) {
            if (round % 3 == 0) {       /* built anew, or used again */
                build();
            }
            serves(3);
        }
        CHECK(counted().left_alone == 0, "nothing is left to llama.cpp");
        end();
    }
}

static void is_left_alone(uint32_t n_others) {
    const uint64_t before = counted().left_alone;
    draw();
    CHECK(run() == 0 && n_served == n_others && n_from_mapping == 1, "what cannot be served is computed from the mapping");
    gp_tap_idle(tap);
    CHECK(counted().left_alone == before + 1, "and counted");
}

static void what_cannot_be_served(void) {
    begin((model_shape) { 0 }, ROW_BYTES);
    add(INPUT, 0, 3);
    add(UNKNOWN_VIEW, 1, 3);
    build();
    is_left_alone(1);       /* ids that are not known to be there */
    look_ups[1].from = INPUT;
    build();
    look_ups[1].ids.buffer = &graph_device_buffer;
    is_left_alone(1);       /* ids that lie elsewhere */
    build();
    look_ups[1].ids.ne[1] = 2;
    is_left_alone(1);
    look_ups[1].from = FIRST_ROW;
    look_ups[1].n_ids = 1;
    build();
    look_ups[1].row_view.view_offs = 5;
    look_ups[1].row_view.data = m.files[0] + m.tables[1].offset_bytes;
    is_left_alone(1);       /* no whole row */
    end();

    begin((model_shape) { 0 }, ROW_BYTES);
    tables[0].nb[1]++;      /* not as the layout says */
    add(INPUT, 0, 1);
    build();
    draw();
    look_ups[0].ids_data[0] = look_ups[0].wanted[0] = 0;
    CHECK(run() == 0 && n_from_mapping == 1 && counted().rows_read == 0, "another tensor of that name is not ours");
    end();
}

/* A batch of embeddings instead of tokens: the tokens' node is in the graph, its ids are what was there before. */
static void unwanted_node_costs_nothing(void) {
    begin((model_shape) { 0 }, ROW_BYTES);
    look_up *l = add(INPUT, 0, 4);
    l->is_unwanted = true;
    build();
    memset(l->ids_data, 0x7f, sizeof l->ids_data);
    draw();
    CHECK(run() == 0 && l->node.src[0] == &tables[0], "what is not computed is not served");
    l->ids_data[0] = 1;
    CHECK(run() == 0 && counted().rows_read == 0 && counted().left_alone == 0, "nor read, nor counted");
    l->n_ids = 0;
    l->is_unwanted = false;
    build();
    CHECK(run() == 0 && counted().rows_read == 0 && counted().left_alone == 0, "nor is a look-up of nothing");
    end();
}

static void memory_is_what_was_said(void) {
    begin((model_shape) { 0 }, 2 * 64 + 6 * 96 + 64);      /* rows.c: ids, places, and six rows of table 0 */
    look_up *l = add(INPUT, 0, 6);
    build();
    for (int i = 0; i < 4; i++) {
        draw();
        for (int32_t row = 0; row < 6; row++) {
            l->ids_data[row] = l->wanted[row] = 9 * row;
        }
        CHECK(run() == 0 && n_served == 1, "a batch that fits is served, however often");
    }
    l->n_ids = 7;
    build();
    draw();
    for (int32_t row = 0; row < 7; row++) {
        l->ids_data[row] = l->wanted[row] = 7 * row;
    }
    CHECK(run() == 0 && n_from_mapping == 1 && counted().left_alone == 1, "one that does not is left alone");
    add(INPUT, 0, 6);
    build();
    draw();
    for (int32_t row = 0; row < 7; row++) {
        l->ids_data[row] = l->wanted[row] = look_ups[1].ids_data[row] = look_ups[1].wanted[row] = 7 * row;
    }
    CHECK(run() == 0 && n_from_mapping == 1 && n_served == 1, "and takes no memory from the next");
    end();
}

static void failure_is(int error, uint32_t table, int32_t row) {
    gp_tap_idle(tap);
    const gp_failure failure = gp_tap_take_failure(tap);
    const gp_table_spec *spec = &m.tables[table];
    CHECK(failure.error == error && failure.file == spec->file, "the failure says what happened in which file");
    const uint64_t at = spec->offset_bytes + (uint64_t) row * spec->row_bytes;
    CHECK(failure.offset_bytes >= at && failure.offset_bytes < at + spec->row_bytes, "and where");
}

static void bad_row_aborts(void) {
    begin((model_shape) { .n_files = 2 }, ROW_BYTES);
    add(INPUT, 1, 5);
    add(INPUT, 0, 2);
    build();
    serves(2);
    for (int is_built_anew = 0; is_built_anew < 2; is_built_anew++) {
        if (is_built_anew) {
            build();
        }
        draw();
        const int32_t bad = look_ups[0].wanted[3];
        const uint64_t rows_read = counted().rows_read;
        fake_fail_at(m.paths[1], m.tables[1].offset_bytes + (uint64_t) bad * m.tables[1].row_bytes + 7, -EIO);
        CHECK(run() == 2, "a row that cannot be read ends the graph");
        CHECK(counted().rows_read == rows_read, "and does not count");
        CHECK(look_ups[1].node.src[0] != &tables[0], "after a failure no other look-up is left at the mapping");
        failure_is(-EIO, 1, bad);
        CHECK(run() == 2, "the next try reads again");
        failure_is(-EIO, 1, bad);
        fake_fail_at(m.paths[1], 0, 0);
        CHECK(run() == 0 && n_served == 2, "once the file is well, so is the graph");
        gp_tap_idle(tap);
    }
    end();
}

static void cut_or_changed_file_aborts(void) {
    begin((model_shape) { 0 }, ROW_BYTES);
    add(INPUT, 1, 3);
    build();
    serves(1);
    draw();
    fake_file_touch(m.paths[0]);
    CHECK(run() == 2, "a file that changed ends the graph");
    gp_tap_idle(tap);
    CHECK(gp_tap_take_failure(tap).error == -ESTALE, "and the failure says so");
    end();

    begin((model_shape) { .n_files = 2, .n_mirrors = 1 }, ROW_BYTES);
    add(INPUT, 0, 3);
    build();
    fake_file_truncate(m.paths[0], m.tables[0].offset_bytes + 40);
    draw();
    CHECK(run() == 2, "so does one that was cut");
    gp_tap_idle(tap);
    CHECK(gp_tap_take_failure(tap).error == -ESTALE, "a change explains the missing bytes");
    end();
}

/* More graphs than are remembered: the first one still has our tensors, and nobody knows its own. */
static void graph_that_was_forgotten(void) {
    enum { MORE = 40 };
    begin((model_shape) { 0 }, ROW_BYTES);
    look_up *l = add(INPUT, 0, 2);
    build();
    serves(1);
    ggml_tensor others[MORE];
    for (int i = 0; i < MORE; i++) {
        others[i] = l->node;
        others[i].src[0] = &tables[0];
        others[i].src[1] = &l->ids;
        CHECK(!gp_tap_eval(&others[i], true, tap), "a look-up ends no piece of graph");
        gp_tap_idle(tap);
    }
    draw();
    for (int again = 0; again < 2; again++) {
        CHECK(run() == 2 && n_served + n_from_mapping == 0, "a forgotten look-up ends the graph, and is not computed");
        gp_tap_idle(tap);
        CHECK(gp_tap_take_failure(tap).error == -ENOTRECOVERABLE, "and the failure says that it cannot be used again");
    }
    build();
    serves(1);
    end();
}

static unsigned n_asked, n_computed;

static bool eval(void *tensor, bool ask, void *data) {
    (void) data;
    const ggml_tensor *node = tensor;
    for (const look_up *l = look_ups; l < look_ups + n_look_ups; l++) {
        if (node == &l->node) {
            CHECK(node->src[0] == l->table_tensor && node->src[1] == l->ids_tensor, "the user sees llama.cpp's tensors");
            n_asked += ask;
            n_computed += !ask;
            return true;
        }
    }
    return !ask;
}

static void user_sees_what_llama_cpp_made(void) {
    begin((model_shape) { 0 }, ROW_BYTES);
    gp_tap_close(tap);
    CHECK(gp_tap_open(&tap, &graph_ggml, 64, 0, ROW_BYTES, eval, NULL, NULL, NULL) == 0, "a tap opens");
    CHECK(gp_tap_attach(tap, pager) == 0, "a tap is attached");
    add(INPUT, 0, 4);
    add(FIRST_ROW, 1, 1);
    build();
    for (int i = 0; i < 4; i++) {
        serves(2);
    }
    CHECK(n_asked == 8 && n_computed == 8, "and is called for each");
    end();
}

/* A piece of graph that holds more look-ups than are remembered: none of those that wait is forgotten. */
static void many_in_one_piece(void) {
    enum { MORE = 40 };
    begin((model_shape) { 0 }, 64 << 10);
    look_up *l = add(INPUT, 0, 1);
    build();
    draw();
    ggml_tensor others[MORE];
    int32_t ids_data[MORE];
    ggml_tensor ids[MORE];
    for (int i = 0; i < MORE; i++) {
        ids_data[i] = i;
        set_ids(&ids[i], &ids_data[i], sizeof ids_data[i], 1);
        others[i] = l->node;
        others[i].src[1] = &ids[i];
        (void) gp_tap_eval(&others[i], true, tap);
    }
    for (int i = 0; i < MORE; i++) {
        const ggml_tensor *rows = others[i].src[0];
        const int32_t id = *(const int32_t *) others[i].src[1]->data;
        CHECK(memcmp((const char *) rows->data + (size_t) id * rows->nb[1], model_row(&m, 0, i), 96) == 0,
              "every node of a piece still has its row");
    }
    CHECK(counted().left_alone > 0 && counted().rows_read + counted().left_alone == MORE, "or was left alone");
    end();
}

int main(void) {
    check_begin();
    each_row_is_read_once();
    every_source_of_ids();
    what_cannot_be_served();
    unwanted_node_costs_nothing();
    memory_is_what_was_said();
    bad_row_aborts();
    cut_or_changed_file_aborts();
    graph_that_was_forgotten();
    user_sees_what_llama_cpp_made();
    many_in_one_piece();
    return 0;
}
