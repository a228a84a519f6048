/* Everything that differs between operating systems, as one table of functions, so that a test can put its own in
 * place and let any of them fail. Functions return 0 (or a count) or -errno. */
#ifndef GGUF_PAGER_OS_H
#define GGUF_PAGER_OS_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* What tells whether a file is still the one that was opened. */
typedef struct {
    uint64_t device, inode, size_bytes;
    int64_t  modified_ns, changed_ns;   /* content; content, name or rights */
} gp_file_id;

/* One read that goes on in the background, as file_read would do it in the foreground. */
typedef struct {
    int       fd;
    void     *into;
    size_t    bytes;
    uint64_t  offset_bytes;
    uint64_t  tag;              /* comes back with the result */
} gp_request;

typedef struct {
    uint64_t tag;
    int64_t  got;               /* what file_read would have returned */
} gp_event;

typedef struct gp_queue gp_queue;

/* Reads in the background. Any thread may submit and wake, one at a time waits. */
typedef struct {
    /* For up to `depth` requests at a time, of files like the open one given. -ENOTSUP where a read of it would keep
     * the one who submits it waiting. */
    int  (*open)(gp_queue **out, uint32_t depth, int fd);
    /* Begins the first so many, at least one, or none: -errno of the first. */
    int  (*submit)(gp_queue *queue, const gp_request *requests, uint32_t n_requests);
    /* Sleeps until a request is done or somebody wakes it; returns how many events there are. */
    int  (*wait)(gp_queue *queue, gp_event *events, uint32_t n_events);
    void (*wake)(gp_queue *queue);
    /* With nothing in flight and nobody waiting, or in a fork, which has neither. */
    void (*close)(gp_queue *queue);
    /* The calling thread will be the one that waits. It works for microseconds at a time, on which others wait: it goes
     * before those that compute. */
    void (*step_forward)(void);
} gp_queues;

typedef struct gp_os {
    int     (*file_open)(const char *path, bool direct, int *fd);
    int     (*file_close)(int fd);
    int     (*file_identify)(int fd, gp_file_id *id);
    /* Alignment of direct reads, in the file and in memory; -ENOTSUP where there are none. */
    int     (*file_alignment)(const char *path, uint32_t *offset_align, uint32_t *memory_align);
    /* Bytes read, which may be fewer than asked; 0 at the end of the file. */
    int64_t (*file_read)(int fd, void *into, size_t bytes, uint64_t offset_bytes);
    /* These bytes will be read soon, through the cache: a wish. */
    void    (*file_expect)(int fd, size_t bytes, uint64_t offset_bytes);
    /* Anonymous memory, page-aligned, not present yet; huge pages where they can be had. */
    int     (*memory_open)(void **out, size_t bytes);
    /* Makes whole pages of it present, keeping what others write meanwhile. */
    int     (*memory_populate)(void *memory, size_t bytes);
    /* Makes the whole pages within a range not present any more; what they hold is lost. */
    void    (*memory_give_back)(void *memory, size_t bytes);
    void    (*memory_close)(void *memory, size_t bytes);
    int     (*thread_start)(pthread_t *thread, void *(*body)(void *), void *data);
    /* The calling thread's work can wait: others go first where processors are short. */
    void    (*thread_step_back)(void);
    uint64_t (*now_ns)(void);
    uint64_t (*now_roughly_ns)(void);   /* the same clock, some milliseconds late, for a few nanoseconds */
    const gp_queues *queues;    /* NULL: there are none */
} gp_os;

extern const gp_os gp_os_system;
extern const gp_queues gp_queues_linux;     /* on Linux alone */

/* Keeps the pages of a range in RAM. */
int gp_os_memory_lock(void *memory, size_t bytes);
/* The same for those that are there and, as they come, for those that are not yet. */
int gp_os_memory_lock_coming(void *memory, size_t bytes);

/* A part of a file in this process's memory. */
typedef struct {
    void    *address;
    size_t   bytes;
    uint64_t device, inode, offset_bytes;
} gp_mapping;

/* While on, llama.cpp's loader maps files without reading them; 0 also where it never reads them. -ENOTSUP where the
 * library looks unfamiliar; the load is then slow and right. Process-wide; calls nest. `library` is the path of the
 * loaded libllama. */
int  gp_os_lazy_load_begin(const char *library);
void gp_os_lazy_load_end(void);

/* What libllama has mapped in this thread since it was asked last, while lazy loading was on, less what it has unmapped
 * again; nothing where that cannot be seen. Ask before the end of lazy loading. Returns how many there are: if more than n_mappings, they are kept for a call
 * with more room. */
uint32_t gp_os_take_mappings(gp_mapping *mappings, uint32_t n_mappings);

#endif
