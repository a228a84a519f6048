/* Warm-up, as seen by whoever may have ended the last read in flight. */
#ifndef GGUF_PAGER_WARM_H
#define GGUF_PAGER_WARM_H

#include "slots/slots.h"

/* With the pager's lock held. What is to be read next, if nothing else is being read: how many reads, which belong to this
 * caller until he has let go of the lock and submitted them. */
uint32_t gp_warm_up_next(gp_pager *pager);
void     gp_warm_up_submit(gp_pager *pager, uint32_t n_reads);     /* without the lock */
bool     gp_warm_up_is_submitting(const gp_pager *pager);          /* somebody is at it; he broadcasts `released` */
void     gp_warm_up_end(gp_pager *pager);   /* nothing more is to be read */

#endif
