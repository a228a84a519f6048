/* Foretelling: the next layer's router is asked with this layer's normalised input, and what it chooses is handed to look-ahead. */
#ifndef GGUF_PAGER_FORETELL_H
#define GGUF_PAGER_FORETELL_H

#include "compute/ggml_tensor.h"
#include "slots/pager.h"

typedef struct gp_foretell gp_foretell;

int  gp_foretell_open(gp_foretell **out, const gp_ggml *ggml, gp_pager *pager, gp_hold *hold);
void gp_foretell_close(gp_foretell *foretell);

/* These in the decoding thread. A layer's first node that multiplies with experts, as llama.cpp has made it, and its ids: while the
 * graph is asked about. */
void gp_foretell_see(gp_foretell *foretell, uint32_t layer, const ggml_tensor *node, const ggml_tensor *ids);
/* In that node's time, while its input is there. */
void gp_foretell_keep(gp_foretell *foretell, uint32_t layer, const ggml_tensor *node, const ggml_tensor *ids);
/* Once the layer's wave has begun, and what was kept is still the layer's. */
void gp_foretell_ahead(gp_foretell *foretell, uint32_t layer);

#endif
