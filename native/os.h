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
    int64_t  modified_ns;
} gp_file_id;

typedef struct gp_os {
    int     (*file_open)(const char *path, bool direct, int *fd);
    int     (*file_close)(int fd);
    int     (*file_identify)(int fd, gp_file_id *id);
    /* Alignment of direct reads, in the file and in memory; -ENOTSUP where there are none. */
    int     (*file_alignment)(const char *path, uint32_t *offset_align, uint32_t *memory_align);
    /* Bytes read, which may be fewer than asked; 0 at the end of the file. */
    int64_t (*file_read)(int fd, void *into, size_t bytes, uint64_t offset_bytes);
    /* Anonymous memory, page-aligned, not present yet; huge pages where they can be had. */
    int     (*memory_open)(void **out, size_t bytes);
    /* Makes whole pages of it present, keeping what others write meanwhile. */
    int     (*memory_populate)(void *memory, size_t bytes);
    void    (*memory_close)(void *memory, size_t bytes);
    int     (*thread_start)(pthread_t *thread, void *(*body)(void *), void *data);
    /* The calling thread's work can wait: others go first where processors are short. */
    void    (*thread_step_back)(void);
    uint64_t (*now_ns)(void);
} gp_os;

extern const gp_os gp_os_system;

/* Keeps the pages of a range in RAM. */
int gp_os_memory_lock(void *memory, size_t bytes);

/* While on, llama.cpp's loader maps files without reading them; 0 also where it never reads them. -ENOTSUP where the
 * library looks unfamiliar; the load is then slow and right. Process-wide; calls nest. `library` is the path of the
 * loaded libllama. */
int  gp_os_lazy_load_begin(const char *library);
void gp_os_lazy_load_end(void);

#endif
