/* Which choices are read for: those whose score lies so far above the line, or so little below it, that three in ten or more of their
 * like come true. */
#include <math.h>

#include "check.h"
#include "compute/margin.h"
#include "fake_os.h"

static float draw(void) {
    return (float) fake_random(1000001) / 1000000;
}

/* How often a choice comes true that lies so many gaps above the line: `sharp` where a guess says much. */
static float truth(float above, float middle, float sharp) {
    return 1 / (1 + expf(-sharp * (above - middle)));
}

/* Tokens of a router whose scores lie in [-gap, gap] of the line, a line that is another for each token. */
static void pass(gp_margin *m, float gap, float middle, float sharp, int n_tokens) {
    for (int t = 0; t < n_tokens; t++) {
        const float line = 100 * draw() - 50, half = gap * (0.5f + draw()) / 2;
        gp_margin_note(m, line + half, line - half);
        for (int rank = 0; rank < 5; rank++) {
            const float above = gp_margin_above(m, line + gap * (4 * draw() - 2), line + half, line - half);
            if (gp_margin_is_doubtful(m, above)) {
                gp_margin_learn(m, draw() < truth(above, middle, sharp));
            }
        }
    }
}

static float mean_least(gp_margin *m, float gap, float middle, float sharp) {
    float sum = 0;
    for (int i = 0; i < 400; i++) {
        pass(m, gap, middle, sharp, 10);
        sum += m->least;
    }
    return sum / 400;
}

/* Three in ten come true where the logarithm of the odds is ln(0.3 / 0.7). */
static float worth_at(float middle, float sharp) {
    return middle + logf(0.3f / 0.7f) / sharp;
}

static void what_is_likely_enough_is_read_for(void) {
    static const struct { float gap, middle, sharp; } routers[] = {
        { 0.03f, 0, 8 }, { 0.03f, 0, 3 }, { 20, 0, 8 }, { 20, 0.8f, 5 }, { 1e-4f, -0.5f, 5 },
    };
    for (size_t i = 0; i < sizeof routers / sizeof routers[0]; i++) {
        const float gap = routers[i].gap, middle = routers[i].middle, sharp = routers[i].sharp;
        gp_margin m = { 0 };
        pass(&m, gap, middle, sharp, 2000);
        CHECK(fabsf(m.gap / gap - 1) < 0.2f, "the gap is what scores are apart, whatever their size");
        CHECK(fabsf(mean_least(&m, gap, middle, sharp) - worth_at(middle, sharp)) < 0.08f, "the line is where three in ten come true");
    }
}

static void another_text_has_another_line(void) {
    gp_margin m = { 0 };
    pass(&m, 1, 0, 6, 20000);
    pass(&m, 1, 1, 6, 2000);
    CHECK(fabsf(mean_least(&m, 1, 1, 6) - worth_at(1, 6)) < 0.08f, "it is found again, however long the first one was");
}

/* Scores as routers have them: most lie near the line, few far from it. */
static void pass_near(gp_margin *m, float middle, int n_tokens) {
    for (int t = 0; t < n_tokens; t++) {
        gp_margin_note(m, 0.5f, -0.5f);
        for (int rank = 0; rank < 5; rank++) {
            const float above = gp_margin_above(m, (draw() + draw() + draw() + draw() - 2) * 2, 0.5f, -0.5f);
            if (gp_margin_is_doubtful(m, above)) {
                gp_margin_learn(m, draw() < truth(above, middle, 6));
            }
        }
    }
}

static void after_long_nonsense_it_comes_back(void) {
    gp_margin m = { 0 };
    pass_near(&m, 1000, 200000);
    CHECK(m.least > 1.5f, "nothing came true");
    pass_near(&m, 0, 20000);
    CHECK(fabsf(m.least - worth_at(0, 6)) < 0.3f, "it comes back");
}

static void what_never_comes_true_is_left(void) {
    gp_margin m = { 0 };
    pass(&m, 1, 1000, 1, 2000);
    CHECK(m.least > 1.5f && m.least < 2.5f, "nothing that was seen is worth it any more; further out nothing was seen");
}

static void before_anything_was_seen_it_is_the_routers_own_choice(void) {
    gp_margin m = { 0 };
    CHECK(gp_margin_is_worth(&m, gp_margin_above(&m, 5, 5, 3)), "the last one chosen is read for");
    CHECK(!gp_margin_is_worth(&m, gp_margin_above(&m, 3, 5, 3)), "the first one not chosen is not");
    gp_margin_note(&m, 5, 3);
    CHECK(gp_margin_is_worth(&m, gp_margin_above(&m, 5, 5, 3)), "likewise with the first gap");
    CHECK(!gp_margin_is_worth(&m, gp_margin_above(&m, 3, 5, 3)), "and below it");
}

static void distance_is_from_the_middle_in_mean_gaps(void) {
    gp_margin m = { 0 };
    gp_margin_note(&m, 5, 3);
    CHECK(m.gap == 2, "the first gap is all that is known");
    CHECK(gp_margin_above(&m, 5, 5, 3) == 0.5f && gp_margin_above(&m, 3, 5, 3) == -0.5f, "the line is in the middle");
    CHECK(gp_margin_above(&m, 104, 101, 99) == 2, "of this token's, measured with what gaps are on average");
    gp_margin_note(&m, 5, -3);
    CHECK(m.gap > 2 && m.gap < 2.5f, "one other changes little");
}

static void what_was_learnt_decides(void) {
    for (int has_come_true = 0; has_come_true < 2; has_come_true++) {
        gp_margin m = { 0 };
        for (int i = 0; i < 100; i++) {
            gp_margin_learn(&m, has_come_true);
        }
        CHECK(has_come_true ? m.least < -0.5f : m.least > 0.5f, "it has moved");
        CHECK(!gp_margin_is_worth(&m, m.least - 0.1f) && gp_margin_is_worth(&m, m.least) && gp_margin_is_worth(&m, m.least + 0.1f),
              "what lies above it is read for, and nothing below");
        CHECK(gp_margin_is_doubtful(&m, m.least - 0.1f) && gp_margin_is_doubtful(&m, m.least + 0.1f), "doubts are to both sides of it");
        CHECK(!gp_margin_is_doubtful(&m, m.least - 1) && !gp_margin_is_doubtful(&m, m.least + 1), "and near");
    }
}

static void it_keeps_still_once_it_is_found(void) {
    gp_margin m = { 0 };
    pass(&m, 1, 0, 6, 2000);
    float least = m.least, most = m.least;
    for (int t = 0; t < 2000; t++) {
        pass(&m, 1, 0, 6, 1);
        least = fminf(least, m.least);
        most = fmaxf(most, m.least);
    }
    CHECK(most - least < 0.5f, "one choice says little");
}

static void equal_scores_are_taken(void) {
    gp_margin m = { 0 };
    for (int i = 0; i < 100; i++) {
        gp_margin_note(&m, 1, 1);
    }
    const float above = gp_margin_above(&m, 1, 1, 1);
    CHECK(gp_margin_is_worth(&m, above) && !gp_margin_is_doubtful(&m, above), "no distance can be told: as the router ranks them");
    gp_margin_note(&m, 2, 1);
    CHECK(isfinite(gp_margin_above(&m, 3, 2, 1)), "until there is one");
}

int main(void) {
    check_begin();
    fake_reset();
    what_is_likely_enough_is_read_for();
    another_text_has_another_line();
    what_never_comes_true_is_left();
    after_long_nonsense_it_comes_back();
    before_anything_was_seen_it_is_the_routers_own_choice();
    distance_is_from_the_middle_in_mean_gaps();
    what_was_learnt_decides();
    it_keeps_still_once_it_is_found();
    equal_scores_are_taken();
    return 0;
}
