#include "compute/batch.h"

#include <errno.h>
#include <stdlib.h>

int32_t gp_id_in(const ggml_tensor *ids, const gp_row *r) {
    return *(const int32_t *) ((const char *) ids->data + r->token * ids->nb[1] + r->rank * ids->nb[0]);
}

float *gp_row_in(const ggml_tensor *tensor, const gp_row *r) {
    const uint32_t rank = tensor->ne[1] == 1 ? 0 : r->rank;
    return (float *) (void *) ((char *) tensor->data + rank * tensor->nb[1] + r->token * tensor->nb[2]);
}

const char *gp_batch_matrix(const gp_batch *b, uint32_t i, uint32_t slice, const ggml_tensor *node) {
    const char *data = gp_wave_slice(b->pager, b->hold, i, slice);
    const ggml_tensor *all = node->src[0];
    return data ? data : (const char *) all->data + (size_t) b->hold->wanted[i].expert * all->nb[2];
}

/* Returns how many distinct experts there are; 0: the ids make no sense. */
static uint32_t collect(gp_batch *b, const ggml_tensor *ids, uint32_t n_experts) {
    uint32_t n = 0;
    for (uint32_t token = 0; token < ids->ne[1]; token++) {
        for (uint32_t rank = 0; rank < ids->ne[0]; rank++) {
            const int32_t expert = gp_id_in(ids, &(gp_row) { rank, token });
            if (expert < 0 || (uint32_t) expert >= n_experts) {
                return 0;
            }
            if (b->place[expert] < 0) {
                b->place[expert] = (int32_t) n;
                b->collected[n] = expert;
                b->counts[n++] = 0;
            }
            b->counts[b->place[expert]]++;
        }
    }
    return n;
}

static void forget_places(gp_batch *b, uint32_t n_experts) {
    for (uint32_t e = 0; e < n_experts; e++) {
        b->place[e] = -1;
    }
}

uint32_t gp_batch_most(gp_batch *b, const ggml_tensor *ids, uint32_t n_experts) {
    if (ids->ne[0] * ids->ne[1] > b->most_rows) {
        return 0;
    }
    const uint32_t n = collect(b, ids, n_experts);
    uint32_t most = 0;
    for (uint32_t i = 0; i < n; i++) {
        most = b->counts[i] > most ? b->counts[i] : most;
    }
    forget_places(b, n_experts);
    return most;
}

static void sort_rows(gp_batch *b, const ggml_tensor *ids) {
    const gp_hold *hold = b->hold;
    uint32_t n_rows = 0;
    for (uint32_t i = 0; i < hold->n_wanted; i++) {
        b->place[hold->wanted[i].expert] = (int32_t) i;
        b->first_row[i] = n_rows;
        n_rows += hold->wanted[i].count;
    }
    for (uint32_t token = 0; token < ids->ne[1]; token++) {
        for (uint32_t rank = 0; rank < ids->ne[0]; rank++) {
            const gp_row r = { rank, token };
            const int32_t expert = gp_id_in(ids, &r);
            const uint32_t at = b->first_row[b->place[expert]]++;
            b->rows[at] = r;
            b->experts[at] = expert;
        }
    }
    for (uint32_t i = hold->n_wanted; i > 0; i--) {     /* each has become the next one's */
        b->first_row[i] = b->first_row[i - 1];
    }
    b->first_row[0] = 0;
}

int gp_batch_begin(gp_batch *b, uint32_t layer, const ggml_tensor *ids, bool is_again, gp_failure *failure) {
    const uint32_t n_experts = gp_pager_layer(b->pager, layer)->n_experts;
    const gp_demand demand = { .layer = layer, .n_experts = collect(b, ids, n_experts), .experts = b->collected,
                               .counts = b->counts, .n_tokens = (uint32_t) ids->ne[1], .is_again = is_again };
    const int error = gp_wave_begin(b->pager, b->hold, &demand, failure);
    if (error == 0) {
        sort_rows(b, ids);
    }
    forget_places(b, n_experts);
    return error;
}

int gp_batch_open(gp_batch *b, gp_pager *pager, gp_hold *hold, uint32_t most_rows) {
    uint32_t most_experts = 0;
    const gp_layer_spec *layer;
    for (uint32_t i = 0; (layer = gp_pager_layer(pager, i)); i++) {
        most_experts = layer->n_experts > most_experts ? layer->n_experts : most_experts;
    }
    *b = (gp_batch) { .pager = pager, .hold = hold, .most_rows = most_rows, .most_experts = most_experts };
    b->place = malloc(most_experts * sizeof *b->place);
    b->collected = malloc(most_experts * sizeof *b->collected);
    b->counts = malloc(most_experts * sizeof *b->counts);
    b->first_row = malloc((most_experts + 1) * sizeof *b->first_row);
    b->rows = malloc(most_rows * sizeof *b->rows);
    b->experts = malloc(most_rows * sizeof *b->experts);
    if (!b->place || !b->collected || !b->counts || !b->first_row || !b->rows || !b->experts) {
        return -ENOMEM;
    }
    forget_places(b, most_experts);
    return 0;
}

void gp_batch_close(gp_batch *b) {
    free(b->place);
    free(b->collected);
    free(b->counts);
    free(b->first_row);
    free(b->rows);
    free(b->experts);
    *b = (gp_batch) { 0 };
}
