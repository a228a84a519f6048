/* What a pager tells of itself, and files that were touched. */
#include "slots/pager.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "slots/forecast.h"
#include "slots/slots.h"

bool gp_pager_enter(gp_pager *p) {
    return getpid() == p->pid && pthread_mutex_lock(&p->lock) == 0;
}

void gp_pager_leave(gp_pager *p, bool has_entered) {
    if (has_entered) {
        pthread_mutex_unlock(&p->lock);
    }
}

void gp_pager_compare_with(gp_pager *p, gp_compare compare, void *data) {
    p->compare = compare;
    p->compare_data = data;
    gp_tables_compare_with(p->tables, compare, data);
}

int gp_pager_accept(gp_pager *p, const gp_file_times *times) {
    if (getpid() != p->pid) {
        return -ECHILD;
    }
    pthread_mutex_lock(&p->lock);
    for (uint32_t i = 0; i < p->n_slots; i++) {
        gp_slot *s = &p->slots[i];
        if (s->is_checked) {
            continue;
        }
        if (s->users || s->is_pinned) {
            s->is_doubtful = true;          /* whoever computes with it compares the bytes */
        } else if (s->state == READY) {
            gp_slot_empty(p, s);
        } else if (s->state == READING) {
            gp_slot_let_go(p, s);           /* it may have begun before */
        }
    }
    pthread_cond_broadcast(&p->released);
    pthread_mutex_unlock(&p->lock);
    return gp_copies_accept(p->copies, times);
}

void gp_pager_count_left_alone(gp_pager *p, uint32_t layer_index) {
    const bool has_entered = gp_pager_enter(p);
    p->layers[layer_index].counters.left_alone++;
    gp_pager_leave(p, has_entered);
}

const gp_layer_spec *gp_pager_layer(const gp_pager *p, uint32_t layer_index) {
    return layer_index < p->config.n_layers ? &p->layers[layer_index].spec : NULL;
}

gp_tables *gp_pager_tables(const gp_pager *p) {
    return p->tables;
}

char *gp_pager_slots(const gp_pager *p, uint32_t shape_class, uint32_t *n_slots, uint64_t *stride_bytes) {
    *n_slots = p->classes[shape_class].n_slots;
    *stride_bytes = p->classes[shape_class].stride_bytes;
    return p->classes[shape_class].slots;
}

/* ---- counters ---------------------------------------------------------------------------------------------------- */

void gp_pager_counters(gp_pager *p, gp_counters *counters) {
    const bool has_entered = gp_pager_enter(p);
    for (uint32_t i = 0; i < p->config.n_layers; i++) {
        counters[i] = p->layers[i].counters;
        counters[i].sight = gp_look_ahead_sight(p, i);
    }
    gp_pager_leave(p, has_entered);
}

void gp_pager_row_counters(const gp_pager *p, gp_row_counters *counters) {
    gp_tables_counters(p->tables, counters);
}

bool gp_pager_reads_in_background(const gp_pager *p) {
    return gp_copies_are_in_background(p->copies);
}

void gp_pager_copies(const gp_pager *p, uint64_t *bytes_read) {
    gp_copies_bytes_read(p->copies, bytes_read);
}

int gp_pager_resident(gp_pager *p, uint32_t layer_index, uint8_t *resident) {
    if (layer_index >= p->config.n_layers) {
        return -EINVAL;
    }
    const gp_layer *l = &p->layers[layer_index];
    const bool has_entered = gp_pager_enter(p);
    for (uint32_t e = 0; e < l->spec.n_experts; e++) {
        const int32_t index = l->slot_of[e];
        resident[e] = index < 0 ? 0 : p->slots[index].is_pinned ? 2 : 1;
    }
    gp_pager_leave(p, has_entered);
    return 0;
}

int gp_pager_chosen(gp_pager *p, uint32_t layer_index, uint64_t *chosen) {
    if (layer_index >= p->config.n_layers) {
        return -EINVAL;
    }
    const gp_layer *l = &p->layers[layer_index];
    const bool has_entered = gp_pager_enter(p);
    memcpy(chosen, l->chosen, l->spec.n_experts * sizeof *chosen);
    gp_pager_leave(p, has_entered);
    return 0;
}
