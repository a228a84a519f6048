#include "slots/foresight.h"

#include <stdlib.h>

/* ---- of a layer --------------------------------------------------------------------------------------------------- */

/* Below the first share nothing is read any more, from the second on it is again. What is read in vain costs its own time on a disk
 * that is busy, and nothing on one that is idle; what comes true saves at most as much. */
static const float POOR_SHARE = 0.4f, GOOD_SHARE = 0.5f;
/* So many make a judgement, and then count half; of a poor layer one token in so many is foretold to see whether it still is. */
enum { JUDGED = 32, LEARN_EVERY = 16 };

void gp_foresight_note(gp_foresight *f, uint32_t n_true, uint32_t n_false) {
    f->true_ones += (float) n_true;
    f->false_ones += (float) n_false;
    const float n = f->true_ones + f->false_ones;
    if (n >= JUDGED) {
        const float share = f->true_ones / n;
        f->is_poor = share < (f->is_poor ? GOOD_SHARE : POOR_SHARE);
        f->true_ones /= 2;
        f->false_ones /= 2;
    }
}

bool gp_foresight_shall_learn(gp_foresight *f) {
    return !f->is_poor || f->n_passed++ % LEARN_EVERY == 0;
}

/* ---- of a context ------------------------------------------------------------------------------------------------- */

/* Tokens between trials: at first, and at most. A trial takes 2 * GP_PAIRS, half of which go the slower way. */
enum { FIRST_SPAN = 64, LONGEST_SPAN = 2048 };
/* It must be so much faster: what is the same is better left alone. */
static const double LEAST_GAIN = 1.01;

static int by_time(const void *left, const void *right) {
    const uint64_t a = *(const uint64_t *) left, b = *(const uint64_t *) right;
    return (a > b) - (a < b);
}

/* Of what is between the quarters: a token that was held up by something else is none. */
static double middle_mean(uint64_t *ns) {
    double sum = 0;
    qsort(ns, GP_PAIRS, sizeof *ns, by_time);
    for (uint32_t i = GP_PAIRS / 4; i < GP_PAIRS - GP_PAIRS / 4; i++) {
        sum += (double) ns[i];
    }
    return sum;
}

static void judge(gp_contest *c) {
    const bool wins = middle_mean(c->without_ns) >= middle_mean(c->with_ns) * LEAST_GAIN;
    c->span = wins != c->is_on ? FIRST_SPAN : c->span < LONGEST_SPAN ? 2 * c->span : LONGEST_SPAN;
    c->is_on = wins;
    c->is_trying = false;
    c->n_tokens = 0;
}

void gp_contest_begin(gp_contest *c, uint32_t n_rows, uint64_t now_ns) {
    if (c->span == 0) {         /* made from zeros: nothing is known, and most often it pays */
        c->span = FIRST_SPAN;
        c->is_on = true;
    }
    if (c->is_trying && n_rows != c->n_rows) {
        c->n_tokens = 0;        /* other batches take another time */
    }
    c->n_rows = n_rows;
    if (c->is_trying && c->n_tokens == 2 * GP_PAIRS) {
        judge(c);
    } else if (!c->is_trying && c->n_tokens >= c->span) {
        c->is_trying = true;
        c->n_tokens = 0;
    }
    c->begun_ns = now_ns;
    c->looks = c->is_trying ? c->n_tokens % 2 == 0 : c->is_on;
}

void gp_contest_end(gp_contest *c, uint64_t now_ns) {
    if (c->begun_ns == 0) {
        return;
    }
    if (c->is_trying) {
        (c->n_tokens % 2 == 0 ? c->with_ns : c->without_ns)[c->n_tokens / 2] = now_ns - c->begun_ns;
    }
    c->n_tokens++;
    c->begun_ns = 0;
}
