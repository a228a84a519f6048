/* An operating system in memory, for tests: files that fail, stop short, change; memory and threads that are refused.
 *
 * Reads take no lock of this side's, lest it hide a race of the other's from the thread sanitizer. So files are added
 * and rewritten while nobody reads: before the pager is opened, or while reads are held back. */
#ifndef GGUF_PAGER_TEST_FAKE_OS_H
#define GGUF_PAGER_TEST_FAKE_OS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "os/os.h"

typedef enum {
    FAKE_FILE_OPEN, FAKE_FILE_IDENTIFY, FAKE_FILE_READ, FAKE_MEMORY_OPEN, FAKE_MEMORY_POPULATE, FAKE_MEMORY_LOCK, FAKE_THREAD_START,
    FAKE_QUEUE_OPEN, FAKE_QUEUE_SUBMIT, FAKE_ALLOCATE, FAKE_CALLS
} fake_call;

extern const gp_os fake_os;

/* Forgets files and faults; open files, memory and threads must be gone. */
void     fake_reset(void);

/* Adds a file of random bytes and returns them. */
uint8_t *fake_file_add(const char *path, uint64_t size_bytes);
void     fake_file_truncate(const char *path, uint64_t size_bytes);
void     fake_file_touch(const char *path);      /* its time of modification moves on */
int64_t fake_file_time(const char *path);      /* when it was modified, in ns */
void     fake_file_refuse_direct(const char *path);     /* -EINVAL, as from a file system without direct reads */
void     fake_replace_after_open(const char *path);      /* its next opening is of the last of this file */
void     fake_file_slow_down(const char *path, unsigned delay_us);     /* each read of it takes so much longer */

/* The nth call from now on (1: the next) returns `error`, once. */
void     fake_fail(fake_call call, unsigned nth, int error);
/* The same for whichever call comes nth that a constructor cannot do without; allocations included. */
void     fake_fail_any(unsigned nth, int error);
/* Every read that covers this byte of the file fails. error 0: no longer. */
void     fake_fail_at(const char *path, uint64_t offset_bytes, int error);
unsigned fake_count(fake_call call);
uint64_t fake_bytes_read(void);
unsigned fake_expected(void);      /* ranges that somebody said would be read soon */
/* Whether a fault that was ordered has not struck yet. */
bool     fake_is_armed(void);

/* Of direct reads; a misaligned one gets -EINVAL, as from Linux. 1, 1 from the start. */
void     fake_direct_align(uint32_t offset_align, uint32_t memory_align);

/* Direct reads can go on in the background. Off from the start, unless FAKE_QUEUE stands in the environment, with which
 * every test can be run over the queue instead of the pool of threads. */
void     fake_allow_queue(bool is_allowed);
bool     fake_has_queue(void);

/* One read in so many stops short, is interrupted; each waits up to so long. 0: never.
 * Of one submission in so many the queue takes only the first few requests. */
typedef struct {
    unsigned short_one_in, interrupted_one_in, delay_us;
    bool     is_ragged;         /* direct reads may stop between multiples of the alignment */
} fake_weather;
void     fake_set_weather(fake_weather weather);

uint64_t fake_bytes_present(void);
uint64_t fake_bytes_given_back(void);

/* Reads wait before they begin until they are let go; returns when n_waiting of them wait. */
void     fake_hold_reads(void);
void     fake_wait_for_reads(unsigned n_waiting);
void     fake_let_some_go(unsigned n_reads);
void     fake_let_reads_go(void);

uint32_t fake_random(uint32_t below);

/* What the tested code has not given back. */
unsigned fake_open_files(void);
unsigned fake_open_memories(void);
unsigned fake_running_threads(void);
unsigned fake_allocations(void);

/* The native sources are compiled with malloc, calloc and free renamed to these. */
void    *fake_malloc(size_t bytes);
void    *fake_calloc(size_t n, size_t bytes);
void     fake_free(void *memory);

#endif
