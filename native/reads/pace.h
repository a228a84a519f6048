/* How a disk gets on, and which of several will have a read soonest. Dividing evenly would make a slow disk the measure of all, so
 * what counts is when each would be done, by the bytes it gave in the time it had something to do. Arithmetic only. */
#ifndef GGUF_PAGER_PACE_H
#define GGUF_PAGER_PACE_H

#include <stdbool.h>
#include <stdint.h>

/* After so many reads, of all disks, what is known counts half. A disk that is passed over is forgotten in one to a dozen such spans,
 * and tried again with one read: it may have been busy with something else. That read is what a slow disk costs, some
 * milliseconds in seconds of reading. */
enum { GP_PACE_SPAN_READS = 4096 };

typedef struct {
    uint64_t waiting_bytes;     /* submitted, not come yet */
    uint64_t n_done;            /* reads that have come; 0: nothing is known */
    uint64_t done_bytes;        /* theirs */
    uint64_t busy_ns;           /* the time they took, in which anything was waited for */
    uint64_t marked_ns;         /* up to where that time is counted */
} gp_pace;

/* Which disk to read so many bytes from: that which will have them soonest as it got on of late, with all that it has to do
 * before. One of which nothing is known is tried with one read at a time; until something is known the rest is read from
 * the first, the model's own. */
uint32_t gp_pace_choose(const gp_pace *paces, uint32_t n_disks, uint64_t bytes);

/* A read is submitted. */
void     gp_pace_begin(gp_pace *pace, uint64_t bytes, uint64_t now_ns);
/* It has come, or not. */
void     gp_pace_end(gp_pace *pace, uint64_t bytes, bool has_come, uint64_t now_ns);
/* A span has passed. */
void     gp_pace_forget_half(gp_pace *pace);

#endif
