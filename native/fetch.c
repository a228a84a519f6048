/* A queue of reads, cut into pieces so that a few misses keep the device as busy as many do.
 *
 * Invariants
 *   1. A read is in the queue while it has pieces that nobody has taken. Pieces are taken in order.
 *   2. pieces_left falls by one per finished piece; whoever brings it to zero moves the bytes and calls done, once.
 *   3. The lock guards the queue, the count of sleepers and `closing`. It is never held across a read or a callback.
 */
#include "fetch.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct gp_fetch {
    const gp_os    *os;
    gp_fetch_config config;
    pthread_mutex_t lock;
    pthread_cond_t  work;
    gp_read        *first, *last;   /* lock */
    uint32_t        n_asleep;       /* lock */
    bool            closing;        /* lock */
    uint64_t        step_bytes;     /* a multiple of both alignments */
    uint32_t        n_threads;
    pthread_t       threads[];
};

static uint64_t round_down(uint64_t value, uint64_t step) {
    return value - value % step;
}

static uint64_t round_up(uint64_t value, uint64_t step) {
    return round_down(value + step - 1, step);
}

static bool is_power_of_two(uint32_t value) {
    return value != 0 && (value & (value - 1)) == 0;
}

/* Chooses what to read and where to. A direct read covers whole sectors. If the cover can be placed so that the wanted
 * bytes fall where they are wanted, nothing has to be moved; otherwise it goes to the region's first aligned address and
 * the bytes are moved once all are there. */
static void plan(const gp_fetch_config *config, gp_read *read) {
    if (!config->direct) {
        read->cover_offset = read->offset_bytes;
        read->cover_bytes = read->bytes;
        read->cover_into = read->into;
        return;
    }
    const uint64_t head = read->offset_bytes % config->offset_align;
    read->cover_offset = read->offset_bytes - head;
    read->cover_bytes = round_up(head + read->bytes, config->offset_align);
    char *in_place = read->into - head;
    if ((uintptr_t) in_place % config->memory_align == 0) {
        read->cover_into = in_place;
    } else {
        read->cover_into = (char *) round_up((uintptr_t) read->region, config->memory_align);
    }
}

bool gp_fetch_fits(const gp_fetch_config *config, const gp_read *read) {
    gp_read planned = { .offset_bytes = read->offset_bytes, .bytes = read->bytes, .into = read->into,
                        .region = read->region };
    plan(config, &planned);
    return read->into >= read->region && read->into + read->bytes <= read->region + read->region_bytes
        && planned.cover_into >= read->region
        && planned.cover_into + planned.cover_bytes <= read->region + read->region_bytes;
}

static void finish(gp_read *read) {
    const int error = atomic_load(&read->error);
    if (error == 0) {
        char *got = read->cover_into + (read->offset_bytes - read->cover_offset);
        if (got != read->into) {
            memmove(read->into, got, read->bytes);
        }
    }
    read->done(read, error, atomic_load(&read->error_offset));
}

/* Reads one piece. Only bytes of the wanted range must arrive: the cover of a file's last slice ends behind the file. */
static int read_piece(gp_fetch *fetch, const gp_read *read, uint64_t piece_at, uint64_t *error_offset) {
    const uint64_t wanted_end = read->offset_bytes + read->bytes;
    uint64_t at = read->cover_offset + piece_at;
    uint64_t left = read->cover_bytes - piece_at;
    if (left > fetch->config.piece_bytes) {
        left = fetch->config.piece_bytes;
    }
    char *const begin = read->cover_into + piece_at;
    char *into = begin;
    while (left > 0 && at < wanted_end) {
        const int64_t got = fetch->os->file_read(read->fd, into, left, at);
        if (got == -EINTR) {
            continue;
        }
        if (got <= 0) {
            *error_offset = at;
            return got < 0 ? (int) got : -ENODATA;
        }
        at += (uint64_t) got;
        into += got;
        left -= (uint64_t) got;
        /* A direct read may stop anywhere; the next begins at the last place that is aligned in the file and in memory. */
        const uint64_t back = fetch->config.direct && left > 0 && at < wanted_end
            ? (uint64_t) (into - begin) % fetch->step_bytes : 0;
        at -= back;
        into -= back;
        left += back;
        if ((uint64_t) got <= back) {
            *error_offset = at;
            return -ENODATA;
        }
    }
    return 0;
}

static void *reader(void *data) {
    gp_fetch *fetch = data;
    pthread_mutex_lock(&fetch->lock);
    for (;;) {
        while (!fetch->first && !fetch->closing) {
            fetch->n_asleep++;
            pthread_cond_wait(&fetch->work, &fetch->lock);
            fetch->n_asleep--;
        }
        gp_read *read = fetch->first;
        if (!read) {
            break;
        }
        const uint64_t piece_at = read->next_piece;
        read->next_piece += fetch->config.piece_bytes;
        if (read->next_piece >= read->cover_bytes) {
            fetch->first = read->next;
            if (!fetch->first) {
                fetch->last = NULL;
            }
        }
        pthread_mutex_unlock(&fetch->lock);

        uint64_t error_offset = 0;
        const int error = read_piece(fetch, read, piece_at, &error_offset);
        if (error != 0) {
            int none = 0;
            if (atomic_compare_exchange_strong(&read->error, &none, error)) {
                atomic_store(&read->error_offset, error_offset);
            }
        }
        if (atomic_fetch_sub(&read->pieces_left, 1) == 1) {
            finish(read);
        }
        pthread_mutex_lock(&fetch->lock);
    }
    pthread_mutex_unlock(&fetch->lock);
    return NULL;
}

void gp_fetch_submit(gp_fetch *fetch, gp_read *const *reads, uint32_t n_reads) {
    uint64_t n_pieces = 0;
    for (uint32_t i = 0; i < n_reads; i++) {
        gp_read *read = reads[i];
        plan(&fetch->config, read);
        const uint64_t pieces = (read->cover_bytes + fetch->config.piece_bytes - 1) / fetch->config.piece_bytes;
        read->next = i + 1 < n_reads ? reads[i + 1] : NULL;
        read->next_piece = 0;
        atomic_store(&read->error, 0);
        atomic_store(&read->error_offset, 0);
        atomic_store(&read->pieces_left, (unsigned) pieces);
        n_pieces += pieces;
    }
    if (n_reads == 0) {
        return;
    }
    pthread_mutex_lock(&fetch->lock);
    if (fetch->last) {
        fetch->last->next = reads[0];
    } else {
        fetch->first = reads[0];
    }
    fetch->last = reads[n_reads - 1];
    /* As many as there is work for: waking all sixteen for one expert costs more than it brings. */
    const uint64_t n_wake = n_pieces < fetch->n_asleep ? n_pieces : fetch->n_asleep;
    for (uint64_t i = 0; i < n_wake; i++) {
        pthread_cond_signal(&fetch->work);
    }
    pthread_mutex_unlock(&fetch->lock);
}

int gp_fetch_open(gp_fetch **out, const gp_os *os, const gp_fetch_config *config) {
    *out = NULL;
    if (config->n_readers == 0 || config->piece_bytes == 0) {
        return -EINVAL;
    }
    const uint64_t step_bytes = config->offset_align > config->memory_align ? config->offset_align : config->memory_align;
    if (config->direct && (!is_power_of_two(config->offset_align) || !is_power_of_two(config->memory_align)
                           || config->piece_bytes % step_bytes != 0)) {
        return -EINVAL;
    }
    gp_fetch *fetch = calloc(1, sizeof *fetch + config->n_readers * sizeof(pthread_t));
    if (!fetch) {
        return -ENOMEM;
    }
    fetch->os = os;
    fetch->config = *config;
    fetch->step_bytes = step_bytes;
    pthread_mutex_init(&fetch->lock, NULL);
    pthread_cond_init(&fetch->work, NULL);
    for (uint32_t i = 0; i < config->n_readers; i++) {
        const int error = os->thread_start(&fetch->threads[i], reader, fetch);
        if (error != 0) {
            gp_fetch_close(fetch);
            return error;
        }
        fetch->n_threads++;
    }
    *out = fetch;
    return 0;
}

void gp_fetch_close(gp_fetch *fetch) {
    if (!fetch) {
        return;
    }
    pthread_mutex_lock(&fetch->lock);
    fetch->closing = true;
    pthread_cond_broadcast(&fetch->work);
    pthread_mutex_unlock(&fetch->lock);
    for (uint32_t i = 0; i < fetch->n_threads; i++) {
        pthread_join(fetch->threads[i], NULL);
    }
    pthread_cond_destroy(&fetch->work);
    pthread_mutex_destroy(&fetch->lock);
    free(fetch);
}

void gp_fetch_abandon(gp_fetch *fetch) {
    free(fetch);
}
