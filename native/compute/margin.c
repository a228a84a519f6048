#include "compute/margin.h"

#include <math.h>

/* Where this share comes true reading is worth it: what is read in vain takes a disk's time, which is idle for half of a
 * token; waiting for what was not read takes everyone's. */
static const float WORTH = 0.3f;
/* Gaps to either side in which a choice is as good as at `least`; how far one of them moves it; tokens that a mean gap is of. */
static const float WINDOW = 0.3f, STEP = 0.02f, SPAN = 64;
/* Further out hardly anything is seen: a line that had wandered off there would not come back. */
static const float FURTHEST = 3;

void gp_margin_note(gp_margin *m, float last, float next) {
    m->gap += (last - next - m->gap) / (m->gap > 0 ? SPAN : 1);
}

float gp_margin_above(const gp_margin *m, float score, float last, float next) {
    const float above = score - (last + next) / 2;
    return m->gap > 0 ? above / m->gap : above >= 0 ? HUGE_VALF : -HUGE_VALF;
}

bool gp_margin_is_worth(const gp_margin *m, float above) {
    return above >= m->least;
}

bool gp_margin_is_doubtful(const gp_margin *m, float above) {
    return fabsf(above - m->least) < WINDOW;
}

void gp_margin_learn(gp_margin *m, bool has_come_true) {
    const float least = m->least + STEP * (WORTH - (float) has_come_true);
    m->least = fmaxf(-FURTHEST, fminf(least, FURTHEST));
}
