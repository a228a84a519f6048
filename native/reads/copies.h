/* The copies of a model on several disks: each read goes to the one that will have it soonest. */
#ifndef GGUF_PAGER_COPIES_H
#define GGUF_PAGER_COPIES_H

#include "gguf_pager.h"
#include "reads/fetch.h"
#include "reads/pace.h"

typedef struct gp_copies gp_copies;

/* Opens the files of every copy. */
int  gp_copies_open(gp_copies **out, const gp_os *os, const gp_config *config, gp_open_failure *failure);
/* Waits for the reads in flight. */
void gp_copies_close(gp_copies *copies);
/* After a fork the threads are gone: closes files and frees memory only. */
void gp_copies_abandon(gp_copies *copies);

/* Reads, in the order in which they are wanted. `file` of a read is one of the model's files; the copy to read from is
 * chosen here, and `file` then counts the files of the copies before it, too: as in gp_failure. */
void gp_copies_submit(gp_copies *copies, gp_read *const *reads, uint32_t n_reads);
/* gp_fetch_withdraw; it changes the order of `reads`. They were submitted here, none of them since by another thread. */
void gp_copies_withdraw(gp_copies *copies, gp_read **reads, uint32_t n_reads);
/* gp_fetch_want, likewise. */
void gp_copies_want(gp_copies *copies, gp_read **reads, uint32_t n_reads);
/* To be called from a read's `done`. */
void gp_copies_note(gp_copies *copies, const gp_read *read, int error);

/* Whether one of the model's files is in each copy still the one that was opened: 0, or -errno and which is not. is_touched
 * becomes true, and changed_file says which, where only the times are others: the bytes may be the same. */
int  gp_copies_check(gp_copies *copies, uint32_t file, uint32_t *changed_file, bool *is_touched);
/* See gp_pager_accept. */
int  gp_copies_accept(gp_copies *copies, const gp_file_times *times);

/* What one of the model's own files was when it was opened. */
const gp_file_id *gp_copies_file(const gp_copies *copies, uint32_t file);

/* bytes_read: one number per copy. Takes no lock. */
void gp_copies_bytes_read(const gp_copies *copies, uint64_t *bytes_read);

/* Of the model's own files. */
bool gp_copies_are_in_background(const gp_copies *copies);

/* Of all copies, as gp_fetch_arrived_bytes has it. */
uint64_t gp_copies_arrived_bytes(const gp_copies *copies);

#endif
