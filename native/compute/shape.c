#include "compute/shape.h"

#include <string.h>

typedef struct {
    gp_nodes  *nodes;
    const gp_ggml *ggml;
    int64_t        most_width;
} search;

static bool is_row_by_row(const gp_ggml *ggml, int32_t op) {
    bool is_known = op == ggml->op_add_id;
    for (uint32_t i = 0; i < GP_ROW_OPS; i++) {
        is_known |= op == ggml->row_ops[i];
    }
    return is_known;
}

/* A row of floats per rank and token. */
static bool has_rows(const search *s, const ggml_tensor *tensor) {
    return tensor->type == s->ggml->type_f32 && tensor->nb[0] == sizeof(float) && tensor->ne[0] <= s->most_width
        && tensor->ne[1] == s->nodes->n_ranks && tensor->ne[2] == s->nodes->n_tokens && tensor->ne[3] == 1;
}

static int find(ggml_tensor *const *tensors, uint32_t n, const ggml_tensor *tensor) {
    for (uint32_t i = 0; i < n; i++) {
        if (tensors[i] == tensor) {
            return (int) i;
        }
    }
    return -1;
}

static int find_first(const search *s, const ggml_tensor *tensor) {
    return find(s->nodes->first, s->nodes->shape.n_first, tensor);
}

static int find_step(const search *s, const ggml_tensor *tensor) {
    return find(s->nodes->steps, s->nodes->shape.n_steps, tensor);
}

static bool trace(search *s, ggml_tensor *tensor);

/* Rows of a first matrix or step, or a part of each. */
static bool trace_rows(search *s, ggml_tensor *tensor, gp_source *found) {
    ggml_tensor *base = tensor->view_src ? tensor->view_src : tensor;
    if (base != tensor && (tensor->op != s->ggml->op_view || tensor->nb[1] != base->nb[1]
                           || (tensor->ne[2] > 1 && tensor->nb[2] != base->nb[2]))) {
        return false;
    }
    if (!has_rows(s, tensor) || !has_rows(s, base) || !trace(s, base)) {
        return false;
    }
    const int first = find_first(s, base);
    found->from = first >= 0 ? OF_FIRST : OF_STEP;
    found->index = (uint32_t) (first >= 0 ? first : find_step(s, base));
    found->offset_bytes = base != tensor ? tensor->view_offs : 0;
    found->width = tensor->ne[0];
    return found->offset_bytes + (size_t) found->width * sizeof(float) <= (size_t) base->ne[0] * sizeof(float);
}

static bool trace_source(search *s, const ggml_tensor *node, uint32_t index, gp_source *found) {
    ggml_tensor *tensor = node->src[index];
    if (node->op != s->ggml->op_add_id || index == 0) {
        return trace_rows(s, tensor, found);
    }
    found->from = index == 1 ? WEIGHTS : IDS;
    return index == 1 ? tensor->op == s->ggml->op_none : tensor == s->nodes->ids;
}

static bool trace(search *s, ggml_tensor *tensor) {
    if (find_first(s, tensor) >= 0 || find_step(s, tensor) >= 0) {
        return true;
    }
    if (!is_row_by_row(s->ggml, tensor->op) || tensor->view_src || !has_rows(s, tensor)) {
        return false;
    }
    gp_step step;
    memset(&step, 0, sizeof step);
    step.op = tensor->op;
    step.width = tensor->ne[0];
    memcpy(step.op_params, tensor->op_params, sizeof step.op_params);
    for (uint32_t i = 0; i < GGML_SOURCES; i++) {
        if (tensor->src[i] && (i >= GP_SOURCES || !trace_source(s, tensor, i, &step.sources[i]))) {
            return false;
        }
    }
    gp_shape *shape = &s->nodes->shape;
    if (shape->n_steps == GP_STEPS) {
        return false;
    }
    memcpy(&shape->steps[shape->n_steps], &step, sizeof step);
    s->nodes->steps[shape->n_steps++] = tensor;
    return true;
}

bool gp_trace(gp_nodes *nodes, const gp_ggml *ggml, int64_t most_width) {
    search s = { nodes, ggml, most_width };
    ggml_tensor *input = nodes->last->src[1];
    return trace(&s, input)
        && input == (nodes->shape.n_steps > 0 ? nodes->steps[nodes->shape.n_steps - 1] : nodes->first[0]);
}

bool gp_nodes_have(const gp_nodes *nodes, const ggml_tensor *tensor) {
    return find(nodes->first, nodes->shape.n_first, tensor) >= 0 || find(nodes->steps, nodes->shape.n_steps, tensor) >= 0;
}

bool gp_nodes_feed(const gp_nodes *nodes, const gp_ggml *ggml, const ggml_tensor *node) {
    if (node->op == ggml->op_view || node->op == ggml->op_reshape) {
        return false;
    }
    for (uint32_t i = 0; i < GGML_SOURCES && node->src[i]; i++) {
        const ggml_tensor *source = node->src[i];
        if (gp_nodes_have(nodes, source->view_src ? source->view_src : source)) {
            return true;
        }
    }
    return false;
}

/* Whether nothing but computing it is asked of any of these: a result of the graph has a flag. */
static bool are_plain(ggml_tensor *const *tensors, uint32_t n, const gp_ggml *ggml) {
    bool are_plain = true;
    for (uint32_t i = 0; i < n; i++) {
        are_plain &= !ggml->flag_compute || tensors[i]->flags == ggml->flag_compute;
    }
    return are_plain;
}

bool gp_nodes_are_private(const gp_nodes *nodes, const gp_ggml *ggml, ggml_tensor *const *between, uint32_t n_between) {
    for (uint32_t i = 0; i < n_between; i++) {
        if (!gp_nodes_have(nodes, between[i]) && gp_nodes_feed(nodes, ggml, between[i])) {
            return false;
        }
    }
    return are_plain(nodes->first, nodes->shape.n_first, ggml) && are_plain(nodes->steps, nodes->shape.n_steps, ggml);
}

bool gp_is_same_shape(const gp_shape *a, const gp_shape *b) {
    return memcmp(a, b, sizeof *a) == 0;
}

gp_kind *gp_kind_find(gp_kinds *kinds, const gp_shape *shape) {
    for (uint32_t i = 0; i < kinds->n_kinds; i++) {
        if (gp_is_same_shape(&kinds->kinds[i].shape, shape)) {
            return &kinds->kinds[i];
        }
    }
    if (kinds->n_kinds == GP_CHAINS) {
        return NULL;
    }
    gp_kind *new = &kinds->kinds[kinds->n_kinds++];
    memcpy(&new->shape, shape, sizeof new->shape);
    return new;
}

void gp_kinds_count(const gp_kinds *kinds, uint32_t *n_same, uint32_t *n_other) {
    *n_same = *n_other = 0;
    for (uint32_t i = 0; kinds && i < kinds->n_kinds; i++) {
        *n_same += kinds->kinds[i].is_same == GP_SAME_BITS;
        *n_other += kinds->kinds[i].is_same == GP_OTHER_BITS;
    }
}
