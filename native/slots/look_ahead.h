/* Look-ahead: while a token, or one each of a few sequences, passes one layer, experts begin to be read that the next layer's router
 * will probably choose. Their reads go behind all that is wanted now. What was foretold is not given up before its layer's turn.
 *
 * It measures itself: of a layer where too little comes true nothing is read, and of all of them none while that is faster. */
#ifndef GGUF_PAGER_LOOK_AHEAD_H
#define GGUF_PAGER_LOOK_AHEAD_H

#include "slots/pager.h"

/* In the decoding thread, once a wave has begun whose hold->look is not GP_LOOK_NOT. What the next layer will probably want, most wanted
 * first and each once: what is in no slot is read, if it is GP_LOOK_TO_READ. */
void gp_look_ahead_begin(gp_pager *pager, gp_hold *hold, const int32_t *experts, uint32_t n_experts);

/* Whether anything may ever be foretold. */
bool gp_look_ahead_is_wanted(const gp_pager *pager);

/* A layer has been seen to be one whose router can be asked while the layer before is computed, or to be another. */
void gp_look_ahead_note_router(gp_pager *pager, uint32_t layer, bool is_known);

#endif
