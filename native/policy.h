/* Who leaves? A policy is a row in a table: a name and how much an expert in a slot is worth. It neither locks,
 * allocates nor reads; the pager offers it only slots that may be given up. */
#ifndef GGUF_PAGER_POLICY_H
#define GGUF_PAGER_POLICY_H

#include <stdint.h>

typedef struct {
    double   uses;      /* tokens that chose this expert since the model was opened, also while it was not in a slot;
                           halved now and then, so that an old subject fades */
    uint64_t age;       /* tokens that passed its layer since one chose it */
    uint32_t away;      /* layers to go until its own is computed again, 1 .. n_layers */
    uint32_t n_layers;
} gp_use;

typedef struct {
    const char *name;
    double    (*worth)(const gp_use *use);  /* the slot with the least worth is given up */
} gp_policy;

const gp_policy *gp_policy_find(const char *name);      /* NULL: no such policy */

#endif
