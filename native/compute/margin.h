/* Which of the experts that a router would choose for a guessed input are worth reading. The nearer a score lies to the line between
 * the last one chosen and the first one not, the less it says: far above it nearly all come true, at the line half of them, and some
 * below it still do. How far below is worth it differs from layer to layer, and is learnt from what comes true.
 *
 * On a model with real hidden states 0.86 of the misses were foreseen so, and 0.27 read in vain for each; 0.81 and 0.19 when as many as
 * the router uses were taken, 0.92 and 0.76 with one more (benchmarks/LOG.md, 2026-11-30). */
#ifndef GGUF_PAGER_MARGIN_H
#define GGUF_PAGER_MARGIN_H

#include <stdbool.h>

/* Made from zeros. */
typedef struct {
    float gap;      /* the mean distance between the scores of the last one chosen and the first one not; 0: none was seen */
    float least;    /* the distance from the line at which reading begins to be worth it, in gaps */
} gp_margin;

/* The scores of the last one chosen and of the first one not. */
void  gp_margin_note(gp_margin *margin, float last, float next);
/* How far above the line between those two a score is, in gaps. */
float gp_margin_above(const gp_margin *margin, float score, float last, float next);
bool  gp_margin_is_worth(const gp_margin *margin, float above);
/* Whether it says something about where reading begins to be worth it that one of this distance comes true, or does not. */
bool  gp_margin_is_doubtful(const gp_margin *margin, float above);
void  gp_margin_learn(gp_margin *margin, bool has_come_true);

#endif
