/* macOS on Apple silicon.
 *
 * Not yet run on a Mac. What was done: compiled and linked for it, with tests/native/system_os.c, by `zig cc -target
 * aarch64-macos` 0.17.1, which brings Apple's headers; run on Linux with the constants and the field that Apple adds
 * supplied from outside. What the kernel does was read in its source (apple-oss-distributions/xnu), not measured. */
#define _DARWIN_C_SOURCE    /* F_NOCACHE, st_mtimespec, MAP_ANON */
#include "os/os.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread/qos.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static int file_open(const char *path, bool direct, int *fd) {
    *fd = open(path, O_RDONLY | O_CLOEXEC);
    if (*fd < 0) {
        return -errno;
    }
    /* Experts lie scattered; read-ahead would bring neighbours that nobody asked for. */
    (void) fcntl(*fd, F_RDAHEAD, 0);
    /* There is no O_DIRECT. With this set, pages that a read brings are not kept in the cache; those that are there
     * already are used. */
    if (direct && fcntl(*fd, F_NOCACHE, 1) == -1) {
        const int error = -errno;
        close(*fd);
        *fd = -1;
        return error;
    }
    return 0;
}

static int file_close(int fd) {
    return close(fd) == 0 ? 0 : -errno;
}

static int file_identify(int fd, gp_file_id *id) {
    struct stat status;
    if (fstat(fd, &status) != 0) {
        return -errno;
    }
    id->device = (uint64_t) status.st_dev;
    id->inode = status.st_ino;
    id->size_bytes = (uint64_t) status.st_size;
    id->modified_ns = (int64_t) status.st_mtimespec.tv_sec * 1000000000 + status.st_mtimespec.tv_nsec;
    id->changed_ns = (int64_t) status.st_ctimespec.tv_sec * 1000000000 + status.st_ctimespec.tv_nsec;
    return 0;
}

static int64_t file_read(int fd, void *into, size_t bytes, uint64_t offset_bytes) {
    enum { MOST_BYTES = 1 << 30 };      /* pread(2): more than INT_MAX is EINVAL */
    const ssize_t got = pread(fd, into, bytes < MOST_BYTES ? bytes : MOST_BYTES, (off_t) offset_bytes);
    return got >= 0 ? got : -errno;
}

static void file_expect(int fd, size_t bytes, uint64_t offset_bytes) {
    struct radvisory range = { .ra_offset = (off_t) offset_bytes, .ra_count = (int) bytes };
    (void) fcntl(fd, F_RDADVISE, &range);
}

/* F_NOCACHE demands no alignment. But only a read whose place in the file and address in memory are multiples of the
 * device's block goes straight to memory; any other goes page by page through the cache and is copied (xnu,
 * bsd/vfs/vfs_cluster.c: cluster_read_direct, `misaligned`). Blocks of Apple's SSDs have 4,096 bytes. A wrong guess
 * costs a copy and nothing else. */
static int file_alignment(const char *path, uint32_t *offset_align, uint32_t *memory_align) {
    enum { DEVICE_BLOCK = 4096 };
    int fd;
    const int error = file_open(path, true, &fd);
    if (error != 0) {
        return error;
    }
    *offset_align = *memory_align = DEVICE_BLOCK;
    return file_close(fd);
}

static size_t whole_pages(size_t bytes) {
    const size_t page = (size_t) sysconf(_SC_PAGESIZE);
    return (bytes + page - 1) / page * page;
}

static int memory_open(void **out, size_t bytes) {
    *out = NULL;
    const size_t want = whole_pages(bytes);
    char *memory = mmap(NULL, want, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    if (memory == MAP_FAILED) {
        return -errno;
    }
    /* Apple silicon has no huge pages to ask for; its pages have 16 KiB. Whether they stay is up to gp_os_memory_lock: the
     * compressor takes what is not wired. */
    *out = memory;
    return 0;
}

/* Nothing is added atomically, which leaves what a read has brought meanwhile. */
static int memory_populate(void *memory, size_t bytes) {
    const size_t page = (size_t) sysconf(_SC_PAGESIZE);
    for (size_t at = 0; at < bytes; at += page) {
        atomic_fetch_add((_Atomic char *) memory + at, 0);
    }
    return 0;
}

/* MADV_FREE_REUSABLE takes the pages from what the process is charged for at once, which MADV_FREE does not. */
static void memory_give_back(void *memory, size_t bytes) {
    const uintptr_t page = (uintptr_t) sysconf(_SC_PAGESIZE);
    char *const begin = (char *) (((uintptr_t) memory + page - 1) / page * page);
    char *const end = (char *) (((uintptr_t) memory + bytes) / page * page);
    if (begin < end) {
        (void) munlock(begin, (size_t) (end - begin));
        (void) madvise(begin, (size_t) (end - begin), MADV_FREE_REUSABLE);
    }
}

static void memory_close(void *memory, size_t bytes) {
    if (memory) {
        munmap(memory, whole_pages(bytes));
    }
}

static int thread_start(pthread_t *thread, void *(*body)(void *), void *data) {
    /* A reader's frames are small; a multiple of the page, or it is EINVAL. Thread-local storage lies elsewhere: dyld allocates
     * it when a thread first uses it. */
    enum { STACK_BYTES = 256 << 10 };
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    const int error = pthread_create(thread, &attributes, body, data);
    pthread_attr_destroy(&attributes);
    return -error;
}

static void thread_step_back(void) {
    (void) pthread_set_qos_class_self_np(QOS_CLASS_UTILITY, 0);
}

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC_RAW, &now);   /* CLOCK_MONOTONIC counts whole microseconds here */
    return (uint64_t) now.tv_sec * 1000000000u + (uint64_t) now.tv_nsec;
}

static uint64_t now_roughly_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC_RAW_APPROX, &now);
    return (uint64_t) now.tv_sec * 1000000000u + (uint64_t) now.tv_nsec;
}

const gp_os gp_os_system = {
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
    .now_roughly_ns = now_roughly_ns,
    .queues = NULL,     /* a pool of threads reads */
};

/* Wires the pages. -EAGAIN or -ENOMEM above vm.user_wire_limit. */
int gp_os_memory_lock(void *memory, size_t bytes) {
    return mlock(memory, bytes) == 0 ? 0 : -errno;
}

int gp_os_memory_lock_coming(void *memory, size_t bytes) {
    return gp_os_memory_lock(memory, bytes);
}

/* Nothing to switch: llama.cpp maps with MAP_POPULATE on Linux alone, and the WILLNEED that it advises everywhere reads
 * no more than one transfer here (xnu, osfmk/vm/vm_map.c: vm_map_willneed). A load reads what it touches. */
int gp_os_lazy_load_begin(const char *library) {
    (void) library;
    return 0;
}

void gp_os_lazy_load_end(void) {
}

uint32_t gp_os_take_mappings(gp_mapping *mappings, uint32_t n_mappings) {
    (void) mappings, (void) n_mappings;
    return 0;
}
