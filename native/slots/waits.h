/* Waiting, with the pager's lock, for what comes, and for slots that others hold: until it is there, or a watch has stopped. */
#ifndef GGUF_PAGER_WAITS_H
#define GGUF_PAGER_WAITS_H

#include "slots/slots.h"

/* When a stall began, and what had arrived until then. */
typedef struct {
    uint64_t ns, bytes;
} gp_stall;

gp_stall gp_stall_begin(const gp_pager *pager);
void     gp_stall_end(const gp_pager *pager, gp_layer *layer, const gp_stall *begun);

bool     gp_hold_has_stopped(const gp_hold *hold);
/* Whether the watch has stopped; the thread that decodes asks. */
bool     gp_hold_stops(gp_hold *hold, bool is_decoding);

/* The rest with the lock held. Waits until hold.arrived is told of something, or a moment where somebody may want to stop. False:
 * it is not to be waited for any more. */
bool     gp_hold_wait(gp_pager *pager, gp_hold *hold, bool is_decoding);
/* Waits a moment for others to give slots back. False: no longer. */
bool     gp_hold_wait_for_others(gp_pager *pager, gp_hold *hold);

#endif
