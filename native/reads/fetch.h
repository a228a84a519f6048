/* Reading: ranges of files are brought into memory in the background. It knows nothing of experts. */
#ifndef GGUF_PAGER_FETCH_H
#define GGUF_PAGER_FETCH_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "os/os.h"

typedef struct gp_fetch gp_fetch;
typedef struct gp_read gp_read;
typedef void (*gp_done)(gp_read *read, int error, uint64_t error_offset_bytes);

/* One range of one file, wanted at one address. Owned by the caller, untouched by it until `done` is called. */
struct gp_read {
    int       fd;
    uint32_t  file;             /* for the caller's error message */
    uint64_t  offset_bytes;
    uint64_t  bytes;
    char     *into;             /* where the first byte shall lie */
    char     *region;           /* memory around it that the read may overwrite: */
    uint64_t  region_bytes;     /* aligned covers begin before and end after the range */

    /* Called by the thread that finished the last piece, without locks held. */
    gp_done   done;
    void     *owner;
    uint32_t  tag;
    bool      is_ahead;         /* nobody waits for it yet: those that are not go first */

    gp_read  *next;             /* the one submitted with it, wanted after it; from then on fetch's own, as the rest */

    bool             is_withdrawn;
    char            *cover_into;
    uint64_t         cover_offset, cover_bytes, piece_bytes, next_piece;
    atomic_uint      pieces_left;
    atomic_int       error;
    _Atomic uint64_t error_offset;
};

typedef struct {
    bool     direct;            /* reads must be aligned */
    uint32_t offset_align, memory_align;
    uint32_t n_readers;         /* threads, or as many pieces in flight in the system's queue */
    uint64_t piece_bytes;
    int      fd;                /* one of the files, if reads are direct: to see how the system reads it */
} gp_fetch_config;

/* *lacks_thread: on failure, whether it was a thread that could not be had. */
int  gp_fetch_open(gp_fetch **out, const gp_os *os, const gp_fetch_config *config, bool *lacks_thread);
/* Waits for the reads in flight. */
void gp_fetch_close(gp_fetch *fetch);
/* After a fork the threads are gone: frees memory only. */
void gp_fetch_abandon(gp_fetch *fetch);

/* Whether the system's queue is used. */
bool gp_fetch_is_in_background(const gp_fetch *fetch);

/* All that has arrived so far, whole reads or not, with what direct reads cover beside it. */
uint64_t gp_fetch_arrived_bytes(const gp_fetch *fetch);

/* Whether the region has room for the aligned cover of the range. */
bool gp_fetch_fits(const gp_fetch_config *config, const gp_read *read);

/* The first of a list of reads, linked by `next`; NULL: there are none. */
void gp_fetch_submit(gp_fetch *fetch, gp_read *first);
/* Somebody waits for these now: those that nobody has begun go before all that are ahead still, in the order of the list. */
void gp_fetch_want(gp_fetch *fetch, gp_read *const *reads, uint32_t n_reads);
/* Takes back those of the reads that nobody has begun, and calls `done` for them with -ECANCELED; the others, begun or
 * done, are left alone. None may be submitted again before this returns. */
void gp_fetch_withdraw(gp_fetch *fetch, gp_read *const *reads, uint32_t n_reads);

#endif
