/* Invariants
 *   1. Nothing of the graph's is written before its time: llama.cpp may have lent a later node's memory to somebody else
 *      until then. Only the node at hand is written; all else goes to rows of our own, and each later node copies its
 *      rows when its time comes. The nodes between the matrices are computed by ggml once more, as they stand.
 *   2. What lies between the matrices ggml computes here, too: graphs of copies of those nodes, one row high, one graph per
 *      rank. Only operations are admitted whose rows depend on the same rows of their sources and on nothing else.
 *   3. A shape is trusted once the last node's result, computed by the graph's own nodes, was the one found here, bit by bit.
 *   4. Whoever completes the first matrices of a rank computes what comes between, and only then is the rank ready. Nobody
 *      sleeps while a rank is about to become ready; who sleeps is woken by the next slice that arrives.
 *   5. All nodes lie in one piece of graph. If one was computed before the last was asked about, they do not.
 */
#include "ffn.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

enum { SOURCES = 3, SHAPES = 16, SPINS = 1000, LINE_BYTES = 64, GRAPH_NODES = 32 };

typedef enum { NOWHERE, FIRST, STEP, WEIGHTS, IDS } origin;

/* What a step takes in. */
typedef struct {
    origin   from;
    uint32_t index;         /* of the first matrix or step */
    size_t   offset_bytes;  /* within its rows */
    int64_t  width;
} source;

/* A node between the first matrices and the last. */
typedef struct {
    int32_t op;
    int32_t op_params[GGML_OP_PARAMS_BYTES / sizeof(int32_t)];
    int64_t width;
    source  sources[SOURCES];
} step;

/* What the bits depend on, beside the kinds of the products. Compared as bytes: made from zeros. */
typedef struct {
    uint32_t n_ranks, n_first, n_steps;
    int64_t  first_widths[FFN_FIRST], last_width;
    step     steps[FFN_STEPS];
} shape;

typedef enum { UNTRIED, SAME, OTHER } verdict;

typedef struct {
    shape   shape;
    verdict is_same;
} tried_shape;

/* How far one rank is. All threads look at it, so none shares a line with the next. */
typedef struct {
    atomic_uint next_first[FFN_FIRST], first_done, next_last;
    atomic_bool is_ready;       /* for the last matrix */
    char        apart[LINE_BYTES];
} progress;

/* The steps of one rank, as a graph of ggml's. */
typedef struct {
    void       *backend, *graph;
    ggml_tensor steps[FFN_STEPS];
    ggml_tensor sources[FFN_STEPS][SOURCES];
} rank_graph;

/* What a node of llama.cpp's is given as its data. */
typedef struct {
    gp_ffn  *ffn;
    uint32_t results;           /* which of the rows are its own */
} part;

enum { LAST_ROWS = FFN_FIRST + FFN_STEPS, N_ROWS };

struct gp_ffn {
    const gp_ggml *ggml;
    uint32_t       most_ranks;
    int64_t        most_width;
    size_t         converted_bytes;
    void          *context;                 /* ggml's, with the graphs in it */
    rank_graph    *ranks;
    progress      *progress;
    float         *rows;                    /* N_ROWS times most_ranks times most_width */
    char          *converted;               /* what the last matrix is multiplied with, per rank */
    part           parts[FFN_FIRST + 1];    /* the first matrices', and the last one's */
    tried_shape    tried[SHAPES];
    uint32_t       n_tried;
    shape          built;                   /* what the graphs are made for */

    /* The feed-forward at hand; until it is taken, as far as it was offered. */
    bool           is_closed;               /* nothing more is taken in this piece */
    tried_shape   *kind;
    shape          shape;
    uint32_t       n_first_chunks;
    gp_product    *first[FFN_FIRST], *last;
    ggml_tensor   *first_nodes[FFN_FIRST], *last_node;
    ggml_tensor   *steps[FFN_STEPS];
    const ggml_tensor *ids;
    atomic_uint    next_copy[FFN_FIRST + 1];
    atomic_bool    has_failed;
};

static float *row_of(const gp_ffn *f, uint32_t rows, uint32_t rank) {
    return f->rows + ((size_t) rows * f->most_ranks + rank) * (size_t) f->most_width;
}

/* The first node is the one being computed. */
static float *first_row(const gp_ffn *f, uint32_t index, uint32_t rank) {
    const ggml_tensor *node = f->first_nodes[0];
    return index == 0 ? (float *) ((char *) node->data + rank * node->nb[1]) : row_of(f, index, rank);
}

static float *step_row(const gp_ffn *f, uint32_t index, uint32_t rank) {
    return row_of(f, FFN_FIRST + index, rank);
}

/* ---- recognising ------------------------------------------------------------------------------------------------ */

static bool is_row_by_row(const gp_ggml *ggml, int32_t op) {
    bool is_known = op == ggml->op_add_id;
    for (uint32_t i = 0; i < GP_ROW_OPS; i++) {
        is_known |= op == ggml->row_ops[i];
    }
    return is_known;
}

/* A row of floats per rank. */
static bool has_rows(const gp_ffn *f, const ggml_tensor *tensor) {
    return tensor->type == f->ggml->type_f32 && tensor->nb[0] == sizeof(float) && tensor->ne[0] <= f->most_width
        && tensor->ne[1] == f->shape.n_ranks && tensor->ne[2] == 1 && tensor->ne[3] == 1;
}

static int find(ggml_tensor *const *tensors, uint32_t n, const ggml_tensor *tensor) {
    for (uint32_t i = 0; i < n; i++) {
        if (tensors[i] == tensor) {
            return (int) i;
        }
    }
    return -1;
}

static bool trace(gp_ffn *f, ggml_tensor *tensor);

/* Rows of a first matrix or step, or a part of each. */
static bool trace_rows(gp_ffn *f, ggml_tensor *tensor, source *s) {
    ggml_tensor *base = tensor->view_src ? tensor->view_src : tensor;
    if (base != tensor && (tensor->op != f->ggml->op_view || tensor->nb[1] != base->nb[1])) {
        return false;
    }
    if (!has_rows(f, tensor) || !has_rows(f, base) || !trace(f, base)) {
        return false;
    }
    const int first = find(f->first_nodes, f->shape.n_first, base), at = find(f->steps, f->shape.n_steps, base);
    *s = (source) { .from = first >= 0 ? FIRST : STEP, .index = (uint32_t) (first >= 0 ? first : at),
                    .offset_bytes = base != tensor ? tensor->view_offs : 0, .width = tensor->ne[0] };
    return s->offset_bytes + (size_t) s->width * sizeof(float) <= (size_t) base->ne[0] * sizeof(float);
}

static bool trace_source(gp_ffn *f, const ggml_tensor *node, uint32_t index, source *s) {
    ggml_tensor *tensor = node->src[index];
    if (node->op != f->ggml->op_add_id || index == 0) {
        return trace_rows(f, tensor, s);
    }
    s->from = index == 1 ? WEIGHTS : IDS;
    return index == 1 ? tensor->op == f->ggml->op_none : tensor == f->ids;
}

/* Follows a result back to the first matrices. What lies between becomes steps, sources before those who use them. */
static bool trace(gp_ffn *f, ggml_tensor *tensor) {
    if (find(f->first_nodes, f->shape.n_first, tensor) >= 0 || find(f->steps, f->shape.n_steps, tensor) >= 0) {
        return true;
    }
    if (!is_row_by_row(f->ggml, tensor->op) || tensor->view_src || !has_rows(f, tensor)) {
        return false;
    }
    step s;
    memset(&s, 0, sizeof s);
    s.op = tensor->op;
    s.width = tensor->ne[0];
    memcpy(s.op_params, tensor->op_params, sizeof s.op_params);
    for (uint32_t i = 0; i < GGML_SOURCES; i++) {
        if (tensor->src[i] && (i >= SOURCES || !trace_source(f, tensor, i, &s.sources[i]))) {
            return false;
        }
    }
    if (f->shape.n_steps == FFN_STEPS) {
        return false;
    }
    memcpy(&f->shape.steps[f->shape.n_steps], &s, sizeof s);
    f->steps[f->shape.n_steps++] = tensor;
    return true;
}

static bool is_same_shape(const shape *a, const shape *b) {
    return memcmp(a, b, sizeof *a) == 0;
}

/* NULL: too many different ones. */
static tried_shape *find_shape(gp_ffn *f) {
    for (uint32_t i = 0; i < f->n_tried; i++) {
        if (is_same_shape(&f->tried[i].shape, &f->shape)) {
            return &f->tried[i];
        }
    }
    if (f->n_tried == SHAPES) {
        return NULL;
    }
    tried_shape *new = &f->tried[f->n_tried++];
    memcpy(&new->shape, &f->shape, sizeof f->shape);
    return new;
}

/* ---- the graphs of the ranks -------------------------------------------------------------------------------------- */

static void make_row(ggml_tensor *tensor, void *data) {
    tensor->ne[1] = 1;
    tensor->nb[1] = tensor->nb[2] = tensor->nb[3] = (size_t) tensor->ne[0] * sizeof(float);
    tensor->data = data;
    tensor->buffer = NULL;
}

/* A source of a step, as one rank sees it. */
static ggml_tensor *describe_source(gp_ffn *f, uint32_t rank, uint32_t at, uint32_t index) {
    const source *s = &f->shape.steps[at].sources[index];
    ggml_tensor *theirs = f->steps[at]->src[index], *ours = &f->ranks[rank].sources[at][index];
    if (s->from == NOWHERE) {
        return NULL;
    }
    if (s->from == WEIGHTS) {
        return theirs;
    }
    if (s->from == STEP && s->width == f->shape.steps[s->index].width) {
        return &f->ranks[rank].steps[s->index];
    }
    *ours = *theirs;
    ours->op = f->ggml->op_none;
    memset(ours->src, 0, sizeof ours->src);
    ours->view_src = NULL;
    ours->view_offs = 0;
    if (s->from == IDS) {
        ours->ne[0] = 1;
        ours->data = (char *) theirs->data + rank * theirs->nb[0];
    } else {
        float *row = s->from == FIRST ? first_row(f, s->index, rank) : step_row(f, s->index, rank);
        make_row(ours, (char *) row + s->offset_bytes);
    }
    return ours;
}

static void describe_rank(gp_ffn *f, uint32_t rank) {
    for (uint32_t at = 0; at < f->shape.n_steps; at++) {
        ggml_tensor *ours = &f->ranks[rank].steps[at];
        *ours = *f->steps[at];
        make_row(ours, step_row(f, at, rank));
        for (uint32_t i = 0; i < SOURCES; i++) {
            ours->src[i] = describe_source(f, rank, at, i);
        }
    }
}

/* A graph holds addresses of tensors, and these stay: it is made anew for another shape only. */
static void describe_ranks(gp_ffn *f) {
    for (uint32_t rank = 0; rank < f->shape.n_ranks; rank++) {
        describe_rank(f, rank);
    }
    if (is_same_shape(&f->built, &f->shape)) {
        return;
    }
    for (uint32_t rank = 0; rank < f->shape.n_ranks; rank++) {
        rank_graph *r = &f->ranks[rank];
        f->ggml->graphs.clear(r->graph);
        for (uint32_t at = 0; at < f->shape.n_steps; at++) {
            f->ggml->graphs.expand(r->graph, &r->steps[at]);
        }
    }
    memcpy(&f->built, &f->shape, sizeof f->shape);
}

/* ---- computing -------------------------------------------------------------------------------------------------- */

static bool has_slice(const gp_product *p, const ggml_tensor *node, uint32_t rank) {
    return gp_pager_has_slice(p->pager, p->layer, gp_product_slot(node, rank), p->slice);
}

static const float *last_input(const gp_ffn *f, uint32_t rank) {
    return f->shape.n_steps > 0 ? step_row(f, f->shape.n_steps - 1, rank) : first_row(f, 0, rank);
}

/* The first matrices of a rank are done. */
static void make_ready(gp_ffn *f, uint32_t rank) {
    const rank_graph *r = &f->ranks[rank];
    if (f->shape.n_steps > 0 && f->ggml->graphs.compute(r->backend, r->graph) != 0) {
        atomic_store(&f->has_failed, true);
    }
    const gp_kind *kind = f->last->kind;
    if (kind->from_float) {
        kind->from_float(last_input(f, rank), f->converted + rank * f->converted_bytes, kind->n_columns);
    }
    atomic_store_explicit(&f->progress[rank].is_ready, true, memory_order_release);
}

/* The next chunk of a matrix; n_chunks: there is none left. */
static uint32_t take(atomic_uint *next, uint32_t n_chunks) {
    if (atomic_load_explicit(next, memory_order_relaxed) >= n_chunks) {
        return n_chunks;
    }
    const uint32_t chunk = atomic_fetch_add_explicit(next, 1, memory_order_relaxed);
    return chunk < n_chunks ? chunk : n_chunks;
}

static bool compute_first(gp_ffn *f, uint32_t rank, uint32_t index) {
    const gp_product *p = f->first[index];
    const ggml_tensor *node = f->first_nodes[index];
    progress *at = &f->progress[rank];
    const uint32_t n_chunks = gp_product_chunks(p->kind);
    if (!has_slice(p, node, rank)) {
        return false;
    }
    const uint32_t chunk = take(&at->next_first[index], n_chunks);
    if (chunk == n_chunks) {
        return false;
    }
    const char *vector = gp_product_input(f->first[0], f->first_nodes[0], rank);
    gp_product_chunk(p->kind, node, rank, vector, first_row(f, index, rank), chunk);
    if (atomic_fetch_add_explicit(&at->first_done, 1, memory_order_acq_rel) + 1 == f->n_first_chunks) {
        make_ready(f, rank);
    }
    return true;
}

static bool compute_last(gp_ffn *f, uint32_t rank) {
    const gp_product *p = f->last;
    progress *at = &f->progress[rank];
    const uint32_t n_chunks = gp_product_chunks(p->kind);
    if (!atomic_load_explicit(&at->is_ready, memory_order_acquire) || !has_slice(p, f->last_node, rank)) {
        return false;
    }
    const uint32_t chunk = take(&at->next_last, n_chunks);
    if (chunk == n_chunks) {
        return false;
    }
    const char *vector = p->kind->from_float ? f->converted + rank * f->converted_bytes : (const char *) last_input(f, rank);
    gp_product_chunk(p->kind, f->last_node, rank, vector, row_of(f, LAST_ROWS, rank), chunk);
    return true;
}

static bool compute_some(gp_ffn *f, uint32_t rank) {
    bool is_any = compute_last(f, rank);
    for (uint32_t i = 0; !is_any && i < f->shape.n_first; i++) {
        is_any = compute_first(f, rank, i);
    }
    return is_any;
}

/* What there is to wait for: nothing, a slice that is still being read, another thread that is about to be done. */
typedef enum { NOTHING, A_SLICE, A_THREAD } obstacle;

static obstacle obstacle_of(const gp_ffn *f, uint32_t rank) {
    const progress *at = &f->progress[rank];
    if (atomic_load_explicit(&at->is_ready, memory_order_acquire)) {
        if (atomic_load_explicit(&at->next_last, memory_order_relaxed) >= gp_product_chunks(f->last->kind)) {
            return NOTHING;
        }
        return has_slice(f->last, f->last_node, rank) ? A_THREAD : A_SLICE;
    }
    for (uint32_t i = 0; i < f->shape.n_first; i++) {
        if (!has_slice(f->first[i], f->first_nodes[i], rank)) {
            return A_SLICE;
        }
    }
    return A_THREAD;
}

static obstacle next_obstacle(const gp_ffn *f) {
    obstacle most = NOTHING;
    for (uint32_t rank = 0; rank < f->shape.n_ranks; rank++) {
        const obstacle o = obstacle_of(f, rank);
        most = o > most ? o : most;
    }
    return most;
}

/* ggml_custom_op_t of the first node: all of the feed-forward. */
static void compute_all(ggml_tensor *node, int ith, int nth, void *data) {
    (void) nth;
    gp_ffn *f = ((const part *) data)->ffn;
    gp_product *p = f->first[0];
    gp_product_convert(p, node->src[1]);
    for (uint32_t n_idle = 0;;) {
        const unsigned n_arrived = gp_hold_n_arrived(p->hold);      /* before looking what is there */
        bool is_any = false;
        for (uint32_t i = 0; i < f->shape.n_ranks; i++) {
            while (compute_some(f, p->order[i])) {
                is_any = true;
            }
        }
        n_idle = is_any ? 0 : n_idle + 1;
        const obstacle next = is_any ? A_THREAD : next_obstacle(f);
        if (next == NOTHING) {
            break;
        }
        if (next == A_SLICE) {
            gp_pager_wait_arrival(p->pager, p->hold, p->layer, n_arrived, ith == 0);
        } else if (n_idle > SPINS) {
            sched_yield();      /* the other thread has lost its processor */
        } else if (n_idle > 0) {
            gp_pause_briefly();
        }
    }
    if (ith == 0) {
        p->is_computed = true;
        gp_product_check(p, ~0u);
    }
}

/* Likewise of the others. */
static void copy_results(ggml_tensor *node, int ith, int nth, void *data) {
    (void) nth;
    const part *own = data;
    gp_ffn *f = own->ffn;
    atomic_uint *next = &f->next_copy[own - f->parts];
    uint32_t rank;
    while ((rank = take(next, f->shape.n_ranks)) < f->shape.n_ranks) {
        memcpy((char *) node->data + rank * node->nb[1], row_of(f, own->results, rank), (size_t) node->ne[0] * sizeof(float));
    }
    gp_failure *failure = f->first[0]->failure;
    if (ith == 0 && failure->error == 0 && atomic_load(&f->has_failed)) {
        *failure = (gp_failure) { .error = -ENOTRECOVERABLE };
    }
}

/* ---- what the tap calls ------------------------------------------------------------------------------------------ */

void gp_ffn_reset(gp_ffn *f) {
    f->is_closed = false;
    f->shape.n_first = 0;
}

static void start(gp_ffn *f, const ggml_tensor *node, const ggml_tensor *ids) {
    memset(&f->shape, 0, sizeof f->shape);
    f->shape.n_ranks = (uint32_t) node->ne[1];
    f->ids = ids;
}

static void add_first(gp_ffn *f, gp_product *product, ggml_tensor *node) {
    const uint32_t at = f->shape.n_first++;
    f->shape.first_widths[at] = product->kind->n_rows;
    f->first[at] = product;
    f->first_nodes[at] = node;
}

/* Multiplied with the same input as the others, in the same form. */
static bool is_another_first(const gp_ffn *f, const gp_product *product, const ggml_tensor *node) {
    const gp_kind *kind = f->first[0]->kind;
    return f->shape.n_first < FFN_FIRST && node->src[1] == f->first_nodes[0]->src[1] && node->ne[1] == f->shape.n_ranks
        && product->kind->from_float == kind->from_float && product->kind->input_bytes == kind->input_bytes;
}

static bool is_last(gp_ffn *f, gp_product *product, ggml_tensor *node, const ggml_tensor *ids) {
    f->last = product;
    f->last_node = node;
    f->shape.last_width = product->kind->n_rows;
    bool are_together = ids == f->ids && node->ne[1] == f->shape.n_ranks;
    for (uint32_t i = 0; i < f->shape.n_first; i++) {
        are_together &= !f->first[i]->is_computed;
    }
    ggml_tensor *input = node->src[1];
    return are_together && trace(f, input)
        && input == (f->shape.n_steps > 0 ? f->steps[f->shape.n_steps - 1] : f->first_nodes[0]);
}

static void begin(gp_ffn *f) {
    f->n_first_chunks = 0;
    for (uint32_t i = 0; i < f->shape.n_first; i++) {
        f->n_first_chunks += gp_product_chunks(f->first[i]->kind);
    }
    for (uint32_t rank = 0; rank < f->shape.n_ranks; rank++) {
        progress *at = &f->progress[rank];
        for (uint32_t i = 0; i < FFN_FIRST; i++) {
            atomic_store(&at->next_first[i], 0);
        }
        atomic_store(&at->first_done, 0);
        atomic_store(&at->next_last, 0);
        atomic_store(&at->is_ready, false);
    }
    for (uint32_t i = 0; i <= FFN_FIRST; i++) {
        atomic_store(&f->next_copy[i], 0);
    }
    atomic_store(&f->has_failed, false);
    describe_ranks(f);
}

static void become(ggml_tensor *node, void (*compute)(ggml_tensor *, int, int, void *), part *own) {
    const gp_custom custom = { .compute = compute, .n_tasks = GP_ALL_THREADS, .data = own };
    memcpy(node->op_params, &custom, sizeof custom);
}

gp_ffn_fate gp_ffn_offer(gp_ffn *f, gp_product *product, ggml_tensor *node, const ggml_tensor *ids) {
    if (f->is_closed || node->ne[1] > f->most_ranks) {
        return FFN_APART;
    }
    if (f->shape.n_first == 0 || f->first[0]->layer != product->layer) {
        start(f, node, ids);
        add_first(f, product, node);
        return FFN_APART;
    }
    if (is_another_first(f, product, node)) {
        add_first(f, product, node);
        return FFN_APART;
    }
    f->is_closed = true;
    f->kind = is_last(f, product, node, ids) ? find_shape(f) : NULL;
    if (!f->kind || f->kind->is_same == OTHER) {
        return FFN_APART;
    }
    begin(f);
    become(f->first_nodes[0], compute_all, &f->parts[0]);
    if (f->kind->is_same == UNTRIED) {
        return FFN_TRIED;
    }
    for (uint32_t i = 1; i < f->shape.n_first; i++) {
        become(f->first_nodes[i], copy_results, &f->parts[i]);
    }
    become(node, copy_results, &f->parts[FFN_FIRST]);
    return FFN_TAKEN;
}

void gp_ffn_judge(gp_ffn *f) {
    bool is_same = !atomic_load(&f->has_failed);
    for (uint32_t rank = 0; rank < f->shape.n_ranks; rank++) {
        const char *theirs = (const char *) f->last_node->data + rank * f->last_node->nb[1];
        is_same &= memcmp(theirs, row_of(f, LAST_ROWS, rank), (size_t) f->last_node->ne[0] * sizeof(float)) == 0;
    }
    f->kind->is_same = is_same ? SAME : OTHER;
}

void gp_ffn_count_shapes(const gp_ffn *f, uint32_t *n_same, uint32_t *n_other) {
    *n_same = *n_other = 0;
    for (uint32_t i = 0; f && i < f->n_tried; i++) {
        *n_same += f->tried[i].is_same == SAME;
        *n_other += f->tried[i].is_same == OTHER;
    }
}

/* ---- opening and closing ---------------------------------------------------------------------------------------- */

static size_t whole_lines(size_t bytes) {
    return (bytes + LINE_BYTES - 1) / LINE_BYTES * LINE_BYTES;
}

static bool open_ranks(gp_ffn *f) {
    const gp_graphs *graphs = &f->ggml->graphs;
    for (uint32_t rank = 0; rank < f->most_ranks; rank++) {
        rank_graph *r = &f->ranks[rank];
        r->graph = graphs->new_graph(f->context, GRAPH_NODES, false);
        r->backend = graphs->backend_init();
        if (!r->graph || !r->backend) {
            return false;
        }
        graphs->backend_set_n_threads(r->backend, 1);
    }
    return true;
}

int gp_ffn_open(gp_ffn **out, const gp_ggml *ggml, uint32_t n_ranks, int64_t width, size_t converted_bytes) {
    *out = NULL;
    const gp_graphs *graphs = &ggml->graphs;
    if (!graphs->compute || graphs->is_numa() || n_ranks == 0) {
        return 0;   /* ggml binds threads to nodes of a NUMA machine with every graph, and unbinds them */
    }
    gp_ffn *f = calloc(1, sizeof *f);
    if (!f) {
        return -ENOMEM;
    }
    f->ggml = ggml;
    f->most_ranks = n_ranks;
    f->most_width = (int64_t) (whole_lines((size_t) width * sizeof(float)) / sizeof(float));
    f->converted_bytes = whole_lines(converted_bytes);
    f->ranks = calloc(n_ranks, sizeof *f->ranks);
    f->progress = calloc(n_ranks, sizeof *f->progress);
    f->rows = malloc((size_t) N_ROWS * n_ranks * (size_t) f->most_width * sizeof *f->rows);
    f->converted = malloc(n_ranks * f->converted_bytes);
    f->context = graphs->init((gp_graphs_memory) { .bytes = n_ranks * graphs->overhead(GRAPH_NODES, false), .no_alloc = true });
    if (!f->ranks || !f->progress || !f->rows || !f->converted || !f->context || !open_ranks(f)) {
        gp_ffn_close(f);
        return -ENOMEM;
    }
    for (uint32_t i = 0; i <= FFN_FIRST; i++) {
        f->parts[i] = (part) { f, i < FFN_FIRST ? i : LAST_ROWS };
    }
    *out = f;
    return 0;
}

void gp_ffn_close(gp_ffn *f) {
    if (!f) {
        return;
    }
    for (uint32_t rank = 0; f->ranks && rank < f->most_ranks; rank++) {
        if (f->ranks[rank].backend) {
            f->ggml->graphs.backend_free(f->ranks[rank].backend);
        }
    }
    if (f->context) {
        f->ggml->graphs.free(f->context);
    }
    free(f->converted);
    free(f->rows);
    free(f->progress);
    free(f->ranks);
    free(f);
}
