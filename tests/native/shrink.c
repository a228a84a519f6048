/* Slots that are given back: the experts that stay are where they were, those that went are read again when they are wanted. */
#include <errno.h>

#include "check.h"
#include "fake_os.h"
#include "model.h"

static model m;
static gp_pager *pager;
static gp_hold hold;

static void begin(uint32_t n_slots) {
    model_make(&m, (model_shape) { .n_slots = n_slots });
    pager = model_open(&m);
    gp_pager_wait_present(pager);
    CHECK(gp_hold_open(&hold, pager) == 0, "a hold opens");
}

static void end(void) {
    model_check_invariants(pager);
    gp_hold_close(&hold, pager);
    gp_pager_close(pager);
    model_end(&m);
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

static uint32_t n_resident(void) {
    uint32_t n = 0;
    for (uint32_t l = 0; l < m.shape.n_layers; l++) {
        uint8_t resident[16];
        CHECK(gp_pager_resident(pager, l, resident) == 0, "the layer exists");
        for (uint32_t e = 0; e < m.shape.n_experts; e++) {
            n += resident[e] != 0;
        }
    }
    return n;
}

static void fewer_slots_compute_the_same(void) {
    begin(12);
    decode(50);
    CHECK(n_resident() == 12, "all slots are used");
    const uint64_t before = fake_bytes_given_back();
    CHECK(gp_pager_shrink(pager, 0, 5) == 0, "nobody computes: they can go");
    model_check_invariants(pager);
    uint32_t n_slots;
    uint64_t stride_bytes;
    (void) gp_pager_slots(pager, 0, &n_slots, &stride_bytes);
    CHECK(n_slots == 5 && fake_bytes_given_back() - before == 7 * stride_bytes, "their memory is given back");
    CHECK(n_resident() == 5, "what lay in them is forgotten");
    decode(100);    /* model_use compares every byte */
    CHECK(n_resident() == 5, "no more than the slots that are left");
    end();
}

static void slots_in_use_stay(void) {
    begin(6);
    decode(20);
    const int32_t experts[] = { 1, 2 };
    int32_t slots[2];
    gp_failure failure;
    CHECK(model_acquire(pager, &hold, 0, experts, 2, 1, slots, &failure) == 0, "two experts come");
    const uint32_t most = (uint32_t) (slots[0] > slots[1] ? slots[0] : slots[1]);
    CHECK(most == 0 || gp_pager_shrink(pager, 0, most) == -EBUSY, "they are computed with");
    gp_hold_release(pager, &hold);
    CHECK(most == 0 || gp_pager_shrink(pager, 0, most) == 0, "and then are not");
    end();
}

static void pinned_slots_stay(void) {
    begin(8);
    gp_failure failure;
    const int32_t experts[] = { 3, 4 };
    decode(20);
    CHECK(gp_pager_pin(pager, 0, experts, 2, NULL, NULL, &failure) == 0, "two are pinned");
    const int error = gp_pager_shrink(pager, 0, 2);
    CHECK(error == -EBUSY || error == 0, "they may be the two that stay");
    uint8_t resident[16];
    CHECK(gp_pager_resident(pager, 0, resident) == 0 && resident[3] == 2 && resident[4] == 2, "they are where they were");
    gp_pager_unpin_all(pager);
    end();
}

static void nonsense_is_refused(void) {
    begin(6);
    CHECK(gp_pager_shrink(pager, 0, 0) == -EINVAL && gp_pager_shrink(pager, 9, 2) == -EINVAL
          && gp_pager_shrink(pager, 0, 7) == -EINVAL, "no slots, no such class, more than there are");
    CHECK(gp_pager_shrink(pager, 0, 6) == 0, "as many as there are");
    end();
}

int main(void) {
    fewer_slots_compute_the_same();
    slots_in_use_stay();
    pinned_slots_stay();
    nonsense_is_refused();
    return 0;
}
