/* Invariants
 *   1. A look-up remembers what its node was, and is forgotten when another needs its place. A node is touched only when
 *      llama.cpp asks about it: a graph's memory may be gone or be another graph's by the next time.
 *   2. Memory is handed out from the start of a piece of graph on, and taken back when the piece is computed.
 *   3. A failed look-up points at zeros.
 */
#include "graph/rows.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* A graph has one or two; the rest are those of graphs that are gone. */
enum { LOOK_UPS = 16, ALIGN = 64 };

/* A table as this context sees it. */
typedef struct {
    const ggml_tensor *original;    /* NULL: not seen yet */
    bool               is_foreign;  /* a tensor of that name is something else: leave it alone */
} table_tensor;

typedef struct {
    const ggml_tensor *node;
    bool               is_current;  /* served in this piece */
    ggml_tensor       *table, *ids;     /* its own src[0] and, where it has ids, src[1] */
    ggml_tensor        rows, places;    /* ours: the rows, and for each id its place among them */
} look_up;

struct gp_rows {
    const gp_ggml *ggml;
    gp_tables     *tables;
    gp_watch      *watch;
    table_tensor  *tensors;         /* one per table */
    uint32_t       n_tables;
    char          *memory, *start;  /* as malloc gave it; aligned */
    size_t         bytes, used_bytes;
    look_up        look_ups[LOOK_UPS];
    uint32_t       next;
};

/* ---- recognising ------------------------------------------------------------------------------------------------ */

static bool is_as_in_layout(const gp_rows *rows, const ggml_tensor *tensor, const gp_table_spec *spec) {
    return tensor->op == rows->ggml->op_none && tensor->type == spec->type && !tensor->view_src
        && tensor->ne[0] == spec->ne[0] && tensor->ne[1] == spec->ne[1] && tensor->ne[2] == 1 && tensor->ne[3] == 1
        && tensor->nb[1] == spec->row_bytes && tensor->buffer && rows->ggml->buffer_is_host(tensor->buffer);
}

/* The number of the table, or -1. */
static int32_t find_table(gp_rows *rows, const ggml_tensor *tensor) {
    for (uint32_t i = 0; i < rows->n_tables; i++) {
        table_tensor *t = &rows->tensors[i];
        const gp_table_spec *spec = gp_tables_spec(rows->tables, i);
        if (!t->original && strncmp(tensor->name, spec->name, GP_MAX_NAME) == 0) {
            t->original = tensor;
            t->is_foreign = !is_as_in_layout(rows, tensor, spec);
        }
        if (t->original == tensor) {
            return t->is_foreign ? -1 : (int32_t) i;
        }
    }
    return -1;
}

/* What llama.cpp adds to a graph for another kind of batch is asked about, but not computed. */
static bool is_to_be_computed(const gp_rows *rows, const ggml_tensor *node) {
    return !rows->ggml->flag_compute || (node->flags & rows->ggml->flag_compute);
}

static bool is_view(const gp_rows *rows, const ggml_tensor *node) {
    return node->op == rows->ggml->op_view || node->op == rows->ggml->op_reshape;
}

bool gp_rows_is_look_up(gp_rows *rows, const ggml_tensor *node) {
    const ggml_tensor *from = node->src[0];
    if (!from || is_view(rows, node) || !is_to_be_computed(rows, node)) {
        return false;
    }
    return find_table(rows, from->view_src ? from->view_src : from) >= 0;
}

static bool has_ids(const gp_rows *rows, const ggml_tensor *node) {
    return node->op == rows->ggml->op_get_rows;
}

static bool can_read_ids(const gp_rows *rows, const ggml_tensor *ids) {
    return ids && ids->type == rows->ggml->type_i32 && ids->ne[1] == 1 && ids->ne[2] == 1 && ids->ne[3] == 1
        && ids->buffer && rows->ggml->buffer_is_host(ids->buffer);
}

/* Vision input, which has no tokens, takes the first row for each of its own. */
static bool is_one_row(const ggml_tensor *view, const gp_table_spec *spec) {
    return view->view_src && view->ne[0] == spec->ne[0] && view->ne[1] == 1 && view->ne[2] == 1 && view->ne[3] == 1
        && view->view_offs % spec->row_bytes == 0 && view->view_offs / spec->row_bytes < (uint64_t) spec->ne[1];
}

/* ---- memory ------------------------------------------------------------------------------------------------------ */

static void *take(gp_rows *rows, size_t bytes) {
    const size_t at = (rows->used_bytes + ALIGN - 1) / ALIGN * ALIGN;
    if (at > rows->bytes || bytes > rows->bytes - at) {
        return NULL;
    }
    rows->used_bytes = at + bytes;
    return rows->start + at;
}

void gp_rows_release(gp_rows *rows) {
    rows->used_bytes = 0;
    for (uint32_t i = 0; i < LOOK_UPS; i++) {
        rows->look_ups[i].is_current = false;
    }
}

/* NULL: all are needed by nodes that are still to be computed. */
static look_up *find_place(gp_rows *rows, const ggml_tensor *node) {
    for (uint32_t i = 0; i < LOOK_UPS; i++) {
        if (rows->look_ups[i].node == node) {
            return &rows->look_ups[i];
        }
    }
    look_up *l = &rows->look_ups[rows->next++ % LOOK_UPS];
    return l->is_current ? NULL : l;
}

/* ---- serving ----------------------------------------------------------------------------------------------------- */

static int compare(const void *a, const void *b) {
    const int32_t x = *(const int32_t *) a, y = *(const int32_t *) b;
    return (x > y) - (x < y);
}

/* Ascending and distinct: a row is read once, and in the order in which it lies on the disk. */
static uint32_t sort_out(int32_t *ids, uint32_t n) {
    uint32_t n_distinct = 0;
    qsort(ids, n, sizeof *ids, compare);
    for (uint32_t i = 0; i < n; i++) {
        if (i == 0 || ids[i] != ids[n_distinct - 1]) {
            ids[n_distinct++] = ids[i];
        }
    }
    return n_distinct;
}

static int32_t id_at(const ggml_tensor *ids, int64_t i) {
    return *(const int32_t *) ((const char *) ids->data + (size_t) i * ids->nb[0]);
}

/* Which rows the node wants, in memory that is taken. NULL: it is none that can be served. */
static int32_t *collect(gp_rows *rows, const ggml_tensor *node, const gp_table_spec *spec, int32_t **places, uint32_t *n_rows) {
    const ggml_tensor *ids = node->src[1];
    const int64_t n = has_ids(rows, node) ? ids->ne[0] : 1;
    int32_t *wanted = n > 0 && n <= INT32_MAX ? take(rows, (size_t) n * sizeof *wanted) : NULL;
    *places = wanted ? take(rows, (size_t) n * sizeof **places) : NULL;
    if (!*places) {
        return NULL;
    }
    if (!has_ids(rows, node)) {
        wanted[0] = (int32_t) (node->src[0]->view_offs / spec->row_bytes);
        *n_rows = 1;
        return wanted;
    }
    for (int64_t i = 0; i < n; i++) {
        wanted[i] = id_at(ids, i);
        if (wanted[i] < 0 || wanted[i] >= spec->ne[1]) {
            return NULL;
        }
    }
    *n_rows = sort_out(wanted, (uint32_t) n);
    for (int64_t i = 0; i < n; i++) {
        const int32_t id = id_at(ids, i);
        const int32_t *found = bsearch(&id, wanted, *n_rows, sizeof *wanted, compare);
        (*places)[i] = (int32_t) (found - wanted);
    }
    return wanted;
}

/* A tensor of ours that looks as the other does. */
static void describe(const gp_rows *rows, ggml_tensor *ours, const ggml_tensor *other, void *data) {
    *ours = *other;
    ours->op = rows->ggml->op_none;
    memset(ours->src, 0, sizeof ours->src);
    ours->view_src = NULL;
    ours->view_offs = 0;
    ours->data = data;
}

static void point_at_rows(gp_rows *rows, look_up *l, ggml_tensor *node, uint32_t n_rows, char *data, int32_t *places) {
    l->node = node;
    l->is_current = true;
    l->table = node->src[0];
    describe(rows, &l->rows, l->table, data);
    l->rows.ne[1] = n_rows;
    l->rows.nb[2] = l->rows.nb[3] = n_rows * l->rows.nb[1];
    node->src[0] = &l->rows;
    if (has_ids(rows, node)) {
        l->ids = node->src[1];
        describe(rows, &l->places, l->ids, places);
        l->places.nb[0] = sizeof *places;
        l->places.nb[1] = l->places.nb[2] = l->places.nb[3] = (size_t) l->places.ne[0] * sizeof *places;
        node->src[1] = &l->places;
    }
}

static bool bring_in(gp_rows *rows, ggml_tensor *node, bool are_known, gp_failure *failure) {
    const ggml_tensor *from = node->src[0];
    const int32_t table = find_table(rows, from->view_src ? from->view_src : from);
    const gp_table_spec *spec = gp_tables_spec(rows->tables, (uint32_t) table);
    if (has_ids(rows, node) ? from->view_src || !are_known || !can_read_ids(rows, node->src[1]) : !is_one_row(from, spec)) {
        return false;
    }
    look_up *l = find_place(rows, node);
    const size_t used_bytes = rows->used_bytes;
    int32_t *places;
    uint32_t n_rows = 0;
    const int32_t *wanted = l ? collect(rows, node, spec, &places, &n_rows) : NULL;
    char *data = wanted ? take(rows, n_rows * spec->row_bytes) : NULL;
    if (!data) {
        rows->used_bytes = used_bytes;
        return false;
    }
    gp_failure happened;
    if (failure->error != 0) {
        memset(data, 0, n_rows * spec->row_bytes);
    } else if (gp_tables_read(rows->tables, (uint32_t) table, wanted, n_rows, data, rows->watch, &happened) != 0) {
        memset(data, 0, n_rows * spec->row_bytes);
        *failure = happened;
    }
    point_at_rows(rows, l, node, n_rows, data, places);
    return true;
}

void gp_rows_serve(gp_rows *rows, ggml_tensor *node, bool are_known, gp_failure *failure) {
    const bool is_empty = has_ids(rows, node) && node->src[1]->ne[0] == 0;
    if (!is_empty && !bring_in(rows, node, are_known, failure)) {
        gp_tables_count_left_alone(rows->tables);
    }
}

int gp_rows_undo(const gp_rows *rows, ggml_tensor *node) {
    const uintptr_t from_first = (uintptr_t) node->src[0] - (uintptr_t) rows->look_ups;
    if (from_first >= sizeof rows->look_ups) {
        return 0;
    }
    const look_up *l = &rows->look_ups[from_first / sizeof *l];
    if (l->node != node || node->src[0] != &l->rows) {
        node->op = rows->ggml->op_none;     /* what it points at has another node's shape: it must not be computed */
        return -ENOTRECOVERABLE;
    }
    node->src[0] = l->table;
    if (has_ids(rows, node)) {
        node->src[1] = l->ids;
    }
    return 0;
}

/* ---- opening and closing ----------------------------------------------------------------------------------------- */

int gp_rows_open(gp_rows **out, const gp_ggml *ggml, size_t row_bytes) {
    *out = NULL;
    gp_rows *rows = calloc(1, sizeof *rows);
    char *memory = malloc(row_bytes + ALIGN);
    if (!rows || !memory) {
        free(memory);
        free(rows);
        return -ENOMEM;
    }
    memset(memory, 0, row_bytes + ALIGN);
    rows->ggml = ggml;
    rows->memory = memory;
    rows->start = memory + (ALIGN - (uintptr_t) memory % ALIGN) % ALIGN;
    rows->bytes = row_bytes;
    *out = rows;
    return 0;
}

int gp_rows_attach(gp_rows *rows, gp_tables *tables, gp_watch *watch) {
    rows->watch = watch;
    uint32_t n = 0;
    while (gp_tables_spec(tables, n)) {
        n++;
    }
    free(rows->tensors);
    rows->n_tables = 0;
    rows->tensors = calloc(n + 1, sizeof *rows->tensors);
    if (!rows->tensors) {
        return -ENOMEM;
    }
    rows->tables = tables;
    rows->n_tables = n;
    return 0;
}

void gp_rows_close(gp_rows *rows) {
    if (!rows) {
        return;
    }
    free(rows->tensors);
    free(rows->memory);
    free(rows);
}
