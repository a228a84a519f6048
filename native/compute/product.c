/* Invariants
 *   1. Each output element is one call of ggml's vec_dot for one row and the converted input: what MUL_MAT_ID does for one
 *      token. tap.c compares the bits of the two before it relies on that.
 *   2. Who takes a unit converts it, who takes a chunk computes it; nobody computes before all units are converted. No
 *      number of threads is assumed.
 *   3. A slice that cannot be read counts as arrived: the product is thrown away then, its memory is there.
 *   4. Thread 0 is the decoding thread: it alone touches the tap's failure.
 */
#include "compute/product.h"

#include <sched.h>

enum { UNIT = 1024, CHUNK_ROWS = 64, SPINS = 1000 };

/* ggml's struct ggml_type_traits_cpu, as declared by the ggml of llama-cpp-python 0.3.36; engine.py has looked at it. */
typedef struct {
    gp_from_float from_float;
    gp_vec_dot    vec_dot;
    int32_t       vec_dot_type;
    int64_t       nrows;
} type_traits;

void gp_pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

bool gp_kind_find(gp_kind *kind, const gp_ggml *ggml, int32_t type, int64_t n_columns, int64_t n_rows) {
    *kind = (gp_kind) { .type = type, .n_columns = n_columns, .n_rows = n_rows };
    const type_traits *weights = ggml->cpu_traits ? ggml->cpu_traits(type) : NULL;
    if (!weights || !weights->vec_dot) {
        return false;
    }
    kind->vec_dot = weights->vec_dot;
    if (weights->vec_dot_type == ggml->type_f32) {
        return true;
    }
    const type_traits *input = ggml->cpu_traits(weights->vec_dot_type);
    const int64_t block = ggml->block_size(weights->vec_dot_type);
    if (!input->from_float || block <= 0 || UNIT % block != 0 || n_columns % block != 0) {
        return false;
    }
    const size_t block_bytes = ggml->type_size(weights->vec_dot_type);
    kind->from_float = input->from_float;
    kind->unit = UNIT;
    kind->unit_bytes = (size_t) (UNIT / block) * block_bytes;
    kind->input_bytes = (size_t) (n_columns / block) * block_bytes;
    return true;
}

bool gp_product_fits(const gp_kind *kind, const gp_ggml *ggml, const ggml_tensor *node) {
    const ggml_tensor *input = node->src[1], *ids = node->src[2];
    bool is_plain = node->type == ggml->type_f32 && input->type == ggml->type_f32
        && node->nb[0] == sizeof(float) && input->nb[0] == sizeof(float)
        && input->buffer && ggml->buffer_is_host(input->buffer)
        && ids->ne[0] <= PRODUCT_RANKS && ids->ne[1] == 1
        && input->ne[0] == kind->n_columns && (input->ne[1] == 1 || input->ne[1] == ids->ne[0]) && input->ne[2] == 1
        && node->ne[0] == kind->n_rows && node->ne[1] == ids->ne[0] && node->ne[2] == 1
        && node->nb[1] == (size_t) kind->n_rows * sizeof(float);
    for (uint32_t i = 0; i < sizeof(gp_custom) / sizeof(int32_t); i++) {
        is_plain &= node->op_params[i] == 0;    /* they will hold a gp_custom, and be zeros again */
    }
    return is_plain;
}

uint32_t gp_product_slot(const ggml_tensor *node, uint32_t rank) {
    return (uint32_t) ((const int32_t *) node->src[2]->data)[rank];
}

static uint32_t divide_up(int64_t value, int64_t by) {
    return (uint32_t) ((value + by - 1) / by);
}

void gp_product_begin(gp_product *p, const ggml_tensor *node) {
    p->is_computed = false;
    p->n_ranks = (uint32_t) node->ne[1];
    p->n_inputs = (uint32_t) node->src[1]->ne[1];
    p->n_units = p->kind->from_float ? p->n_inputs * divide_up(p->kind->n_columns, p->kind->unit) : 0;
    p->n_chunks = p->n_ranks * gp_product_chunks(p->kind);
    uint8_t later[PRODUCT_RANKS];
    uint32_t n = 0, n_later = 0;
    for (uint32_t rank = 0; rank < p->n_ranks; rank++) {
        if (gp_pager_has_slice(p->pager, p->layer, gp_product_slot(node, rank), p->slice)) {
            p->order[n++] = (uint8_t) rank;
        } else {
            later[n_later++] = (uint8_t) rank;
        }
    }
    for (uint32_t i = 0; i < n_later; i++) {    /* in the order in which they were asked for */
        p->order[n++] = later[i];
    }
    atomic_store(&p->next_unit, 0);
    atomic_store(&p->units_done, 0);
    atomic_store(&p->next_chunk, 0);
}

void gp_product_convert(gp_product *p, const ggml_tensor *input) {
    const gp_kind *kind = p->kind;
    if (!kind->from_float) {
        return;
    }
    const uint32_t per_input = divide_up(kind->n_columns, kind->unit);
    uint32_t unit;
    while ((unit = atomic_fetch_add_explicit(&p->next_unit, 1, memory_order_relaxed)) < p->n_units) {
        const uint32_t row = unit / per_input, at = unit % per_input;
        const int64_t left = kind->n_columns - at * kind->unit;
        const float *from = (const float *) ((const char *) input->data + row * input->nb[1]) + at * kind->unit;
        kind->from_float(from, p->inputs + row * kind->input_bytes + at * kind->unit_bytes,
                         left < kind->unit ? left : kind->unit);
        atomic_fetch_add_explicit(&p->units_done, 1, memory_order_release);
    }
    for (uint32_t i = 0; atomic_load_explicit(&p->units_done, memory_order_acquire) < p->n_units; i++) {
        if (i < SPINS) {
            gp_pause_briefly();
        } else {
            sched_yield();  /* the thread that converts the rest has lost its processor */
        }
    }
}

const char *gp_product_input(const gp_product *p, const ggml_tensor *node, uint32_t rank) {
    const ggml_tensor *input = node->src[1];
    const uint32_t row = p->n_inputs == 1 ? 0 : rank;
    return p->kind->from_float ? p->inputs + row * p->kind->input_bytes : (const char *) input->data + row * input->nb[1];
}

uint32_t gp_product_chunks(const gp_kind *kind) {
    return divide_up(kind->n_rows, CHUNK_ROWS);
}

void gp_product_chunk(const gp_kind *kind, const ggml_tensor *node, uint32_t rank, const char *vector, float *result,
                      uint32_t chunk) {
    const ggml_tensor *experts = node->src[0];
    const char *matrix = (const char *) experts->data + (uint64_t) gp_product_slot(node, rank) * experts->nb[2];
    const int64_t first = (int64_t) chunk * CHUNK_ROWS;
    const int64_t end = first + CHUNK_ROWS < kind->n_rows ? first + CHUNK_ROWS : kind->n_rows;
    for (int64_t i = first; i < end; i++) {
        kind->vec_dot((int) kind->n_columns, &result[i], 0, matrix + (uint64_t) i * experts->nb[1], 0, vector, 0, 1);
    }
}

void gp_product_check(const gp_product *p, uint32_t slices) {
    gp_failure failure;
    if (p->failure->error == 0 && gp_pager_wait(p->pager, p->hold, p->layer, slices, &failure) != 0) {
        *p->failure = failure;
    }
}

void gp_product_compute(ggml_tensor *node, int ith, int nth, void *data) {
    (void) nth;
    gp_product *p = data;
    gp_product_convert(p, node->src[1]);
    const uint32_t per_rank = p->n_chunks / p->n_ranks;
    uint32_t chunk;
    while ((chunk = atomic_fetch_add_explicit(&p->next_chunk, 1, memory_order_relaxed)) < p->n_chunks) {
        const uint32_t rank = p->order[chunk / per_rank], slot = gp_product_slot(node, rank);
        if (!gp_pager_has_slice(p->pager, p->layer, slot, p->slice)
            && !gp_pager_wait_slice(p->pager, p->hold, p->layer, slot, p->slice, ith == 0)) {
            break;
        }
        gp_product_chunk(p->kind, node, rank, gp_product_input(p, node, rank),
                         (float *) ((char *) node->data + rank * node->nb[1]), chunk % per_rank);
    }
    if (ith == 0) {
        p->is_computed = true;
        gp_product_check(p, 1u << p->slice);
    }
}
