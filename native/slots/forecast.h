/* Look-ahead (look_ahead.h) as waves and the pager know it: how much is foretold, and what became of it. All with the pager's lock held
 * but gp_look_ahead_token_ends. */
#ifndef GGUF_PAGER_FORECAST_H
#define GGUF_PAGER_FORECAST_H

#include "slots/slots.h"

/* How much of the next layer shall be foretold for this batch: hold->look. */
void     gp_look_ahead_decide(gp_pager *pager, gp_hold *hold, const gp_demand *demand);
/* A layer's turn has come: what of it was foretold is compared with what is wanted. Returns how many of those that are READY would be
 * missing without. */
uint32_t gp_forecast_settle(gp_pager *pager, gp_hold *hold, const gp_demand *demand);
/* It protects nothing any more. */
void     gp_forecast_end(gp_pager *pager, gp_hold *hold);
/* In the decoding thread, once a layer has been computed. */
void     gp_look_ahead_token_ends(const gp_pager *pager, gp_hold *hold);
gp_sight gp_look_ahead_sight(const gp_pager *pager, uint32_t layer);

#endif
