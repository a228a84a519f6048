/* Between the pager and who computes: a wave brings the experts of one node's batch through slots, each for as long as it is
 * computed with. Any number of slots will do, from one up: whoever is done with an expert lets its slot go, and the next that
 * is wanted is read into it. */
#ifndef GGUF_PAGER_PAGER_H
#define GGUF_PAGER_PAGER_H

#include <stdatomic.h>

#include "gguf_pager.h"
#include "reads/fetch.h"
#include "reads/tables.h"
#include "reads/watch.h"
#include "slots/foresight.h"

/* What one graph node's batch wants of a layer. */
typedef struct {
    uint32_t        layer;
    const int32_t  *experts;    /* distinct */
    const uint32_t *counts;     /* ids that named each */
    uint32_t        n_experts;
    uint32_t        n_tokens;
    bool            is_again;   /* the same ids were counted before: only the slots are wanted */
} gp_demand;

/* One expert of a wave. */
typedef struct {
    int32_t         expert;
    uint32_t        count;      /* ids that named it */
    uint32_t        at;         /* its place in the demand */
    bool            is_done;    /* lock */
    _Atomic int32_t slot;       /* within its class, or: */
} gp_wanted;

enum { GP_NO_SLOT_YET = -1, GP_NO_SLOT = -2 };      /* and there will be none: others hold them all, and nobody gives any back */

/* An expert that a router would have chosen before its time. */
typedef struct {
    int32_t         expert;
    bool            was_missing;        /* it was in no slot */
    bool            is_read;            /* and was read for it */
} gp_foretold;

/* What was foretold of the layer whose turn comes next. */
typedef struct {
    uint32_t        layer, n;
    bool            is_open;
    gp_foretold    *experts;            /* n of them, room for all of a layer */
} gp_forecast;

/* How much shall be foretold of the next layer. GP_LOOK_TO_LEARN: only to see what would have come true. */
typedef enum { GP_LOOK_NOT, GP_LOOK_TO_LEARN, GP_LOOK_TO_READ } gp_look;

enum { GP_LOOK_ROWS = 16 };     /* tokens in a batch for which is looked ahead, at most */

/* One context's waves, one at a time. */
typedef struct {
    uint32_t        bit;        /* this hold's place in a slot's mask of users */
    gp_watch       *watch;      /* the caller's, to set after open; NULL: nobody stops it */

    gp_wanted      *wanted;     /* those that were in slots first, then the others in the order in which they are read */
    uint32_t        n_wanted;   /* these four: the decoding thread's, while nobody computes */
    uint32_t        layer, n_tokens;
    bool            is_large;   /* more experts than the layer's share of the slots: they pass through */
    uint32_t        next;       /* lock; the first that nobody has taken a slot for */
    uint32_t        n_open;     /* lock; those that hold a slot, or do without, and are not done */
    uint64_t        waits_since_ns;     /* the decoding thread's: for a slot of others; 0: it does not */
    uint32_t        n_pending;  /* lock; those whose slots are still being read */
    uint32_t       *touched;    /* lock; computed, and their files must be compared before their slots may go */
    atomic_uint     n_touched;  /* written with the lock */
    gp_failure      touched_at; /* lock; the file whose times are others */
    gp_failure      failure;    /* lock; the first */
    atomic_bool     has_failed; /* written with the lock */

    pthread_cond_t  arrived;    /* there is something new to do, while n_watching threads wait for it */
    uint32_t        n_watching; /* lock */
    atomic_uint     n_arrived;  /* how often there was; written with the lock */

    int32_t        *ahead;      /* lock; what of the next layer is read once nothing of this one is left to be */
    uint32_t        n_ahead, next_ahead, ahead_layer;
    uint32_t      **routed;     /* by layer and expert: the ids that named it in the batch before; the decoding thread's */
    gp_read       **reads;      /* room for one submission of the decoding thread's */
    gp_forecast     forecast;       /* lock */
    gp_look         look;           /* the decoding thread's, as the next two: of the next layer, for the batch at hand */
    gp_contest      contests[2];    /* of single tokens, of a few sequences */
    gp_contest     *contest;        /* the one at hand */
} gp_hold;

int  gp_hold_open(gp_hold *hold, gp_pager *pager);
void gp_hold_close(gp_hold *hold, gp_pager *pager);
/* In the decoding thread, while nobody computes with them: gives back all slots that are held. After a failure once nothing of
 * it is being read, so that whoever wants these experts next reads them anew. */
void gp_hold_release(gp_pager *pager, gp_hold *hold);
/* The same when its context rests: what was foretold, and did not come to its turn, is given up as well. */
void gp_hold_rest(gp_pager *pager, gp_hold *hold);

/* Begins a wave, in the decoding thread: what is in slots is held, of the rest as much is on its way as there are slots for. Not
 * 0: nothing is held, and *failure tells why. -ECHILD: this process is a fork of the one that opened the pager. */
int  gp_wave_begin(gp_pager *pager, gp_hold *hold, const gp_demand *demand, gp_failure *failure);

/* These in any thread. Whether the slices, a bit each, of the ith expert are in a slot. */
bool gp_wave_has(const gp_pager *pager, const gp_hold *hold, uint32_t i, uint32_t slices);
/* Where one of them lies; of an expert that is there. NULL: in no slot, it is to be had from llama.cpp's mapping. */
const char *gp_wave_slice(const gp_pager *pager, const gp_hold *hold, uint32_t i, uint32_t slice);
/* Nobody computes with it any more. */
void gp_wave_done(gp_pager *pager, gp_hold *hold, uint32_t i);
/* Those who wait shall look again: all is done, say. */
void gp_wave_tell(gp_pager *pager, gp_hold *hold);
/* How often something came, ever: to be asked before looking for what is there. */
unsigned gp_wave_n_arrived(const gp_hold *hold);
/* Waits until more has come, or somebody tells. `is_decoding`: it is the thread that decodes, which counts the time as
 * a stall, asks the watch, and takes slots that others have given back. False: it shall not be waited any more. */
bool gp_wave_wait(gp_pager *pager, gp_hold *hold, unsigned n_arrived, bool is_decoding);
/* Whether to stop: something could not be read, or the watch says so; the thread that decodes asks it. */
bool gp_wave_stops(gp_hold *hold, bool is_decoding);

/* In the decoding thread, once all experts are done or nobody computes: what went wrong. -EINTR, even if nothing is missing,
 * once the watch has stopped: other threads may have left something undone. */
int  gp_wave_end(gp_pager *pager, gp_hold *hold, gp_failure *failure);

void gp_pager_count_left_alone(gp_pager *pager, uint32_t layer);

const gp_layer_spec *gp_pager_layer(const gp_pager *pager, uint32_t layer);     /* NULL past the last */
gp_tables       *gp_pager_tables(const gp_pager *pager);
/* The address, number and distance of the slots of a class. */
char            *gp_pager_slots(const gp_pager *pager, uint32_t shape_class, uint32_t *n_slots, uint64_t *stride_bytes);

#endif
