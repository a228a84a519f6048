/* Invariants
 *   1. Nothing of the graph's is written before its time: llama.cpp may have lent a later node's memory to somebody else
 *      until then. Only the node at hand is written; all else goes to rows of our own, and each later node copies its
 *      rows when its time comes. The nodes between the matrices are computed by ggml once more, as they stand.
 *   2. What lies between the matrices ggml computes here, too: graphs of copies of those nodes, one row high, one graph per
 *      rank. Only operations are admitted whose rows depend on the same rows of their sources and on nothing else.
 *   3. A shape is trusted once the last result, as computed by the graph's own nodes, was the one found here, bit by bit.
 *   4. Whoever completes the first matrices of a rank computes what comes between, and only then is the rank ready. Nobody
 *      sleeps while a rank is about to become ready; who sleeps is woken by the next slice that arrives.
 *   5. All nodes lie in one piece of graph. If one was computed before the last was asked about, they do not.
 */
#include "compute/ffn.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "compute/ffn_between.h"

enum { SPINS = 1000, LINE_BYTES = 64 };

/* How far one rank is. All threads look at it, so none shares a line with the next. */
typedef struct {
    atomic_uint next_first[FFN_FIRST], first_done, next_last;
    atomic_bool is_ready;       /* for the last matrix */
    char        apart[LINE_BYTES];
} progress;

enum { LAST = FFN_FIRST, PARTS };

/* What a node of llama.cpp's is given as its data: its number, LAST or that of a first matrix. */
typedef struct {
    gp_ffn  *ffn;
    uint32_t index;
} part;

struct gp_ffn {
    const gp_ggml  *ggml;
    uint32_t        most_ranks;
    int64_t         most_width;
    size_t          converted_bytes;
    gp_ffn_between *between;
    progress       *progress;               /* per rank */
    char           *converted;              /* what the last matrix is multiplied with, per rank */
    part            parts[PARTS];
    gp_ffn_kinds    kinds;

    /* The feed-forward at hand; until it is taken, as far as it was offered. */
    bool            is_closed;              /* nothing more is taken in this piece */
    gp_ffn_kind    *kind;
    gp_ffn_nodes    nodes;
    gp_product     *first[FFN_FIRST], *last;
    uint32_t        n_first_chunks;
    atomic_uint     next_copy[PARTS];
    atomic_bool     has_failed;
};

/* ---- computing -------------------------------------------------------------------------------------------------- */

static bool has_slice(const gp_product *p, const ggml_tensor *node, uint32_t rank) {
    return gp_pager_has_slice(p->pager, p->layer, gp_product_slot(node, rank), p->slice);
}

/* The first matrices of a rank are done. */
static void make_ready(gp_ffn *f, uint32_t rank) {
    if (f->nodes.shape.n_steps > 0 && gp_ffn_between_compute(f->between, rank) != 0) {
        atomic_store(&f->has_failed, true);
    }
    const gp_kind *kind = f->last->kind;
    if (kind->from_float) {
        kind->from_float(gp_ffn_last_input(f->between, &f->nodes, rank), f->converted + rank * f->converted_bytes,
                         kind->n_columns);
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
    const ggml_tensor *node = f->nodes.first[index];
    progress *at = &f->progress[rank];
    const uint32_t n_chunks = gp_product_chunks(p->kind);
    if (!has_slice(p, node, rank)) {
        return false;
    }
    const uint32_t chunk = take(&at->next_first[index], n_chunks);
    if (chunk == n_chunks) {
        return false;
    }
    const char *vector = gp_product_input(f->first[0], f->nodes.first[0], rank);
    gp_product_chunk(p->kind, node, rank, vector, gp_ffn_first_row(f->between, &f->nodes, index, rank), chunk);
    if (atomic_fetch_add_explicit(&at->first_done, 1, memory_order_acq_rel) + 1 == f->n_first_chunks) {
        make_ready(f, rank);
    }
    return true;
}

static bool compute_last(gp_ffn *f, uint32_t rank) {
    const gp_product *p = f->last;
    progress *at = &f->progress[rank];
    const uint32_t n_chunks = gp_product_chunks(p->kind);
    if (!atomic_load_explicit(&at->is_ready, memory_order_acquire) || !has_slice(p, f->nodes.last, rank)) {
        return false;
    }
    const uint32_t chunk = take(&at->next_last, n_chunks);
    if (chunk == n_chunks) {
        return false;
    }
    const char *vector = p->kind->from_float ? f->converted + rank * f->converted_bytes
                                             : (const char *) gp_ffn_last_input(f->between, &f->nodes, rank);
    gp_product_chunk(p->kind, f->nodes.last, rank, vector, gp_ffn_last_row(f->between, rank), chunk);
    return true;
}

static bool compute_some(gp_ffn *f, uint32_t rank) {
    bool is_any = compute_last(f, rank);
    for (uint32_t i = 0; !is_any && i < f->nodes.shape.n_first; i++) {
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
        return has_slice(f->last, f->nodes.last, rank) ? A_THREAD : A_SLICE;
    }
    for (uint32_t i = 0; i < f->nodes.shape.n_first; i++) {
        if (!has_slice(f->first[i], f->nodes.first[i], rank)) {
            return A_SLICE;
        }
    }
    return A_THREAD;
}

static obstacle next_obstacle(const gp_ffn *f) {
    obstacle most = NOTHING;
    for (uint32_t rank = 0; rank < f->nodes.n_ranks; rank++) {
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
        for (uint32_t i = 0; i < f->nodes.n_ranks; i++) {
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
            if (!gp_pager_wait_arrival(p->pager, p->hold, p->layer, n_arrived, ith == 0)) {
                break;
            }
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
    const uint32_t n_ranks = f->nodes.n_ranks;
    uint32_t rank;
    while ((rank = take(&f->next_copy[own->index], n_ranks)) < n_ranks) {
        const float *row = own->index == LAST ? gp_ffn_last_row(f->between, rank)
                                              : gp_ffn_first_row(f->between, &f->nodes, own->index, rank);
        memcpy((char *) node->data + rank * node->nb[1], row, (size_t) node->ne[0] * sizeof(float));
    }
    gp_failure *failure = f->first[0]->failure;
    if (ith == 0 && failure->error == 0 && atomic_load(&f->has_failed)) {
        *failure = (gp_failure) { .error = -ENOTRECOVERABLE };
    }
}

/* ---- what the tap calls ------------------------------------------------------------------------------------------ */

void gp_ffn_reset(gp_ffn *f) {
    f->is_closed = false;
    f->nodes.shape.n_first = 0;
}

static void start(gp_ffn *f, const ggml_tensor *node, const ggml_tensor *ids) {
    memset(&f->nodes, 0, sizeof f->nodes);
    f->nodes.n_ranks = (uint32_t) node->ne[1];
    f->nodes.n_tokens = 1;
    f->nodes.ids = ids;
}

static void add_first(gp_ffn *f, gp_product *product, ggml_tensor *node) {
    const uint32_t at = f->nodes.shape.n_first++;
    f->nodes.shape.first_types[at] = product->kind->type;
    f->nodes.shape.first_widths[at] = product->kind->n_rows;
    f->first[at] = product;
    f->nodes.first[at] = node;
}

/* Multiplied with the same input as the others, in the same form. */
static bool is_another_first(const gp_ffn *f, const gp_product *product, const ggml_tensor *node) {
    const gp_kind *kind = f->first[0]->kind;
    const gp_ffn_shape *shape = &f->nodes.shape;
    return shape->n_first < FFN_FIRST && node->src[1] == f->nodes.first[0]->src[1] && node->ne[1] == f->nodes.n_ranks
        && product->kind->from_float == kind->from_float && product->kind->input_bytes == kind->input_bytes;
}

static bool is_last(gp_ffn *f, gp_product *product, ggml_tensor *node, const ggml_tensor *ids) {
    f->last = product;
    f->nodes.last = node;
    f->nodes.shape.last_type = product->kind->type;
    f->nodes.shape.last_width = product->kind->n_rows;
    bool are_together = ids == f->nodes.ids && node->ne[1] == f->nodes.n_ranks;
    for (uint32_t i = 0; i < f->nodes.shape.n_first; i++) {
        are_together &= !f->first[i]->is_computed;
    }
    return are_together && gp_ffn_trace(&f->nodes, f->ggml, f->most_width);
}

static void begin(gp_ffn *f) {
    f->n_first_chunks = 0;
    for (uint32_t i = 0; i < f->nodes.shape.n_first; i++) {
        f->n_first_chunks += gp_product_chunks(f->first[i]->kind);
    }
    for (uint32_t rank = 0; rank < f->nodes.n_ranks; rank++) {
        progress *at = &f->progress[rank];
        for (uint32_t i = 0; i < FFN_FIRST; i++) {
            atomic_store(&at->next_first[i], 0);
        }
        atomic_store(&at->first_done, 0);
        atomic_store(&at->next_last, 0);
        atomic_store(&at->is_ready, false);
    }
    for (uint32_t i = 0; i < PARTS; i++) {
        atomic_store(&f->next_copy[i], 0);
    }
    atomic_store(&f->has_failed, false);
    gp_ffn_between_prepare(f->between, &f->nodes);
}

static void become(ggml_tensor *node, void (*compute)(ggml_tensor *, int, int, void *), part *own) {
    const gp_custom custom = { .compute = compute, .n_tasks = GP_ALL_THREADS, .data = own };
    memcpy(node->op_params, &custom, sizeof custom);
}

gp_ffn_fate gp_ffn_offer(gp_ffn *f, gp_product *product, ggml_tensor *node, const ggml_tensor *ids) {
    if (f->is_closed || node->ne[1] > f->most_ranks) {
        return FFN_APART;
    }
    if (f->nodes.shape.n_first == 0 || f->first[0]->layer != product->layer) {
        start(f, node, ids);
        add_first(f, product, node);
        return FFN_APART;
    }
    if (is_another_first(f, product, node)) {
        add_first(f, product, node);
        return FFN_APART;
    }
    f->is_closed = true;
    f->kind = is_last(f, product, node, ids) ? gp_ffn_kind_find(&f->kinds, &f->nodes.shape) : NULL;
    if (!f->kind || f->kind->is_same == FFN_OTHER) {
        return FFN_APART;
    }
    begin(f);
    become(f->nodes.first[0], compute_all, &f->parts[0]);
    if (f->kind->is_same == FFN_UNTRIED) {
        return FFN_TRIED;
    }
    for (uint32_t i = 1; i < f->nodes.shape.n_first; i++) {
        become(f->nodes.first[i], copy_results, &f->parts[i]);
    }
    become(node, copy_results, &f->parts[LAST]);
    return FFN_TAKEN;
}

void gp_ffn_judge(gp_ffn *f) {
    bool is_same = !atomic_load(&f->has_failed);
    for (uint32_t rank = 0; rank < f->nodes.n_ranks; rank++) {
        const char *theirs = (const char *) f->nodes.last->data + rank * f->nodes.last->nb[1];
        is_same &= memcmp(theirs, gp_ffn_last_row(f->between, rank), (size_t) f->nodes.last->ne[0] * sizeof(float)) == 0;
    }
    f->kind->is_same = is_same ? FFN_SAME : FFN_OTHER;
}

void gp_ffn_count_shapes(const gp_ffn *f, uint32_t *n_same, uint32_t *n_other) {
    gp_ffn_kinds_count(f ? &f->kinds : NULL, n_same, n_other);
}

/* ---- opening and closing ---------------------------------------------------------------------------------------- */

int gp_ffn_open(gp_ffn **out, const gp_ggml *ggml, uint32_t n_ranks, int64_t width, size_t converted_bytes) {
    *out = NULL;
    if (!ggml->graphs.compute || ggml->graphs.is_numa() || n_ranks == 0) {
        return 0;   /* ggml binds threads to nodes of a NUMA machine with every graph, and unbinds them */
    }
    gp_ffn *f = calloc(1, sizeof *f);
    if (!f) {
        return -ENOMEM;
    }
    f->ggml = ggml;
    f->most_ranks = n_ranks;
    f->most_width = width;
    f->converted_bytes = (converted_bytes + LINE_BYTES - 1) / LINE_BYTES * LINE_BYTES;
    f->progress = calloc(n_ranks, sizeof *f->progress);
    f->converted = malloc(n_ranks * f->converted_bytes);
    if (!f->progress || !f->converted || gp_ffn_between_open(&f->between, ggml, n_ranks, width) != 0) {
        gp_ffn_close(f);
        return -ENOMEM;
    }
    for (uint32_t i = 0; i < PARTS; i++) {
        f->parts[i] = (part) { f, i };
    }
    *out = f;
    return 0;
}

void gp_ffn_close(gp_ffn *f) {
    if (!f) {
        return;
    }
    gp_ffn_between_close(f->between);
    free(f->converted);
    free(f->progress);
    free(f);
}
