#define _POSIX_C_SOURCE 200809L
#include "model.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "check.h"
#include "fake_os.h"

/* Odd on purpose: no slice is a multiple of a sector or of a piece, gate and up differ from down. */
static const model_shape defaults = {
    .n_layers = 3, .n_experts = 9, .n_used = 2, .n_slots = 7, .n_slices = 3, .slice_bytes = { 1184, 1184, 1696 },
    .n_files = 1, .n_classes = 1, .n_readers = 3, .piece_bytes = 512, .policy = "lru",
};

static const char *const paths[MODEL_FILES] = { "model-00001-of-00002.gguf", "model-00002-of-00002.gguf" };

static const char *const mirror_paths[MODEL_MIRRORS][MODEL_FILES] = {
    { "disk2/model-00001-of-00002.gguf", "disk2/model-00002-of-00002.gguf" },
    { "disk3/model-00001-of-00002.gguf", "disk3/model-00002-of-00002.gguf" },
};

static uint64_t round_up(uint64_t value, uint64_t step) {
    return (value + step - 1) / step * step;
}

#define DEFAULT(field) if (!shape.field) shape.field = defaults.field

static model_shape complete(model_shape shape) {
    DEFAULT(n_layers);
    DEFAULT(n_experts);
    DEFAULT(n_used);
    DEFAULT(n_slots);
    DEFAULT(n_files);
    DEFAULT(n_classes);
    DEFAULT(n_readers);
    DEFAULT(piece_bytes);
    DEFAULT(policy);
    if (!shape.n_slices) {
        shape.n_slices = defaults.n_slices;
        memcpy(shape.slice_bytes, defaults.slice_bytes, sizeof shape.slice_bytes);
    }
    if (!shape.offset_align && fake_has_queue()) {     /* the queue is for direct reads */
        shape.offset_align = shape.memory_align = 1;
    }
    return shape;
}

/* The arithmetic of gguf_pager/memory/budget.py: slice_rooms. Returns the slot's size. */
static uint64_t place_slices(gp_layer_spec *layer, uint64_t align) {
    uint64_t at = 0;
    for (uint32_t s = 0; s < layer->n_slices; s++) {
        gp_slice_spec *slice = &layer->slices[s];
        const uint64_t spare = align == 1 ? 0 : 2 * align;
        uint64_t head = 0;
        if (align > 1) {
            head = slice->slice_bytes % align == 0 ? slice->offset_bytes % align : align;
        }
        slice->region_at = at;
        slice->region_bytes = round_up(slice->slice_bytes + spare, align > 64 ? align : 64);
        slice->data_at = at + head;
        at += slice->region_bytes;
    }
    return at;
}

void model_make(model *m, model_shape wanted) {
    const model_shape shape = complete(wanted);
    const bool is_direct = shape.offset_align != 0;
    const uint64_t align = !is_direct ? 1
        : shape.offset_align > shape.memory_align ? shape.offset_align : shape.memory_align;
    *m = (model) { .shape = shape };
    uint64_t ends[MODEL_FILES] = { 4096 + 32 * 7, 96 };     /* the headers: aligned to 32 bytes and no more */
    for (uint32_t l = 0; l < shape.n_layers; l++) {
        gp_layer_spec *layer = &m->layers[l];
        layer->n_slices = shape.n_slices;
        layer->n_experts = shape.n_experts;
        layer->n_used = shape.n_used;
        layer->shape_class = l % shape.n_classes;
        for (uint32_t s = 0; s < shape.n_slices; s++) {
            gp_slice_spec *slice = &layer->slices[s];
            const uint32_t file = s % shape.n_files;
            static const char *const roles[] = { "gate", "up", "down", "more" };
            snprintf(slice->name, sizeof slice->name, "blk.%u.ffn_%s_exps.weight", l, roles[s]);
            slice->type = 12;       /* TYPE_WEIGHTS */
            slice->slice_bytes = shape.slice_bytes[s] + 1024 * layer->shape_class;
            slice->ne[0] = 32;
            slice->ne[1] = (int64_t) slice->slice_bytes / 32;
            slice->ne[2] = shape.n_experts;
            slice->file = file;
            slice->offset_bytes = ends[file];
            ends[file] += round_up(slice->slice_bytes * shape.n_experts, 32);
        }
        gp_class_spec *c = &m->classes[layer->shape_class];
        c->stride_bytes = place_slices(layer, align);
        c->n_slots = shape.n_slots;
    }
    for (uint32_t t = 0; t < shape.n_tables; t++) {
        const uint32_t file = t % shape.n_files;
        gp_table_spec *table = &m->tables[t];
        snprintf(table->name, sizeof table->name, "%stoken_embd.weight", t ? "per_layer_" : "");
        table->type = 12;           /* TYPE_WEIGHTS */
        table->ne[0] = 96 + 40 * t;
        table->ne[1] = 50 + t;
        table->file = file;
        table->offset_bytes = ends[file];
        table->row_bytes = (uint64_t) table->ne[0];
        ends[file] += round_up(table->row_bytes * (uint64_t) table->ne[1], 32);
    }
    fake_direct_align(is_direct ? shape.offset_align : 1, is_direct ? shape.memory_align : 1);
    for (uint32_t f = 0; f < shape.n_files; f++) {
        m->paths[f] = paths[f];
        m->files[f] = fake_file_add(paths[f], ends[f]);
        m->truth[f] = malloc(ends[f]);
        CHECK(m->truth[f], "the test has memory");
        memcpy(m->truth[f], m->files[f], ends[f]);
    }
    for (uint32_t i = 0; i < shape.n_mirrors; i++) {
        for (uint32_t f = 0; f < shape.n_files; f++) {
            m->mirror_paths[i][f] = mirror_paths[i][f];
            m->mirror_files[i][f] = fake_file_add(mirror_paths[i][f], ends[f]);
            memcpy(m->mirror_files[i][f], m->truth[f], ends[f]);
        }
        m->mirrors[i] = (gp_mirror_spec) { m->mirror_paths[i], is_direct };
    }
    m->config = (gp_config) {
        .paths = m->paths, .n_paths = shape.n_files, .mirrors = m->mirrors, .n_mirrors = shape.n_mirrors,
        .layers = m->layers, .n_layers = shape.n_layers,
        .classes = m->classes, .n_classes = shape.n_classes, .tables = m->tables, .n_tables = shape.n_tables, .policy = shape.policy, .direct = is_direct,
        .read_ahead = shape.read_ahead, .offset_align = is_direct ? shape.offset_align : 1,
        .memory_align = is_direct ? shape.memory_align : 1, .n_readers = shape.n_readers,
        .piece_bytes = shape.piece_bytes,
    };
}

void model_end(model *m) {
    for (uint32_t f = 0; f < m->shape.n_files; f++) {
        free(m->truth[f]);
    }
    fake_reset();
}

gp_pager *model_open(const model *m) {
    gp_pager *pager;
    gp_open_failure failure;
    CHECK(gp_pager_open(&pager, &fake_os, &m->config, &failure) == 0, "the pager opens");
    CHECK(failure.lack == GP_LACKS_NOTHING, "and lacks nothing");
    return pager;
}

uint64_t model_offset(const model *m, uint32_t layer, uint32_t slice, int32_t expert) {
    const gp_slice_spec *spec = &m->layers[layer].slices[slice];
    return spec->offset_bytes + (uint64_t) expert * spec->slice_bytes;
}

const uint8_t *model_truth(const model *m, uint32_t layer, uint32_t slice, int32_t expert) {
    return m->truth[m->layers[layer].slices[slice].file] + model_offset(m, layer, slice, expert);
}

const uint8_t *model_row(const model *m, uint32_t table, int32_t row) {
    const gp_table_spec *spec = &m->tables[table];
    return m->truth[spec->file] + spec->offset_bytes + (uint64_t) row * spec->row_bytes;
}

bool model_slot_holds(const model *m, const gp_pager *pager, uint32_t slot, uint32_t layer, int32_t expert) {
    uint32_t n_slots;
    uint64_t stride_bytes;
    const char *slots = gp_pager_slots(pager, m->layers[layer].shape_class, &n_slots, &stride_bytes);
    CHECK(slot < n_slots, "a slot's number lies within its class");
    for (uint32_t s = 0; s < m->layers[layer].n_slices; s++) {
        const gp_slice_spec *slice = &m->layers[layer].slices[s];
        if (memcmp(slots + slot * stride_bytes + slice->data_at, model_truth(m, layer, s, expert),
                   slice->slice_bytes) != 0) {
            return false;
        }
    }
    return true;
}

static bool has_all(gp_pager *p, const gp_hold *hold, uint32_t i) {
    return gp_wave_has(p, hold, i, (1u << gp_pager_layer(p, hold->layer)->n_slices) - 1);
}

static bool has_come(gp_pager *p, const gp_hold *hold) {
    for (uint32_t i = 0; i < hold->n_wanted; i++) {
        if (!has_all(p, hold, i)) {
            return false;
        }
    }
    return true;
}

/* Whether it holds slots, waits for others to let theirs go, and nothing is on its way: what a wave never does that is done with
 * what it has. */
static bool is_in_the_way(gp_pager *p, const gp_hold *hold) {
    pthread_mutex_lock(&p->lock);
    const bool is = hold->next < hold->n_wanted && hold->n_open > 0 && hold->n_pending == 0;
    pthread_mutex_unlock(&p->lock);
    return is;
}

int model_acquire(gp_pager *p, gp_hold *hold, uint32_t layer, const int32_t *experts, uint32_t n_experts,
                  uint32_t n_tokens, int32_t *slots, gp_failure *failure) {
    uint32_t counts[MODEL_MOST_EXPERTS];
    for (uint32_t i = 0; i < n_experts; i++) {
        counts[i] = 1;
    }
    gp_demand demand = { .layer = layer, .experts = experts, .counts = counts, .n_experts = n_experts, .n_tokens = n_tokens };
    int error = gp_wave_begin(p, hold, &demand, failure);
    while (error == 0) {
        const unsigned n_arrived = gp_wave_n_arrived(hold);
        if (has_come(p, hold) || gp_wave_stops(hold, true)) {
            break;
        }
        if (is_in_the_way(p, hold)) {
            gp_hold_release(p, hold);
            nanosleep(&(struct timespec) { .tv_nsec = 100000 }, NULL);
            demand.is_again = true;
            error = gp_wave_begin(p, hold, &demand, failure);
        } else {
            (void) gp_wave_wait(p, hold, n_arrived, true);
        }
    }
    error = error == 0 ? gp_wave_end(p, hold, failure) : error;
    for (uint32_t i = 0; error == 0 && i < n_experts; i++) {
        const int32_t slot = atomic_load(&hold->wanted[i].slot);
        slots[hold->wanted[i].at] = slot;
        if (slot == GP_NO_SLOT) {
            error = -EBUSY;
        }
    }
    if (error != 0) {
        gp_hold_release(p, hold);
    }
    return error;
}

typedef struct {
    bool     is_done[MODEL_MOST_EXPERTS];
    uint32_t n_done;
    bool     is_wrong;      /* some bytes were not the expert's */
} work;

/* Does what there is to do; whether that was anything. */
static bool do_what_has_come(const model *m, gp_pager *p, gp_hold *hold, work *w) {
    bool is_any = false;
    for (uint32_t i = 0; i < hold->n_wanted && !gp_wave_stops(hold, true); i++) {
        if (w->is_done[i] || !has_all(p, hold, i)) {
            continue;
        }
        const int32_t slot = atomic_load(&hold->wanted[i].slot);
        CHECK(slot >= 0, "a slot comes in time");
        w->is_wrong |= !model_slot_holds(m, p, (uint32_t) slot, hold->layer, hold->wanted[i].expert);
        gp_wave_done(p, hold, i);
        w->is_done[i] = is_any = true;
        w->n_done++;
    }
    return is_any;
}

int model_wave(const model *m, gp_pager *p, gp_hold *hold, const gp_demand *wanted, gp_failure *failure) {
    work w = { .n_done = 0 };
    uint32_t once[MODEL_MOST_EXPERTS];
    for (uint32_t i = 0; i < MODEL_MOST_EXPERTS; i++) {
        once[i] = 1;
    }
    gp_demand demand = *wanted;
    demand.counts = demand.counts ? demand.counts : once;
    int error = gp_wave_begin(p, hold, &demand, failure);
    if (error == 0) {
        while (w.n_done < demand.n_experts && !gp_wave_stops(hold, true)) {
            const unsigned n_arrived = gp_wave_n_arrived(hold);
            if (!do_what_has_come(m, p, hold, &w) && !gp_wave_wait(p, hold, n_arrived, true)) {
                break;
            }
        }
        error = gp_wave_end(p, hold, failure);
    }
    CHECK(error != 0 || w.n_done == demand.n_experts, "a wave that ends well has brought every expert");
    CHECK(error != 0 || !w.is_wrong, "and its own bytes");   /* of a changed file others may come, but then the wave fails */
    gp_hold_release(p, hold);
    return error;
}

void model_use(const model *m, gp_pager *p, gp_hold *hold, uint32_t layer, const int32_t *experts,
               uint32_t n_experts, uint32_t n_tokens) {
    const gp_demand demand = { .layer = layer, .experts = experts, .n_experts = n_experts, .n_tokens = n_tokens };
    gp_failure failure;
    CHECK(model_wave(m, p, hold, &demand, &failure) == 0 && failure.error == 0, "the experts come");
}

void model_draw(const model *m, int32_t *experts, uint32_t n_experts) {
    for (uint32_t i = 0; i < n_experts; i++) {
        bool is_new;
        do {
            /* Low numbers more often, as routers have favourites. */
            const uint32_t below = 1 + fake_random(m->shape.n_experts);
            experts[i] = (int32_t) fake_random(below);
            is_new = true;
            for (uint32_t j = 0; j < i; j++) {
                is_new &= experts[j] != experts[i];
            }
        } while (!is_new);
    }
}

bool model_is_resident(gp_pager *pager, const model *m, uint32_t layer, int32_t expert) {
    uint8_t resident[MODEL_MOST_EXPERTS];
    CHECK(m->shape.n_experts <= sizeof resident, "the test's models are small");
    CHECK(gp_pager_resident(pager, layer, resident) == 0, "the layer exists");
    return resident[expert] != 0;
}

void model_settle(gp_pager *pager) {
    for (bool is_reading = true; is_reading;) {
        is_reading = false;
        pthread_mutex_lock(&pager->lock);
        for (uint32_t i = 0; i < pager->n_slots; i++) {
            is_reading |= pager->slots[i].state == READING || pager->slots[i].state == LEAVING;
        }
        pthread_mutex_unlock(&pager->lock);
        if (is_reading) {
            nanosleep(&(struct timespec) { .tv_nsec = 200000 }, NULL);
        }
    }
}

static void check_class(const gp_pager *p, uint32_t index) {
    const gp_class *c = &p->classes[index];
    uint32_t n_free = 0, n_transient = 0;
    for (uint32_t i = c->first; i < c->first + c->n_slots; i++) {
        const gp_slot *s = &p->slots[i];
        const bool is_missing = atomic_load(&p->missing[i]) != 0;
        CHECK(s->state == LEAVING ? is_missing || s->is_withdrawing : is_missing == (s->state == READING),
              "3: slices are missing of what is READING or LEAVING, and of nothing else");
        CHECK(s->state != READING || !s->is_pinned, "what is pinned has been read");
        if (s->state == FREE) {
            n_free++;
            CHECK(!s->users && !s->is_pinned, "a free slot is nobody's");
            continue;
        }
        n_transient += s->is_transient;
        CHECK(p->layers[s->layer].spec.shape_class == index, "a slot holds an expert of its own class");
        if (s->state == LEAVING) {
            CHECK(!s->users && !s->is_pinned && p->layers[s->layer].slot_of[s->expert] != (int32_t) i,
                  "1: a slot that is leaving is nobody's");
            continue;
        }
        CHECK(p->layers[s->layer].slot_of[s->expert] == (int32_t) i, "1: who is in a slot is found there");
        CHECK(s->state == READING || !s->has_failed || s->users, "what could not be read stays for those only who have it");
    }
    CHECK(c->n_free == n_free, "n_free is the number of free slots");
    CHECK(c->n_transient == n_transient, "n_transient is the number of transient slots");
}

static void check_layer(const gp_pager *p, uint32_t index) {
    const gp_layer *l = &p->layers[index];
    uint32_t resident = 0, kept = 0;
    for (uint32_t e = 0; e < l->spec.n_experts; e++) {
        const int32_t at = l->slot_of[e];
        if (at >= 0) {
            const gp_slot *s = &p->slots[at];
            CHECK(s->state != FREE && s->layer == index && s->expert == (int32_t) e,
                  "1: a slot holds who points at it");
            resident++;
            kept += !s->is_transient && !s->is_warmed;
        }
    }
    CHECK(l->counters.resident == resident, "4: resident is the number of the layer's slots");
    CHECK(l->kept == kept, "4: kept is the number of those that are neither transient nor warmed");
}

static void check_hold(const gp_pager *p, uint32_t bit) {
    const gp_hold *hold = p->holds[bit];
    uint32_t n_used = 0, n_open = 0, n_held = 0, n_pending = 0;
    for (uint32_t i = 0; i < p->n_slots; i++) {
        n_used += p->slots[i].users >> bit & 1;
    }
    if (!hold) {
        CHECK(n_used == 0, "a closed hold holds nothing");
        return;
    }
    CHECK(hold->next <= hold->n_wanted, "2: nobody takes a slot for what is not wanted");
    for (uint32_t i = 0; i < hold->n_wanted; i++) {
        const gp_wanted *w = &hold->wanted[i];
        const int32_t slot = atomic_load(&w->slot);
        CHECK((slot != GP_NO_SLOT_YET) == (i < hold->next), "2: slots are taken in the order in which experts are wanted");
        if (slot == GP_NO_SLOT_YET || w->is_done) {
            CHECK(!w->is_done || slot != GP_NO_SLOT_YET, "what is done had a slot, or did without");
            continue;
        }
        n_open++;
        if (slot == GP_NO_SLOT) {
            continue;
        }
        n_held++;
        const uint32_t index = p->classes[p->layers[hold->layer].spec.shape_class].first + (uint32_t) slot;
        const gp_slot *s = &p->slots[index];
        n_pending += atomic_load(&p->missing[index]) != 0;
        CHECK(s->users >> bit & 1, "1: what is held bears the hold's bit");
        CHECK((s->state == READING || s->state == READY) && s->layer == hold->layer && s->expert == w->expert,
              "and holds what is wanted");
    }
    CHECK(hold->n_open == n_open, "1: n_open is the number of those that have a slot, or do without, and are not done");
    CHECK(hold->n_pending == n_pending, "1: n_pending is the number of those whose slot lacks a slice");
    CHECK(n_used == n_held, "1: nothing else bears the hold's bit");
    CHECK(atomic_load(&hold->has_failed) == (hold->failure.error != 0), "what has failed has a failure");
}

void model_check_invariants(gp_pager *pager) {
    pthread_mutex_lock(&pager->lock);
    for (uint32_t i = 0; i < pager->config.n_classes; i++) {
        check_class(pager, i);
    }
    for (uint32_t i = 0; i < pager->config.n_layers; i++) {
        check_layer(pager, i);
    }
    for (uint32_t bit = 0; bit < GP_MAX_TAPS; bit++) {
        check_hold(pager, bit);
    }
    uint32_t n_in_flight = 0;
    for (uint32_t i = 0; i < pager->n_slots; i++) {
        n_in_flight += pager->slots[i].state == READING || pager->slots[i].state == LEAVING;
    }
    CHECK(pager->n_in_flight == n_in_flight, "4: n_in_flight is the number of slots that are READING or LEAVING");
    pthread_mutex_unlock(&pager->lock);
}
