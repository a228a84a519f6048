/* Look-ahead: what the next layer's router will probably choose is read, is not given up before its layer's turn, and is the first to go
 * after it. It is counted for what it is. */
#define _POSIX_C_SOURCE 200809L  /* nanosleep */
#include <errno.h>
#include <time.h>

#include "foretold.h"

/* ---- what is read, and how it is counted ---------------------------------------------------------------------------- */

static void what_is_likely_is_read_and_counted(void) {
    begin((model_shape) { .n_slots = 3 * EXPERTS });
    pass(&hold, 0, SOME(0, 1), SOME(3, 4, 5));
    model_settle(pager);
    CHECK(is_here(1, 3) && is_here(1, 4) && is_here(1, 5) && counters_of(1).resident == 3, "what is likely is read, and no more");
    gp_counters c = counters_of(1);
    CHECK(c.hits + c.misses + c.foreseen + c.in_vain + c.tokens == 0, "nothing is counted before the layer's turn");
    use(&hold, 1, SOME(3, 4, 6));
    c = counters_of(1);
    CHECK(c.hits == 0 && c.misses == 3, "without it all three would have been read on demand: misses");
    CHECK(c.foreseen == 2 && c.in_vain == 1, "two of them were foreseen, one was read in vain");
    CHECK(experts_read(1) == 4, "none was read twice");
    use(&hold, 1, SOME(3, 4));
    c = counters_of(1);
    CHECK(c.hits == 2 && c.misses == 3 && c.foreseen == 2, "from then on they are in slots as any");
    use(&hold, 1, SOME(5));
    c = counters_of(1);
    CHECK(c.hits == 3 && c.in_vain == 1, "what came in vain, and is wanted by a later token, is a hit");
    end();
}

/* The layer's turn comes while its reads are on their way. */
static void what_is_on_its_way_is_joined(void) {
    begin((model_shape) { .n_slots = 3 * EXPERTS, .n_readers = 1, .piece_bytes = WHOLE_SLICE });
    use(&hold, 0, SOME(0, 1));
    fake_hold_reads();
    pass(&hold, 0, SOME(0, 1), SOME(3, 4));
    CHECK(begin_wave(&hold, 1, SOME(3, 4, 6), 1) == 0, "a wave begins");
    const gp_counters c = counters_of(1);
    CHECK(c.misses == 3 && c.hits == 0 && c.foreseen == 2 && c.in_vain == 0, "they count as those that have come");
    fake_let_reads_go();
    CHECK(finish_wave(&hold) == 0 && experts_read(1) == 3, "and are waited for, not read again");
    end();
}

/* Foretold, but in a slot anyway: neither gain nor loss. */
static void what_is_in_slots_gains_nothing(void) {
    begin((model_shape) { .n_slots = 3 * EXPERTS });
    use(&hold, 1, SOME(3, 4));
    pass(&hold, 0, SOME(0, 1), SOME(3, 4));
    use(&hold, 1, SOME(3, 5));
    const gp_counters c = counters_of(1);
    CHECK(c.hits == 1 && c.misses == 3 && c.foreseen == 0 && c.in_vain == 0, "a hit is a hit, and nothing was read in vain");
    CHECK(experts_read(1) == 3, "or read again");
    end();
}

static void a_new_forecast_ends_the_old_one(void) {
    begin((model_shape) { .n_slots = 3 * EXPERTS });
    pass(&hold, 0, SOME(0, 1), SOME(3, 4));
    model_settle(pager);
    CHECK(count_foretold() == 2, "two are foretold");
    pass(&hold, 0, SOME(0, 1), SOME(4, 5, 6));
    model_settle(pager);
    CHECK(count_foretold() == 3 && is_here(1, 3), "of a token anew: those three, the other is kept as long as there is room");
    use(&hold, 1, SOME(4, 3));
    const gp_counters c = counters_of(1);
    CHECK(c.in_vain == 2 && c.misses + c.hits == 2 && experts_read(1) == 4, "only what this forecast read is in vain");
    CHECK(count_foretold() == 0, "after its turn nothing is foretold");
    end();
}

static void what_is_foretold(gp_look wanted, const char *what, uint32_t layer, uint32_t n_tokens) {
    CHECK(begin_wave(&hold, layer, SOME(0, 1), n_tokens) == 0, "a wave begins");
    CHECK(hold.look == wanted, what);
    CHECK(finish_wave(&hold) == 0, "and ends well");
}

static void who_is_looked_ahead_for(void) {
    begin((model_shape) { .n_slots = 3 * EXPERTS });
    what_is_foretold(GP_LOOK_TO_READ, "for a token", 0, 1);
    what_is_foretold(GP_LOOK_TO_READ, "for one each of a few sequences", 0, GP_LOOK_ROWS);
    what_is_foretold(GP_LOOK_NOT, "not for a prompt", 0, GP_LOOK_ROWS + 1);
    what_is_foretold(GP_LOOK_NOT, "there is nothing behind the last layer", 2, 1);
    gp_look_ahead_note_router(pager, 2, false);
    what_is_foretold(GP_LOOK_NOT, "not of a router of another kind", 1, 1);
    CHECK(counters_of(0).sight == GP_SIGHT_FIRST && counters_of(1).sight == GP_SIGHT_ON && counters_of(2).sight == GP_SIGHT_OTHER,
          "it is said of each layer");
    end();
    begin_as((model_shape) { .n_slots = 3 * EXPERTS }, GP_LOOK_NEVER);
    what_is_foretold(GP_LOOK_NOT, "nor where nobody wants it", 0, 1);
    CHECK(counters_of(0).sight == GP_SIGHT_OFF && counters_of(1).sight == GP_SIGHT_OFF, "which is said as well");
    end();
}

static void unseen_routers_are_not_asked(void) {
    model_make(&m, (model_shape) { .n_experts = EXPERTS, .n_slots = 3 * EXPERTS });
    m.config.look_ahead = GP_LOOK_ALWAYS;
    pager = model_open(&m);
    CHECK(gp_hold_open(&hold, pager) == 0 && gp_hold_open(&other, pager) == 0, "two holds open");
    what_is_foretold(GP_LOOK_NOT, "a router that nobody has seen yet", 0, 1);
    CHECK(counters_of(1).sight == GP_SIGHT_UNSEEN, "it is said");
    end();
}

/* Tokens of which what is foretold does not come true, or does, until the next layer is no longer said to be so. */
static uint32_t pass_while(gp_sight sight, some comes_true) {
    uint32_t n = 0;
    for (; counters_of(1).sight == sight; n++) {
        CHECK(n < 1000, "it changes");
        pass(&hold, 0, SOME(0, 1), SOME(3, 4));
        CHECK((sight == GP_SIGHT_ON) == (hold.look == GP_LOOK_TO_READ), "it is read for exactly where it is on");
        use(&hold, 1, comes_true);
    }
    model_settle(pager);
    return n;
}

/* Only layers 0 and 1 pass, so that no token ends and no times are compared. */
static void a_poor_layer_only_learns_and_comes_back(void) {
    begin_as((model_shape) { .n_slots = 3 }, GP_LOOK_AUTO);
    const some right = SOME(3, 4), wrong = SOME(7, 8);
    pass_while(GP_SIGHT_UNSEEN, wrong);
    CHECK(counters_of(1).sight == GP_SIGHT_POOR, "what never comes true is found out");
    uint32_t n_learnt = 0;
    for (uint32_t t = 0; t < 32; t++) {
        pass(&hold, 0, SOME(0, 1), SOME(3, 4));
        n_learnt += hold.look == GP_LOOK_TO_LEARN;
        use(&hold, 1, wrong);
    }
    CHECK(n_learnt == 2, "then one token in sixteen is learnt from");
    CHECK(!is_here(1, 3) && counters_of(1).in_vain == 0 && counters_of(1).foreseen == 0, "nothing was read for it, ever");
    CHECK(pass_while(GP_SIGHT_POOR, right) > 16, "it comes back, not by one token");
    CHECK(counters_of(1).sight == GP_SIGHT_ON && counters_of(1).foreseen == 0, "without a read until then");
    pass(&hold, 0, SOME(0, 1), SOME(5));
    CHECK(hold.look == GP_LOOK_TO_READ, "it is read for");
    use(&hold, 1, SOME(5));
    CHECK(counters_of(1).foreseen == 1, "to some use");
    CHECK(pass_while(GP_SIGHT_ON, wrong) > 4, "it is given up again, not for a few");
    CHECK(counters_of(1).sight == GP_SIGHT_POOR && counters_of(1).in_vain > 4, "that were read in vain");
    end();
}

/* ---- slots ------------------------------------------------------------------------------------------------------------ */

/* Another context comes by for long between a layer's forecast and its turn. */
static void come_by(uint32_t n_times) {
    for (uint32_t i = 0; i < n_times; i++) {
        use(&other, 2, (some) { (int32_t[]) { (int32_t) (i % 9), (int32_t) (i % 9) + 1 }, 2 });
    }
}

static void what_is_foretold_stays_until_its_turn(void) {
    for (int is_foretold = 0; is_foretold < 2; is_foretold++) {
        begin((model_shape) { .n_slots = 5, .n_layers = 3 });      /* a floor of one slot a layer */
        use(&hold, 1, SOME(7));
        use(&hold, 1, SOME(8));
        use(&hold, 0, SOME(0, 1));
        pass(&hold, 0, SOME(0, 1), is_foretold ? SOME(7, 3) : SOME(3));
        model_settle(pager);
        come_by(30);
        CHECK(is_here(1, 3), "what was read for it is still there after thirty other tokens");
        CHECK(is_here(1, 7) == (is_foretold == 1), "and what was there already, if it was foretold, too");
        use(&hold, 1, SOME(9));
        CHECK(is_here(1, 9) && count_foretold() == 0, "its turn has come");
        come_by(30);
        CHECK(!is_here(1, 3), "then it goes as any");
        end();
    }
}

/* All slots are full of what tokens wanted, but for one that was read in vain: it makes room, whatever is worth less. */
static void what_was_in_vain_goes_first(void) {
    begin((model_shape) { .n_slots = 8 });
    use(&hold, 2, SOME(0, 1));
    use(&hold, 1, SOME(0, 1));
    use(&hold, 0, SOME(0, 1));
    pass(&hold, 0, SOME(0, 1), SOME(3, 4));
    model_settle(pager);
    CHECK(pager->classes[0].n_free == 0, "all slots are full");
    use(&hold, 1, SOME(4, 5));
    CHECK(!is_here(1, 3) && is_here(1, 4) && is_here(1, 5), "what nobody wanted makes room for what is");
    for (uint32_t l = 0; l < 3; l++) {
        CHECK(is_here(l, 0) && is_here(l, 1), "and not what somebody did");
    }
    CHECK(counters_of(1).bytes_wasted == expert_bytes(1), "it was wasted, to the byte");
    end();
}

/* The expert of least worth makes room for what is likely; what is likely itself never does, nor what is held or pinned. */
static void it_takes_what_is_worth_least(void) {
    begin((model_shape) { .n_slots = 6, .n_layers = 3 });
    use(&hold, 2, SOME(5));         /* worth least: longest ago */
    use(&hold, 2, SOME(6));
    use(&hold, 2, SOME(7));
    use(&hold, 1, SOME(3));
    use(&hold, 0, SOME(0, 1));
    pass(&hold, 0, SOME(0, 1), SOME(3, 4));
    model_settle(pager);
    CHECK(!is_here(2, 5) && is_here(1, 4) && is_here(1, 3) && is_here(0, 0) && is_here(0, 1), "the one of least worth goes");
    end();
    begin((model_shape) { .n_slots = 4, .n_layers = 2 });
    gp_failure failure;
    CHECK(gp_pager_pin(pager, 1, (int32_t[]) { 8 }, 1, NULL, NULL, &failure) == 0, "one is pinned");
    pass(&hold, 0, SOME(0, 1), SOME(2, 3, 4, 5, 6));
    CHECK(is_here(1, 8) && is_here(1, 2) && !is_here(1, 3) && !is_here(1, 4), "as many as there are slots for, the likeliest first");
    CHECK(is_here(0, 0) && is_here(0, 1), "what is computed with stays");
    use(&hold, 1, SOME(2, 3));
    CHECK(counters_of(1).foreseen == 1 && counters_of(1).in_vain == 0 && is_here(1, 8), "what there was no slot for is only missed");
    end();
}

/* Every slot is foretold by a hold: others want them, and go on. */
static void the_smallest_arena_goes_on(uint32_t n_slots, uint32_t n_tokens) {
    begin((model_shape) { .n_slots = n_slots, .n_used = n_slots });
    const some two = { all + 3, n_slots < 2 ? n_slots : 2 };
    for (int round = 0; round < 3; round++) {
        CHECK(begin_wave(&hold, 0, SOME(0, 1), 1) == 0 && finish_wave(&hold) == 0, "a token passes");
        foretell(&hold, two);
        model_settle(pager);
        CHECK(count_foretold() == n_slots, "every slot is foretold");
        model_use(&m, pager, &other, 2, all, n_tokens > 1 ? EXPERTS : 2, n_tokens);
        CHECK(count_foretold() < n_slots, "others take as many as they need all the same");
        use(&hold, 1, SOME(3, 4));
    }
    const gp_counters c = counters_of(1);
    CHECK(c.misses == 6 && c.hits == 0 && c.in_vain == 0, "without look-ahead all would have been missed");
    CHECK(c.bytes_wasted == (3 * n_slots - c.foreseen) * expert_bytes(1), "what was given up meanwhile was wasted, and not foreseen");
    CHECK(c.foreseen == 0 || n_tokens > 1, "a token needs them all");
    CHECK(counters_of(2).left_alone == 0, "nothing was done without");
    end();
}

static void *use_last_layer(void *data) {
    (void) data;
    use(&other, 2, SOME(5, 6));
    return NULL;
}

/* The same while all of them are still being read. */
static void the_smallest_arena_goes_on_once_it_is_read(void) {
    begin((model_shape) { .n_slots = 2 });
    use(&hold, 0, SOME(0, 1));
    fake_hold_reads();
    foretell(&hold, SOME(3, 4));
    fake_wait_for_reads(1);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, use_last_layer, NULL) == 0, "the test has threads");
    nanosleep(&(struct timespec) { .tv_nsec = 20000000 }, NULL);
    fake_let_reads_go();
    pthread_join(thread, NULL);
    CHECK(counters_of(2).left_alone == 0 && (is_here(2, 5) || is_here(2, 6)), "it waits until one is read, and takes it");
    use(&hold, 1, SOME(3, 4));
    end();
}

/* More rows than slots: what is foretold must not take the slots that the rest of the wave waits for. */
static void its_own_wave_goes_on(void) {
    begin((model_shape) { .n_slots = 3 });
    for (int round = 0; round < 20; round++) {
        CHECK(begin_wave(&hold, 0, (some) { all, EXPERTS }, 5) == 0, "a wave begins");
        CHECK(hold.look == GP_LOOK_TO_READ && hold.next < hold.n_wanted, "which has to go through few slots");
        foretell(&hold, SOME(3, 4, 5, 6));
        CHECK(finish_wave(&hold) == 0, "all of it comes");
        model_check_invariants(pager);
        model_use(&m, pager, &hold, 1, all + 3, 4, 5);
    }
    CHECK(counters_of(0).left_alone + counters_of(1).left_alone == 0, "nothing was done without");
    end();
}

static void a_closed_hold_protects_nothing(void) {
    begin((model_shape) { .n_slots = 6 });
    use(&hold, 0, SOME(0, 1));
    foretell(&hold, SOME(3, 4));
    CHECK(count_foretold() == 2, "two are foretold");
    gp_hold_close(&hold, pager);
    CHECK(count_foretold() == 0, "for nobody, once it is closed");
    model_settle(pager);
    come_by(20);
    CHECK(!is_here(1, 3) && !is_here(1, 4), "they are the first to go");
    CHECK(gp_hold_open(&hold, pager) == 0, "the next one in its place");
    use(&hold, 1, SOME(3, 4));
    CHECK(counters_of(1).foreseen == 0 && counters_of(1).in_vain == 0, "has foretold nothing");
    end();
}

static bool yes(void *data) {
    (void) data;
    return true;
}

/* A decode that stops between a forecast and its turn. */
static void a_stopped_hold_protects_nothing(void) {
    begin((model_shape) { .n_slots = 6 });
    gp_watch watch = { .os = &fake_os, .ask = yes };
    use(&hold, 0, SOME(0, 1));
    CHECK(begin_wave(&hold, 0, SOME(0, 1), 1) == 0, "a wave begins");
    foretell(&hold, SOME(3, 4));
    hold.watch = &watch;
    CHECK(gp_wave_stops(&hold, true), "the decode shall stop");
    gp_failure failure;
    CHECK(gp_wave_end(pager, &hold, &failure) == -EINTR, "and does");
    gp_hold_release(pager, &hold);
    CHECK(count_foretold() == 0, "what it has foretold is nobody's");
    hold.watch = NULL;
    use(&hold, 1, SOME(3, 5));      /* the next decode begins anywhere */
    use(&hold, 0, SOME(0, 1));
    end();
}

/* Foretold by two, and read for the first: whose turn may come first, and who may be wrong. */
static void what_another_has_foretold_too_stays(bool is_read) {
    begin((model_shape) { .n_slots = 3 * EXPERTS, .n_readers = 1, .piece_bytes = WHOLE_SLICE });
    use(&hold, 0, SOME(0, 1));
    use(&other, 0, SOME(0, 1));
    if (!is_read) {
        fake_hold_reads();
    }
    foretell(&hold, SOME(2, 3, 4));
    foretell(&other, SOME(4));
    if (is_read) {
        model_settle(pager);
    } else {
        fake_wait_for_reads(1);
    }
    CHECK(count_foretold() == 3, "one of three for two");
    CHECK(begin_wave(&hold, 1, SOME(2), 1) == 0, "the turn of one comes");
    CHECK(count_foretold() == 1 && is_here(1, 4), "the other's is still foretold, and kept");
    fake_let_reads_go();
    CHECK(finish_wave(&hold) == 0, "and it goes on");
    use(&other, 1, SOME(4));
    CHECK(experts_read(1) <= 3, "nothing is read again");
    end();
}

/* ---- anything ------------------------------------------------------------------------------------------------------------ */

/* What is likely: some of what will be wanted, and some that will not. */
static uint32_t guess(const int32_t *wanted, uint32_t n, int32_t *likely) {
    bool is_in[EXPERTS] = { false };
    uint32_t n_likely = 0;
    for (uint32_t i = 0; i < n + 2; i++) {
        const int32_t e = i < n && fake_random(4) > 0 ? wanted[i] : (int32_t) fake_random(EXPERTS);
        if (!is_in[e] && n_likely < EXPERTS) {
            likely[n_likely++] = e;
            is_in[e] = true;
        }
    }
    return n_likely;
}

static bool was_read_for(uint32_t layer, int32_t expert) {
    const gp_forecast *f = &hold.forecast;
    for (uint32_t i = 0; f->is_open && f->layer == layer && i < f->n; i++) {
        if (f->experts[i].expert == expert) {
            return f->experts[i].is_read;
        }
    }
    return false;
}

/* Tokens and small batches, guesses right and wrong: every byte and every expert is accounted for. */
static void the_books_balance(uint32_t n_slots, const char *policy) {
    begin((model_shape) { .n_slots = n_slots, .n_layers = 4, .piece_bytes = 1024, .policy = policy });
    uint64_t n_used[4] = { 0 }, n_missed[4] = { 0 }, n_wanted[4] = { 0 }, n_foreseen = 0, n_in_vain = 0;
    for (int token = 0; token < 100; token++) {
        int32_t wanted[4][EXPERTS], likely[EXPERTS];
        uint32_t n[4];
        for (uint32_t l = 0; l < 4; l++) {
            n[l] = 1 + fake_random(4);
            model_draw(&m, wanted[l], n[l]);
        }
        const uint32_t n_tokens = 1 + fake_random(3);
        for (uint32_t l = 0; l < 4; l++) {
            for (uint32_t i = 0; i < n[l]; i++) {
                const int32_t index = pager->layers[l].slot_of[wanted[l][i]];
                const gp_slot *s = index < 0 ? NULL : &pager->slots[index];
                n_used[l] += !s || s->ahead_for != 0;
                n_missed[l] += !s || was_read_for(l, wanted[l][i]);
            }
            n_wanted[l] += n[l];
            CHECK(begin_wave(&hold, l, (some) { wanted[l], n[l] }, n_tokens) == 0, "a wave begins");
            if (l < 3 && fake_random(5) > 0) {
                foretell(&hold, (some) { likely, guess(wanted[l + 1], n[l + 1], likely) });
            }
            CHECK(finish_wave(&hold) == 0, "and ends well");
            model_settle(pager);
            model_check_invariants(pager);
            for (uint32_t k = 0; k < 4; k++) {
                uint64_t n_unused = 0;
                for (int32_t e = 0; e < EXPERTS; e++) {
                    const int32_t index = pager->layers[k].slot_of[e];
                    n_unused += index >= 0 && pager->slots[index].ahead_for != 0;
                }
                const gp_counters c = counters_of(k);
                CHECK(c.bytes_read == (n_used[k] + n_unused) * expert_bytes(k) + c.bytes_wasted, "every byte is accounted for");
                CHECK(c.misses == n_missed[k] && c.hits + c.misses == n_wanted[k], "every expert, too");
                CHECK(c.foreseen <= c.misses, "what is foreseen is missed");
            }
        }
    }
    for (uint32_t k = 0; k < 4; k++) {
        n_foreseen += counters_of(k).foreseen;
        n_in_vain += counters_of(k).in_vain;
    }
    CHECK(n_slots < 9 || (n_foreseen > 20 && n_in_vain > 20), "the test foresees, and is wrong");
    end();
}

static void *pass_anything(void *data) {
    gp_hold *h = data;
    for (int token = 0; token < 60; token++) {
        int32_t wanted[4][EXPERTS], likely[EXPERTS];
        uint32_t n[4];
        for (uint32_t l = 0; l < 4; l++) {
            n[l] = 1 + fake_random(4);
            model_draw(&m, wanted[l], n[l]);
        }
        for (uint32_t l = 0; l < 4; l++) {
            CHECK(begin_wave(h, l, (some) { wanted[l], n[l] }, 1 + fake_random(2)) == 0, "a wave begins");
            if (l < 3) {
                foretell(h, (some) { likely, guess(wanted[l + 1], n[l + 1], likely) });
            }
            CHECK(finish_wave(h) == 0, "and ends well");
        }
    }
    return NULL;
}

/* Contexts in threads that want, foresee and give up the same experts, of one disk or more. */
static void contexts_get_along(uint32_t n_slots, uint32_t n_mirrors) {
    begin((model_shape) { .n_slots = n_slots, .n_layers = 4, .piece_bytes = 700, .n_readers = 5, .n_mirrors = n_mirrors });
    fake_set_weather((fake_weather) { .delay_us = 60, .short_one_in = 9 });
    pthread_t threads[2];
    gp_hold *const holds[2] = { &hold, &other };
    for (int i = 0; i < 2; i++) {
        CHECK(pthread_create(&threads[i], NULL, pass_anything, holds[i]) == 0, "the test has threads");
    }
    for (int i = 0; i < 2; i++) {
        pthread_join(threads[i], NULL);
    }
    model_settle(pager);
    CHECK(count_foretold() == 0, "after the last layer's turn nothing is foretold");
    CHECK(counters_of(1).left_alone == 0 && counters_of(1).foreseen > 0, "and all was served, some of it foreseen");
    end();
}

int main(void) {
    check_begin();
    what_is_likely_is_read_and_counted();
    what_is_on_its_way_is_joined();
    what_is_in_slots_gains_nothing();
    a_new_forecast_ends_the_old_one();
    who_is_looked_ahead_for();
    unseen_routers_are_not_asked();
    a_poor_layer_only_learns_and_comes_back();
    what_is_foretold_stays_until_its_turn();
    what_was_in_vain_goes_first();
    it_takes_what_is_worth_least();
    for (uint32_t n_slots = 1; n_slots <= 2; n_slots++) {
        the_smallest_arena_goes_on(n_slots, 1);
        the_smallest_arena_goes_on(n_slots, 5);
    }
    the_smallest_arena_goes_on_once_it_is_read();
    its_own_wave_goes_on();
    a_closed_hold_protects_nothing();
    a_stopped_hold_protects_nothing();
    what_another_has_foretold_too_stays(true);
    what_another_has_foretold_too_stays(false);
    the_books_balance(2, "lru");
    the_books_balance(9, "lfru");
    the_books_balance(25, "lfru");
    contexts_get_along(4, 0);
    contexts_get_along(12, 1);
    contexts_get_along(30, 2);
    return 0;
}
