#include "compute/samples.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

void gp_samples_begin(gp_samples *s, const gp_nodes *nodes, gp_kind *kind) {
    const uint32_t n_rows = nodes->n_ranks * nodes->n_tokens;
    s->nodes = nodes;
    s->kind = kind;
    s->n_kept = 0;
    s->n_rows = n_rows < GP_SAMPLES ? n_rows : GP_SAMPLES;
    for (uint32_t i = 0; i < s->n_rows; i++) {
        const uint32_t row = (uint32_t) ((uint64_t) n_rows * i / s->n_rows);
        s->rows[i] = (gp_row) { row % nodes->n_ranks, row / nodes->n_ranks };
    }
}

void gp_samples_keep(gp_samples *s, const ggml_tensor *node) {
    for (uint32_t i = 0; s->nodes && i < s->nodes->shape.n_first; i++) {
        if (s->nodes->first[i] == node) {
            for (uint32_t r = 0; r < s->n_rows; r++) {
                memcpy(s->kept[i] + r * node->ne[0], gp_row_in(node, &s->rows[r]), (size_t) node->ne[0] * sizeof(float));
            }
            s->n_kept++;
        }
    }
}

/* Where the results of each step go; false: there is no room for them. */
static bool lay_out(const gp_nodes *nodes, gp_step_rows *rows, char *memory, size_t bytes) {
    float *at = (float *) (void *) memory;
    size_t n = 0;
    for (uint32_t i = 0; i < nodes->shape.n_steps; i++) {
        rows->steps[i] = at + n;
        n += GP_SAMPLES * (size_t) nodes->shape.steps[i].width;
    }
    return n * sizeof *at <= bytes;
}

void gp_samples_compare(gp_samples *s, const ggml_tensor *node, gp_workers *workers, char *memory, size_t bytes) {
    const gp_nodes *nodes = s->nodes;
    if (!nodes || nodes->last != node || s->n_kept != nodes->shape.n_first) {
        return;
    }
    const uint32_t n_steps = nodes->shape.n_steps;
    const ggml_tensor *theirs = node->src[1];
    int32_t experts[GP_SAMPLES];
    gp_step_rows rows = { .n = s->n_rows, .experts = experts, .first = { s->kept[0], s->kept[1] } };
    s->nodes = NULL;
    if (!lay_out(nodes, &rows, memory, bytes)) {
        return;
    }
    for (uint32_t i = 0; i < s->n_rows; i++) {
        experts[i] = gp_id_in(nodes->ids, &s->rows[i]);
    }
    bool is_same = n_steps == 0 || gp_worker_step(workers, 0, nodes, &rows) == 0;
    const float *ours = n_steps > 0 ? rows.steps[n_steps - 1] : s->kept[0];
    const size_t width = (size_t) theirs->ne[0];
    for (uint32_t i = 0; i < s->n_rows; i++) {
        is_same &= memcmp(ours + i * width, gp_row_in(theirs, &s->rows[i]), width * sizeof(float)) == 0;
    }
    s->kind->is_same = is_same ? GP_SAME_BITS : GP_OTHER_BITS;
}

int gp_samples_open(gp_samples *s, int64_t widest) {
    *s = (gp_samples) { 0 };
    bool is_whole = true;
    for (uint32_t i = 0; i < GP_FIRST; i++) {
        s->kept[i] = malloc(GP_SAMPLES * (size_t) widest * sizeof *s->kept[i]);
        is_whole &= s->kept[i] != NULL;
    }
    return is_whole ? 0 : -ENOMEM;
}

void gp_samples_close(gp_samples *s) {
    for (uint32_t i = 0; i < GP_FIRST; i++) {
        free(s->kept[i]);
    }
    *s = (gp_samples) { 0 };
}
