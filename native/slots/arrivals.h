/* What reads do when they are done. */
#ifndef GGUF_PAGER_ARRIVALS_H
#define GGUF_PAGER_ARRIVALS_H

#include "slots/slots.h"

/* gp_pager.slice_arrived. In a reader thread, or in one that withdraws. */
void gp_slice_arrived(gp_read *read, int error, uint64_t error_offset_bytes);

#endif
