/* A slice has been read, or could not be: its slot hears of it, and where nothing else is in flight the warm-up goes on.
 * Slots know of no warm-up: this stands above both. */
#include "slots/arrivals.h"

#include "slots/warm.h"

void gp_slice_arrived(gp_read *read, int error, uint64_t error_offset_bytes) {
    (void) error_offset_bytes;
    gp_pager *p = read->owner;
    gp_copies_note(p->copies, read, error);
    pthread_mutex_lock(&p->lock);
    if (gp_slot_take_slice(p, read, error)) {
        gp_warm_up_end(p);
    }
    const uint32_t n_next = gp_warm_up_next(p);
    pthread_mutex_unlock(&p->lock);
    gp_warm_up_submit(p, n_next);
}
