/* Look-ahead measures itself. Of a layer: too little that comes true, and nothing is read for it but now and then, until enough does.
 * Of a context: what is faster is kept, and tried again; a token that something else held up decides nothing. */
#include "check.h"
#include "fake_os.h"
#include "slots/foresight.h"

/* Of a poor layer one token in so many is foretold. */
enum { LEARN_EVERY = 16 };

/* ---- of a layer --------------------------------------------------------------------------------------------------- */

static void note_often(gp_foresight *f, uint32_t n_true, uint32_t n_false) {
    for (int i = 0; i < 100; i++) {
        gp_foresight_note(f, n_true, n_false);
    }
}

static void layers_are_judged(void) {
    gp_foresight f = { 0 };
    CHECK(!gp_foresight_pays(&f), "at first nothing is read");
    for (int i = 0; i < 100; i++) {
        CHECK(gp_foresight_shall_learn(&f), "but each token is foretold");
    }
    gp_foresight_note(&f, 0, 2);
    note_often(&f, 0, 0);
    CHECK(!f.is_judged && gp_foresight_shall_learn(&f), "what little was missing, or was in slots anyway, says nothing");
    note_often(&f, 0, 8);
    CHECK(f.is_judged && f.is_poor && !gp_foresight_pays(&f), "where nothing comes true, nothing is read");
    f = (gp_foresight) { 0 };
    note_often(&f, 8, 2);
    CHECK(f.is_judged && !f.is_poor && gp_foresight_pays(&f), "where most does, it is");
    f = (gp_foresight) { 0 };
    gp_foresight_note(&f, 4, 0);
    gp_foresight_note(&f, 4, 0);
    CHECK(gp_foresight_pays(&f), "from the first tokens on");
}

static void poor_layers_learn_now_and_then(void) {
    gp_foresight f = { 0 };
    note_often(&f, 0, 8);
    uint32_t n_between = 0, n_learnt = 0;
    for (int i = 0; i < 20 * LEARN_EVERY; i++) {
        n_between++;
        if (gp_foresight_shall_learn(&f)) {
            CHECK(n_learnt == 0 || n_between == LEARN_EVERY, "as many tokens lie between any two");
            n_between = 0;
            n_learnt++;
        }
        CHECK(!gp_foresight_pays(&f), "nothing is read meanwhile");
    }
    CHECK(n_learnt == 20, "of a poor one in sixteen");
    note_often(&f, 8, 0);
    CHECK(gp_foresight_pays(&f), "and it comes back once it comes true");
}

/* It was good for long: that must not keep it from being found poor. */
static void the_past_fades(void) {
    gp_foresight f = { 0 };
    for (int i = 0; i < 10000; i++) {
        gp_foresight_note(&f, 8, 0);
    }
    uint32_t n = 0;
    for (; !f.is_poor && n < 1000; n++) {
        gp_foresight_note(&f, 0, 8);
    }
    CHECK(n > 1 && n < 40, "a few tokens decide, whatever was before");
}

/* The share in percent at which it changes its mind, coming from above or from below. */
static uint32_t turning_share(bool was_poor) {
    for (uint32_t step = 0; step <= 100; step++) {
        const uint32_t share = was_poor ? step : 100 - step;
        gp_foresight f = { .is_judged = true, .is_poor = was_poor };
        note_often(&f, share, 100 - share);
        if (f.is_poor != was_poor) {
            return share;
        }
    }
    return 101;
}

static void it_does_not_waver(void) {
    const uint32_t falls = turning_share(false), rises = turning_share(true);
    CHECK(falls > 10 && rises < 90, "both can happen");
    CHECK(falls + 5 < rises, "what lies between changes nothing");
}

/* ---- of a context ------------------------------------------------------------------------------------------------- */

/* Times of a token with and without look-ahead, and what of it is counted. */
typedef struct {
    uint64_t with_ns, without_ns;
    uint32_t n_looked;
} world;

static uint64_t now_ns;

static bool pass(gp_contest *c, world *w, uint32_t n_rows) {
    now_ns += 1000;
    gp_contest_begin(c, n_rows, now_ns);
    const bool looks = c->looks;
    now_ns += looks ? w->with_ns : w->without_ns;
    gp_contest_end(c, now_ns);
    w->n_looked += looks;
    return looks;
}

static void pass_many(gp_contest *c, world *w, uint32_t n_rows, uint32_t n) {
    w->n_looked = 0;
    for (uint32_t i = 0; i < n; i++) {
        (void) pass(c, w, n_rows);
    }
}

enum { LONG = 20000 };     /* tokens: many trials */

static void what_is_slower_is_turned_off(void) {
    gp_contest c = { 0 };
    world w = { .with_ns = 1200000, .without_ns = 1000000 };
    CHECK(pass(&c, &w, 1), "at first it is on");
    pass_many(&c, &w, 1, 400);
    CHECK(!c.is_on, "what is slower is turned off soon");
    pass_many(&c, &w, 1, LONG);
    CHECK(!c.is_on && w.n_looked > 0, "stays off, and is tried again");
    CHECK(w.n_looked < LONG / 50, "ever less often: it costs next to nothing");
}

static void what_is_faster_is_kept(void) {
    gp_contest c = { 0 };
    world w = { .with_ns = 800000, .without_ns = 1000000 };
    pass_many(&c, &w, 1, LONG);
    CHECK(c.is_on && w.n_looked < LONG, "what is faster is kept, although the other is tried");
    CHECK(w.n_looked > LONG - LONG / 50, "seldom");
}

/* Times that differ by chance alone, as they do on any machine. */
static void chance_seldom_decides(void) {
    uint32_t n_off = 0;
    for (int i = 0; i < 200; i++) {
        gp_contest c = { 0 };
        for (int token = 0; token < 120; token++) {     /* the first trial, and no other */
            world w = { .with_ns = 1000000 + fake_random(500000), .without_ns = 1000000 + fake_random(500000) };
            (void) pass(&c, &w, 1);
        }
        n_off += !c.is_on;
    }
    CHECK(n_off < 60, "what makes no difference is seldom taken for slower");
}

static void it_changes_its_mind(void) {
    gp_contest c = { 0 };
    world slower = { .with_ns = 1200000, .without_ns = 1000000 }, faster = { .with_ns = 800000, .without_ns = 1000000 };
    for (int i = 0; i < 3; i++) {
        pass_many(&c, &slower, 1, LONG);
        CHECK(!c.is_on, "off while it is slower");
        pass_many(&c, &faster, 1, LONG);
        CHECK(c.is_on, "on while it is faster, however long it was off");
    }
}

/* Tokens until a trial begins, which is seen by what is not the rule. */
static void pass_until_trial(gp_contest *c, world *w, uint32_t n_rows) {
    for (int i = 0; !c->is_trying; i++) {
        CHECK(i < LONG, "a trial comes");
        (void) pass(c, w, n_rows);
    }
}

static uint32_t tokens_of_trial(gp_contest *c, world *w, uint32_t n_rows) {
    uint32_t n = 0;
    while (c->is_trying) {
        CHECK(n < LONG, "a trial ends");
        (void) pass(c, w, n_rows);
        n++;
    }
    return n;
}

static void they_take_turns(void) {
    gp_contest c = { 0 };
    world w = { .with_ns = 800000, .without_ns = 1000000 };
    pass_until_trial(&c, &w, 1);
    bool looked = c.looks;
    for (int i = 1; i < 2 * GP_PAIRS; i++) {
        CHECK(pass(&c, &w, 1) == !looked, "in a trial one goes with it, the next without");
        looked = !looked;
    }
}

/* Batches of two take twice as long, with it or without: compared with those of one, either could win. */
static void other_batches_end_a_trial(void) {
    gp_contest c = { 0 };
    world one = { .with_ns = 800000, .without_ns = 1000000 }, two = { .with_ns = 2400000, .without_ns = 2000000 };
    pass_until_trial(&c, &one, 1);
    for (int i = 0; i < 2 * GP_PAIRS - 2; i++) {
        (void) pass(&c, &one, 1);
    }
    CHECK(c.is_trying, "the trial is nearly done");
    (void) pass(&c, &two, 2);
    CHECK(!c.is_trying && c.is_on, "it ends where batches are others, and decides nothing");
    pass_until_trial(&c, &two, 2);
    CHECK(tokens_of_trial(&c, &two, 2) <= 2 * GP_PAIRS + 1, "one of equal batches does not");
    CHECK(!c.is_on, "and is about these alone");
    pass_many(&c, &two, 2, 10);
    pass_many(&c, &two, 3, 10);
    CHECK(!c.is_trying && !c.is_on, "outside of a trial other batches change nothing");
}

/* Clients come and go: no trial ends. */
static void batches_that_keep_changing_decide_nothing(void) {
    gp_contest on = { 0 }, off = { 0 };
    world one = { .with_ns = 1200000, .without_ns = 1000000 }, two = { .with_ns = 2400000, .without_ns = 2000000 };
    for (int i = 0; i < LONG; i++) {
        (void) pass(&on, i % 2 ? &two : &one, 1 + i % 2);
    }
    CHECK(on.is_on, "what was never compared with its like is not turned off");
    pass_many(&off, &one, 1, 400);
    CHECK(!off.is_on, "what is known to be slower");
    one.n_looked = two.n_looked = 0;
    for (int i = 0; i < LONG; i++) {
        (void) pass(&off, i / 5 % 2 ? &two : &one, 1 + i / 5 % 2);
    }
    CHECK(!off.is_on && one.n_looked + two.n_looked < LONG / 4, "is not done for most of them in trials that never end");
}

static void an_outlier_decides_nothing(void) {
    for (uint32_t at = 0; at < 2 * GP_PAIRS; at++) {
        gp_contest fast = { 0 }, slow = { 0 };
        world faster = { .with_ns = 900000, .without_ns = 1000000 }, slower = { .with_ns = 1100000, .without_ns = 1000000 };
        world hour = { .with_ns = 3600000000000, .without_ns = 3600000000000 }, moment = { .with_ns = 1, .without_ns = 1 };
        pass_until_trial(&fast, &faster, 1);
        for (uint32_t i = 1; fast.is_trying; i++) {
            (void) pass(&fast, i == at ? &hour : i == at + 3 ? &moment : &faster, 1);
        }
        CHECK(fast.is_on, "what is faster is kept although one token took an hour, and another no time");
        pass_until_trial(&slow, &slower, 1);
        for (uint32_t i = 1; slow.is_trying; i++) {
            (void) pass(&slow, i == at ? &hour : i == at + 3 ? &moment : &slower, 1);
        }
        CHECK(!slow.is_on, "what is slower is turned off all the same");
    }
}

/* A decode that was stopped in a token: nothing is known of that one. */
static void a_token_without_an_end_counts_nothing(void) {
    gp_contest c = { 0 }, whole = { 0 };
    world w = { .with_ns = 900000, .without_ns = 1000000 };
    for (int i = 0; i < 2000; i++) {
        const bool looks = pass(&whole, &w, 1);
        now_ns += 1000;
        gp_contest_begin(&c, 1, now_ns);
        now_ns += 3600000000000;
        const uint64_t begun_ns = now_ns;
        gp_contest_begin(&c, 1, begun_ns);
        CHECK(c.looks == looks, "it goes on as if there had been none");
        now_ns += looks ? w.with_ns : w.without_ns;
        gp_contest_end(&c, now_ns);
    }
    CHECK(c.is_on == whole.is_on && c.n_tokens == whole.n_tokens && c.is_on, "and comes to the same end");
    const gp_contest before = c;
    gp_contest_end(&c, now_ns);
    CHECK(c.n_tokens == before.n_tokens, "an end without a token counts nothing either");
}

int main(void) {
    check_begin();
    layers_are_judged();
    poor_layers_learn_now_and_then();
    the_past_fades();
    it_does_not_waver();
    what_is_slower_is_turned_off();
    what_is_faster_is_kept();
    chance_seldom_decides();
    it_changes_its_mind();
    they_take_turns();
    other_batches_end_a_trial();
    batches_that_keep_changing_decide_nothing();
    an_outlier_decides_nothing();
    a_token_without_an_end_counts_nothing();
    return 0;
}
