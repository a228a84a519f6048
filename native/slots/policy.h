/* Who leaves? A policy is a row in a table: a name and how much an expert in a slot is worth. It neither locks,
 * allocates nor reads; the pager offers it only slots that may be given up. */
#ifndef GGUF_PAGER_POLICY_H
#define GGUF_PAGER_POLICY_H

#include <stdint.h>

/* Tokens that chose an expert, also while it was not in a slot. They fade, fast and slowly, so that an old subject does. */
typedef struct {
    float recent, lasting;
} gp_uses;

typedef struct {
    gp_uses  uses;      /* up to when a token last chose this expert */
    uint64_t age;       /* tokens that passed its layer since then */
    uint32_t away;      /* layers to go until its own is computed again, 1 .. n_layers */
    uint32_t n_layers;
} gp_use;

typedef struct {
    const char *name;
    double    (*worth)(const gp_use *use);  /* the slot with the least worth is given up */
} gp_policy;

/* What one choice counts for at the end of a batch of so many tokens, somewhere in which it was made. */
gp_uses gp_uses_in_batch(uint32_t n_tokens);
/* The lasting ones, `age` tokens after they were counted. */
double gp_uses_lasting(const gp_uses *uses, uint64_t age);
/* What uses become with n_choices more, `age` tokens after the last ones. */
void gp_uses_add(gp_uses *uses, uint64_t age, uint32_t n_choices, const gp_uses *each);

const gp_policy *gp_policy_find(const char *name);      /* NULL: no such policy */

#endif
