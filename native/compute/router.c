/* Invariants
 *   1. A copy refers to nothing of the graph that it was made of: its sources are copies, or weights of the model.
 *   2. It is made for one token: of a graph with more, the outermost dimension of every node is the tokens', or it is not copied.
 *   3. All nodes of a copy, views aside, have their place in the memory that the routers share, one after the other.
 */
#define _POSIX_C_SOURCE 200809L  /* strnlen */
#include "compute/router.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { MEMORY_BYTES = 1 << 20, ALIGN_BYTES = 64, GRAPH_NODES = 2 * GP_ROUTER_NODES };

/* The copying of one router. */
typedef struct {
    const gp_routers  *routers;
    gp_router         *router;
    const ggml_tensor *theirs[GP_ROUTER_NODES];     /* whose copy each node is */
    const ggml_tensor *norm;
    int64_t            n_tokens;
    uint32_t           depth;       /* of nodes whose sources are being copied */
    bool               has_adapter;
    size_t             used_bytes;
} copying;

static bool is_norm(const gp_ggml *ggml, const ggml_tensor *node) {
    return node->op != ggml->op_none && (node->op == ggml->op_rms_norm || node->op == ggml->op_norm);
}

static bool ends_with(const char *name, const char *end) {
    const size_t n = strnlen(name, GGML_NAME_BYTES), n_end = strlen(end);
    return n >= n_end && memcmp(name + n - n_end, end, n_end) == 0;
}

/* An adapter's weights have the names of those that they adapt, and may go before the model does. */
static bool is_adapter(const ggml_tensor *tensor) {
    return ends_with(tensor->name, ".lora_a") || ends_with(tensor->name, ".lora_b");
}

/* A weight of the model, as its files name them: inputs of a graph are called otherwise. */
static bool is_weight(const gp_ggml *ggml, const ggml_tensor *tensor) {
    return tensor->op == ggml->op_none && !tensor->view_src && tensor->data && tensor->buffer
        && strncmp(tensor->name, "blk.", 4) == 0 && !is_adapter(tensor) && ggml->buffer_is_host(tensor->buffer);
}

static size_t bytes_of(const gp_ggml *ggml, const ggml_tensor *tensor) {
    size_t bytes = ggml->type_size(tensor->type);
    const int64_t block = ggml->block_size(tensor->type);
    for (int i = 0; i < GGML_DIMS; i++) {
        const size_t n = (size_t) (i == 0 ? (tensor->ne[0] - 1) / block : tensor->ne[i] - 1);
        bytes += tensor->ne[i] > 0 ? n * tensor->nb[i] : 0;
    }
    return bytes;
}

/* Invariant 2. */
static bool keep_one_token(ggml_tensor *node, int64_t n_tokens) {
    if (n_tokens == 1) {
        return true;
    }
    int outermost = GGML_DIMS - 1;
    while (outermost > 0 && node->ne[outermost] == 1) {
        outermost--;
    }
    if (node->ne[outermost] != n_tokens) {
        return false;
    }
    node->ne[outermost] = 1;
    for (int i = outermost + 1; i < GGML_DIMS; i++) {
        node->nb[i] = node->nb[outermost];
    }
    return true;
}

static ggml_tensor *copy(copying *c, const ggml_tensor *theirs);

static bool place(copying *c, ggml_tensor *ours) {
    if (ours->view_src) {
        ours->data = (char *) ours->view_src->data + ours->view_offs;
        return true;
    }
    const size_t bytes = (bytes_of(c->routers->ggml, ours) + ALIGN_BYTES - 1) / ALIGN_BYTES * ALIGN_BYTES;
    if (bytes > c->routers->bytes - c->used_bytes) {
        return false;
    }
    ours->data = c->routers->memory + c->used_bytes;
    c->used_bytes += bytes;
    return true;
}

/* A cast names itself as where its result goes. */
static bool copy_sources(copying *c, const ggml_tensor *theirs, ggml_tensor *ours) {
    bool is_whole = ++c->depth <= GP_ROUTER_NODES;
    for (uint32_t i = 0; is_whole && i < GGML_SOURCES; i++) {
        if (theirs->src[i] && theirs->src[i] != theirs) {
            ours->src[i] = copy(c, theirs->src[i]);
            is_whole = ours->src[i] != NULL;
        }
    }
    c->depth--;
    return is_whole;
}

static ggml_tensor *copy_node(copying *c, const ggml_tensor *theirs) {
    ggml_tensor ours = *theirs;
    if (!copy_sources(c, theirs, &ours)) {
        return NULL;
    }
    ours.view_src = theirs->view_src ? copy(c, theirs->view_src) : NULL;
    if ((theirs->view_src && !ours.view_src) || c->router->n_nodes == GP_ROUTER_NODES
        || !keep_one_token(&ours, c->n_tokens) || !place(c, &ours)) {
        return NULL;
    }
    ours.flags = c->routers->ggml->flag_compute;
    ours.buffer = ours.extra = NULL;
    c->theirs[c->router->n_nodes] = theirs;
    ggml_tensor *at = &c->router->nodes[c->router->n_nodes++];
    *at = ours;
    for (uint32_t i = 0; i < GGML_SOURCES; i++) {
        at->src[i] = theirs->src[i] == theirs ? at : at->src[i];
    }
    return at;
}

/* NULL: it cannot be had before its time. */
static ggml_tensor *copy(copying *c, const ggml_tensor *theirs) {
    const gp_ggml *ggml = c->routers->ggml;
    for (uint32_t i = 0; i < c->router->n_nodes; i++) {
        if (c->theirs[i] == theirs) {
            return &c->router->nodes[i];
        }
    }
    if (theirs->op == ggml->op_none) {
        c->has_adapter |= is_adapter(theirs);
        return is_weight(ggml, theirs) ? (ggml_tensor *) (uintptr_t) theirs : NULL;
    }
    if (!is_norm(ggml, theirs)) {
        return copy_node(c, theirs);
    }
    if ((c->norm && c->norm != theirs) || theirs->type != ggml->type_f32 || theirs->ne[1] != c->n_tokens
        || theirs->ne[2] != 1 || theirs->ne[3] != 1) {
        return NULL;
    }
    c->norm = theirs;
    ggml_tensor *input = &c->router->input;
    const size_t bytes = (size_t) theirs->ne[0] * sizeof(float);
    *input = (ggml_tensor) { .type = ggml->type_f32, .op = ggml->op_none, .ne = { theirs->ne[0], 1, 1, 1 },
                             .nb = { sizeof(float), bytes, bytes, bytes } };
    return input;
}

static const ggml_tensor *scores_of(const gp_ggml *ggml, const ggml_tensor *ids) {
    const ggml_tensor *ranking = ids->view_src;
    const bool is_ranking = ranking && ids->view_offs == 0 && ranking->op == ggml->op_argsort;
    const ggml_tensor *scores = is_ranking ? ranking->src[0] : NULL;
    return scores && scores->type == ggml->type_f32 && scores->nb[0] == sizeof(float) ? scores : NULL;
}

static bool is_row_per_token(const gp_ggml *ggml, const ggml_tensor *tensor, int64_t n_embd, int64_t n_tokens) {
    return tensor->type == ggml->type_f32 && tensor->nb[0] == sizeof(float) && tensor->ne[0] == n_embd && tensor->ne[1] == n_tokens
        && tensor->ne[2] == 1 && tensor->ne[3] == 1;
}

/* The first that comes on the way from the ids, sources in their order. */
static bool find_path(const gp_ggml *ggml, gp_router *r, const ggml_tensor *at, int64_t n_tokens) {
    if (r->n_path > 0 && is_row_per_token(ggml, at, r->n_embd, n_tokens) && gp_norm_before(ggml, at).is_known) {
        return true;
    }
    for (uint8_t i = 0; i < GGML_SOURCES && r->n_path < GP_ROUTER_DEPTH && !is_norm(ggml, at); i++) {
        if (at->src[i] && at->src[i] != at) {
            r->path[r->n_path++] = i;
            if (find_path(ggml, r, at->src[i], n_tokens)) {
                return true;
            }
            r->n_path--;
        }
    }
    return false;
}

static bool copy_all(copying *c, const ggml_tensor *ids) {
    gp_router *r = c->router;
    r->nodes = calloc(GP_ROUTER_NODES, sizeof *r->nodes);
    r->ids = r->nodes ? copy(c, ids) : NULL;
    if (!r->ids || !c->norm || !place(c, &r->input)) {
        return false;
    }
    const gp_graphs *graphs = &c->routers->ggml->graphs;
    r->context = graphs->init((gp_graphs_memory) { .bytes = graphs->overhead(GRAPH_NODES, false) + 1024, .no_alloc = true });
    r->graph = r->context ? graphs->new_graph(r->context, GRAPH_NODES, false) : NULL;
    if (!r->graph) {
        return false;
    }
    graphs->expand(r->graph, (ggml_tensor *) (uintptr_t) r->ids);
    r->n_embd = r->input.ne[0];
    r->n_used = (uint32_t) ids->ne[0];
    r->scores = scores_of(c->routers->ggml, r->ids);
    (void) find_path(c->routers->ggml, r, ids, c->n_tokens);
    return true;
}

void gp_router_learn(gp_router *r, const gp_routers *routers, const ggml_tensor *ids) {
    if (r->state != GP_ROUTER_UNSEEN || !routers->backend || ids->type != routers->ggml->type_i32) {
        return;
    }
    copying c = { .routers = routers, .router = r, .n_tokens = ids->ne[1] };
    const bool is_whole = copy_all(&c, ids);
    if (!is_whole) {
        gp_router_close(r, routers);
    }
    /* Of one token, all that a router is made of can be seen; of several, their number may have been in the way. */
    r->state = is_whole ? GP_ROUTER_KNOWN : ids->ne[1] == 1 && !c.has_adapter ? GP_ROUTER_OTHER : GP_ROUTER_UNSEEN;
}

void gp_router_close(gp_router *r, const gp_routers *routers) {
    if (r->context) {
        routers->ggml->graphs.free(r->context);
    }
    free(r->nodes);
    *r = (gp_router) { 0 };
}

const int32_t *gp_router_ask(gp_router *r, const gp_routers *routers, const float *normalised) {
    memcpy(r->input.data, normalised, (size_t) r->n_embd * sizeof *normalised);
    return routers->ggml->graphs.compute(routers->backend, r->graph) == 0 ? r->ids->data : NULL;
}

const ggml_tensor *gp_router_input(const gp_router *r, const gp_ggml *ggml, const ggml_tensor *ids) {
    const ggml_tensor *at = ids;
    for (uint32_t i = 0; at && i < r->n_path; i++) {
        at = at->src[r->path[i]];
    }
    const bool is_there = at && r->n_path > 0 && is_row_per_token(ggml, at, r->n_embd, ids->ne[1])
        && at->data && at->buffer && ggml->buffer_is_host(at->buffer);
    return is_there ? at : NULL;
}

int gp_routers_open(gp_routers *routers, const gp_ggml *ggml) {
    *routers = (gp_routers) { .ggml = ggml, .bytes = MEMORY_BYTES };
    if (!ggml->graphs.compute || ggml->op_rms_norm == ggml->op_none) {
        return 0;
    }
    routers->memory = aligned_alloc(ALIGN_BYTES, MEMORY_BYTES);
    routers->backend = routers->memory ? ggml->graphs.backend_init() : NULL;
    if (!routers->backend) {
        gp_routers_close(routers);
        return -ENOMEM;
    }
    ggml->graphs.backend_set_n_threads(routers->backend, 1);
    return 0;
}

void gp_routers_close(gp_routers *routers) {
    if (routers->backend) {
        routers->ggml->graphs.backend_free(routers->backend);
    }
    free(routers->memory);
    *routers = (gp_routers) { 0 };
}

/* ---- norms -------------------------------------------------------------------------------------------------------- */

static const float *vector_of(const gp_ggml *ggml, const ggml_tensor *tensor, int64_t n) {
    const bool is_vector = tensor && is_weight(ggml, tensor) && tensor->type == ggml->type_f32 && tensor->ne[0] == n
        && tensor->ne[1] == 1 && tensor->ne[2] == 1 && tensor->ne[3] == 1;
    return is_vector ? tensor->data : NULL;
}

gp_norm gp_norm_before(const gp_ggml *ggml, const ggml_tensor *input) {
    gp_norm norm = { .n_embd = input->ne[0] };
    for (uint32_t i = 0; input && i < GP_ROUTER_NODES; i++) {
        if (input->op == ggml->op_none) {
            break;
        }
        if (is_norm(ggml, input)) {
            norm.is_known = input->ne[0] == norm.n_embd;
            break;
        }
        const float *vector = vector_of(ggml, input->src[1], norm.n_embd);
        if (input->op == ggml->op_mul && vector && !norm.weight) {
            norm.weight = vector;
        } else if (input->op == ggml->op_add && vector && !norm.weight && !norm.bias) {
            norm.bias = vector;
        } else if (input->op != ggml->op_reshape && input->op != ggml->op_view && input->op != ggml->op_repeat
                   && (input->op != ggml->op_mul || norm.weight)) {
            break;      /* a product with a number per token, in front of the norm's weight, changes no direction */
        }
        input = input->src[0];
    }
    return norm;
}

void gp_norm_undo(const gp_norm *norm, const float *input, float *normalised) {
    for (int64_t i = 0; i < norm->n_embd; i++) {
        const float value = norm->bias ? input[i] - norm->bias[i] : input[i];
        /* Of what a weight of zero has taken away nothing is known; zero is what it is on average. */
        normalised[i] = !norm->weight ? value : norm->weight[i] != 0 ? value / norm->weight[i] : 0;
    }
}
