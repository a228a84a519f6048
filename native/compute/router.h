/* A layer's router, copied out of a graph of llama.cpp's, so that it can be asked before its time: what it chooses for a normalised
 * input, by ggml's own operations on the model's own weights. Whatever formula an architecture has (softmax, sigmoid and a bias,
 * groups, a norm of its own) is copied as it is: from the ids back to the norm that all of it begins with.
 *
 * It decides nothing: the model's own router does that, later, and what was foretold is thrown away. */
#ifndef GGUF_PAGER_ROUTER_H
#define GGUF_PAGER_ROUTER_H

#include "compute/ggml_tensor.h"
#include "gguf_pager.h"

enum { GP_ROUTER_NODES = 48, GP_ROUTER_DEPTH = 24 };

typedef enum {
    GP_ROUTER_UNSEEN,       /* no graph with it has come by */
    GP_ROUTER_KNOWN,
    GP_ROUTER_OTHER         /* it is made of something that cannot be had before its time */
} gp_router_state;

typedef struct {
    gp_router_state state;
    int64_t         n_embd;
    uint32_t        n_used;
    ggml_tensor     input;                      /* one normalised row of floats, n_embd of them */
    ggml_tensor    *nodes;                      /* n_nodes of them, sources before those that use them */
    uint32_t        n_nodes;
    const ggml_tensor *ids;                     /* the last of them, or a view of it: n_used numbers of experts */
    uint8_t         path[GP_ROUTER_DEPTH];      /* from the ids to what it takes in: which source, n_path times; 0: there is none */
    uint32_t        n_path;
    const ggml_tensor *scores;                  /* of all experts, which ids is the beginning of a ranking by; NULL: it is none */
    void           *graph;                      /* in its context */
    void           *context;
} gp_router;

/* What all routers of a context share. */
typedef struct {
    const gp_ggml *ggml;
    void          *backend;                     /* ggml's, with one thread */
    char          *memory;                      /* for what nodes compute; one router at a time */
    size_t         bytes;
} gp_routers;

int  gp_routers_open(gp_routers *routers, const gp_ggml *ggml);
void gp_routers_close(gp_routers *routers);

/* Copies the router whose result `ids` is, of any number of tokens. Weights must be the model's: they stay where they are as long as
 * the model. A graph that it cannot be copied from, because it has an adapter in it, say, leaves it unseen. */
void gp_router_learn(gp_router *router, const gp_routers *routers, const ggml_tensor *ids);
void gp_router_close(gp_router *router, const gp_routers *routers);

/* Which experts it would choose, best first, for an input that was normalised, but not multiplied with a norm's weight yet: n_used of
 * them; where there are scores, all experts follow in their order. NULL: ggml could not. */
const int32_t *gp_router_ask(gp_router *router, const gp_routers *routers, const float *normalised);

/* What a router that is known takes in, in a graph with these ids: a row of n_embd floats per token, normalised and multiplied with the
 * norm's weight. NULL: it is not to be had there. Whether llama.cpp still needs it, and has not given its memory to another node, is not known here. */
const ggml_tensor *gp_router_input(const gp_router *router, const gp_ggml *ggml, const ggml_tensor *ids);

/* The weight and the bias that a norm's result was multiplied with and added to on its way to a node that multiplies experts with it. */
typedef struct {
    bool         is_known;
    int64_t      n_embd;
    const float *weight, *bias;                 /* NULL: none */
} gp_norm;

gp_norm gp_norm_before(const gp_ggml *ggml, const ggml_tensor *input);
/* Undoes both. */
void    gp_norm_undo(const gp_norm *norm, const float *input, float *normalised);

#endif
