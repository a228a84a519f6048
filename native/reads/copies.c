/* Every copy of the model has its own fetch, with its own reads in flight: disks are busy at the same time. A read, that is
 * a slice, goes to one of them when it is submitted (pace.h).
 *
 * Invariants
 *   1. Of each copy the reads begin in the order in which they were submitted: first slices of all experts first.
 *   2. A pace's waiting_bytes is the sum of the copy's reads that were submitted and not noted yet.
 *   3. The lock guards the paces and what the files were. It is held for arithmetic only: never across a read, never together with another lock.
 */
#include "reads/copies.h"

#include <errno.h>
#include <stdlib.h>

typedef struct {
    gp_fetch        *fetch;
    int             *fds;
    gp_file_id      *ids;               /* lock; what the file was, as last agreed */
    uint32_t         n_open;
    _Atomic uint64_t bytes_read;
} copy;

struct gp_copies {
    const gp_os    *os;
    uint32_t        n_copies, n_files;
    pthread_mutex_t lock;
    gp_pace         paces[GP_MAX_COPIES];   /* lock */
    uint32_t        n_noted;                /* lock; reads, of all */
    copy            copies[GP_MAX_COPIES];
};

void gp_copies_submit(gp_copies *copies, gp_read *const *reads, uint32_t n_reads) {
    gp_read *first[GP_MAX_COPIES] = { NULL }, *last[GP_MAX_COPIES];
    const uint64_t now_ns = copies->os->now_ns();
    pthread_mutex_lock(&copies->lock);
    for (uint32_t i = 0; i < n_reads; i++) {
        gp_read *read = reads[i];
        const uint32_t chosen = gp_pace_choose(copies->paces, copies->n_copies, read->bytes);
        gp_pace_begin(&copies->paces[chosen], read->bytes, now_ns);
        read->fd = copies->copies[chosen].fds[read->file];
        read->file += chosen * copies->n_files;
        read->next = NULL;
        atomic_store(&read->error, 0);      /* of its last use; before any of these can fail and be looked at */
        if (first[chosen]) {
            last[chosen]->next = read;
        } else {
            first[chosen] = read;
        }
        last[chosen] = read;
    }
    pthread_mutex_unlock(&copies->lock);
    for (uint32_t i = 0; i < copies->n_copies; i++) {
        gp_fetch_submit(copies->copies[i].fetch, first[i]);
    }
}

/* Calls a function of fetch's for each copy with those of the reads that it has. */
static void for_each(gp_copies *copies, gp_read **reads, uint32_t n_reads,
                     void (*function)(gp_fetch *fetch, gp_read *const *reads, uint32_t n_reads)) {
    uint32_t first = 0;
    for (uint32_t i = 0; i < copies->n_copies; i++) {
        uint32_t end = first;
        for (uint32_t at = first; at < n_reads; at++) {
            if (reads[at]->file / copies->n_files == i) {
                gp_read *own = reads[at];
                reads[at] = reads[end];
                reads[end++] = own;
            }
        }
        if (end > first) {
            function(copies->copies[i].fetch, reads + first, end - first);
        }
        first = end;
    }
}

void gp_copies_withdraw(gp_copies *copies, gp_read **reads, uint32_t n_reads) {
    for_each(copies, reads, n_reads, gp_fetch_withdraw);
}

void gp_copies_want(gp_copies *copies, gp_read **reads, uint32_t n_reads) {
    for_each(copies, reads, n_reads, gp_fetch_want);
}

void gp_copies_note(gp_copies *copies, const gp_read *read, int error) {
    const uint32_t index = read->file / copies->n_files;
    const uint64_t now_ns = copies->os->now_ns();
    pthread_mutex_lock(&copies->lock);
    gp_pace_end(&copies->paces[index], read->bytes, error == 0, now_ns);
    if (++copies->n_noted % GP_PACE_SPAN_READS == 0) {
        for (uint32_t i = 0; i < copies->n_copies; i++) {
            gp_pace_forget_half(&copies->paces[i]);
        }
    }
    pthread_mutex_unlock(&copies->lock);
    if (error == 0) {
        atomic_fetch_add_explicit(&copies->copies[index].bytes_read, read->bytes, memory_order_relaxed);
    }
}

void gp_copies_bytes_read(const gp_copies *copies, uint64_t *bytes_read) {
    for (uint32_t i = 0; i < copies->n_copies; i++) {
        bytes_read[i] = atomic_load_explicit(&copies->copies[i].bytes_read, memory_order_relaxed);
    }
}

bool gp_copies_are_in_background(const gp_copies *copies) {
    return gp_fetch_is_in_background(copies->copies[0].fetch);
}

uint64_t gp_copies_arrived_bytes(const gp_copies *copies) {
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < copies->n_copies; i++) {
        bytes += gp_fetch_arrived_bytes(copies->copies[i].fetch);
    }
    return bytes;
}

/* ---- files ------------------------------------------------------------------------------------------------------- */

static bool is_same_time(const gp_file_id *a, const gp_file_id *b) {
    return a->modified_ns == b->modified_ns && a->changed_ns == b->changed_ns;
}

int gp_copies_check(gp_copies *copies, uint32_t file, uint32_t *changed_file, bool *is_touched) {
    for (uint32_t i = 0; i < copies->n_copies; i++) {
        const gp_file_id *then = &copies->copies[i].ids[file];
        gp_file_id now;
        int error = copies->os->file_identify(copies->copies[i].fds[file], &now);
        pthread_mutex_lock(&copies->lock);
        const bool is_other = error == 0 && !is_same_time(&now, then);
        if (error == 0 && now.size_bytes != then->size_bytes) {
            error = -ESTALE;
        }
        pthread_mutex_unlock(&copies->lock);
        if (error != 0 || is_other) {
            *changed_file = i * copies->n_files + file;
            *is_touched = true;
        }
        if (error != 0) {
            return error;
        }
    }
    return 0;
}

int gp_copies_accept(gp_copies *copies, const gp_file_times *times) {
    for (uint32_t i = 0; i < copies->n_copies * copies->n_files; i++) {
        copy *c = &copies->copies[i / copies->n_files];
        const gp_file_id wanted = { .modified_ns = times[i].modified_ns, .changed_ns = times[i].changed_ns };
        const uint32_t file = i % copies->n_files;
        gp_file_id now;
        int error = copies->os->file_identify(c->fds[file], &now);
        pthread_mutex_lock(&copies->lock);
        if (error == 0 && (now.size_bytes != c->ids[file].size_bytes || !is_same_time(&now, &wanted))) {
            error = -ESTALE;
        }
        if (error == 0) {
            c->ids[file] = now;
        }
        pthread_mutex_unlock(&copies->lock);
        if (error != 0) {
            return error;
        }
    }
    return 0;
}

const gp_file_id *gp_copies_file(const gp_copies *copies, uint32_t file) {
    return &copies->copies[0].ids[file];
}

static int open_copy(gp_copies *copies, copy *c, const gp_config *config, const char *const *paths, bool direct,
                     gp_open_failure *failure) {
    *failure = (gp_open_failure) { .lack = GP_LACKS_MEMORY };
    c->fds = calloc(copies->n_files, sizeof *c->fds);
    c->ids = calloc(copies->n_files, sizeof *c->ids);
    if (!c->fds || !c->ids) {
        return -ENOMEM;
    }
    const uint32_t first_file = (uint32_t) (c - copies->copies) * copies->n_files;
    for (uint32_t i = 0; i < copies->n_files; i++) {
        *failure = (gp_open_failure) { GP_LACKS_FILE, first_file + i };
        int error = copies->os->file_open(paths[i], direct, &c->fds[i]);
        if (error != 0) {
            return error;
        }
        c->n_open++;
        error = copies->os->file_identify(c->fds[i], &c->ids[i]);
        if (error != 0) {
            return error;
        }
    }
    const gp_fetch_config fetch = { .direct = direct, .offset_align = config->offset_align,
                                    .memory_align = config->memory_align, .n_readers = config->n_readers,
                                    .piece_bytes = config->piece_bytes, .fd = c->fds[0] };
    bool lacks_thread;
    const int error = gp_fetch_open(&c->fetch, copies->os, &fetch, &lacks_thread);
    failure->lack = lacks_thread ? GP_LACKS_THREAD : error == -EINVAL ? GP_LACKS_SENSE : GP_LACKS_MEMORY;
    return error;
}

int gp_copies_open(gp_copies **out, const gp_os *os, const gp_config *config, gp_open_failure *failure) {
    *out = NULL;
    *failure = (gp_open_failure) { .lack = GP_LACKS_MEMORY };
    gp_copies *copies = calloc(1, sizeof *copies);
    if (!copies) {
        return -ENOMEM;
    }
    copies->os = os;
    copies->n_copies = config->n_mirrors + 1;
    copies->n_files = config->n_paths;
    pthread_mutex_init(&copies->lock, NULL);
    int error = open_copy(copies, &copies->copies[0], config, config->paths, config->direct, failure);
    for (uint32_t i = 0; error == 0 && i < config->n_mirrors; i++) {
        const gp_mirror_spec *mirror = &config->mirrors[i];
        error = open_copy(copies, &copies->copies[i + 1], config, mirror->paths, mirror->direct, failure);
    }
    if (error != 0) {
        gp_copies_close(copies);
        return error;
    }
    *out = copies;
    return 0;
}

static void free_all(gp_copies *copies) {
    for (uint32_t i = 0; i < copies->n_copies; i++) {
        copy *c = &copies->copies[i];
        for (uint32_t file = 0; file < c->n_open; file++) {
            (void) copies->os->file_close(c->fds[file]);
        }
        free(c->ids);
        free(c->fds);
    }
    free(copies);
}

void gp_copies_close(gp_copies *copies) {
    if (!copies) {
        return;
    }
    for (uint32_t i = 0; i < copies->n_copies; i++) {
        gp_fetch_close(copies->copies[i].fetch);
    }
    pthread_mutex_destroy(&copies->lock);
    free_all(copies);
}

void gp_copies_abandon(gp_copies *copies) {
    if (!copies) {
        return;
    }
    for (uint32_t i = 0; i < copies->n_copies; i++) {
        gp_fetch_abandon(copies->copies[i].fetch);
    }
    free_all(copies);
}
