/* Pinned experts stay; pins leave room to compute, and what they take is counted once. */
#include <errno.h>

#include "check.h"
#include "fake_os.h"
#include "model.h"

static model m;
static gp_pager *pager;
static gp_hold hold;

static void begin(uint32_t n_slots, uint32_t n_ids) {
    model_make(&m, (model_shape) { .n_slots = n_slots });
    pager = model_open(&m);
    CHECK(gp_hold_open(&hold, pager, n_ids) == 0, "a hold opens");
}

static void end(void) {
    model_check_invariants(pager);
    gp_hold_close(&hold, pager);
    gp_pager_close(pager);
    model_end(&m);
}

static int pin(uint32_t layer, const int32_t *experts, uint32_t n) {
    gp_failure failure;
    const int error = gp_pager_pin(pager, layer, experts, n, NULL, NULL, &failure);
    model_check_invariants(pager);
    return error;
}

static void decode(int n_tokens) {
    for (int token = 0; token < n_tokens; token++) {
        for (uint32_t l = 0; l < m.shape.n_layers; l++) {
            int32_t experts[2];
            model_draw(&m, experts, 2);
            model_use(&m, pager, &hold, l, experts, 2, 1);
        }
    }
}

static uint8_t state(uint32_t layer, int32_t expert) {
    uint8_t resident[16];
    CHECK(gp_pager_resident(pager, layer, resident) == 0, "the layer exists");
    return resident[expert];
}

static void pinned_expert_outlives_any_pressure(void) {
    begin(7, 2);
    const int32_t experts[] = { 8, 6 };
    CHECK(pin(1, experts, 2) == 0, "there is room for two pins");
    decode(100);
    CHECK(state(1, 8) == 2 && state(1, 6) == 2, "a pinned expert stays");
    model_use(&m, pager, &hold, 1, experts, 2, 1);
    gp_pager_unpin_all(pager);
    CHECK(state(1, 8) == 1, "it is in its slot until another needs that");
    for (int e = 0; e < 6; e++) {
        model_use(&m, pager, &hold, 0, (int32_t[]) { e }, 1, 1);
        model_use(&m, pager, &hold, 2, (int32_t[]) { e }, 1, 1);
    }
    CHECK(state(1, 8) + state(1, 6) < 2 + 2, "unpinned experts may go");
    end();
}

static void pins_leave_room(void) {
    begin(7, 2);        /* one token wants two slots */
    const int32_t experts[] = { 0, 1, 2, 3, 4, 5 };
    CHECK(pin(0, experts, 6) == -ENOSPC, "six of seven slots leave one");
    CHECK(state(0, 0) == 0, "pins that are refused read nothing");
    CHECK(pin(0, experts, 5) == 0, "five leave two");
    CHECK(pin(1, experts, 1) == -ENOSPC, "pins of all layers count");
    decode(30);
    end();
}

/* n_needed is a number of ids: no batch wants more slots than there are experts. */
static void large_batches_want_no_more_than_all_experts(void) {
    begin(12, 4096);
    const int32_t experts[] = { 0, 1, 2, 3 };
    CHECK(pin(0, experts, 4) == -ENOSPC, "twelve slots less four are fewer than the nine experts of a batch");
    CHECK(pin(0, experts, 3) == 0, "less three are enough");
    end();
}

static void pinning_again_takes_nothing(void) {
    begin(7, 2);
    const int32_t experts[] = { 0, 1, 2, 3, 4 };
    for (int again = 0; again < 3; again++) {
        CHECK(pin(0, experts, 5) == 0, "what is pinned already can be pinned again");
    }
    end();
}

static void naming_an_expert_twice_pins_it_once(void) {
    begin(7, 2);
    const int32_t experts[] = { 3, 3, 5, 3 };
    CHECK(pin(0, experts, 4) == 0, "a list may name an expert twice");
    CHECK(state(0, 3) == 2 && state(0, 5) == 2, "it is pinned");
    uint32_t n_pinned = 0;
    for (uint32_t i = 0; i < pager->n_slots; i++) {
        n_pinned += pager->slots[i].is_pinned;
    }
    CHECK(n_pinned == 2, "once");
    end();
}

static void pinning_counts_no_use(void) {
    begin(7, 2);
    CHECK(pin(0, (int32_t[]) { 1, 2 }, 2) == 0, "there is room for two pins");
    gp_counters counters[MODEL_LAYERS];
    gp_pager_counters(pager, counters);
    CHECK(counters[0].hits + counters[0].misses + counters[0].tokens + counters[0].visits == 0,
          "a pin is no token's demand");
    CHECK(counters[0].bytes_read > 0 && counters[0].resident == 2, "but its bytes were read");
    end();
}

int main(void) {
    check_begin();
    pinned_expert_outlives_any_pressure();
    pins_leave_room();
    large_batches_want_no_more_than_all_experts();
    pinning_again_takes_nothing();
    naming_an_expert_twice_pins_it_once();
    pinning_counts_no_use();
    return 0;
}
