/* Waiting, with the pager's lock, for slices, and for slots that others hold: until they are there, or a watch has stopped. */
#ifndef GGUF_PAGER_WAITS_H
#define GGUF_PAGER_WAITS_H

#include "slots/slots.h"

enum { GP_ALL_SLICES = (1 << GP_MAX_SLICES) - 1 };

/* When a stall began, and what had arrived until then. */
typedef struct {
    uint64_t ns, bytes;
} gp_stall;

gp_stall gp_stall_begin(const gp_pager *pager);
void     gp_stall_end(const gp_pager *pager, gp_layer *layer, const gp_stall *begun);

bool     gp_hold_has_stopped(const gp_hold *hold);

/* The rest with the lock held. Whether some of these slices of the hold's slots are still being read. */
bool     gp_hold_is_pending(const gp_hold *hold, uint32_t slices);
/* Waits until they are not; in the decoding thread. False: some are, and are not to be waited for. */
bool     gp_hold_wait(gp_pager *pager, gp_hold *hold, uint32_t slices);
/* Waits a moment for others to give slots back. False: no longer. */
bool     gp_hold_wait_for_others(gp_pager *pager, gp_hold *hold);

#endif
