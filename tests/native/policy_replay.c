/* policy_replay POLICY N_SLOTS: replays recorded ids through a pager and prints what each layer counted.
 *
 * Standard input: n_layers n_experts n_used n_tokens, then the ids, token by token, layer by layer.
 * Standard output: one line "hits misses evictions" per layer. */
#include <stdlib.h>

#include "check.h"
#include "fake_os.h"
#include "model.h"

static uint32_t read_number(void) {
    uint32_t number;
    CHECK(scanf("%u", &number) == 1, "the input is numbers");
    return number;
}

int main(int argc, char **argv) {
    check_begin();
    CHECK(argc == 3, "a policy and a number of slots are given");
    const model_shape shape = {
        .n_layers = read_number(), .n_experts = read_number(), .n_used = read_number(),
        .n_slots = (uint32_t) atoi(argv[2]), .policy = argv[1], .n_slices = 1, .slice_bytes = { 64 },
    };
    const uint32_t n_tokens = read_number();
    CHECK(shape.n_layers <= MODEL_LAYERS && shape.n_used <= 16, "the recording is small");
    model m;
    model_make(&m, shape);
    gp_pager *pager = model_open(&m);
    gp_hold hold;
    CHECK(gp_hold_open(&hold, pager) == 0, "a hold opens");
    for (uint32_t token = 0; token < n_tokens; token++) {
        for (uint32_t l = 0; l < shape.n_layers; l++) {
            int32_t experts[16];
            for (uint32_t i = 0; i < shape.n_used; i++) {
                experts[i] = (int32_t) read_number();
            }
            model_use(&m, pager, &hold, l, experts, shape.n_used, 1);
        }
    }
    model_check_invariants(pager);
    gp_counters counters[MODEL_LAYERS];
    gp_pager_counters(pager, counters);
    for (uint32_t l = 0; l < shape.n_layers; l++) {
        printf("%llu %llu %llu\n", (unsigned long long) counters[l].hits, (unsigned long long) counters[l].misses,
               (unsigned long long) counters[l].evictions);
    }
    gp_hold_close(&hold, pager);
    gp_pager_close(pager);
    model_end(&m);
    return 0;
}
