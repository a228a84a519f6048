#include "slots/foresight.h"

/* ---- of a layer --------------------------------------------------------------------------------------------------- */

/* Below the first share nothing is read any more, from the second on it is again. What is read in vain costs its own time on a disk
 * that is busy, and nothing on one that is idle; what comes true saves at most as much. */
static const float POOR_SHARE = 0.4f, GOOD_SHARE = 0.5f;
/* So few make the first judgement, before which nothing is read; so many each later one, and then they count half. Of a poor layer one
 * token in so many is foretold to see whether it still is. */
enum { JUDGED_FIRST = 8, JUDGED = 32, LEARN_EVERY = 16 };

void gp_foresight_note(gp_foresight *f, uint32_t n_true, uint32_t n_false) {
    f->true_ones += (float) n_true;
    f->false_ones += (float) n_false;
    const float n = f->true_ones + f->false_ones;
    if (n >= (f->is_judged ? JUDGED : JUDGED_FIRST)) {
        f->is_poor = f->true_ones / n < (f->is_poor ? GOOD_SHARE : POOR_SHARE);
        f->is_judged = true;
    }
    if (n >= JUDGED) {
        f->true_ones /= 2;
        f->false_ones /= 2;
    }
}

bool gp_foresight_pays(const gp_foresight *f) {
    return f->is_judged && !f->is_poor;
}

bool gp_foresight_shall_learn(gp_foresight *f) {
    return !f->is_judged || f->n_passed++ % LEARN_EVERY == 0;
}

/* ---- of a context ------------------------------------------------------------------------------------------------- */

/* Tokens between trials: at first, and at most. A trial takes 2 * GP_PAIRS, half of which go the slower way. */
enum { FIRST_SPAN = 64, LONGEST_SPAN = 2048 };
/* It is left when so many of the pairs were slower with it, those of earlier trials counting half, a quarter and so on: of 32 that
 * make no difference so many are slower once in twenty times. It is taken up again when fewer than half were. What comes true is
 * judged already, so that the doubt is in its favour. */
static const float SLOWER_SHARE = 0.65f, FASTER_SHARE = 0.5f;

static void judge(gp_contest *c) {
    const float n = c->n_pairs + GP_PAIRS;
    const float share = (c->n_slower + (float) c->n_slower_now) / n;
    const bool is_on = share < (c->is_on ? SLOWER_SHARE : FASTER_SHARE);
    c->span = is_on != c->is_on ? FIRST_SPAN : c->span < LONGEST_SPAN ? 2 * c->span : LONGEST_SPAN;
    c->is_on = is_on;
    c->is_trying = false;
    c->n_pairs = n / 2;
    c->n_slower = (c->n_slower + (float) c->n_slower_now) / 2;
    c->n_tokens = 0;
}

void gp_contest_begin(gp_contest *c, uint32_t n_rows, uint64_t now_ns) {
    if (c->span == 0) {         /* made from zeros: nothing is known, and most often it pays */
        c->span = FIRST_SPAN;
        c->is_on = true;
    }
    if (c->is_trying && n_rows != c->n_rows) {
        c->is_trying = false;       /* other batches take another time */
        c->n_tokens = 0;
    }
    c->n_rows = n_rows;
    if (c->is_trying && c->n_tokens == 2 * GP_PAIRS) {
        judge(c);
    } else if (!c->is_trying && c->n_tokens >= c->span) {
        c->is_trying = true;
        c->n_tokens = c->n_slower_now = 0;
    }
    c->begun_ns = now_ns;
    c->looks = c->is_trying ? c->n_tokens % 2 == 0 : c->is_on;
}

void gp_contest_end(gp_contest *c, uint64_t now_ns) {
    if (c->begun_ns == 0) {
        return;
    }
    const uint64_t ns = now_ns - c->begun_ns;
    if (c->is_trying && c->n_tokens % 2 == 0) {
        c->with_ns = ns;
    } else if (c->is_trying) {
        c->n_slower_now += c->with_ns > ns;
    }
    c->n_tokens++;
    c->begun_ns = 0;
}
