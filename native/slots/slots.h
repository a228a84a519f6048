/* The pager's state, shared by the files that work on it: slots.c moves slots between their states, pager.c
 * serves contexts, arena.c opens and closes the whole. */
#ifndef GGUF_PAGER_SLOTS_H
#define GGUF_PAGER_SLOTS_H

#include <stdatomic.h>
#include <sys/types.h>

#include "reads/copies.h"
#include "reads/tables.h"
#include "slots/pager.h"
#include "slots/policy.h"

typedef enum { FREE, READING, READY, LEAVING } gp_slot_state;

typedef struct {
    gp_slot_state state;
    bool       is_transient;    /* came for a large batch; first to go */
    bool       is_warmed;       /* came before anybody wanted it; goes before those that were wanted */
    bool       is_pinned;
    bool       is_withdrawing;  /* LEAVING, and its reads may not be forgotten yet */
    bool       has_failed;
    bool       is_checked;      /* the file was still the same one after these bytes were read */
    bool       is_doubtful;     /* if it was not checked: its file's new times were accepted, so that they tell nothing any more */
    int32_t    expert;
    uint32_t   layer;
    uint64_t   users;           /* a bit per hold */
    uint64_t   ahead_for;       /* the bit of the hold it was read ahead for; 0: nobody's, or wanted by now */
    uint64_t   ahead_bytes;     /* what came of it meanwhile */
    uint64_t   foretold_for;    /* the bits of holds whose layer's turn is still to come, and will probably want it */
} gp_slot;

typedef enum { GP_ROUTER_IS_UNSEEN, GP_ROUTER_IS_KNOWN, GP_ROUTER_IS_OTHER } gp_router_sight;

typedef struct {
    gp_layer_spec spec;
    int32_t      *slot_of;      /* by expert; -1: not in a slot */
    gp_uses      *uses;         /* by expert; they fade, for the policy */
    uint64_t     *chosen;       /* by expert; these do not, for those who look */
    uint64_t     *last_token;   /* by expert: this layer's token count when it was last chosen */
    uint32_t      rank;         /* its place among the layers of its class, in the order they are computed */
    uint32_t      kept;
    gp_router_sight router;     /* whether it can be foretold */
    gp_foresight  foresight;
    gp_counters   counters;
} gp_layer;

typedef struct {
    char    *slots;             /* address of the first */
    uint64_t stride_bytes;
    uint32_t first, n_slots;    /* in pager.slots */
    uint32_t n_free, n_transient, transient_limit;
    uint32_t n_layers;
    uint32_t floor;             /* slots no other layer may take from one */
    uint32_t share;             /* an equal part of the slots */
    uint32_t batch_share;       /* the same of those that are not set aside for transient experts */
} gp_class;

/* An expert that may be wanted next. */
typedef struct {
    float   uses;
    int32_t expert;
} gp_guess;
typedef struct gp_warm_up gp_warm_up;

struct gp_pager {
    const gp_os     *os;
    gp_config        config;
    const gp_policy *policy;
    pid_t            pid;
    gp_copies       *copies;            /* the files, and who reads them */
    gp_tables       *tables;
    char            *arena;
    size_t           arena_bytes;
    pthread_t        populating;        /* the thread that makes the arena present */
    bool             has_populating;    /* and that it was started */
    atomic_bool      has_populated;     /* and that it has nothing more to do */
    atomic_bool      is_closing;
    gp_read         *reads;             /* GP_MAX_SLICES per slot */
    gp_done          slice_arrived;     /* what each of them calls; set at open */
    gp_compare       compare;           /* these two: set before anybody computes */
    void            *compare_data;
    pthread_mutex_t  lock;              /* guards all below */
    pthread_cond_t   released;
    gp_layer        *layers;
    gp_class        *classes;
    gp_slot         *slots;
    _Atomic uint8_t *missing;           /* per slot: slices to be read, a bit each; cleared with the lock, read also without */
    uint32_t         n_slots;
    gp_hold         *holds[GP_MAX_TAPS];
    gp_read        **leaving;           /* room for all reads, to withdraw them at the end */
    uint32_t         changed_file;      /* the last one that was found changed */
    gp_guess        *guesses;           /* room for one layer's experts */
    uint32_t         n_in_flight;       /* slots that are READING or LEAVING */
    bool             is_slower;         /* look-ahead, when it was tried last */
    gp_warm_up      *warm_up;           /* NULL: none was asked for */
};

/* Take and give back the pager's lock. A fork is alone with a copy of the state, and of the lock as some thread of the
 * parent had it: it must not wait, and enters without. */
bool gp_pager_enter(gp_pager *pager);
void gp_pager_leave(gp_pager *pager, bool has_entered);

/* The rest with the lock held. */

/* The slot to give up for an expert of `for_layer`, free or READY; -1: there is none, or a transient expert had better wait for one
 * of its like to go. With must_go_on any will do. */
int32_t  gp_slot_choose(const gp_pager *pager, const gp_layer *for_layer, bool is_transient, bool must_go_on);
/* Only a slot whose loss costs nothing: a free one, or a transient one. */
int32_t  gp_slot_choose_spare(const gp_pager *pager, const gp_layer *for_layer);
/* For what will probably be wanted: the slot of least worth, if it is not foretold itself. */
int32_t  gp_slot_choose_foretold(const gp_pager *pager, const gp_layer *for_layer);

void     gp_slot_assign(gp_pager *pager, uint32_t index, uint32_t layer, int32_t expert, bool is_transient);
/* The same for a free slot and an expert that nobody has asked for; -1: there is none. */
int32_t  gp_slot_warm(gp_pager *pager, uint32_t layer, int32_t expert);
void     gp_slot_empty(gp_pager *pager, gp_slot *slot);
/* What is READING and used by nobody leaves: its slot is free once its reads, submitted or not yet, are done. */
void     gp_slot_let_go(gp_pager *pager, gp_slot *slot);
/* The same, and it shall be withdrawn. Returns the number of its reads, for gp_copies_withdraw, after which
 * gp_ahead_withdrawn must be called with them. */
uint32_t gp_slot_withdraw(gp_pager *pager, uint32_t index, gp_read **reads);
void     gp_slot_want(gp_slot *slot);  /* what was read ahead is used */
void     gp_slot_keep(gp_pager *pager, gp_slot *slot);     /* neither transient nor warmed any more */
/* In the place of `slice_arrived`, with the lock: one slice has come, or has not. The read keeps its error until the slot is
 * assigned anew. Returns whether this ends the reading of an expert that was warmed up, and it could not be read. */
bool     gp_slot_take_slice(gp_pager *pager, const gp_read *read, int error);
/* Fills in the reads of a slot that was assigned, one in every `step` of `reads`; returns how many. */
uint32_t gp_slot_prepare_reads(gp_pager *pager, uint32_t index, gp_read **reads, uint32_t step);

/* Where a slice's first byte lies. */
char    *gp_slot_slice(const gp_pager *pager, uint32_t index, uint32_t slice);

/* Works out what a class's layers may keep of its slots. */
void     gp_class_divide(gp_pager *pager, uint32_t shape_class);

/* There is something new for a hold: who waits looks again. */
void     gp_hold_tell(gp_hold *hold);
/* What went wrong, unless something has before. */
void     gp_hold_fail(gp_hold *hold, const gp_failure *failure);

/* What went wrong with a slot that has failed. */
gp_failure gp_slot_failure(const gp_pager *pager, uint32_t index);

#endif
