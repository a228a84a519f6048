/* Opening and closing a pager: the arena cut into slots, files, threads, tables. All memory there will ever be. */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "slots/ahead.h"
#include "slots/arrivals.h"
#include "slots/slots.h"
#include "slots/warm.h"

static uint64_t round_up(uint64_t value, uint64_t step) {
    return (value + step - 1) / step * step;
}

enum { ARENA_ALIGN = 4096, ANY_SLOT = 1 << 20, MAX_SLOTS = INT32_MAX / GP_MAX_SLICES };

/* A step keeps the address space from being changed, by a malloc of a thread that computes, say: two huge pages, 1 to 4 ms. */
enum { POPULATE_BYTES = 4 << 20 };

#define MAX_ARENA_BYTES (UINT64_C(1) << 47)    /* addresses a process has */
#define MAX_TABLE_ROW_BYTES (UINT64_C(1) << 30)     /* INT32_MAX such rows have a size that 64 bits hold */

/* Slots are placed for direct reads where any copy is read so; buffered ones need nothing of it. */
static bool is_any_direct(const gp_config *config) {
    bool is_any = config->direct;
    for (uint32_t i = 0; i < config->n_mirrors; i++) {
        is_any |= config->mirrors[i].direct;
    }
    return is_any;
}

static int check_slice(const gp_config *config, const gp_layer_spec *layer, const gp_slice_spec *slice) {
    const gp_class_spec *c = &config->classes[layer->shape_class];
    if (slice->file >= config->n_paths || slice->slice_bytes == 0 || slice->ne[2] != (int64_t) layer->n_experts
        || slice->region_at > c->stride_bytes || slice->region_bytes > c->stride_bytes - slice->region_at
        || slice->data_at > c->stride_bytes || slice->slice_bytes > c->stride_bytes
        || slice->offset_bytes > INT64_MAX - layer->n_experts * c->stride_bytes) {
        return -EINVAL;
    }
    for (const gp_slice_spec *other = layer->slices; other < slice; other++) {     /* reads of both run at once */
        if (slice->region_at < other->region_at + other->region_bytes
            && other->region_at < slice->region_at + slice->region_bytes) {
            return -EINVAL;
        }
    }
    const gp_fetch_config fetch = { .direct = is_any_direct(config), .offset_align = config->offset_align,
                                    .memory_align = config->memory_align };
    for (uint32_t e = 0; e < layer->n_experts; e++) {
        const gp_read read = {
            .offset_bytes = slice->offset_bytes + e * slice->slice_bytes,
            .bytes = slice->slice_bytes,
            /* Slots begin at multiples of memory_align, so any such address stands for all of them. */
            .into = (char *) (uintptr_t) (ANY_SLOT + slice->data_at),
            .region = (char *) (uintptr_t) (ANY_SLOT + slice->region_at),
            .region_bytes = slice->region_bytes,
        };
        if (!gp_fetch_fits(&fetch, &read)) {
            return -EINVAL;
        }
    }
    return 0;
}

static int check_table(const gp_config *config, const gp_table_spec *table) {
    return table->file >= config->n_paths || table->row_bytes == 0 || table->row_bytes > MAX_TABLE_ROW_BYTES
        || table->ne[0] <= 0 || table->ne[1] <= 0 || table->ne[1] > INT32_MAX
        || table->offset_bytes > INT64_MAX - (uint64_t) table->ne[1] * table->row_bytes ? -EINVAL : 0;
}

static int check_config(const gp_config *config) {
    if (config->n_layers == 0 || config->n_classes == 0 || config->n_paths == 0 || config->n_mirrors >= GP_MAX_COPIES) {
        return -EINVAL;
    }
    /* Slots begin at multiples of ARENA_ALIGN and of the stride: both must be multiples of memory_align. */
    const bool is_direct = is_any_direct(config);
    if (is_direct && (config->offset_align == 0 || config->memory_align == 0
                           || ARENA_ALIGN % config->memory_align != 0)) {
        return -EINVAL;
    }
    uint64_t n_slots = 0, arena_bytes = 0;
    for (uint32_t i = 0; i < config->n_classes; i++) {
        const gp_class_spec *c = &config->classes[i];
        if (c->n_slots == 0 || c->stride_bytes == 0 || c->stride_bytes > MAX_ARENA_BYTES / c->n_slots
            || (is_direct && c->stride_bytes % config->memory_align != 0)) {
            return -EINVAL;
        }
        n_slots += c->n_slots;
        arena_bytes += c->n_slots * c->stride_bytes;
        if (n_slots > MAX_SLOTS || arena_bytes > MAX_ARENA_BYTES) {
            return -EINVAL;
        }
    }
    for (uint32_t i = 0; i < config->n_layers; i++) {
        const gp_layer_spec *layer = &config->layers[i];
        if (layer->n_slices == 0 || layer->n_slices > GP_MAX_SLICES || layer->shape_class >= config->n_classes
            || layer->n_experts == 0 || layer->n_used == 0 || layer->n_used > layer->n_experts
            || layer->n_used > config->classes[layer->shape_class].n_slots) {
            return -EINVAL;
        }
        for (uint32_t s = 0; s < layer->n_slices; s++) {
            const int error = check_slice(config, layer, &layer->slices[s]);
            if (error != 0) {
                return error;
            }
        }
    }
    for (uint32_t i = 0; i < config->n_tables; i++) {
        const int error = check_table(config, &config->tables[i]);
        if (error != 0) {
            return error;
        }
    }
    return 0;
}

static int open_arena(gp_pager *p) {
    const gp_config *config = &p->config;
    p->classes = calloc(config->n_classes, sizeof *p->classes);
    if (!p->classes) {
        return -ENOMEM;
    }
    for (uint32_t i = 0; i < config->n_classes; i++) {
        p->arena_bytes = round_up(p->arena_bytes, ARENA_ALIGN);
        p->arena_bytes += config->classes[i].n_slots * config->classes[i].stride_bytes;
    }
    void *arena;
    int error = p->os->memory_open(&arena, p->arena_bytes);
    if (error != 0) {
        return error;
    }
    p->arena = arena;
    uint64_t at = 0;
    for (uint32_t i = 0; i < config->n_classes; i++) {
        at = round_up(at, ARENA_ALIGN);
        p->classes[i] = (gp_class) {
            .slots = p->arena + at, .stride_bytes = config->classes[i].stride_bytes,
            .first = p->n_slots, .n_slots = config->classes[i].n_slots, .n_free = config->classes[i].n_slots,
        };
        at += p->classes[i].n_slots * p->classes[i].stride_bytes;
        p->n_slots += p->classes[i].n_slots;
    }
    p->slots = calloc(p->n_slots, sizeof *p->slots);
    p->missing = calloc(p->n_slots, sizeof *p->missing);
    p->reads = calloc((size_t) p->n_slots * GP_MAX_SLICES, sizeof *p->reads);
    p->leaving = calloc((size_t) p->n_slots * GP_MAX_SLICES, sizeof *p->leaving);
    return p->slots && p->missing && p->reads && p->leaving ? 0 : -ENOMEM;
}

/* Pages that nobody has touched cost the token that first reads into them; making them present takes seconds for a large
 * arena, in which the model can be used already. Slots are filled from the first on, so this runs ahead of the reads.
 * Where it fails, reads make the pages present themselves, and fail with what the system then says. */
static void make_present(gp_pager *p) {
    for (size_t at = 0; at < p->arena_bytes; at += POPULATE_BYTES) {
        const size_t left = p->arena_bytes - at;
        if (atomic_load(&p->is_closing)
            || p->os->memory_populate(p->arena + at, left < POPULATE_BYTES ? left : POPULATE_BYTES) != 0) {
            return;
        }
    }
    /* Never swapped where the limit allows it; where it does not, doctor says what that means on a machine with swap. */
    (void) gp_os_memory_lock(p->arena, p->arena_bytes);
}

static void *populate(void *data) {
    gp_pager *p = data;
    p->os->thread_step_back();
    make_present(p);
    atomic_store(&p->has_populated, true);
    return NULL;
}

static int open_layers(gp_pager *p) {
    const gp_config *config = &p->config;
    uint32_t n_most = 0;
    p->layers = calloc(config->n_layers, sizeof *p->layers);
    if (!p->layers) {
        return -ENOMEM;
    }
    for (uint32_t i = 0; i < config->n_layers; i++) {
        gp_layer *l = &p->layers[i];
        l->spec = config->layers[i];
        gp_class *c = &p->classes[l->spec.shape_class];
        l->rank = c->n_layers++;
        l->slot_of = malloc(l->spec.n_experts * sizeof *l->slot_of);
        l->uses = calloc(l->spec.n_experts, sizeof *l->uses);
        l->chosen = calloc(l->spec.n_experts, sizeof *l->chosen);
        l->last_token = calloc(l->spec.n_experts, sizeof *l->last_token);
        n_most = l->spec.n_experts > n_most ? l->spec.n_experts : n_most;
        if (!l->slot_of || !l->uses || !l->chosen || !l->last_token) {
            return -ENOMEM;
        }
        for (uint32_t e = 0; e < l->spec.n_experts; e++) {
            l->slot_of[e] = -1;
        }
    }
    p->guesses = malloc(n_most * sizeof *p->guesses);
    if (!p->guesses) {
        return -ENOMEM;
    }
    for (uint32_t i = 0; i < config->n_classes; i++) {
        gp_class_divide(p, i);
    }
    return 0;
}

/* Memory that a large batch's experts pass through: what the disk needs to be kept busy while others are computed, with some to
 * spare for both. */
enum { WAVE_BYTES = 96 << 20, LEAST_WAVE_SLOTS = 16 };

void gp_class_divide(gp_pager *p, uint32_t shape_class) {
    gp_class *c = &p->classes[shape_class];
    c->share = c->n_layers ? c->n_slots / c->n_layers : 0;
    c->floor = 0;
    uint32_t n_used = 0;
    for (uint32_t i = 0; i < p->config.n_layers; i++) {
        const gp_layer_spec *spec = &p->layers[i].spec;
        n_used = spec->shape_class == shape_class && spec->n_used > n_used ? spec->n_used : n_used;
    }
    c->floor = n_used < c->share ? n_used : c->share;
    const uint64_t wanted = WAVE_BYTES / c->stride_bytes;
    const uint32_t wave = wanted < LEAST_WAVE_SLOTS ? LEAST_WAVE_SLOTS : wanted < c->n_slots ? (uint32_t) wanted : c->n_slots;
    /* Slots that do not hold one token's experts of every layer hold nothing that is worth keeping from a batch. */
    const uint32_t most = c->share < n_used ? c->n_slots : c->n_slots / 2;
    c->transient_limit = wave < most ? wave : most;
    c->batch_share = c->n_layers ? (c->n_slots - c->transient_limit) / c->n_layers : 0;
}

int gp_pager_open(gp_pager **out, const gp_os *os, const gp_config *config, gp_open_failure *failure) {
    *out = NULL;
    *failure = (gp_open_failure) { .lack = GP_LACKS_SENSE };
    const gp_policy *policy = gp_policy_find(config->policy);
    int error = policy ? check_config(config) : -EINVAL;
    if (error != 0) {
        return error;
    }
    failure->lack = GP_LACKS_MEMORY;
    gp_pager *p = calloc(1, sizeof *p);
    if (!p) {
        return -ENOMEM;
    }
    p->os = os;
    p->config = *config;
    p->policy = policy;
    p->slice_arrived = gp_slice_arrived;
    p->pid = getpid();
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->released, NULL);
    if ((error = open_arena(p)) != 0 || (error = open_layers(p)) != 0
        || (error = gp_copies_open(&p->copies, os, config, failure)) != 0
        || (error = gp_tables_open(&p->tables, os, config, p->copies, failure)) != 0) {
        goto fail;
    }
    failure->lack = GP_LACKS_THREAD;
    if ((error = os->thread_start(&p->populating, populate, p)) != 0) {
        goto fail;
    }
    failure->lack = GP_LACKS_NOTHING;
    p->has_populating = true;
    /* The caller's arrays may go now; what is needed of them is in layers and classes. */
    p->config.paths = NULL;
    p->config.mirrors = NULL;
    p->config.layers = NULL;
    p->config.classes = NULL;
    p->config.tables = NULL;
    p->config.policy = policy->name;
    *out = p;
    return 0;
fail:
    gp_pager_close(p);
    return error;
}

void gp_pager_wait_present(gp_pager *p) {
    if (getpid() == p->pid && p->has_populating) {
        pthread_join(p->populating, NULL);
        p->has_populating = false;
    }
}

bool gp_pager_is_present(const gp_pager *p) {
    return atomic_load(&p->has_populated) || getpid() != p->pid;
}

/* Whoever finishes one copy's read may be submitting to another copy, to warm up: no fetch closes before. */
static void wait_for_reads(gp_pager *p) {
    pthread_mutex_lock(&p->lock);
    while (gp_warm_up_is_submitting(p)) {
        pthread_cond_wait(&p->released, &p->lock);
    }
    /* After a decode that has stopped a layer's reads may be queued, gigabytes, for nobody. */
    uint32_t n_reads = 0;
    for (uint32_t i = 0; p->n_in_flight > 0 && i < p->n_slots; i++) {
        if (p->slots[i].state == READING) {
            n_reads += gp_slot_withdraw(p, i, p->leaving + n_reads);
        }
    }
    pthread_mutex_unlock(&p->lock);
    if (n_reads > 0) {
        gp_copies_withdraw(p->copies, p->leaving, n_reads);
    }
    pthread_mutex_lock(&p->lock);
    gp_ahead_withdrawn(p, p->leaving, n_reads);
    while (p->n_in_flight > 0) {
        pthread_cond_wait(&p->released, &p->lock);
    }
    pthread_mutex_unlock(&p->lock);
}

void gp_pager_close(gp_pager *p) {
    if (!p) {
        return;
    }
    gp_tables_close(p->tables);
    if (getpid() == p->pid) {
        atomic_store(&p->is_closing, true);
        wait_for_reads(p);
        gp_copies_close(p->copies);
        gp_pager_wait_present(p);
    } else {
        gp_copies_abandon(p->copies);
    }
    for (uint32_t i = 0; p->layers && i < p->config.n_layers; i++) {
        free(p->layers[i].slot_of);
        free(p->layers[i].uses);
        free(p->layers[i].chosen);
        free(p->layers[i].last_token);
    }
    if (p->arena) {
        p->os->memory_close(p->arena, p->arena_bytes);
    }
    free(p->warm_up);
    free(p->guesses);
    free(p->leaving);
    free(p->reads);
    free(p->missing);
    free(p->slots);
    free(p->layers);
    free(p->classes);
    if (getpid() == p->pid) {   /* in a fork: glibc's destroy would wait for the parent's waiters */
        pthread_cond_destroy(&p->released);
        pthread_mutex_destroy(&p->lock);
    }
    free(p);
}
