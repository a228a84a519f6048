/* Memory for the rows of the experts that are being computed: taken in the order in which they are begun, mostly given back in
 * the same. Any thread. */
#ifndef GGUF_PAGER_SCRATCH_H
#define GGUF_PAGER_SCRATCH_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { GP_BLOCKS = 64 };        /* at a time */

typedef struct {
    char       *memory;
    size_t      bytes;
    atomic_flag is_busy;
    uint32_t    first, n;       /* the oldest of those that are taken; the newer ones follow, round the ring */
    struct {
        size_t at, bytes;
        bool   is_given_back;
    } blocks[GP_BLOCKS];
} gp_scratch;

void  gp_scratch_begin(gp_scratch *scratch, char *memory, size_t bytes);
/* NULL: there is no room now. *block is for giving it back. */
char *gp_scratch_take(gp_scratch *scratch, size_t bytes, uint32_t *block);
void  gp_scratch_give_back(gp_scratch *scratch, uint32_t block);

#endif
