/* A large batch wants nearly every expert of a layer. It takes transient slots, not more than half of them, and leaves the experts
 * that decoding lives on. */
#include "check.h"
#include "fake_os.h"
#include "model.h"

enum { LAYERS = 4, EXPERTS = 16, FAVOURITES = 4, SLOTS = 40 };

static model m;
static gp_pager *pager;
static gp_hold hold;

static void begin(model_shape shape) {
    shape.n_layers = LAYERS;
    shape.n_experts = EXPERTS;
    shape.n_used = 2;
    shape.n_slots = shape.n_slots ? shape.n_slots : SLOTS;
    model_make(&m, shape);
    pager = model_open(&m);
    CHECK(gp_hold_open(&hold, pager) == 0, "a hold opens");
}

static void end(void) {
    model_check_invariants(pager);
    gp_hold_close(&hold, pager);
    gp_pager_close(pager);
    model_end(&m);
}

/* A token chooses two of the four favourites in each layer. */
static void decode_favourites(int n_tokens) {
    for (int token = 0; token < n_tokens; token++) {
        for (uint32_t l = 0; l < LAYERS; l++) {
            const int32_t first = (int32_t) fake_random(FAVOURITES);
            model_use(&m, pager, &hold, l, (int32_t[]) { first, (first + 1) % FAVOURITES }, 2, 1);
        }
    }
}

static void prefill(uint32_t n_tokens) {
    int32_t all[EXPERTS];
    for (int32_t e = 0; e < EXPERTS; e++) {
        all[e] = e;
    }
    const gp_class *c = &pager->classes[0];
    for (uint32_t l = 0; l < LAYERS; l++) {
        const uint32_t without_loss = c->n_free + c->n_transient;
        model_use(&m, pager, &hold, l, all, EXPERTS, n_tokens);
        model_settle(pager);
        model_check_invariants(pager);
        CHECK(c->n_transient <= c->transient_limit || c->n_transient <= without_loss,
              "transient experts take the place of others up to a limit");
    }
}

static uint64_t misses(void) {
    gp_counters counters[LAYERS];
    uint64_t n = 0;
    gp_pager_counters(pager, counters);
    for (uint32_t l = 0; l < LAYERS; l++) {
        n += counters[l].misses;
    }
    return n;
}

static void decode_set_outlives_batches(model_shape shape) {
    begin(shape);
    decode_favourites(40);
    for (int round = 0; round < 4; round++) {
        prefill(64);
        const uint64_t before = misses();
        decode_favourites(10);
        CHECK(misses() == before, "what decoding lives on is still there after a batch");
    }
    end();
}

/* Most of a batch's experts are transient, or the limit would mean nothing. */
static void batch_is_transient(void) {
    begin((model_shape) { 0 });
    CHECK(pager->classes[0].transient_limit == SLOTS / 2, "half of the slots is the limit, where the disk could do with more");
    decode_favourites(40);
    prefill(64);
    CHECK(pager->classes[0].n_transient > EXPERTS / 2, "a batch's experts are transient");
    end();
}

static uint32_t kept(void) {
    uint32_t n = 0;
    for (uint32_t l = 0; l < LAYERS; l++) {
        n += pager->layers[l].kept;
    }
    return n;
}

static void transient_go_first(model_shape shape) {
    begin(shape);
    decode_favourites(40);
    prefill(64);
    while (pager->classes[0].n_free > 0) {      /* free slots go before any */
        int32_t expert;
        model_draw(&m, &expert, 1);
        model_use(&m, pager, &hold, fake_random(LAYERS), &expert, 1, 1);
    }
    const uint32_t n_transient = pager->classes[0].n_transient;
    CHECK(n_transient > 2, "the batch has left transient experts");
    for (uint32_t taken = 0; taken < n_transient;) {
        int32_t expert = 0;
        uint32_t l = 0;
        for (bool is_absent = false; !is_absent;) {
            l = fake_random(LAYERS);
            model_draw(&m, &expert, 1);
            is_absent = !model_is_resident(pager, &m, l, expert);
        }
        const uint32_t before = kept();
        model_use(&m, pager, &hold, l, &expert, 1, 1);
        CHECK(kept() == before + 1 && pager->classes[0].n_transient == n_transient - ++taken,
              "a miss takes a transient slot while there is one");
    }
    end();
}

static void use_makes_a_transient_expert_stay(void) {
    begin((model_shape) { 0 });
    decode_favourites(40);
    prefill(64);
    const uint32_t n_transient = pager->classes[0].n_transient;
    for (uint32_t i = 0; i < pager->n_slots; i++) {
        if (pager->slots[i].state == READY && pager->slots[i].is_transient) {
            const uint32_t l = pager->slots[i].layer;
            model_use(&m, pager, &hold, l, (int32_t[]) { pager->slots[i].expert }, 1, 1);
            CHECK(!pager->slots[i].is_transient && pager->classes[0].n_transient == n_transient - 1,
                  "an expert that one token wants is kept from then on");
            break;
        }
    }
    end();
}

/* A batch that needs every slot there is gets them, floors or not. */
static void batch_as_large_as_the_arena(void) {
    begin((model_shape) { .n_slots = EXPERTS });
    decode_favourites(10);
    for (int round = 0; round < 3; round++) {
        prefill(64);
        decode_favourites(10);
    }
    end();
}

/* A shape class may be empty of layers. */
static void class_without_layers(void) {
    model_make(&m, (model_shape) { .n_layers = 1, .n_classes = 1 });
    m.classes[1] = (gp_class_spec) { .stride_bytes = 4096, .n_slots = 2 };
    m.config.n_classes = 2;
    gp_pager *opened;
    if (gp_pager_open(&opened, &fake_os, &m.config, &(gp_open_failure) { 0 }) == 0) {     /* to refuse it would be right as well */
        gp_pager_close(opened);
    }
    model_end(&m);
}

int main(void) {
    check_begin();
    decode_set_outlives_batches((model_shape) { .policy = "lru" });
    decode_set_outlives_batches((model_shape) { .policy = "lfru" });
    decode_set_outlives_batches((model_shape) { .policy = "lfru", .n_slots = 52, .read_ahead = true });
    batch_is_transient();
    transient_go_first((model_shape) { .policy = "lru" });
    transient_go_first((model_shape) { .policy = "lfru" });
    use_makes_a_transient_expert_stay();
    batch_as_large_as_the_arena();
    class_without_layers();
    return 0;
}
