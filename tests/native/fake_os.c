#define _POSIX_C_SOURCE 200809L
#include "fake_os.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "check.h"

enum { MAX_FILES = 6, MAX_DESCRIPTORS = 256, FIRST_DESCRIPTOR = 1000 };

typedef struct {
    char             path[64];
    uint8_t         *bytes;
    _Atomic uint64_t size_bytes;
    _Atomic int64_t  modified_ns;
    _Atomic uint64_t bad_at;
    atomic_int       bad_error;
    atomic_uint      delay_us;
    bool             refuses_direct, is_replaced_next;
    uint64_t         n_replaced;
} fake_file;

typedef struct {
    fake_file  *file;
    uint64_t    n_replaced;     /* before it was opened */
    bool        is_direct;
    atomic_bool is_open;
} descriptor;

static struct {
    fake_file       files[MAX_FILES];
    unsigned        n_files;
    descriptor      descriptors[MAX_DESCRIPTORS];
    unsigned        n_descriptors;
    atomic_uint     calls[FAKE_CALLS];
    _Atomic uint64_t bytes_read;
    atomic_uint     expected;
    atomic_uint     fail_in[FAKE_CALLS];
    atomic_int      fail_with[FAKE_CALLS];
    atomic_uint     fail_any_in;
    atomic_int      fail_any_with;
    uint32_t        offset_align, memory_align;
    atomic_uint     short_one_in, interrupted_one_in, delay_us;
    atomic_bool     is_ragged;
    _Atomic uint64_t random;
    atomic_uint     memories, threads, queues, allocations;
    atomic_bool     has_queue;
    pthread_mutex_t gate_lock;
    pthread_cond_t  gate_moved;
    atomic_bool     is_gated;
    unsigned        n_waiting;      /* gate_lock */
    unsigned        n_passes;       /* gate_lock */
    uint64_t       present_bytes;       /* the populating thread's, then its joiner's */
    uint64_t       given_back_bytes;
} fake = { .offset_align = 1, .memory_align = 1,
           .gate_lock = PTHREAD_MUTEX_INITIALIZER, .gate_moved = PTHREAD_COND_INITIALIZER };

#define RELAXED memory_order_relaxed

uint32_t fake_random(uint32_t below) {
    uint64_t x = atomic_fetch_add_explicit(&fake.random, UINT64_C(0x9e3779b97f4a7c15), RELAXED);
    x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
    return (uint32_t) ((x ^ x >> 31) >> 16) % below;
}

/* ---- faults ----------------------------------------------------------------------------------------------------- */

/* Counts down without going below zero; true when it arrives there. */
static bool strike(atomic_uint *left) {
    unsigned now = atomic_load_explicit(left, RELAXED);
    while (now > 0) {
        if (atomic_compare_exchange_weak_explicit(left, &now, now - 1, RELAXED, RELAXED)) {
            return now == 1;
        }
    }
    return false;
}

static int begin(fake_call call) {
    atomic_fetch_add_explicit(&fake.calls[call], 1, RELAXED);
    const bool can_be_done_without = call == FAKE_FILE_READ || call == FAKE_MEMORY_POPULATE || call == FAKE_MEMORY_LOCK
        || call == FAKE_QUEUE_OPEN || call == FAKE_QUEUE_SUBMIT;
    if (!can_be_done_without && strike(&fake.fail_any_in)) {
        return atomic_load_explicit(&fake.fail_any_with, RELAXED);
    }
    return strike(&fake.fail_in[call]) ? atomic_load_explicit(&fake.fail_with[call], RELAXED) : 0;
}

void fake_fail(fake_call call, unsigned nth, int error) {
    atomic_store(&fake.fail_with[call], error);
    atomic_store(&fake.fail_in[call], nth);
}

void fake_fail_any(unsigned nth, int error) {
    atomic_store(&fake.fail_any_with, error);
    atomic_store(&fake.fail_any_in, nth);
}

uint64_t fake_bytes_read(void) {
    return atomic_load(&fake.bytes_read);
}

unsigned fake_expected(void) {
    return atomic_load(&fake.expected);
}

bool fake_is_armed(void) {
    unsigned armed = atomic_load(&fake.fail_any_in);
    for (int i = 0; i < FAKE_CALLS; i++) {
        armed += atomic_load(&fake.fail_in[i]);
    }
    return armed > 0;
}

unsigned fake_count(fake_call call) {
    return atomic_load(&fake.calls[call]);
}

void fake_set_weather(fake_weather weather) {
    atomic_store(&fake.short_one_in, weather.short_one_in);
    atomic_store(&fake.interrupted_one_in, weather.interrupted_one_in);
    atomic_store(&fake.delay_us, weather.delay_us);
    atomic_store(&fake.is_ragged, weather.is_ragged);
}

void fake_direct_align(uint32_t offset_align, uint32_t memory_align) {
    fake.offset_align = offset_align;
    fake.memory_align = memory_align;
}

/* ---- the gate --------------------------------------------------------------------------------------------------- */

void fake_hold_reads(void) {
    atomic_store(&fake.is_gated, true);
}

static void wait_at_gate(void) {
    if (!atomic_load_explicit(&fake.is_gated, RELAXED)) {
        return;
    }
    pthread_mutex_lock(&fake.gate_lock);
    fake.n_waiting++;
    pthread_cond_broadcast(&fake.gate_moved);
    while (atomic_load(&fake.is_gated) && fake.n_passes == 0) {
        pthread_cond_wait(&fake.gate_moved, &fake.gate_lock);
    }
    fake.n_passes -= fake.n_passes > 0;
    fake.n_waiting--;
    pthread_mutex_unlock(&fake.gate_lock);
}

void fake_wait_for_reads(unsigned n_waiting) {
    pthread_mutex_lock(&fake.gate_lock);
    while (fake.n_waiting < n_waiting) {
        pthread_cond_wait(&fake.gate_moved, &fake.gate_lock);
    }
    pthread_mutex_unlock(&fake.gate_lock);
}

void fake_let_some_go(unsigned n_reads) {
    pthread_mutex_lock(&fake.gate_lock);
    fake.n_passes = n_reads;
    pthread_cond_broadcast(&fake.gate_moved);
    pthread_mutex_unlock(&fake.gate_lock);
}

void fake_let_reads_go(void) {
    pthread_mutex_lock(&fake.gate_lock);
    atomic_store(&fake.is_gated, false);
    fake.n_passes = 0;
    pthread_cond_broadcast(&fake.gate_moved);
    pthread_mutex_unlock(&fake.gate_lock);
}

/* ---- files ------------------------------------------------------------------------------------------------------ */

static fake_file *find_file(const char *path) {
    for (unsigned i = 0; i < fake.n_files; i++) {
        if (strcmp(fake.files[i].path, path) == 0) {
            return &fake.files[i];
        }
    }
    return NULL;
}

uint8_t *fake_file_add(const char *path, uint64_t size_bytes) {
    CHECK(fake.n_files < MAX_FILES && strlen(path) < sizeof fake.files[0].path, "the test asks for few files");
    fake_file *file = &fake.files[fake.n_files++];
    strcpy(file->path, path);
    file->bytes = malloc(size_bytes);
    CHECK(file->bytes, "the test has memory");
    for (uint64_t i = 0; i < size_bytes; i++) {
        file->bytes[i] = (uint8_t) fake_random(256);
    }
    atomic_store(&file->size_bytes, size_bytes);
    atomic_store(&file->modified_ns, 1);
    return file->bytes;
}

void fake_file_truncate(const char *path, uint64_t size_bytes) {
    atomic_store(&find_file(path)->size_bytes, size_bytes);
}

void fake_file_touch(const char *path) {
    atomic_fetch_add(&find_file(path)->modified_ns, 1);
}

int64_t fake_file_time(const char *path) {
    return atomic_load(&find_file(path)->modified_ns);
}

void fake_fail_at(const char *path, uint64_t offset_bytes, int error) {
    fake_file *file = find_file(path);
    atomic_store(&file->bad_at, offset_bytes);
    atomic_store(&file->bad_error, error);
}

void fake_file_refuse_direct(const char *path) {
    find_file(path)->refuses_direct = true;
}

void fake_replace_after_open(const char *path) {
    find_file(path)->is_replaced_next = true;
}

void fake_file_slow_down(const char *path, unsigned delay_us) {
    atomic_store(&find_file(path)->delay_us, delay_us);
}

static int file_open(const char *path, bool direct, int *fd) {
    *fd = -1;
    const int error = begin(FAKE_FILE_OPEN);
    fake_file *file = find_file(path);
    if (error != 0 || !file) {
        return error != 0 ? error : -ENOENT;
    }
    if (direct && file->refuses_direct) {
        return -EINVAL;
    }
    CHECK(fake.n_descriptors < MAX_DESCRIPTORS, "the test opens few files");
    descriptor *d = &fake.descriptors[fake.n_descriptors];
    d->file = file;
    d->is_direct = direct;
    d->n_replaced = file->n_replaced;
    file->n_replaced += file->is_replaced_next;
    file->is_replaced_next = false;
    atomic_store(&d->is_open, true);
    *fd = FIRST_DESCRIPTOR + (int) fake.n_descriptors++;
    return 0;
}

static descriptor *find_descriptor(int fd) {
    CHECK(fd >= FIRST_DESCRIPTOR && fd < FIRST_DESCRIPTOR + (int) fake.n_descriptors, "a descriptor came from open");
    descriptor *d = &fake.descriptors[fd - FIRST_DESCRIPTOR];
    CHECK(atomic_load_explicit(&d->is_open, RELAXED), "no closed file is used");
    return d;
}

static int file_close(int fd) {
    atomic_store(&find_descriptor(fd)->is_open, false);
    return 0;
}

static int file_identify(int fd, gp_file_id *id) {
    const int error = begin(FAKE_FILE_IDENTIFY);
    if (error != 0) {
        return error;
    }
    const descriptor *d = find_descriptor(fd);
    fake_file *file = d->file;
    *id = (gp_file_id) { .device = 1, .inode = (uint64_t) (file - fake.files) + 1 + MAX_FILES * d->n_replaced,
                         .size_bytes = atomic_load_explicit(&file->size_bytes, RELAXED),
                         .modified_ns = atomic_load_explicit(&file->modified_ns, RELAXED) };
    return 0;
}

static int file_alignment(const char *path, uint32_t *offset_align, uint32_t *memory_align) {
    (void) path;
    *offset_align = fake.offset_align;
    *memory_align = fake.memory_align;
    return 0;
}

static bool happens(atomic_uint *one_in) {
    const unsigned n = atomic_load_explicit(one_in, RELAXED);
    return n > 0 && fake_random(n) == 0;
}

static size_t shorten(size_t bytes, bool is_direct) {
    const size_t step = is_direct && !atomic_load_explicit(&fake.is_ragged, RELAXED) ? fake.offset_align : 1;
    /* Some progress, in the file and in memory. */
    const size_t align = fake.offset_align > fake.memory_align ? fake.offset_align : fake.memory_align;
    const size_t least = is_direct ? align : 1;
    if (bytes <= least) {
        return bytes;
    }
    const size_t shorter = fake_random((uint32_t) bytes) / step * step;
    return shorter < least ? least : shorter;
}

static int64_t file_read(int fd, void *into, size_t bytes, uint64_t offset_bytes) {
    const int error = begin(FAKE_FILE_READ);
    wait_at_gate();
    const unsigned delay_us = atomic_load_explicit(&fake.delay_us, RELAXED);
    if (delay_us > 0) {
        nanosleep(&(struct timespec) { .tv_nsec = 1000L * fake_random(delay_us) }, NULL);
    }
    descriptor *d = find_descriptor(fd);
    const unsigned file_delay_us = atomic_load_explicit(&d->file->delay_us, RELAXED);
    if (file_delay_us > 0) {
        nanosleep(&(struct timespec) { .tv_nsec = 1000L * file_delay_us }, NULL);
    }
    if (error != 0 || happens(&fake.interrupted_one_in)) {
        return error != 0 ? error : -EINTR;
    }
    if (d->is_direct && (offset_bytes % fake.offset_align != 0 || bytes % fake.offset_align != 0
                         || (uintptr_t) into % fake.memory_align != 0)) {
        return -EINVAL;
    }
    const uint64_t bad_at = atomic_load_explicit(&d->file->bad_at, RELAXED);
    const int bad_error = atomic_load_explicit(&d->file->bad_error, RELAXED);
    if (bad_error != 0 && offset_bytes <= bad_at && bad_at < offset_bytes + bytes) {
        return bad_error;
    }
    const uint64_t size_bytes = atomic_load_explicit(&d->file->size_bytes, RELAXED);
    if (offset_bytes >= size_bytes) {
        return 0;
    }
    size_t got = bytes < size_bytes - offset_bytes ? bytes : (size_t) (size_bytes - offset_bytes);
    if (happens(&fake.short_one_in)) {
        got = shorten(got, d->is_direct);
    }
    memcpy(into, d->file->bytes + offset_bytes, got);
    atomic_fetch_add_explicit(&fake.bytes_read, got, RELAXED);
    return (int64_t) got;
}

static void file_expect(int fd, size_t bytes, uint64_t offset_bytes) {
    const descriptor *d = find_descriptor(fd);
    CHECK(!d->is_direct && bytes > 0 && offset_bytes < INT64_MAX, "the cache is told of bytes in a file");
    atomic_fetch_add(&fake.expected, 1);
}

/* ---- reads in the background -------------------------------------------------------------------------------------
 * As many threads as requests may be in flight: all of them begin at once, and end in any order. */

enum { MAX_DEPTH = 64 };

struct gp_queue {
    pid_t           pid;
    pthread_mutex_t lock;
    pthread_cond_t  work, done;
    pthread_t       threads[MAX_DEPTH];
    uint32_t        depth;
    gp_request      requests[MAX_DEPTH];    /* lock; a ring */
    uint32_t        n_requests, first_request;
    gp_event        events[MAX_DEPTH];      /* lock */
    uint32_t        n_events;
    uint32_t        n_in_flight;            /* lock; submitted and not reaped */
    bool            is_waited_for, is_woken, is_closing;    /* lock */
};

static void *work_off(void *data) {
    gp_queue *q = data;
    pthread_mutex_lock(&q->lock);
    for (;;) {
        while (q->n_requests == 0 && !q->is_closing) {
            pthread_cond_wait(&q->work, &q->lock);
        }
        if (q->n_requests == 0) {
            break;
        }
        const gp_request r = q->requests[q->first_request];
        q->first_request = (q->first_request + 1) % q->depth;
        q->n_requests--;
        pthread_mutex_unlock(&q->lock);
        const int64_t got = file_read(r.fd, r.into, r.bytes, r.offset_bytes);
        pthread_mutex_lock(&q->lock);
        q->events[q->n_events++] = (gp_event) { r.tag, got };
        pthread_cond_signal(&q->done);
    }
    pthread_mutex_unlock(&q->lock);
    return NULL;
}

static int queue_open(gp_queue **out, uint32_t depth, int fd) {
    *out = NULL;
    (void) find_descriptor(fd);
    const int error = begin(FAKE_QUEUE_OPEN);
    if (error != 0 || !fake_has_queue()) {
        return error != 0 ? error : -ENOTSUP;
    }
    CHECK(depth > 0 && depth <= MAX_DEPTH, "the test asks for few reads at a time");
    gp_queue *q = calloc(1, sizeof *q);
    CHECK(q, "the test has memory");
    q->pid = getpid();
    q->depth = depth;
    pthread_mutex_init(&q->lock, NULL);
    pthread_cond_init(&q->work, NULL);
    pthread_cond_init(&q->done, NULL);
    for (uint32_t i = 0; i < depth; i++) {
        CHECK(pthread_create(&q->threads[i], NULL, work_off, q) == 0, "the test has threads");
    }
    atomic_fetch_add(&fake.queues, 1);
    *out = q;
    return 0;
}

static int queue_submit(gp_queue *q, const gp_request *requests, uint32_t n_requests) {
    const int error = begin(FAKE_QUEUE_SUBMIT);
    if (error != 0) {
        return error;
    }
    const uint32_t n = happens(&fake.short_one_in) ? 1 + fake_random(n_requests) : n_requests;
    pthread_mutex_lock(&q->lock);
    for (uint32_t i = 0; i < n; i++) {
        CHECK(q->n_in_flight < q->depth, "no more requests are in flight than was said");
        q->requests[(q->first_request + q->n_requests) % q->depth] = requests[i];
        q->n_requests++;
        q->n_in_flight++;
        pthread_cond_signal(&q->work);
    }
    pthread_mutex_unlock(&q->lock);
    return (int) n;
}

static int queue_wait(gp_queue *q, gp_event *events, uint32_t n_events) {
    pthread_mutex_lock(&q->lock);
    CHECK(!q->is_waited_for, "one thread waits at a time");
    q->is_waited_for = true;
    while (q->n_events == 0 && !q->is_woken) {
        pthread_cond_wait(&q->done, &q->lock);
    }
    uint32_t n = 0;
    while (q->n_events > 0 && n < n_events) {
        events[n++] = q->events[--q->n_events];
    }
    q->n_in_flight -= n;
    q->is_woken &= n > 0;
    q->is_waited_for = false;
    pthread_mutex_unlock(&q->lock);
    return (int) n;
}

static void queue_wake(gp_queue *q) {
    pthread_mutex_lock(&q->lock);
    q->is_woken = true;
    pthread_cond_signal(&q->done);
    pthread_mutex_unlock(&q->lock);
}

static void queue_close(gp_queue *q) {
    if (getpid() == q->pid) {
        pthread_mutex_lock(&q->lock);
        CHECK(q->n_in_flight == 0 && !q->is_waited_for, "a queue is closed when nothing is in flight any more");
        q->is_closing = true;
        pthread_cond_broadcast(&q->work);
        pthread_mutex_unlock(&q->lock);
        for (uint32_t i = 0; i < q->depth; i++) {
            pthread_join(q->threads[i], NULL);
        }
        pthread_cond_destroy(&q->done);
        pthread_cond_destroy(&q->work);
        pthread_mutex_destroy(&q->lock);
    }
    atomic_fetch_sub(&fake.queues, 1);
    free(q);
}

static void queue_step_forward(void) {
}

static const gp_queues queues = {
    .open = queue_open,
    .submit = queue_submit,
    .wait = queue_wait,
    .wake = queue_wake,
    .close = queue_close,
    .step_forward = queue_step_forward,
};

bool fake_has_queue(void) {
    return atomic_load(&fake.has_queue) || getenv("FAKE_QUEUE");
}

void fake_allow_queue(bool is_allowed) {
    atomic_store(&fake.has_queue, is_allowed);
}

/* ---- memory, threads, time -------------------------------------------------------------------------------------- */

static int memory_open(void **out, size_t bytes) {
    *out = NULL;
    const int error = begin(FAKE_MEMORY_OPEN);
    if (error != 0) {
        return error;
    }
    CHECK(posix_memalign(out, 4096, bytes) == 0, "the test has memory");     /* no byte more: ASan watches the end */
    memset(*out, 0xee, bytes);
    atomic_fetch_add(&fake.memories, 1);
    return 0;
}

static int memory_populate(void *memory, size_t bytes) {
    CHECK(memory && bytes > 0, "there is memory to make present");
    const int error = begin(FAKE_MEMORY_POPULATE);
    if (error == 0) {
        fake.present_bytes += bytes;
    }
    return error;
}

uint64_t fake_bytes_present(void) {
    return fake.present_bytes;
}

static void memory_give_back(void *memory, size_t bytes) {
    CHECK(memory && bytes > 0, "there is memory to give back");
    memset(memory, 0xee, bytes);    /* whoever still uses it sees that */
    fake.given_back_bytes += bytes;
}

uint64_t fake_bytes_given_back(void) {
    return fake.given_back_bytes;
}

static void memory_close(void *memory, size_t bytes) {
    (void) bytes;
    free(memory);
    atomic_fetch_sub(&fake.memories, 1);
}

typedef struct {
    void *(*body)(void *);
    void *data;
} thread_task;

static void *run_thread(void *data) {
    const thread_task task = *(thread_task *) data;
    free(data);
    void *result = task.body(task.data);
    atomic_fetch_sub_explicit(&fake.threads, 1, RELAXED);
    return result;
}

static int thread_start(pthread_t *thread, void *(*body)(void *), void *data) {
    const int error = begin(FAKE_THREAD_START);
    if (error != 0) {
        return error;
    }
    thread_task *task = malloc(sizeof *task);
    CHECK(task, "the test has memory");
    *task = (thread_task) { body, data };
    atomic_fetch_add(&fake.threads, 1);
    CHECK(pthread_create(thread, NULL, run_thread, task) == 0, "the test has threads");
    return 0;
}

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t) now.tv_sec * 1000000000u + (uint64_t) now.tv_nsec;
}

static void thread_step_back(void) {
}

const gp_os fake_os = {
    .file_open = file_open,
    .file_close = file_close,
    .file_identify = file_identify,
    .file_alignment = file_alignment,
    .file_read = file_read,
    .file_expect = file_expect,
    .memory_open = memory_open,
    .memory_populate = memory_populate,
    .memory_give_back = memory_give_back,
    .memory_close = memory_close,
    .thread_start = thread_start,
    .thread_step_back = thread_step_back,
    .now_ns = now_ns,
    .now_roughly_ns = now_ns,
    .queues = &queues,
};

int gp_os_memory_lock_coming(void *memory, size_t bytes) {
    return gp_os_memory_lock(memory, bytes);
}

int gp_os_memory_lock(void *memory, size_t bytes) {
    CHECK(memory && bytes > 0, "there is memory to lock");
    return begin(FAKE_MEMORY_LOCK);
}

void *fake_malloc(size_t bytes) {
    if (begin(FAKE_ALLOCATE) != 0) {
        return NULL;
    }
    void *memory = malloc(bytes);
    CHECK(memory, "the test has memory");
    memset(memory, 0xa5, bytes);        /* whoever reads what was not written shall notice */
    atomic_fetch_add_explicit(&fake.allocations, 1, RELAXED);
    return memory;
}

void *fake_calloc(size_t n, size_t bytes) {
    if (begin(FAKE_ALLOCATE) != 0) {
        return NULL;
    }
    void *memory = calloc(n, bytes);
    CHECK(memory, "the test has memory");
    atomic_fetch_add_explicit(&fake.allocations, 1, RELAXED);
    return memory;
}

void fake_free(void *memory) {
    atomic_fetch_sub_explicit(&fake.allocations, memory != NULL, RELAXED);
    free(memory);
}

/* ---- what is left ----------------------------------------------------------------------------------------------- */

unsigned fake_open_files(void) {
    unsigned n = 0;
    for (unsigned i = 0; i < fake.n_descriptors; i++) {
        n += atomic_load(&fake.descriptors[i].is_open);
    }
    return n;
}

unsigned fake_open_memories(void) {
    return atomic_load(&fake.memories);
}

unsigned fake_running_threads(void) {
    return atomic_load(&fake.threads);
}

unsigned fake_allocations(void) {
    return atomic_load(&fake.allocations);
}

void fake_reset(void) {
    CHECK(fake_open_files() == 0, "every file was closed");
    CHECK(fake_open_memories() == 0, "every arena was closed");
    CHECK(fake_running_threads() == 0, "every thread has ended");
    CHECK(atomic_load(&fake.queues) == 0, "every queue was closed");
    CHECK(fake_allocations() == 0, "all memory was freed");
    for (unsigned i = 0; i < fake.n_files; i++) {
        free(fake.files[i].bytes);
        atomic_store(&fake.files[i].bad_error, 0);
        atomic_store(&fake.files[i].delay_us, 0);
        fake.files[i].refuses_direct = false;
        fake.files[i].n_replaced = 0;
    }
    fake.n_files = fake.n_descriptors = 0;
    for (int i = 0; i < FAKE_CALLS; i++) {
        atomic_store(&fake.calls[i], 0);
        atomic_store(&fake.fail_in[i], 0);
    }
    atomic_store(&fake.fail_any_in, 0);
    atomic_store(&fake.bytes_read, 0);
    atomic_store(&fake.expected, 0);
    fake_set_weather((fake_weather) { 0 });
    fake.present_bytes = 0;
    fake_direct_align(1, 1);
}
