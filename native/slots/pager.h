/* Between pager.c and tap.c: slots taken and given back for the time of one piece of graph. */
#ifndef GGUF_PAGER_PAGER_H
#define GGUF_PAGER_PAGER_H

#include "gguf_pager.h"
#include "reads/fetch.h"
#include "reads/tables.h"
#include "reads/watch.h"

/* Slots one context computes with. Zeroed by gp_hold_open. */
typedef struct {
    uint32_t        bit;        /* this hold's place in a slot's mask of users */
    uint32_t       *slots;      /* lock */
    uint32_t        n_slots;    /* lock */
    uint32_t        pending;    /* lock; how many of them are still being read */
    uint32_t        pending_slices[GP_MAX_SLICES];  /* lock; how many lack this slice */
    pthread_cond_t  arrived;        /* all pending slots' slice of some index */
    pthread_cond_t  slice_arrived;  /* any slice, while n_watching threads wait for one */
    uint32_t        n_watching;     /* lock */
    atomic_uint     n_arrived;      /* slices so far; written with the lock */
    gp_read       **reads;      /* room for one submission */
    uint32_t        n_needed;   /* the most slots of one class it may hold at a time */
    gp_watch       *watch;      /* the caller's, to set after open; its waits end with -EINTR when it stops */
} gp_hold;

/* What one graph node's batch wants of a layer. */
typedef struct {
    uint32_t        layer;
    const int32_t  *experts;    /* distinct */
    const uint32_t *counts;     /* ids that named each */
    uint32_t        n_experts;
    uint32_t        n_tokens;
    bool            is_again;   /* the same ids were counted before: only the slots are wanted */
    uint32_t        later;      /* slices, a bit each, that are not waited for: gp_pager_wait does, before they are used;
                                 * all, of several tokens: they are used an expert at a time, and read so */
} gp_demand;

int  gp_hold_open(gp_hold *hold, gp_pager *pager, uint32_t n_needed);
void gp_hold_close(gp_hold *hold, gp_pager *pager);

/* Brings the experts into slots and holds them; slots[i] is the slot, within its class, of demand->experts[i].
 * On failure nothing new is held and *failure tells where. -EBUSY: other contexts hold too many slots.
 * -ECHILD: this process is a fork of the one that opened the pager. -EINTR: the hold's watch has stopped. */
int  gp_pager_acquire(gp_pager *pager, gp_hold *hold, const gp_demand *demand, int32_t *slots, gp_failure *failure);
/* Waits until the slices, a bit each, of all held slots are in. On failure they stay held: other threads may be computing
 * with them. -EINTR, even if nothing is missing, once the watch has stopped: other threads may have left something undone. */
int  gp_pager_wait(gp_pager *pager, gp_hold *hold, uint32_t layer, uint32_t slices, gp_failure *failure);
/* Whether a slice of a held slot, named as gp_pager_acquire does, is in. Any thread. */
bool gp_pager_has_slice(const gp_pager *pager, uint32_t layer, uint32_t slot, uint32_t slice);
/* Waits until it is, or could not be read: gp_pager_wait tells. Any thread; `is_decoding`: it is the one that decodes, which
 * counts the time as a stall and asks the watch. False: the slice is not there, and shall not be waited for. */
bool gp_pager_wait_slice(gp_pager *pager, gp_hold *hold, uint32_t layer, uint32_t slot, uint32_t slice, bool is_decoding);
/* How many slices have arrived for this hold, ever. Any thread. */
unsigned gp_hold_n_arrived(const gp_hold *hold);
/* Waits until there are others than these. Some must be on their way. Any thread, and false as above. */
bool gp_pager_wait_arrival(gp_pager *pager, gp_hold *hold, uint32_t layer, unsigned n_arrived, bool is_decoding);
/* Whether the watch has stopped; the thread that decodes asks. */
bool gp_hold_stops(gp_hold *hold, bool is_decoding);
/* Whether some of these slices are still being read. */
bool gp_pager_is_waiting(gp_pager *pager, const gp_hold *hold, uint32_t slices);
void gp_pager_release(gp_pager *pager, gp_hold *hold);

void gp_pager_count_left_alone(gp_pager *pager, uint32_t layer);

const gp_layer_spec *gp_pager_layer(const gp_pager *pager, uint32_t layer);     /* NULL past the last */
uint32_t         gp_pager_n_taps(gp_pager *pager);
gp_tables       *gp_pager_tables(const gp_pager *pager);
/* The address, number and distance of the slots of a class. */
char            *gp_pager_slots(const gp_pager *pager, uint32_t shape_class, uint32_t *n_slots, uint64_t *stride_bytes);

#endif
