/* Read-ahead: what the next layer of a batch will probably want. All with the pager's lock held. */
#ifndef GGUF_PAGER_AHEAD_H
#define GGUF_PAGER_AHEAD_H

#include "slots/slots.h"

/* Plans what to read once nothing of the hold's own wave is left to be. In the thread that decodes. */
void     gp_ahead_plan(gp_pager *pager, gp_hold *hold);
/* Slots for what comes next in the plan, of so many experts at most. Returns the number of reads put into `reads`. */
uint32_t gp_ahead_take(gp_pager *pager, gp_hold *hold, gp_read **reads, uint32_t most_experts);
/* Lets go what was read ahead for this hold and layer, is still being read and is not wanted. Returns the number of reads
 * put into `reads`, for gp_copies_withdraw, after which gp_ahead_withdrawn must be called with them. */
uint32_t gp_ahead_drop(gp_pager *pager, const gp_hold *hold, uint32_t layer, gp_read **reads);
void     gp_ahead_withdrawn(gp_pager *pager, gp_read *const *reads, uint32_t n_reads);

/* Puts the reads of what is on its way ahead for this hold, and is wanted now, into `reads`, for gp_copies_want. What is on its way for
 * others they may not have submitted yet. */
uint32_t gp_ahead_wanted(gp_pager *pager, const gp_hold *hold, const gp_demand *demand, gp_read **reads);

#endif
