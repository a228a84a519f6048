/* Reads in the order in which they were wanted, cut into pieces so that a few misses keep the device as busy as many do.
 *
 * Where the system reads directly and in the background, whoever submits reads puts the first pieces in flight, as many
 * as may be, without waking anybody; one thread, the pump, sleeps until some are done, finishes them and sends the next
 * ones after. Elsewhere a pool of threads reads a piece each. Either way no more than n_readers * piece_bytes are in
 * flight: the device shares itself among all that are, and what was wanted first shall come first.
 *
 * Invariants
 *   1. A read is in a list while it has pieces that nobody has taken. Pieces are taken in order, and go to the
 *      system's queue in order: one thread at a time fills it. Of two lists: what is wanted goes before what is ahead.
 *   2. pieces_left falls by one per finished piece; whoever brings it to zero moves the bytes and calls done, once.
 *   3. The lock guards the lists, the pieces in flight, the count of sleepers and the flags. It is never held across a
 *      read, a call of the system's queue or a callback.
 *   4. While a read is in a list, the queue is as full as it may be with it, or somebody is filling it. So the pump, who alone makes
 *      room, needs nobody's call to go on.
 *   5. Reads that are ahead are in flight in fewer and smaller pieces: what is wanted meanwhile waits for those, and for no more.
 */
#include "reads/fetch.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { AT_ONCE = 32 };
/* Of reads that are ahead: the largest piece, how many pieces may be in flight for one of them to begin, and how many may go before it
 * while it waits: somebody may have come to want it whose word did not reach us. */
enum { AHEAD_PIECE_BYTES = 512 << 10, AHEAD_PIECES = 3, MOST_PASSED_OVER = 32 };

/* A part of a read, taken by a thread or in flight. */
typedef struct {
    gp_read *read;
    uint64_t at;                /* from the beginning of the read's cover */
    uint32_t next_idle;
} piece;

typedef struct {
    gp_read *first, *last;
} list;

struct gp_fetch {
    const gp_os    *os;
    gp_fetch_config config;
    pthread_mutex_t lock;
    pthread_cond_t  work;           /* for the pool */
    list            wanted, ahead;  /* lock */
    uint32_t        n_passed_over;  /* lock; pieces that went before what is ahead since one of that went */
    uint32_t        n_asleep;       /* lock */
    bool            closing;        /* lock */
    _Atomic uint64_t arrived_bytes;
    uint64_t        step_bytes;     /* a multiple of both alignments */
    gp_queue       *queue;          /* NULL: there is a pool */
    piece          *in_flight;      /* lock; n_readers of them, by the tag of the request */
    uint32_t        n_in_flight;    /* lock */
    uint32_t        idle;           /* lock; the first that is not in flight, n_readers: none */
    bool            is_filling;     /* lock */
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

static uint64_t piece_end(const gp_read *read, uint64_t piece_at) {
    const uint64_t left = read->cover_bytes - piece_at;
    return piece_at + (left < read->piece_bytes ? left : read->piece_bytes);
}

/* Reads one piece, or what is left of it: `got` is what a first read of it returned, -EINTR if there was none. Only
 * bytes of the wanted range must arrive: the cover of a file's last slice ends behind the file. */
static int read_piece(const gp_fetch *fetch, const gp_read *read, uint64_t piece_at, int64_t got, uint64_t *error_offset) {
    const uint64_t wanted_end = read->offset_bytes + read->bytes;
    uint64_t at = read->cover_offset + piece_at;
    uint64_t left = piece_end(read, piece_at) - piece_at;
    char *const begin = read->cover_into + piece_at;
    char *into = begin;
    for (;; got = fetch->os->file_read(read->fd, into, left, at)) {
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
        if (left == 0 || at >= wanted_end) {
            return 0;
        }
        /* A direct read may stop anywhere; the next begins at the last place that is aligned in the file and in memory. */
        const uint64_t back = fetch->config.direct ? (uint64_t) (into - begin) % fetch->step_bytes : 0;
        at -= back;
        into -= back;
        left += back;
        if ((uint64_t) got <= back) {
            *error_offset = at;
            return -ENODATA;
        }
    }
}

static void finish_piece(gp_fetch *fetch, const piece *done, int64_t got) {
    gp_read *read = done->read;
    uint64_t error_offset = 0;
    const int error = read_piece(fetch, read, done->at, got, &error_offset);
    if (error != 0) {
        int none = 0;
        if (atomic_compare_exchange_strong(&read->error, &none, error)) {
            atomic_store(&read->error_offset, error_offset);
        }
    } else {
        atomic_fetch_add_explicit(&fetch->arrived_bytes, piece_end(read, done->at) - done->at, memory_order_relaxed);
    }
    if (atomic_fetch_sub(&read->pieces_left, 1) == 1) {
        finish(read);
    }
}

static void append(list *l, gp_read *read) {
    read->next = NULL;
    if (l->last) {
        l->last->next = read;
    } else {
        l->first = read;
    }
    l->last = read;
}

/* The list that the next piece comes from; NULL: none may be begun now. With the lock held. */
static list *choose_list(gp_fetch *fetch) {
    const bool has_waited = fetch->ahead.first && fetch->n_passed_over >= MOST_PASSED_OVER;
    if (fetch->wanted.first && !has_waited) {
        return &fetch->wanted;
    }
    return fetch->ahead.first && (has_waited || fetch->n_in_flight < AHEAD_PIECES) ? &fetch->ahead : NULL;
}

static piece take_piece(gp_fetch *fetch, list *l) {
    gp_read *read = l->first;
    fetch->n_passed_over = l == &fetch->wanted && fetch->ahead.first ? fetch->n_passed_over + 1 : 0;
    const piece taken = { .read = read, .at = read->next_piece };
    read->next_piece = piece_end(read, taken.at);
    if (read->next_piece == read->cover_bytes) {
        l->first = read->next;
        if (!l->first) {
            l->last = NULL;
        }
    }
    return taken;
}

/* ---- the pool of threads ----------------------------------------------------------------------------------------- */

/* As many as there is work for: waking all for one expert costs more than it brings. Called with the lock held. */
static void wake_readers(gp_fetch *fetch, uint64_t n_pieces) {
    const uint64_t n_wake = n_pieces < fetch->n_asleep ? n_pieces : fetch->n_asleep;
    for (uint64_t i = 0; i < n_wake; i++) {
        pthread_cond_signal(&fetch->work);
    }
}

static bool is_empty(const gp_fetch *fetch) {
    return !fetch->wanted.first && !fetch->ahead.first;
}

static void *reader(void *data) {
    gp_fetch *fetch = data;
    pthread_mutex_lock(&fetch->lock);
    for (;;) {
        list *l;
        while (!(l = choose_list(fetch)) && !(fetch->closing && is_empty(fetch))) {
            fetch->n_asleep++;
            pthread_cond_wait(&fetch->work, &fetch->lock);
            fetch->n_asleep--;
        }
        if (!l) {
            break;
        }
        const piece taken = take_piece(fetch, l);
        fetch->n_in_flight++;
        pthread_mutex_unlock(&fetch->lock);
        finish_piece(fetch, &taken, -EINTR);
        pthread_mutex_lock(&fetch->lock);
        fetch->n_in_flight--;
    }
    wake_readers(fetch, UINT64_MAX);    /* those that may begin nothing while so much is in flight */
    pthread_mutex_unlock(&fetch->lock);
    return NULL;
}

/* ---- the system's queue ------------------------------------------------------------------------------------------ */

/* With the lock held. */
static uint32_t take_requests(gp_fetch *fetch, gp_request *requests) {
    uint32_t n = 0;
    list *l;
    while (fetch->idle < fetch->config.n_readers && n < AT_ONCE && (l = choose_list(fetch))) {
        const uint32_t tag = fetch->idle;
        piece *p = &fetch->in_flight[tag];
        fetch->idle = p->next_idle;
        fetch->n_in_flight++;
        *p = take_piece(fetch, l);
        requests[n++] = (gp_request) {
            .fd = p->read->fd, .into = p->read->cover_into + p->at, .bytes = piece_end(p->read, p->at) - p->at,
            .offset_bytes = p->read->cover_offset + p->at, .tag = tag,
        };
    }
    return n;
}

/* With the lock held. */
static piece give_back(gp_fetch *fetch, uint64_t tag) {
    const piece done = fetch->in_flight[tag];
    fetch->in_flight[tag].next_idle = fetch->idle;
    fetch->idle = (uint32_t) tag;
    fetch->n_in_flight--;
    return done;
}

/* Puts pieces in flight until there is no room or no piece. Called with the lock held, which it lets go meanwhile. If
 * somebody is at it, he will see what there is: he looks again before he leaves. */
static void fill(gp_fetch *fetch) {
    if (fetch->is_filling) {
        return;
    }
    fetch->is_filling = true;
    gp_request requests[AT_ONCE];
    uint32_t n;
    while ((n = take_requests(fetch, requests)) > 0) {
        pthread_mutex_unlock(&fetch->lock);
        for (uint32_t at = 0; at < n;) {
            const int begun = fetch->os->queues->submit(fetch->queue, requests + at, n - at);
            if (begun > 0) {
                at += (uint32_t) begun;
                continue;
            }
            /* It does not want this one, now or ever: it is read here, and says what is wrong with it. */
            pthread_mutex_lock(&fetch->lock);
            const piece refused = give_back(fetch, requests[at++].tag);
            pthread_mutex_unlock(&fetch->lock);
            finish_piece(fetch, &refused, -EINTR);
        }
        pthread_mutex_lock(&fetch->lock);
    }
    fetch->is_filling = false;
}

static void *pump(void *data) {
    gp_fetch *fetch = data;
    gp_event events[AT_ONCE];
    piece done[AT_ONCE];
    fetch->os->queues->step_forward();
    pthread_mutex_lock(&fetch->lock);
    while (!fetch->closing || !is_empty(fetch) || fetch->n_in_flight > 0) {
        pthread_mutex_unlock(&fetch->lock);
        const int n = fetch->os->queues->wait(fetch->queue, events, AT_ONCE);
        pthread_mutex_lock(&fetch->lock);
        for (int i = 0; i < n; i++) {
            done[i] = give_back(fetch, events[i].tag);
        }
        fill(fetch);
        pthread_mutex_unlock(&fetch->lock);
        for (int i = 0; i < n; i++) {
            finish_piece(fetch, &done[i], events[i].got);
        }
        pthread_mutex_lock(&fetch->lock);
    }
    pthread_mutex_unlock(&fetch->lock);
    return NULL;
}

/* ---- what others call -------------------------------------------------------------------------------------------- */

/* Each of these to the list that it belongs to; whoever reads is told. With the lock held. */
static void enlist(gp_fetch *fetch, gp_read *first, uint64_t n_pieces) {
    for (gp_read *read = first, *next; read; read = next) {
        next = read->next;
        append(read->is_ahead ? &fetch->ahead : &fetch->wanted, read);
    }
    if (fetch->queue) {
        fill(fetch);
    } else {
        wake_readers(fetch, n_pieces);
    }
}

void gp_fetch_submit(gp_fetch *fetch, gp_read *first) {
    uint64_t n_pieces = 0;
    for (gp_read *read = first; read; read = read->next) {
        plan(&fetch->config, read);
        read->piece_bytes = read->is_ahead && fetch->config.piece_bytes > AHEAD_PIECE_BYTES ? AHEAD_PIECE_BYTES : fetch->config.piece_bytes;
        const uint64_t pieces = (read->cover_bytes + read->piece_bytes - 1) / read->piece_bytes;
        read->next_piece = 0;
        read->is_withdrawn = false;
        atomic_store(&read->error, 0);
        atomic_store(&read->error_offset, 0);
        atomic_store(&read->pieces_left, (unsigned) pieces);
        n_pieces += pieces;
    }
    if (n_pieces == 0) {
        return;
    }
    pthread_mutex_lock(&fetch->lock);
    enlist(fetch, first, n_pieces);
    pthread_mutex_unlock(&fetch->lock);
}

void gp_fetch_want(gp_fetch *fetch, gp_read *const *reads, uint32_t n_reads) {
    pthread_mutex_lock(&fetch->lock);
    for (uint32_t i = 0; i < n_reads; i++) {
        reads[i]->is_ahead = false;
    }
    gp_read *const first = fetch->ahead.first;
    fetch->ahead = (list) { 0 };
    enlist(fetch, first, UINT64_MAX);
    pthread_mutex_unlock(&fetch->lock);
}

/* Those of a list that nobody has begun leave it for another. */
static void take_out(list *l, list *withdrawn) {
    gp_read *read = l->first, *next;
    *l = (list) { 0 };
    for (; read; read = next) {
        next = read->next;
        append(read->is_withdrawn && read->next_piece == 0 ? withdrawn : l, read);
    }
}

void gp_fetch_withdraw(gp_fetch *fetch, gp_read *const *reads, uint32_t n_reads) {
    list withdrawn = { 0 };
    pthread_mutex_lock(&fetch->lock);
    for (uint32_t i = 0; i < n_reads; i++) {
        reads[i]->is_withdrawn = true;
    }
    take_out(&fetch->wanted, &withdrawn);
    take_out(&fetch->ahead, &withdrawn);
    pthread_mutex_unlock(&fetch->lock);
    for (gp_read *read = withdrawn.first, *next; read; read = next) {
        next = read->next;      /* `done` may give the read away */
        read->done(read, -ECANCELED, read->offset_bytes);
    }
}

bool gp_fetch_is_in_background(const gp_fetch *fetch) {
    return fetch->queue != NULL;
}

uint64_t gp_fetch_arrived_bytes(const gp_fetch *fetch) {
    return atomic_load_explicit(&fetch->arrived_bytes, memory_order_relaxed);
}

/* Leaves things as they are where the system has no such queue, or refuses it. */
static int open_queue(gp_fetch *fetch) {
    const gp_fetch_config *config = &fetch->config;
    if (!config->direct || !fetch->os->queues) {
        return 0;
    }
    if (fetch->os->queues->open(&fetch->queue, config->n_readers, config->fd) != 0) {
        return 0;
    }
    fetch->in_flight = calloc(config->n_readers, sizeof *fetch->in_flight);
    if (!fetch->in_flight) {
        return -ENOMEM;
    }
    for (uint32_t i = 0; i < config->n_readers; i++) {
        fetch->in_flight[i].next_idle = i + 1;
    }
    return 0;
}

int gp_fetch_open(gp_fetch **out, const gp_os *os, const gp_fetch_config *config, bool *lacks_thread) {
    *out = NULL;
    *lacks_thread = false;
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
    int error = open_queue(fetch);
    const uint32_t n_wanted = fetch->queue ? 1 : config->n_readers;
    while (error == 0 && fetch->n_threads < n_wanted) {
        error = os->thread_start(&fetch->threads[fetch->n_threads], fetch->queue ? pump : reader, fetch);
        fetch->n_threads += error == 0;
        *lacks_thread = error != 0;
    }
    if (error != 0) {
        gp_fetch_close(fetch);
        return error;
    }
    *out = fetch;
    return 0;
}

static void free_all(gp_fetch *fetch) {
    if (fetch->queue) {
        fetch->os->queues->close(fetch->queue);
    }
    free(fetch->in_flight);
    free(fetch);
}

void gp_fetch_close(gp_fetch *fetch) {
    if (!fetch) {
        return;
    }
    pthread_mutex_lock(&fetch->lock);
    fetch->closing = true;
    pthread_cond_broadcast(&fetch->work);
    pthread_mutex_unlock(&fetch->lock);
    if (fetch->queue && fetch->n_threads > 0) {
        fetch->os->queues->wake(fetch->queue);
    }
    for (uint32_t i = 0; i < fetch->n_threads; i++) {
        pthread_join(fetch->threads[i], NULL);
    }
    pthread_cond_destroy(&fetch->work);
    pthread_mutex_destroy(&fetch->lock);
    free_all(fetch);
}

void gp_fetch_abandon(gp_fetch *fetch) {
    if (fetch) {
        free_all(fetch);
    }
}
