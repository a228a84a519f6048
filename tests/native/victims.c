/* Who is given up: never a slot that is in use, pinned or being read; never a layer's last experts while others have
 * more; and whatever is served after any number of evictions is the expert's own bytes. */
#include <string.h>

#include "check.h"
#include "fake_os.h"
#include "model.h"

enum { HOLDS = 3, MOST = 3, STEPS = 1500 };

typedef struct {
    gp_hold  hold;
    uint32_t layer, n;
    int32_t  experts[MOST], slots[MOST];
} user;

static void check_held(const model *m, gp_pager *pager, const user *u) {
    for (uint32_t i = 0; i < u->n; i++) {
        const uint32_t index = pager->classes[m->layers[u->layer].shape_class].first + (uint32_t) u->slots[i];
        CHECK(pager->layers[u->layer].slot_of[u->experts[i]] == (int32_t) index, "2: a slot in use is not given up");
        CHECK(model_slot_holds(m, pager, (uint32_t) u->slots[i], u->layer, u->experts[i]), "nor written to");
    }
}

/* Three contexts take and release in turns. No thread of theirs, so every step can be looked at. */
static void take_turns(model_shape shape) {
    shape.n_layers = 4;
    shape.n_experts = 12;
    shape.n_slots = 17;
    model m;
    model_make(&m, shape);
    fake_set_weather((fake_weather) { .short_one_in = 5, .interrupted_one_in = 7 });
    gp_pager *pager = model_open(&m);
    user users[HOLDS];
    for (int i = 0; i < HOLDS; i++) {
        users[i] = (user) { 0 };
        CHECK(gp_hold_open(&users[i].hold, pager) == 0, "a hold opens");
    }
    const int32_t pinned[] = { 10, 11 };
    gp_failure failure;
    CHECK(gp_pager_pin(pager, 1, pinned, 2, NULL, NULL, &failure) == 0, "two experts are pinned");
    uint64_t n_evicted = 0;
    for (int step = 0; step < STEPS; step++) {
        user *u = &users[fake_random(HOLDS)];
        gp_hold_release(pager, &u->hold);
        u->n = 1 + fake_random(MOST);
        u->layer = fake_random(m.shape.n_layers);
        model_draw(&m, u->experts, u->n);

        uint32_t kept_before[MODEL_LAYERS];
        for (uint32_t l = 0; l < m.shape.n_layers; l++) {
            kept_before[l] = pager->layers[l].kept;
        }
        CHECK(model_acquire(pager, &u->hold, u->layer, u->experts, u->n, 1, u->slots, &failure) == 0, "experts come");
        for (uint32_t l = 0; l < m.shape.n_layers; l++) {
            const gp_class *c = &pager->classes[m.layers[l].shape_class];
            const uint32_t floor = kept_before[l] < c->floor ? kept_before[l] : c->floor;
            CHECK(c->floor > 0 && pager->layers[l].kept >= floor, "a layer keeps its floor when another wants more");
        }
        for (int i = 0; i < HOLDS; i++) {
            check_held(&m, pager, &users[i]);
        }
        CHECK(model_is_resident(pager, &m, 1, 10) && model_is_resident(pager, &m, 1, 11), "2: the pinned stay");
        model_check_invariants(pager);
    }
    gp_counters counters[MODEL_LAYERS];
    gp_pager_counters(pager, counters);
    for (uint32_t l = 0; l < m.shape.n_layers; l++) {
        n_evicted += counters[l].evictions;
    }
    CHECK(n_evicted > STEPS / 10, "the test evicts a lot");
    for (int i = 0; i < HOLDS; i++) {
        gp_hold_close(&users[i].hold, pager);
    }
    gp_pager_close(pager);
    model_end(&m);
}

/* As few slots as can compute one token: all of a layer's floor belongs to whoever computes. */
static void fewest_slots_work(void) {
    model m;
    model_make(&m, (model_shape) { .n_layers = 5, .n_used = 3, .n_slots = 3 });
    gp_pager *pager = model_open(&m);
    gp_hold hold;
    CHECK(gp_hold_open(&hold, pager) == 0, "a hold opens");
    for (int token = 0; token < 50; token++) {
        for (uint32_t l = 0; l < m.shape.n_layers; l++) {
            int32_t experts[3];
            model_draw(&m, experts, 3);
            model_use(&m, pager, &hold, l, experts, 3, 1);
            model_check_invariants(pager);
        }
    }
    gp_hold_close(&hold, pager);
    gp_pager_close(pager);
    model_end(&m);
}

/* Enough slots for all: nothing is read twice. */
static void enough_slots_read_once(void) {
    model m;
    model_make(&m, (model_shape) { .n_slots = 27 });
    gp_pager *pager = model_open(&m);
    gp_hold hold;
    CHECK(gp_hold_open(&hold, pager) == 0, "a hold opens");
    for (int token = 0; token < 100; token++) {
        for (uint32_t l = 0; l < m.shape.n_layers; l++) {
            int32_t experts[2];
            model_draw(&m, experts, 2);
            model_use(&m, pager, &hold, l, experts, 2, 1);
        }
    }
    gp_counters counters[MODEL_LAYERS];
    gp_pager_counters(pager, counters);
    for (uint32_t l = 0; l < m.shape.n_layers; l++) {
        CHECK(counters[l].evictions == 0, "with room for all, none goes");
        CHECK(counters[l].misses <= m.shape.n_experts, "and each comes once");
    }
    gp_hold_close(&hold, pager);
    gp_pager_close(pager);
    model_end(&m);
}

int main(void) {
    check_begin();
    take_turns((model_shape) { .policy = "lru" });
    take_turns((model_shape) { .policy = "lfru", .n_files = 2 });
    take_turns((model_shape) { .policy = "lru", .n_classes = 2, .offset_align = 512, .memory_align = 512 });
    fewest_slots_work();
    enough_slots_read_once();
    return 0;
}
