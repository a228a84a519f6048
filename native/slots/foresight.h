/* Whether look-ahead pays. Nothing here reads or locks. */
#ifndef GGUF_PAGER_FORESIGHT_H
#define GGUF_PAGER_FORESIGHT_H

#include <stdbool.h>
#include <stdint.h>

/* Of a layer: how much of what was foretold, and not in a slot, came true of late. */
typedef struct {
    float    true_ones, false_ones;     /* they fade */
    bool     is_judged;
    bool     is_poor;                   /* once it is judged: too little comes true for reads to pay */
    uint32_t n_passed;                  /* tokens since something was foretold although it is poor */
} gp_foresight;

void gp_foresight_note(gp_foresight *foresight, uint32_t n_true, uint32_t n_false);
/* Whether what is foretold is worth reading. */
bool gp_foresight_pays(const gp_foresight *foresight);
/* Whether to foretell all the same, to see whether it would be. Asked once for each token, or one each of a few sequences. */
bool gp_foresight_shall_learn(gp_foresight *foresight);

/* Of a context: tokens with look-ahead and tokens without take turns for a while, and what was faster more often is kept for a longer one. */
enum { GP_PAIRS = 16 };

typedef struct {
    uint64_t begun_ns;                  /* 0: no token is being measured */
    bool     is_on;                     /* what was faster */
    bool     is_trying;
    bool     looks;                     /* for the token at hand */
    uint32_t n_rows;                    /* of the batch at hand: one, or one each of so many sequences */
    uint32_t n_tokens;                  /* since this span, or this trial, began */
    uint32_t span;                      /* tokens until the next trial */
    uint64_t with_ns;                   /* of the pair at hand */
    uint32_t n_slower_now;              /* pairs of this trial in which the token with look-ahead was slower */
    float    n_pairs, n_slower;         /* of earlier trials; they fade */
} gp_contest;

/* A token, or one each of so many sequences, begins: contest->looks says whether to look ahead for it. */
void gp_contest_begin(gp_contest *contest, uint32_t n_rows, uint64_t now_ns);
void gp_contest_end(gp_contest *contest, uint64_t now_ns);

#endif
