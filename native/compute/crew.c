/* Invariants
 *   1. An expert goes through phases, and whoever ends one begins the next: its rows are gathered, multiplied with the first
 *      matrices, taken through what lies between, multiplied with the last one. A phase is cut into pieces; who takes a piece
 *      computes it.
 *   2. Results are those of the same functions of ggml on the same rows in the same company: how they are cut, and by how many
 *      threads they are computed, changes no bit (trial.h has seen to it).
 *   3. Only the last node's result is written, in its own time: llama.cpp may have lent the memory of every other one to somebody
 *      else.
 *   4. A thread sleeps only while nothing of what is there is left to be taken or about to become so: who has a piece of an
 *      expert is about to end it, and those spin.
 */
#include "compute/crew.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

enum { SPINS = 1000, LINE_BYTES = 64 };
/* Rows of a matrix in one piece for ggml's vec_dot; for MUL_MAT_ID, whose tiles are 64 rows high; and rows of an expert, in one
 * piece for MUL_MAT_ID and between the matrices. */
enum { DOT_ROWS = 64, GGML_ROWS = 128, AT_ONCE = 128 };

typedef enum { NOT_BEGUN, GATHERING, FIRST, BETWEEN, LAST, DONE } phase;

/* All threads look at it, so none shares a line with the next. */
struct gp_share {
    const gp_row *rows;
    uint32_t      n_rows, block;
    const char   *inputs;               /* of the first matrices, one after the other; NULL: where they were converted */
    const char   *second_inputs;        /* the same for the second, where it takes another type */
    char         *last_inputs;
    gp_step_rows  between;
    atomic_uint   phase;
    /* Pieces, for each phase its own: who comes late, with an earlier phase in mind, must not take one of a later. */
    atomic_uint   next_first[GP_FIRST], next_between, next_last;
    atomic_uint   first_done, between_done, last_done;
    char          apart[LINE_BYTES];
};

static void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static size_t round_up(size_t bytes) {
    return (bytes + LINE_BYTES - 1) / LINE_BYTES * LINE_BYTES;
}

static uint32_t divide_up(int64_t value, int64_t by) {
    return (uint32_t) ((value + by - 1) / by);
}

/* ---- memory ------------------------------------------------------------------------------------------------------- */

static bool takes_another_input(const gp_run *run) {
    return run->n_first > 1 && run->first_kinds[1]->matrix.input_type != run->first_kinds[0]->matrix.input_type;
}

static const ggml_tensor *input_of(const gp_run *run) {
    return (run->n_first > 0 ? run->first[0] : run->last)->src[1];
}

static size_t converted_bytes(const gp_run *run) {
    if (run->n_first == 0) {
        return 0;
    }
    const ggml_tensor *input = input_of(run);
    const size_t n = (size_t) (input->ne[1] * input->ne[2]);
    return round_up(n * run->first_kinds[0]->matrix.input_bytes)
        + (takes_another_input(run) ? round_up(n * run->first_kinds[1]->matrix.input_bytes) : 0);
}

/* ggml's own operation takes inputs that lie one after the other. */
static bool is_gathered(const gp_run *run, uint32_t n_rows) {
    bool is_gathered = false;
    for (uint32_t i = 0; i < run->n_first; i++) {
        is_gathered |= gp_kernel_for(run->first_kinds[i], n_rows) == GP_BY_GGML;
    }
    return is_gathered;
}

/* What an expert with so many rows takes while it is computed. With a share: where its rows are, then. */
static size_t lay_out(const gp_run *run, uint32_t n_rows, char *memory, gp_share *share) {
    size_t at = 0;
    if (is_gathered(run, n_rows)) {
        if (share) {
            share->inputs = memory + at;
        }
        at += round_up(n_rows * run->first_kinds[0]->matrix.input_bytes);
        if (takes_another_input(run)) {
            if (share) {
                share->second_inputs = memory + at;
            }
            at += round_up(n_rows * run->first_kinds[1]->matrix.input_bytes);
        }
    }
    for (uint32_t i = 0; i < run->n_first; i++) {
        if (share) {
            share->between.first[i] = (float *) (void *) (memory + at);
        }
        at += round_up(n_rows * (size_t) run->first_kinds[i]->matrix.n_rows * sizeof(float));
    }
    for (uint32_t i = 0; run->nodes && i < run->nodes->shape.n_steps; i++) {
        if (share) {
            share->between.steps[i] = (float *) (void *) (memory + at);
        }
        at += round_up(n_rows * (size_t) run->nodes->shape.steps[i].width * sizeof(float));
    }
    if (share) {
        share->last_inputs = memory + at;
    }
    return at + round_up(n_rows * run->last_kind->matrix.input_bytes);
}

bool gp_crew_has_room(const gp_crew *c, const gp_run *run, uint32_t most_rows) {
    const size_t converted = converted_bytes(run);
    return converted <= c->bytes && lay_out(run, most_rows, NULL, NULL) <= c->bytes - converted;
}

/* ---- rows --------------------------------------------------------------------------------------------------------- */

/* Where the inputs of one of the first matrices are converted to. */
static char *inputs_of(const gp_crew *c, const gp_run *run, uint32_t matrix) {
    const ggml_tensor *input = input_of(run);
    const size_t n = (size_t) (input->ne[1] * input->ne[2]);
    return c->memory + (matrix > 0 && takes_another_input(run) ? round_up(n * run->first_kinds[0]->matrix.input_bytes) : 0);
}

void gp_crew_expect(gp_crew *c) {
    atomic_store(&c->next_input, 0);
}

void gp_crew_convert(gp_crew *c, const gp_run *run) {
    const ggml_tensor *input = input_of(run);
    const uint32_t n = (uint32_t) (input->ne[1] * input->ne[2]);
    const gp_matrix *first = &run->first_kinds[0]->matrix;
    uint32_t i;
    while ((i = atomic_fetch_add_explicit(&c->next_input, 1, memory_order_relaxed)) < n) {
        const gp_row r = { i % (uint32_t) input->ne[1], i / (uint32_t) input->ne[1] };
        gp_matrix_convert(first, gp_row_in(input, &r), inputs_of(c, run, 0) + i * first->input_bytes);
        if (takes_another_input(run)) {
            const gp_matrix *second = &run->first_kinds[1]->matrix;
            gp_matrix_convert(second, gp_row_in(input, &r), inputs_of(c, run, 1) + i * second->input_bytes);
        }
    }
}

/* Where the input of a row was converted to. */
static const char *converted_input(const gp_crew *c, uint32_t matrix, const gp_row *r) {
    const ggml_tensor *input = input_of(c->run);
    const size_t rank = input->ne[1] == 1 ? 0 : r->rank;
    const size_t bytes = c->run->first_kinds[matrix]->matrix.input_bytes;
    return inputs_of(c, c->run, matrix) + (r->token * (size_t) input->ne[1] + rank) * bytes;
}

static void gather(const gp_crew *c, gp_share *s) {
    const gp_run *run = c->run;
    for (uint32_t i = 0; i < s->n_rows; i++) {
        if (run->n_first == 0) {
            const gp_matrix *m = &run->last_kind->matrix;
            gp_matrix_convert(m, gp_row_in(run->last->src[1], &s->rows[i]), s->last_inputs + i * m->input_bytes);
        } else if (s->inputs) {
            const size_t bytes = run->first_kinds[0]->matrix.input_bytes;
            memcpy((char *) (uintptr_t) s->inputs + i * bytes, converted_input(c, 0, &s->rows[i]), bytes);
            if (takes_another_input(run)) {
                const size_t others = run->first_kinds[1]->matrix.input_bytes;
                memcpy((char *) (uintptr_t) s->second_inputs + i * others, converted_input(c, 1, &s->rows[i]), others);
            }
        }
    }
}

/* ---- pieces ------------------------------------------------------------------------------------------------------- */

static uint32_t n_slices_of_rows(uint32_t n_rows) {
    return divide_up(n_rows, AT_ONCE);
}

/* Of rows that are cut into n parts as equal as can be: where the ith begins. A short rest would be too few for ggml's kernels
 * for many. */
static uint32_t begin_of(uint32_t n_rows, uint32_t n, uint32_t i) {
    return (uint32_t) ((uint64_t) n_rows * i / n);
}

static uint32_t n_pieces(const gp_crew *c, const gp_matrices *kind, uint32_t n_rows) {
    return gp_kernel_for(kind, n_rows) == GP_BY_DOT
        ? divide_up(kind->matrix.n_rows, DOT_ROWS) : divide_up(kind->matrix.n_rows, c->ggml_rows) * n_slices_of_rows(n_rows);
}

/* The next piece; n: there is none left. */
static uint32_t take(atomic_uint *next, uint32_t n) {
    if (atomic_load_explicit(next, memory_order_relaxed) >= n) {
        return n;
    }
    const uint32_t piece = atomic_fetch_add_explicit(next, 1, memory_order_relaxed);
    return piece < n ? piece : n;
}

static void note(gp_crew *c, int status) {
    if (status != 0) {
        atomic_store(&c->has_failed, true);
    }
}

static gp_matrix_part part_of(const gp_matrices *kind, const char *data, const ggml_tensor *node, int64_t height, uint32_t i) {
    const int64_t first = i * height, end = first + height;
    return (gp_matrix_part) { .data = data, .row_bytes = node->src[0]->nb[1], .first = first,
                              .end = end < kind->matrix.n_rows ? end : kind->matrix.n_rows };
}

/* A piece of the product with one of the first matrices. */
static void multiply_first(gp_crew *c, uint32_t worker, uint32_t share, uint32_t matrix, uint32_t piece) {
    gp_share *s = &c->shares[share];
    const gp_matrices *kind = c->run->first_kinds[matrix];
    const ggml_tensor *node = c->run->first[matrix];
    const char *data = gp_batch_matrix(c->batch, share, c->run->first_slices[matrix], node);
    const size_t width = (size_t) kind->matrix.n_rows, bytes = kind->matrix.input_bytes;
    const char *gathered = matrix > 0 && s->second_inputs ? s->second_inputs : s->inputs;
    float *results = s->between.first[matrix];
    if (gp_kernel_for(kind, s->n_rows) == GP_BY_DOT) {
        const gp_matrix_part part = part_of(kind, data, node, DOT_ROWS, piece);
        for (uint32_t i = 0; i < s->n_rows; i++) {
            gp_matrix_dot(&kind->matrix, &part, gathered ? gathered + i * bytes : converted_input(c, matrix, &s->rows[i]),
                          results + i * width);
        }
        return;
    }
    const uint32_t n = n_slices_of_rows(s->n_rows);
    const gp_matrix_part part = part_of(kind, data, node, c->ggml_rows, piece / n);
    const uint32_t begin = begin_of(s->n_rows, n, piece % n), end = begin_of(s->n_rows, n, piece % n + 1);
    note(c, gp_worker_multiply(c->workers, worker, &kind->matrix, &part, gathered + begin * bytes, end - begin,
                               results + begin * width + part.first, width * sizeof(float)));
}

/* The same with the last matrix: each row of the result belongs somewhere else. */
static void multiply_last(gp_crew *c, uint32_t worker, uint32_t share, uint32_t piece) {
    gp_share *s = &c->shares[share];
    const gp_matrices *kind = c->run->last_kind;
    ggml_tensor *node = c->run->last;
    const char *data = gp_batch_matrix(c->batch, share, c->run->last_slice, node);
    const size_t bytes = kind->matrix.input_bytes;
    if (gp_kernel_for(kind, s->n_rows) == GP_BY_DOT) {
        const gp_matrix_part part = part_of(kind, data, node, DOT_ROWS, piece);
        for (uint32_t i = 0; i < s->n_rows; i++) {
            gp_matrix_dot(&kind->matrix, &part, s->last_inputs + i * bytes, gp_row_in(node, &s->rows[i]));
        }
        return;
    }
    const uint32_t n = n_slices_of_rows(s->n_rows);
    const gp_matrix_part part = part_of(kind, data, node, c->ggml_rows, piece / n);
    const uint32_t begin = begin_of(s->n_rows, n, piece % n), end = begin_of(s->n_rows, n, piece % n + 1);
    const size_t width = (size_t) (part.end - part.first);
    float *results = c->parts + (size_t) worker * GGML_ROWS * AT_ONCE;
    note(c, gp_worker_multiply(c->workers, worker, &kind->matrix, &part, s->last_inputs + begin * bytes, end - begin, results,
                               width * sizeof(float)));
    for (uint32_t i = begin; i < end; i++) {
        memcpy(gp_row_in(node, &s->rows[i]) + part.first, results + (i - begin) * width, width * sizeof(float));
    }
}

static gp_step_rows part_of_rows(const gp_run *run, const gp_share *s, uint32_t begin, uint32_t end) {
    gp_step_rows part = { .n = end - begin, .experts = s->between.experts + begin };
    for (uint32_t i = 0; i < run->n_first; i++) {
        part.first[i] = s->between.first[i] + begin * (size_t) run->first_kinds[i]->matrix.n_rows;
    }
    for (uint32_t i = 0; i < run->nodes->shape.n_steps; i++) {
        part.steps[i] = s->between.steps[i] + begin * (size_t) run->nodes->shape.steps[i].width;
    }
    return part;
}

/* What lies between, and the last matrix' inputs, of some rows. */
static void go_between(gp_crew *c, uint32_t worker, gp_share *s, uint32_t piece) {
    const gp_run *run = c->run;
    const uint32_t n = n_slices_of_rows(s->n_rows), n_steps = run->nodes->shape.n_steps;
    const uint32_t begin = begin_of(s->n_rows, n, piece), end = begin_of(s->n_rows, n, piece + 1);
    const gp_step_rows part = part_of_rows(run, s, begin, end);
    if (n_steps > 0) {
        note(c, gp_worker_step(c->workers, worker, run->nodes, &part));
    }
    const float *results = n_steps > 0 ? part.steps[n_steps - 1] : part.first[0];
    const gp_matrix *m = &run->last_kind->matrix;
    for (uint32_t i = begin; i < end; i++) {
        gp_matrix_convert(m, results + (i - begin) * (size_t) m->n_columns, s->last_inputs + i * m->input_bytes);
    }
}

/* ---- phases ------------------------------------------------------------------------------------------------------- */

static void enter(gp_share *s, phase next) {
    atomic_store_explicit(&s->phase, next, memory_order_release);
}

static bool has(const gp_crew *c, uint32_t share, uint32_t slice) {
    return gp_wave_has(c->pager, c->hold, share, 1u << slice);
}

/* Whether an expert that nobody has begun can be: what its first piece multiplies with is there. */
static bool can_begin(const gp_crew *c, uint32_t share) {
    const gp_run *run = c->run;
    return has(c, share, run->n_first > 0 ? run->first_slices[0] : run->last_slice)
        || (run->n_first > 1 && has(c, share, run->first_slices[1]));
}

static bool begin_share(gp_crew *c, uint32_t share) {
    gp_share *s = &c->shares[share];
    unsigned expected = NOT_BEGUN;
    if (!can_begin(c, share) || !atomic_compare_exchange_strong(&s->phase, &expected, GATHERING)) {
        return false;
    }
    char *memory = gp_scratch_take(&c->scratch, lay_out(c->run, s->n_rows, NULL, NULL), &s->block);
    if (!memory) {
        atomic_store(&s->phase, NOT_BEGUN);
        return false;
    }
    (void) lay_out(c->run, s->n_rows, memory, s);
    gather(c, s);
    enter(s, c->run->n_first > 0 ? FIRST : LAST);
    return true;
}

/* Counts a piece that is done; true: it was the last one. */
static bool ends_phase(atomic_uint *n_done, uint32_t n) {
    return atomic_fetch_add_explicit(n_done, 1, memory_order_acq_rel) + 1 == n;
}

static bool work_on_first(gp_crew *c, uint32_t worker, uint32_t share) {
    gp_share *s = &c->shares[share];
    const gp_run *run = c->run;
    uint32_t n[GP_FIRST] = { 0 }, n_all = 0;
    for (uint32_t i = 0; i < run->n_first; i++) {
        n_all += n[i] = n_pieces(c, run->first_kinds[i], s->n_rows);
    }
    for (uint32_t i = 0; i < run->n_first; i++) {
        const uint32_t piece = has(c, share, run->first_slices[i]) ? take(&s->next_first[i], n[i]) : n[i];
        if (piece < n[i]) {
            multiply_first(c, worker, share, i, piece);
            if (ends_phase(&s->first_done, n_all)) {
                enter(s, BETWEEN);
            }
            return true;
        }
    }
    return false;
}

static bool work_between(gp_crew *c, uint32_t worker, gp_share *s) {
    const uint32_t n = n_slices_of_rows(s->n_rows), piece = take(&s->next_between, n);
    if (piece == n) {
        return false;
    }
    go_between(c, worker, s, piece);
    if (ends_phase(&s->between_done, n)) {
        enter(s, LAST);
    }
    return true;
}

static bool work_on_last(gp_crew *c, uint32_t worker, uint32_t share) {
    gp_share *s = &c->shares[share];
    const uint32_t n = n_pieces(c, c->run->last_kind, s->n_rows);
    const uint32_t piece = has(c, share, c->run->last_slice) ? take(&s->next_last, n) : n;
    if (piece == n) {
        return false;
    }
    multiply_last(c, worker, share, piece);
    if (ends_phase(&s->last_done, n)) {
        gp_scratch_give_back(&c->scratch, s->block);
        gp_wave_done(c->pager, c->hold, share);
        atomic_store_explicit(&s->phase, DONE, memory_order_release);
        if (atomic_fetch_add(&c->n_done, 1) + 1 == c->n_shares) {
            gp_wave_tell(c->pager, c->hold);    /* not before: who then finds nothing to do would sleep for good */
        }
    }
    return true;
}

/* Computes a piece of an expert. False: no piece of it can be taken. */
static bool work_on(gp_crew *c, uint32_t worker, uint32_t share) {
    switch (atomic_load_explicit(&c->shares[share].phase, memory_order_acquire)) {
    case NOT_BEGUN: return begin_share(c, share);
    case FIRST:     return work_on_first(c, worker, share);
    case BETWEEN:   return work_between(c, worker, &c->shares[share]);
    case LAST:      return work_on_last(c, worker, share);
    default:        return false;
    }
}

/* Whether somebody is at an expert, all of whose slices for the phase are there: its next piece comes without a read. */
static bool is_about_to_go_on(const gp_crew *c, uint32_t share) {
    const gp_run *run = c->run;
    switch (atomic_load_explicit(&c->shares[share].phase, memory_order_acquire)) {
    case NOT_BEGUN: return can_begin(c, share);
    case FIRST:     return has(c, share, run->first_slices[0]) && (run->n_first == 1 || has(c, share, run->first_slices[1]));
    case LAST:      return has(c, share, run->last_slice);
    case DONE:      return false;
    default:        return true;
    }
}

/* The experts before it are done. */
static uint32_t find_first_open(gp_crew *c) {
    uint32_t first = atomic_load_explicit(&c->first_open, memory_order_relaxed);
    const uint32_t before = first;
    while (first < c->n_shares && atomic_load_explicit(&c->shares[first].phase, memory_order_relaxed) == DONE) {
        first++;
    }
    if (first > before) {       /* somebody else may have come further: no harm */
        atomic_store_explicit(&c->first_open, first, memory_order_relaxed);
    }
    return first;
}

static bool is_anything_about_to_go_on(gp_crew *c) {
    for (uint32_t i = find_first_open(c); i < c->n_shares; i++) {
        if (is_about_to_go_on(c, i)) {
            return true;
        }
    }
    return false;
}

static bool work(gp_crew *c, uint32_t worker) {
    bool is_any = false;
    for (uint32_t i = find_first_open(c); i < c->n_shares && !gp_wave_stops(c->hold, worker == 0); i++) {
        while (work_on(c, worker, i)) {
            is_any = true;
        }
    }
    return is_any;
}

void gp_crew_compute(gp_crew *c, uint32_t worker) {
    uint32_t n_idle = 0;
    while (worker < GP_WORKERS && atomic_load(&c->n_done) < c->n_shares && !gp_wave_stops(c->hold, worker == 0)) {
        const unsigned n_arrived = gp_wave_n_arrived(c->hold);      /* before looking what is there */
        if (work(c, worker)) {
            n_idle = 0;
        } else if (!is_anything_about_to_go_on(c)) {
            if (atomic_load(&c->n_done) < c->n_shares && !gp_wave_wait(c->pager, c->hold, n_arrived, worker == 0)) {
                break;
            }
        } else if (n_idle++ < SPINS) {
            pause_briefly();
        } else {
            sched_yield();      /* the other thread has lost its processor */
        }
    }
}

/* ---- beginning ---------------------------------------------------------------------------------------------------- */

/* Whole products are the least trouble; where there are fewer experts at a time than threads could do with, they are cut. */
static int64_t height_of_pieces(const gp_crew *c, int64_t n_rows, uint32_t n_threads) {
    const uint32_t wanted = 4 * n_threads;
    const uint32_t n = c->n_shares < wanted ? divide_up(wanted, c->n_shares) : 1;
    const int64_t height = (n_rows / n + DOT_ROWS - 1) / DOT_ROWS * DOT_ROWS;
    return height < DOT_ROWS ? DOT_ROWS : height > GGML_ROWS ? GGML_ROWS : height;
}

void gp_crew_begin(gp_crew *c, const gp_run *run, uint32_t n_threads) {
    const size_t converted = converted_bytes(run);
    c->run = run;
    c->n_shares = c->hold->n_wanted;
    c->ggml_rows = height_of_pieces(c, run->last_kind->matrix.n_rows, n_threads);
    gp_scratch_begin(&c->scratch, c->memory + converted, c->bytes - converted);
    for (uint32_t i = 0; i < c->n_shares; i++) {
        gp_share *s = &c->shares[i];
        const uint32_t first = c->batch->first_row[i];
        s->rows = c->batch->rows + first;
        s->n_rows = c->batch->first_row[i + 1] - first;
        s->inputs = s->second_inputs = NULL;
        s->between.experts = c->batch->experts + first;
        atomic_uint *const counters[] = { &s->next_first[0], &s->next_first[1], &s->next_between, &s->next_last,
                                          &s->first_done, &s->between_done, &s->last_done };
        for (uint32_t k = 0; k < sizeof counters / sizeof *counters; k++) {
            atomic_store_explicit(counters[k], 0, memory_order_relaxed);
        }
        enter(s, NOT_BEGUN);
    }
    atomic_store(&c->first_open, 0);
    atomic_store(&c->n_done, 0);
    atomic_store(&c->has_failed, false);
}

void gp_crew_rest(gp_crew *c) {
    c->n_shares = 0;
    atomic_store(&c->n_done, 0);
    atomic_store(&c->has_failed, false);
}

/* ---- opening and closing ---------------------------------------------------------------------------------------- */

int gp_crew_open(gp_crew *c, const gp_ggml *ggml, gp_pager *pager, gp_hold *hold, gp_batch *batch, size_t bytes) {
    *c = (gp_crew) { .ggml = ggml, .pager = pager, .hold = hold, .batch = batch, .bytes = bytes };
    atomic_flag_clear(&c->scratch.is_busy);
    c->shares = calloc(batch->most_experts, sizeof *c->shares);
    c->parts = malloc((size_t) GP_WORKERS * GGML_ROWS * AT_ONCE * sizeof *c->parts);
    c->memory = malloc(bytes + 1);
    if (!c->shares || !c->parts || !c->memory) {
        return -ENOMEM;
    }
    return ggml->graphs.compute ? gp_workers_open(&c->workers, ggml) : 0;
}

void gp_crew_close(gp_crew *c) {
    gp_workers_close(c->workers);
    free(c->shares);
    free(c->parts);
    free(c->memory);
    *c = (gp_crew) { 0 };
}
