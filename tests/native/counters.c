/* What is counted: experts wanted, found or not; tokens; bytes; waiting; and nothing twice. */
#define _POSIX_C_SOURCE 200809L
#include <pthread.h>
#include <time.h>

#include "check.h"
#include "fake_os.h"
#include "model.h"

static model m;
static gp_pager *pager;
static gp_hold hold;

static void begin(model_shape shape) {
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

static gp_counters counters_of(uint32_t layer) {
    gp_counters counters[MODEL_LAYERS];
    gp_pager_counters(pager, counters);
    return counters[layer];
}

static void hits_and_misses(void) {
    begin((model_shape) { .n_slots = 9 });
    fake_set_weather((fake_weather) { .delay_us = 500 });
    uint64_t expert_bytes = 0;
    for (uint32_t s = 0; s < m.shape.n_slices; s++) {
        expert_bytes += m.layers[1].slices[s].slice_bytes;
    }
    model_use(&m, pager, &hold, 1, (int32_t[]) { 3, 4 }, 2, 1);
    model_use(&m, pager, &hold, 1, (int32_t[]) { 4, 5 }, 2, 1);
    model_use(&m, pager, &hold, 1, (int32_t[]) { 3, 4, 5, 6 }, 4, 7);
    const gp_counters c = counters_of(1);
    CHECK(c.hits == 1 + 3 && c.misses == 2 + 1 + 1, "a hit or miss is one distinct expert of a batch");
    CHECK(c.visits == 3 && c.tokens == 1 + 1 + 7, "a batch is one visit of its tokens");
    CHECK(c.bytes_read == 4 * expert_bytes, "bytes are those that were wanted, not their cover");
    CHECK(c.resident == 4 && c.evictions == 0, "four experts lie in slots");
    CHECK(c.stall_ns > 0, "waiting for reads is counted");
    model_use(&m, pager, &hold, 1, (int32_t[]) { 3, 4 }, 2, 1);
    CHECK(counters_of(1).stall_ns == c.stall_ns && counters_of(1).stall_bytes == c.stall_bytes, "a hit waits for nothing");
    CHECK(counters_of(0).hits + counters_of(0).misses + counters_of(0).tokens == 0, "layers count for themselves");
    for (int32_t e = 0; e < 9; e++) {
        model_use(&m, pager, &hold, 0, &e, 1, 1);
    }
    const gp_counters after = counters_of(1);
    CHECK(after.evictions == 4 - after.resident && after.evictions > 0, "an eviction is counted where the expert was");
    end();
}

static void *let_reads_go(void *data) {
    (void) data;
    nanosleep(&(struct timespec) { .tv_nsec = 30000000 }, NULL);
    fake_let_reads_go();
    return NULL;
}

static void a_stall_is_what_is_waited_for(void) {
    begin((model_shape) { .n_slices = 1, .slice_bytes = { 1184 }, .n_readers = 1, .piece_bytes = 64 << 10 });
    fake_hold_reads();
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, let_reads_go, NULL) == 0, "the test has threads");
    model_use(&m, pager, &hold, 1, (int32_t[]) { 3 }, 1, 1);
    pthread_join(thread, NULL);
    const gp_counters c = counters_of(1);
    CHECK(c.stall_ns > 10000000 && c.stall_ns < UINT64_C(5000000000), "the time in which nothing could be done");
    CHECK(c.stall_bytes == 1184 && c.stall_bytes == gp_copies_arrived_bytes(pager->copies), "and what arrived meanwhile");
    end();
}

/* The same ids are handed over for gate, up and down, when each is a piece of graph by itself. */
static void again_is_not_counted(void) {
    begin((model_shape) { 0 });
    const int32_t experts[] = { 1, 2 };
    const uint32_t counts[] = { 1, 1 };
    gp_demand demand = { .layer = 0, .experts = experts, .counts = counts, .n_experts = 2, .n_tokens = 1 };
    gp_failure failure;
    for (int node = 0; node < 3; node++) {
        demand.is_again = node > 0;
        CHECK(model_wave(&m, pager, &hold, &demand, &failure) == 0, "the experts come");
    }
    const gp_counters c = counters_of(0);
    CHECK(c.hits == 0 && c.misses == 2 && c.visits == 1 && c.tokens == 1, "a demand made again is counted once");
    CHECK(pager->layers[0].uses[1].recent == 1 && pager->layers[0].chosen[1] == 1, "also as a use");
    end();
}

/* A wave that was begun and never computed, as where llama.cpp leaves out a node: the next one gives its slots back. */
static void a_wave_that_is_left_holds_nothing(void) {
    begin((model_shape) { .n_slots = 3 });
    const int32_t experts[] = { 1, 2 };
    int32_t slots[2];
    gp_failure failure;
    for (uint32_t l = 0; l < 3; l++) {
        CHECK(model_acquire(pager, &hold, l, experts, 2, 1, slots, &failure) == 0, "the experts come");
        model_check_invariants(pager);
        CHECK(hold.n_open == 2, "those of one wave are held");
    }
    gp_hold_release(pager, &hold);
    CHECK(hold.n_open == 0 && counters_of(1).visits == 1, "and given back");
    model_check_invariants(pager);
    end();
}

/* An old subject fades: a use counts half after 32 tokens in one count, after 512 in the other. */
static void uses_fade(void) {
    begin((model_shape) { 0 });
    const int32_t favourite = 1, other = 2;
    const gp_uses *uses = &pager->layers[0].uses[favourite];
    model_use(&m, pager, &hold, 0, &favourite, 1, 1);
    CHECK(uses->recent == 1 && uses->lasting == 1, "a token is a use");
    for (int i = 0; i < 511; i++) {
        model_use(&m, pager, &hold, 0, &other, 1, 1);
    }
    model_use(&m, pager, &hold, 0, &favourite, 1, 1);
    CHECK(uses->recent == 1 + 1.0f / 65536 && uses->lasting == 1.5f, "512 tokens later it is little, or half of one");
    gp_use use = { .uses = { 1, 1 }, .n_layers = 1 };
    const gp_policy *lfru = gp_policy_find("lfru");
    for (double last = lfru->worth(&use); use.age < 32000; last = lfru->worth(&use)) {
        use.age += 1 + use.age / 50;
        CHECK(lfru->worth(&use) < last, "the longer ago, the less an expert is worth");
    }
    use.uses = (gp_uses) { 0, 0 };
    CHECK(lfru->worth(&use) < -1e9, "one that was never used is worth nothing");
    uint64_t chosen[16];
    CHECK(gp_pager_chosen(pager, 0, chosen) == 0, "the layer exists");
    CHECK(chosen[favourite] == 2 && chosen[other] == 511 && chosen[0] == 0, "how often one was chosen does not");
    CHECK(gp_pager_chosen(pager, 1, chosen) == 0 && chosen[favourite] == 0, "layers count for themselves");
    end();
}

/* A choice somewhere in a batch counts about as it would, on the average, had the batch's tokens come one by one; about,
 * because many short steps along the straight lines between halvings lead less far down than a long one. */
static void uses_in_a_batch_fade_too(void) {
    gp_uses each = gp_uses_in_batch(1);
    CHECK(each.recent == 1 && each.lasting == 1, "a batch of one is a token");
    const gp_uses one = each;
    gp_uses uses = { 0, 0 }, all = { 0, 0 };
    for (int i = 0; i < 200; i++) {
        gp_uses_add(&uses, 1, 1, &one);
    }
    each = gp_uses_in_batch(200);
    gp_uses_add(&all, 200, 200, &each);
    CHECK(uses.recent / all.recent > 0.7 && uses.recent / all.recent < 1.4, "200 tokens at once or one by one");
    CHECK(uses.lasting / all.lasting > 0.7 && uses.lasting / all.lasting < 1.4, "in both counts");
    CHECK(all.recent < 60, "and the first of them count no more");
}

static void unknown_layers_are_refused(void) {
    begin((model_shape) { 0 });
    uint8_t resident[16];
    CHECK(gp_pager_resident(pager, m.shape.n_layers, resident) < 0, "a layer that is not there has no residents");
    uint64_t chosen[16];
    CHECK(gp_pager_chosen(pager, m.shape.n_layers, chosen) < 0, "and nobody chose from it");
    CHECK(!gp_pager_layer(pager, m.shape.n_layers) && gp_pager_layer(pager, 0), "nor a description");
    CHECK(gp_policy_exists("lru") && gp_policy_exists("lfru") && !gp_policy_exists("fifo"), "policies have names");
    end();
}

int main(void) {
    check_begin();
    hits_and_misses();
    a_stall_is_what_is_waited_for();
    again_is_not_counted();
    a_wave_that_is_left_holds_nothing();
    uses_fade();
    uses_in_a_batch_fade_too();
    unknown_layers_are_refused();
    return 0;
}
