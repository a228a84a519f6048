#include "compute/trial.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Rows of the matrices that are tried: two pieces of them; leaves and nodes of the graph of the whole product. */
enum { TRIED_ROWS = 128, PIECE_ROWS = 64, GRAPH_NODES = 16 };

/* Rows per expert: on both sides of every limit that ggml has for its kernels, and of ours for pieces. */
typedef struct {
    uint32_t n[2];
} company;
static const company few_rows[] = { { { 1, 7 } }, { { 2, 3 } } };
static const company many_rows[] = { { { 8, 17 } }, { { 16, 40 } }, { { 260, 9 } } };
enum { MOST_ROWS = 269 };

typedef struct {
    const gp_ggml          *ggml;
    gp_workers             *workers;
    const gp_matrix        *matrix;
    const gp_trial_experts *experts;
    int64_t                 n_rows;             /* of the matrices */
    float                  *inputs, *theirs, *ours;
    char                   *converted;
    int32_t                 ids[MOST_ROWS];
    uint32_t                n;                  /* rows */
} trial;

/* Numbers between -2 and 2 without a pattern (xorshift32 of G. Marsaglia, Journal of Statistical Software 8, 2003). */
static void make_up(float *numbers, size_t n) {
    uint32_t x = 2463534242u;
    for (size_t i = 0; i < n; i++) {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        numbers[i] = (float) (int32_t) x / (float) (1 << 30);
    }
}

/* One row of each expert in turn, as long as it has any. */
static void mix(trial *t, const company *rows) {
    uint32_t left[2] = { rows->n[0], t->experts->n > 1 ? rows->n[1] : 0 };
    t->n = 0;
    while (left[0] + left[1] > 0) {
        for (int32_t e = 0; e < 2; e++) {
            if (left[e] > 0) {
                left[e]--;
                t->ids[t->n++] = e;
            }
        }
    }
}

/* ggml's own: all experts at once, inputs as they are. By one thread: of a process that was forked from one that has computed with
 * several, libgomp would wait for ever for threads that are not there (12.2 does). How rows are shared out changes none. */
static int compute_theirs(trial *t) {
    const gp_ggml *ggml = t->ggml;
    const gp_trial_experts *experts = t->experts;
    ggml_tensor weights = { .op = ggml->op_none, .type = t->matrix->type };
    ggml_tensor input = { .op = ggml->op_none, .type = ggml->type_f32, .data = t->inputs };
    ggml_tensor ids = { .op = ggml->op_none, .type = ggml->type_i32, .data = t->ids };
    ggml_tensor product = { .op = ggml->op_mul_mat_id, .type = ggml->type_f32, .flags = ggml->flag_compute,
                            .src = { &weights, &input, &ids }, .data = t->theirs };
    /* The lower one is the tensor's first expert, and the distance to the other how far apart its experts are. */
    const bool is_upside_down = experts->n > 1 && experts->data[1] < experts->data[0];
    const char *const low = experts->data[is_upside_down];
    const size_t distance = experts->n > 1 ? (size_t) (experts->data[!is_upside_down] - low) : experts->row_bytes;
    for (uint32_t i = 0; is_upside_down && i < t->n; i++) {
        t->ids[i] = !t->ids[i];
    }
    weights.data = (void *) (uintptr_t) low;
    const size_t input_bytes = (size_t) t->matrix->n_columns * sizeof(float), output_bytes = (size_t) t->n_rows * sizeof(float);
    gp_set_size(&weights, t->matrix->n_columns, t->n_rows, experts->n, ggml->type_size(t->matrix->type), experts->row_bytes,
                distance);
    gp_set_size(&input, t->matrix->n_columns, 1, t->n, sizeof(float), input_bytes, input_bytes);
    gp_set_size(&ids, 1, t->n, 1, sizeof *t->ids, sizeof *t->ids, sizeof *t->ids * t->n);
    gp_set_size(&product, t->n_rows, 1, t->n, sizeof(float), output_bytes, output_bytes);
    const gp_graphs *graphs = &ggml->graphs;
    void *context = graphs->init((gp_graphs_memory) { .bytes = graphs->overhead(GRAPH_NODES, false), .no_alloc = true });
    void *graph = context ? graphs->new_graph(context, GRAPH_NODES, false) : NULL;
    void *backend = graph ? graphs->backend_init() : NULL;
    int status = -ENOMEM;
    if (backend) {
        graphs->backend_set_n_threads(backend, 1);
        graphs->expand(graph, &product);
        status = graphs->compute(backend, graph);
        graphs->backend_free(backend);
    }
    if (context) {
        graphs->free(context);
    }
    for (uint32_t i = 0; is_upside_down && i < t->n; i++) {
        t->ids[i] = !t->ids[i];
    }
    return status;
}

static const float *input_row(const trial *t, uint32_t i) {
    return t->inputs + i * (size_t) t->matrix->n_columns;
}

/* One expert's rows, in pieces. */
static int compute_ours(trial *t, uint32_t expert, gp_kernel kernel) {
    const gp_matrix *m = t->matrix;
    uint32_t n = 0;
    for (uint32_t i = 0; i < t->n; i++) {
        if ((uint32_t) t->ids[i] == expert) {
            gp_matrix_convert(m, input_row(t, i), t->converted + n++ * m->input_bytes);
        }
    }
    int status = 0;
    for (int64_t first = 0; first < t->n_rows && n > 0; first += PIECE_ROWS) {
        const int64_t end = first + PIECE_ROWS < t->n_rows ? first + PIECE_ROWS : t->n_rows;
        const gp_matrix_part part = { t->experts->data[expert], t->experts->row_bytes, first, end };
        if (kernel == GP_BY_DOT) {
            for (uint32_t i = 0; i < n; i++) {
                gp_matrix_dot(m, &part, t->converted + i * m->input_bytes, t->ours + i * (size_t) t->n_rows);
            }
            continue;
        }
        const uint32_t half = n > PIECE_ROWS ? n / 2 : n;
        for (uint32_t at = 0; at < n && status == 0; at += half) {
            const uint32_t n_now = n - at < 2 * half ? n - at : half;     /* the second half takes what is left over */
            status = gp_worker_multiply(t->workers, 0, m, &part, t->converted + at * m->input_bytes, n_now,
                                        t->ours + at * (size_t) t->n_rows + first, (size_t) t->n_rows * sizeof(float));
            at += n_now - half;
        }
    }
    return status;
}

static bool are_same(trial *t, uint32_t expert, gp_kernel kernel) {
    if (compute_ours(t, expert, kernel) != 0) {
        return false;
    }
    const size_t width = (size_t) t->n_rows;
    bool are_same = true;
    for (uint32_t i = 0, n = 0; i < t->n; i++) {
        if ((uint32_t) t->ids[i] == expert) {
            are_same &= memcmp(t->theirs + i * width, t->ours + n++ * width, width * sizeof(float)) == 0;
        }
    }
    return are_same;
}

static bool is_right(trial *t, gp_kernel kernel, const company *companies, uint32_t n_companies) {
    bool is_right = true;
    for (uint32_t i = 0; i < n_companies && is_right; i++) {
        mix(t, &companies[i]);
        is_right = compute_theirs(t) == 0;
        for (uint32_t e = 0; e < t->experts->n && is_right; e++) {
            is_right = are_same(t, e, kernel);
        }
    }
    return is_right;
}

static gp_kernel find_kernel(trial *t, bool is_many) {
    if (is_many) {
        return is_right(t, GP_BY_GGML, many_rows, sizeof many_rows / sizeof *many_rows) ? GP_BY_GGML : GP_BY_NOBODY;
    }
    const uint32_t n = sizeof few_rows / sizeof *few_rows;
    return is_right(t, GP_BY_DOT, few_rows, n) ? GP_BY_DOT : is_right(t, GP_BY_GGML, few_rows, n) ? GP_BY_GGML : GP_BY_NOBODY;
}

int gp_try(gp_matrices *kind, bool is_many, const gp_ggml *ggml, gp_workers *workers, const gp_trial_experts *experts) {
    trial *t = calloc(1, sizeof *t);
    if (!t) {
        return -ENOMEM;
    }
    *t = (trial) { .ggml = ggml, .workers = workers, .matrix = &kind->matrix, .experts = experts,
                   .n_rows = kind->matrix.n_rows < TRIED_ROWS ? kind->matrix.n_rows : TRIED_ROWS };
    t->inputs = malloc(MOST_ROWS * (size_t) kind->matrix.n_columns * sizeof *t->inputs);
    t->converted = malloc(MOST_ROWS * kind->matrix.input_bytes);
    t->theirs = malloc(MOST_ROWS * (size_t) t->n_rows * sizeof *t->theirs);
    t->ours = malloc(MOST_ROWS * (size_t) t->n_rows * sizeof *t->ours);
    const int error = t->inputs && t->converted && t->theirs && t->ours ? 0 : -ENOMEM;
    if (error == 0) {
        make_up(t->inputs, MOST_ROWS * (size_t) kind->matrix.n_columns);
        *(is_many ? &kind->many : &kind->few) = find_kernel(t, is_many);
    }
    free(t->inputs);
    free(t->converted);
    free(t->theirs);
    free(t->ours);
    free(t);
    return error;
}
