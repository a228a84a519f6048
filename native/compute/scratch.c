#include "compute/scratch.h"

/* Held for some nanoseconds, by threads that all have a processor. */
static void enter(gp_scratch *s) {
    while (atomic_flag_test_and_set_explicit(&s->is_busy, memory_order_acquire)) {
    }
}

static void leave(gp_scratch *s) {
    atomic_flag_clear_explicit(&s->is_busy, memory_order_release);
}

void gp_scratch_begin(gp_scratch *s, char *memory, size_t bytes) {
    s->memory = memory;
    s->bytes = bytes;
    s->first = s->n = 0;
}

/* Where the next block can begin; false: nowhere. What is taken lies between the oldest block and the end of the newest, once
 * round the end of the memory if need be. */
static bool find_place(const gp_scratch *s, size_t bytes, size_t *at) {
    if (s->n == 0) {
        *at = 0;
        return bytes <= s->bytes;
    }
    const uint32_t newest = (s->first + s->n - 1) % GP_BLOCKS;
    const size_t begin = s->blocks[s->first].at, end = s->blocks[newest].at + s->blocks[newest].bytes;
    if (end <= begin) {
        *at = end;
        return bytes <= begin - end;
    }
    *at = bytes <= s->bytes - end ? end : 0;
    return bytes <= s->bytes - end || bytes <= begin;
}

char *gp_scratch_take(gp_scratch *s, size_t bytes, uint32_t *block) {
    size_t at = 0;
    enter(s);
    const bool is_found = s->n < GP_BLOCKS && find_place(s, bytes, &at);
    if (is_found) {
        *block = (s->first + s->n++) % GP_BLOCKS;
        s->blocks[*block].at = at;
        s->blocks[*block].bytes = bytes;
        s->blocks[*block].is_given_back = false;
    }
    leave(s);
    return is_found ? s->memory + at : NULL;
}

void gp_scratch_give_back(gp_scratch *s, uint32_t block) {
    enter(s);
    s->blocks[block].is_given_back = true;
    while (s->n > 0 && s->blocks[s->first].is_given_back) {
        s->first = (s->first + 1) % GP_BLOCKS;
        s->n--;
    }
    leave(s);
}
