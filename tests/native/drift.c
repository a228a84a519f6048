/* What a layer's input will be at the next one, by a line through what was seen of late, number by number. */
#include <math.h>

#include "check.h"
#include "compute/drift.h"
#include "fake_os.h"

enum { N = 5 };

typedef float row[N];

static float draw(void) {
    return (float) fake_random(20001) / 10000 - 1;
}

/* Of line k: another slope and offset for each number, one of them flat, one falling. */
static void move(int k, const row here, row next) {
    for (int i = 0; i < N; i++) {
        next[i] = ((float) i - 1.5f + (float) k) * here[i] + 3 * (float) (i % 2) - (float) k;
    }
}

static void draw_row(row here) {
    for (int i = 0; i < N; i++) {
        here[i] = draw() + (float) i;
    }
}

static void learn_line(gp_drift *d, int k, int n_tokens) {
    row here, next;
    for (int t = 0; t < n_tokens; t++) {
        draw_row(here);
        move(k, here, next);
        gp_drift_learn(d, N, here, next);
    }
}

/* By how much it is wrong at most. */
static float error_of(const gp_drift *d, int k) {
    float most = 0;
    for (int t = 0; t < 50; t++) {
        row here, next, guessed;
        draw_row(here);
        move(k, here, next);
        gp_drift_follow(d, N, here, guessed);
        for (int i = 0; i < N; i++) {
            CHECK(isfinite(guessed[i]), "a guess is a number");
            most = fmaxf(most, fabsf(guessed[i] - next[i]));
        }
    }
    return most;
}

static gp_drift opened(void) {
    gp_drift d = { 0 };
    CHECK(gp_drift_open(&d, N), "there is memory");
    return d;
}

static void a_line_is_learnt(void) {
    gp_drift d = opened();
    learn_line(&d, 0, 40);
    CHECK(error_of(&d, 0) < 0.05f, "soon");
    learn_line(&d, 0, 2000);
    CHECK(error_of(&d, 0) < 0.01f, "and well");
    CHECK(error_of(&d, 2) > 0.5f, "not another one");
    gp_drift_close(&d);
}

static void the_past_fades(void) {
    gp_drift d = opened();
    learn_line(&d, 0, 100000);
    learn_line(&d, 2, 6000);
    CHECK(error_of(&d, 2) < 0.05f, "another text, another line, however long the first one was");
    gp_drift_close(&d);
}

/* Nothing changes in the first place: no slope can be told. */
static void constant_inputs_move_as_they_did(void) {
    gp_drift d = opened();
    const row here = { 1, -2, 0, 1e6f, 0.1f }, next = { 3, -2, 5, 1e6f, -0.1f };
    for (int t = 0; t < 1000; t++) {
        gp_drift_learn(&d, N, here, next);
    }
    row guessed, other;
    gp_drift_follow(&d, N, here, guessed);
    for (int i = 0; i < N; i++) {
        CHECK(fabsf(guessed[i] - next[i]) <= 1e-5f * fabsf(next[i]) + 1e-6f, "the same input leads to the same again");
        other[i] = here[i] + 1;
    }
    gp_drift_follow(&d, N, other, guessed);
    for (int i = 0; i < N; i++) {
        CHECK(fabsf(guessed[i] - next[i] - 1) <= 0.1f, "another one keeps its distance");
    }
    gp_drift_close(&d);
}

/* Two points make a line of any slope: of so few only the step is believed. */
static void few_samples_give_a_step(void) {
    gp_drift d = opened();
    const row origin = { 0.5f, 0, -1, 2, 7 };
    row guessed;
    gp_drift_follow(&d, N, origin, guessed);
    for (int i = 0; i < N; i++) {
        CHECK(guessed[i] == origin[i], "of nothing that was seen it stays as it is");
    }
    for (int t = 0; t < 3; t++) {
        const float at = (float) t;
        gp_drift_learn(&d, N, (row) { at, at, at, at, at }, (row) { 100 * at, 100 * at, 100 * at, 100 * at, 100 * at });
    }
    gp_drift_follow(&d, N, (row) { 2, 2, 2, 2, 2 }, guessed);
    for (int i = 0; i < N; i++) {
        CHECK(fabsf(guessed[i] - 101) < 0.01f, "the mean of the next, and the distance from the mean here");
    }
    gp_drift_close(&d);
}

/* Better than that nothing changes, where what comes is noisy. */
static void noise_is_averaged(void) {
    gp_drift d = opened();
    row here, next, guessed;
    double ours = 0, still = 0;
    for (int t = 0; t < 2000; t++) {
        draw_row(here);
        for (int i = 0; i < N; i++) {
            next[i] = 0.5f * here[i] + 0.3f + 0.2f * draw();
        }
        if (t >= 100) {
            gp_drift_follow(&d, N, here, guessed);
            for (int i = 0; i < N; i++) {
                ours += (double) (guessed[i] - next[i]) * (guessed[i] - next[i]);
                still += (double) (here[i] - next[i]) * (here[i] - next[i]);
            }
        }
        gp_drift_learn(&d, N, here, next);
    }
    CHECK(ours < still / 10, "it is nearer than the input itself");
    gp_drift_close(&d);
}

static void a_guess_may_take_the_inputs_place(void) {
    gp_drift d = opened();
    learn_line(&d, 1, 100);
    row here, guessed;
    draw_row(here);
    gp_drift_follow(&d, N, here, guessed);
    gp_drift_follow(&d, N, here, here);
    for (int i = 0; i < N; i++) {
        CHECK(here[i] == guessed[i], "it is the same");
    }
    gp_drift_close(&d);
}

static void without_memory_there_is_none(void) {
    gp_drift d = { 0 };
    fake_fail(FAKE_ALLOCATE, 1, -1);
    CHECK(!gp_drift_open(&d, N) && !d.here && !fake_is_armed(), "it says so");
    gp_drift_close(&d);
    CHECK(fake_allocations() == 0, "nothing is left behind, here and before");
}

/* A context lives on after a batch of nonsense, which nobody may have meant. */
static void nonsense_is_forgotten(void) {
    static const float nonsense[] = { NAN, INFINITY, -INFINITY, 1e38f, -1e30f };
    for (size_t i = 0; i < sizeof nonsense / sizeof nonsense[0]; i++) {
        for (int when = 0; when < 2; when++) {
            gp_drift d = opened();
            learn_line(&d, 0, when * 100);
            row here, next;
            draw_row(here);
            move(0, here, next);
            here[1] = next[3] = nonsense[i];
            gp_drift_learn(&d, N, here, next);
            gp_drift_learn(&d, N, next, here);
            learn_line(&d, 0, 2000);
            CHECK(error_of(&d, 0) < 0.05f, "as if it had not been");
            gp_drift_close(&d);
        }
    }
}

int main(void) {
    check_begin();
    fake_reset();
    a_line_is_learnt();
    the_past_fades();
    constant_inputs_move_as_they_did();
    few_samples_give_a_step();
    noise_is_averaged();
    a_guess_may_take_the_inputs_place();
    without_memory_there_is_none();
    nonsense_is_forgotten();
    return 0;
}
