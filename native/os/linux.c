#define _GNU_SOURCE
#include "os/os.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static int file_open(const char *path, bool direct, int *fd) {
    *fd = open(path, O_RDONLY | O_CLOEXEC | (direct ? O_DIRECT : 0));
    if (*fd < 0) {
        return -errno;
    }
    if (!direct) {
        /* Experts lie scattered; read-ahead would bring neighbours that nobody asked for. */
        (void) posix_fadvise(*fd, 0, 0, POSIX_FADV_RANDOM);
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
    id->device = status.st_dev;
    id->inode = status.st_ino;
    id->size_bytes = (uint64_t) status.st_size;
    id->modified_ns = (int64_t) status.st_mtim.tv_sec * 1000000000 + status.st_mtim.tv_nsec;
    id->changed_ns = (int64_t) status.st_ctim.tv_sec * 1000000000 + status.st_ctim.tv_nsec;
    return 0;
}

static int64_t file_read(int fd, void *into, size_t bytes, uint64_t offset_bytes) {
    const ssize_t got = pread(fd, into, bytes, (off_t) offset_bytes);
    return got >= 0 ? got : -errno;
}

static void file_expect(int fd, size_t bytes, uint64_t offset_bytes) {
    (void) posix_fadvise(fd, (off_t) offset_bytes, (off_t) bytes, POSIX_FADV_WILLNEED);
}

#ifndef STATX_DIOALIGN
#define STATX_DIOALIGN 0x2000U
#endif

/* The words of struct statx, whose alignment fields came with Linux 6.1: older headers lack their names. */
enum { STATX_BYTES = 256, STATX_MASK_WORD = 0, STATX_DIO_MEM_WORD = 38, STATX_DIO_OFFSET_WORD = 39 };

static int stated_alignment(const char *path, uint32_t *offset_align, uint32_t *memory_align) {
    uint32_t words[STATX_BYTES / sizeof(uint32_t)] = { 0 };
    if (syscall(SYS_statx, AT_FDCWD, path, 0, STATX_DIOALIGN, words) != 0) {
        return -errno;
    }
    if (!(words[STATX_MASK_WORD] & STATX_DIOALIGN)) {
        return -ENODATA;
    }
    if (words[STATX_DIO_OFFSET_WORD] == 0) {
        return -ENOTSUP;
    }
    *memory_align = words[STATX_DIO_MEM_WORD];
    *offset_align = words[STATX_DIO_OFFSET_WORD];
    return 0;
}

/* tmpfs opens with O_DIRECT from Linux 6.6 on and some overlays open and then refuse to read: so one read is tried. */
static int direct_read_works(const char *path, uint32_t align) {
    int fd;
    const int opened = file_open(path, true, &fd);
    if (opened != 0) {
        return opened == -EINVAL ? -ENOTSUP : opened;
    }
    void *page = mmap(NULL, align, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED) {
        const int error = -errno;
        close(fd);
        return error;
    }
    const int64_t got = file_read(fd, page, align, 0);
    munmap(page, align);
    close(fd);
    return got >= 0 ? 0 : got == -EINVAL ? -ENOTSUP : (int) got;
}

static int file_alignment(const char *path, uint32_t *offset_align, uint32_t *memory_align) {
    enum { SAFE_ALIGN = 4096 };     /* no device in use has larger sectors */
    const int error = stated_alignment(path, offset_align, memory_align);
    if (error == -ENOTSUP) {
        return error;
    }
    if (error != 0) {       /* an old kernel; or a container that knows no statx and says EPERM (Docker before 18.04) */
        *offset_align = *memory_align = SAFE_ALIGN;
    }
    return direct_read_works(path, *offset_align > *memory_align ? *offset_align : *memory_align);
}

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

static int memory_open(void **out, size_t bytes) {
    enum { HUGE_PAGE = 2 << 20 };
    *out = NULL;
    /* Aligned to huge pages by asking for one more and giving back the ends. */
    const size_t page = (size_t) sysconf(_SC_PAGESIZE);
    const size_t want = (bytes + page - 1) / page * page;
    const size_t extra = want >= HUGE_PAGE ? HUGE_PAGE : 0;
    char *raw = mmap(NULL, want + extra, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (raw == MAP_FAILED) {
        return -errno;
    }
    char *memory = raw;
    if (extra) {
        memory = (char *) (((uintptr_t) raw + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
        if (memory > raw) {
            munmap(raw, (size_t) (memory - raw));
        }
        const size_t tail = extra - (size_t) (memory - raw);
        if (tail) {
            munmap(memory + want, tail);
        }
        /* Always: they can be dearer to get, and small ones that lie scattered took four times as long for the disk to fill
         * (benchmarks/LOG.md, 2026-11-30). A kernel without them says so here, and there is nothing to tell. */
        (void) madvise(memory, want, MADV_HUGEPAGE);
    }
    *out = memory;
    return 0;
}

static int memory_populate(void *memory, size_t bytes) {
    const size_t page = (size_t) sysconf(_SC_PAGESIZE);
    const size_t want = (bytes + page - 1) / page * page;
    if (madvise(memory, want, MADV_POPULATE_WRITE) == 0) {
        return 0;
    }
    if (errno != EINVAL) {
        return -errno;
    }
    /* Linux before 5.14 does not know the call. Nothing is added atomically, which leaves what a read has brought. */
    for (size_t at = 0; at < want; at += page) {
        atomic_fetch_add((_Atomic char *) memory + at, 0);
    }
    return 0;
}

static void memory_give_back(void *memory, size_t bytes) {
    const uintptr_t page = (uintptr_t) sysconf(_SC_PAGESIZE);
    char *const begin = (char *) (((uintptr_t) memory + page - 1) / page * page);
    char *const end = (char *) (((uintptr_t) memory + bytes) / page * page);
    if (begin < end) {
        (void) munlock(begin, (size_t) (end - begin));      /* what is locked cannot be given back: EINVAL */
        (void) madvise(begin, (size_t) (end - begin), MADV_DONTNEED);
    }
}

static void memory_close(void *memory, size_t bytes) {
    if (memory) {
        const size_t page = (size_t) sysconf(_SC_PAGESIZE);
        munmap(memory, (bytes + page - 1) / page * page);
    }
}

/* glibc takes every thread's copy of all static thread-local storage out of its stack, whosever it is: a preloaded library
 * with an array of 245 KB left a stack of 256 KiB nothing to run on, one of 250 KB made pthread_create fail with EINVAL (2.36).
 * It says how much that is, with a page or two on top, by a name that it keeps for Java and Rust. Other C libraries (musl)
 * make room for it by themselves. */
static size_t stack_bytes(const pthread_attr_t *attributes) {
    enum { OWN_BYTES = 256 << 10 };     /* a reader's frames are small; the default would be 8 MB of address space */
    size_t (*least)(const pthread_attr_t *);
    *(void **) &least = dlsym(RTLD_DEFAULT, "__pthread_get_minstack");
    const size_t page = (size_t) sysconf(_SC_PAGESIZE);
    return (OWN_BYTES + (least ? least(attributes) : 0) + page - 1) / page * page;
}

static int thread_start(pthread_t *thread, void *(*body)(void *), void *data) {
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, stack_bytes(&attributes));
    const int error = pthread_create(thread, &attributes, body, data);
    pthread_attr_destroy(&attributes);
    return -error;
}

static void thread_step_back(void) {
    enum { NICE = 10 };     /* a tenth of a processor beside a thread that computes */
    (void) setpriority(PRIO_PROCESS, (id_t) syscall(SYS_gettid), NICE);
}

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t) now.tv_sec * 1000000000u + (uint64_t) now.tv_nsec;
}

static uint64_t now_roughly_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
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
    .queues = &gp_queues_linux,
};

int gp_os_memory_lock(void *memory, size_t bytes) {
    return mlock(memory, bytes) == 0 ? 0 : -errno;
}

#ifndef MLOCK_ONFAULT
#define MLOCK_ONFAULT 1
#endif

/* By its number: musl and glibc before 2.27 have no name for it. */
int gp_os_memory_lock_coming(void *memory, size_t bytes) {
    if (syscall(SYS_mlock2, memory, bytes, MLOCK_ONFAULT) == 0) {
        return 0;
    }
    return errno == ENOSYS ? gp_os_memory_lock(memory, bytes) : -errno;
}
