/* Waves of a pager with two holds, in which is foretold while they are computed: what the tests of look-ahead share. */
#ifndef GGUF_PAGER_TESTS_FORETOLD_H
#define GGUF_PAGER_TESTS_FORETOLD_H

#include <string.h>

#include "check.h"
#include "fake_os.h"
#include "model.h"
#include "slots/forecast.h"
#include "slots/look_ahead.h"

enum { EXPERTS = 10, WHOLE_SLICE = 64 << 10 };

static const int32_t all[EXPERTS] = { 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 };

static model m;
static gp_pager *pager;
static gp_hold hold, other;

static inline void begin_as(model_shape shape, gp_look_ahead look_ahead) {
    shape.n_experts = EXPERTS;
    model_make(&m, shape);
    m.config.look_ahead = look_ahead;
    pager = model_open(&m);
    for (uint32_t l = 1; l < m.shape.n_layers; l++) {
        gp_look_ahead_note_router(pager, l, true);
    }
    CHECK(gp_hold_open(&hold, pager) == 0 && gp_hold_open(&other, pager) == 0, "two holds open");
}

static inline void begin(model_shape shape) {
    begin_as(shape, GP_LOOK_ALWAYS);
}

static inline uint32_t count_foretold(void) {
    uint32_t n = 0;
    pthread_mutex_lock(&pager->lock);
    for (uint32_t i = 0; i < pager->n_slots; i++) {
        n += pager->slots[i].foretold_for != 0;
    }
    pthread_mutex_unlock(&pager->lock);
    return n;
}

static inline void end(void) {
    model_check_invariants(pager);
    gp_hold_close(&hold, pager);
    gp_hold_close(&other, pager);
    CHECK(count_foretold() == 0, "2: without holds nothing is foretold for any");
    gp_pager_close(pager);
    model_end(&m);
}

static inline gp_counters counters_of(uint32_t layer) {
    gp_counters counters[MODEL_LAYERS];
    gp_pager_counters(pager, counters);
    return counters[layer];
}

static inline bool is_here(uint32_t layer, int32_t expert) {
    return model_is_resident(pager, &m, layer, expert);
}

static inline uint64_t expert_bytes(uint32_t layer) {
    uint64_t bytes = 0;
    for (uint32_t s = 0; s < m.shape.n_slices; s++) {
        bytes += m.layers[layer].slices[s].slice_bytes;
    }
    return bytes;
}

static inline uint64_t experts_read(uint32_t layer) {
    return counters_of(layer).bytes_read / expert_bytes(layer);
}

/* ---- waves, in which is foretold while they are computed ------------------------------------------------------------ */

typedef struct {
    const int32_t *experts;
    uint32_t       n;
} some;

#define SOME(...) ((some) { (const int32_t[]) { __VA_ARGS__ }, sizeof (int32_t[]) { __VA_ARGS__ } / sizeof(int32_t) })

static inline int begin_wave(gp_hold *h, uint32_t layer, some wanted, uint32_t n_tokens) {
    uint32_t once[EXPERTS];
    for (uint32_t i = 0; i < EXPERTS; i++) {
        once[i] = 1;
    }
    const gp_demand demand = { .layer = layer, .experts = wanted.experts, .counts = once, .n_experts = wanted.n, .n_tokens = n_tokens };
    gp_failure failure;
    return gp_wave_begin(pager, h, &demand, &failure);
}

static inline void foretell(gp_hold *h, some likely) {
    if (h->look != GP_LOOK_NOT) {
        gp_look_ahead_begin(pager, h, likely.experts, likely.n);
    }
}

static inline bool has_all(const gp_hold *h, uint32_t i) {
    return gp_wave_has(pager, h, i, (1u << m.shape.n_slices) - 1);
}

/* Waits for what was begun, looks at the bytes, and lets it go. A slice that could not be read has arrived, too: who computes with
 * it is told no later than at the wave's end. */
static inline int finish_wave(gp_hold *h) {
    bool is_done[EXPERTS] = { false }, is_wrong = false;
    for (uint32_t n_done = 0; n_done < h->n_wanted && !gp_wave_stops(h, true);) {
        const unsigned n_arrived = gp_wave_n_arrived(h);
        bool is_any = false;
        for (uint32_t i = 0; i < h->n_wanted && !gp_wave_stops(h, true); i++) {
            if (!is_done[i] && has_all(h, i)) {
                const int32_t slot = atomic_load(&h->wanted[i].slot);
                CHECK(slot >= 0, "a slot comes in time");
                is_wrong |= !model_slot_holds(&m, pager, (uint32_t) slot, h->layer, h->wanted[i].expert);
                gp_wave_done(pager, h, i);
                is_done[i] = is_any = true;
                n_done++;
            }
        }
        if (!is_any && !gp_wave_wait(pager, h, n_arrived, true)) {
            break;
        }
    }
    gp_failure failure;
    const int error = gp_wave_end(pager, h, &failure);
    CHECK(error != 0 || !is_wrong, "a wave that ends well has brought every expert's own bytes");
    gp_hold_release(pager, h);
    return error;
}

/* A token, or a few, in a layer: what is wanted there, and what is likely to be in the next. */
static inline void pass(gp_hold *h, uint32_t layer, some wanted, some likely) {
    CHECK(begin_wave(h, layer, wanted, 1) == 0, "a wave begins");
    foretell(h, likely);
    CHECK(finish_wave(h) == 0, "and ends well");
}

static inline void use(gp_hold *h, uint32_t layer, some wanted) {
    model_use(&m, pager, h, layer, wanted.experts, wanted.n, 1);
}

#endif
