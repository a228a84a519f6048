/* Slots given back for good: another context needs the memory. The last ones of a class go, so that those that stay keep
 * their addresses and numbers. */
#include <errno.h>

#include "slots/slots.h"

/* How many of a class's last slots can go now: free, or holding an expert that nobody computes with. */
static uint32_t count_idle_at_the_end(const gp_pager *p, const gp_class *c) {
    uint32_t n = 0;
    while (n < c->n_slots) {
        const gp_slot *s = &p->slots[c->first + c->n_slots - 1 - n];
        if (s->state != FREE && (s->state != READY || s->users || s->is_pinned)) {
            break;
        }
        n++;
    }
    return n;
}

int gp_pager_shrink(gp_pager *p, uint32_t shape_class, uint32_t n_slots) {
    if (shape_class >= p->config.n_classes || n_slots == 0) {
        return -EINVAL;
    }
    gp_class *c = &p->classes[shape_class];
    pthread_mutex_lock(&p->lock);
    if (n_slots >= c->n_slots) {
        pthread_mutex_unlock(&p->lock);
        return n_slots == c->n_slots ? 0 : -EINVAL;
    }
    const uint32_t n_gone = c->n_slots - n_slots;
    if (count_idle_at_the_end(p, c) < n_gone) {
        pthread_mutex_unlock(&p->lock);
        return -EBUSY;
    }
    for (uint32_t i = c->first + n_slots; i < c->first + c->n_slots; i++) {
        if (p->slots[i].state == READY) {
            p->layers[p->slots[i].layer].counters.evictions++;
            gp_slot_empty(p, &p->slots[i]);
        }
    }
    char *const end = c->slots + c->n_slots * c->stride_bytes;
    c->n_free -= n_gone;
    c->n_slots = n_slots;
    gp_class_divide(p, shape_class);
    pthread_mutex_unlock(&p->lock);
    /* Nobody reads into them any more, and nobody will. */
    char *const begin = c->slots + n_slots * c->stride_bytes;
    p->os->memory_give_back(begin, (size_t) (end - begin));
    return 0;
}
