/* Loading without reading. llama.cpp maps a model with MAP_POPULATE and advises WILLNEED, which reads the whole file; it has
 * no switch for it. For the time of the load, libllama's own entries for these calls are pointed at ours instead. They also
 * write down what was mapped where: /proc/self/maps knows files by other numbers than stat on btrfs and overlayfs. */
#define _GNU_SOURCE
#include "os/os.h"

#include <elf.h>
#include <errno.h>
#include <link.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- what was mapped -------------------------------------------------------------------------------------------- */

typedef struct {
    pthread_t  thread;
    gp_mapping mapping;
} record;

static struct {
    pthread_mutex_t lock;
    record         *records;        /* lock */
    uint32_t        n, n_room;      /* lock */
} written = { .lock = PTHREAD_MUTEX_INITIALIZER };

/* Without memory for it nothing is written down: the caller then finds no mapping. */
static void add_record(pthread_t thread, const gp_mapping *mapping) {
    if (written.n == written.n_room) {
        const uint32_t n_room = written.n_room ? 2 * written.n_room : 16;
        record *larger = realloc(written.records, n_room * sizeof *larger);
        if (!larger) {
            return;
        }
        written.records = larger;
        written.n_room = n_room;
    }
    written.records[written.n++] = (record) { thread, *mapping };
}

/* What is unmapped may be given to anybody the next moment. */
static void cut_records(uintptr_t begin, uintptr_t end) {
    const uint32_t n = written.n;
    for (uint32_t i = 0; i < n; i++) {
        const pthread_t thread = written.records[i].thread;
        const gp_mapping m = written.records[i].mapping;
        const uintptr_t first = (uintptr_t) m.address, stop = first + m.bytes;
        if (end <= first || begin >= stop) {
            continue;
        }
        written.records[i].mapping.bytes = begin > first ? begin - first : 0;
        if (end < stop) {
            gp_mapping rest = m;
            rest.address = (void *) end;
            rest.bytes = stop - end;
            rest.offset_bytes += end - first;
            add_record(thread, &rest);
        }
    }
}

static bool is_own(const record *r) {
    return pthread_equal(r->thread, pthread_self());
}

/* The records of all threads, or of this one. */
static void drop_records(bool are_all) {
    uint32_t n_kept = 0;
    for (uint32_t i = 0; i < written.n && !are_all; i++) {
        if (!is_own(&written.records[i])) {
            written.records[n_kept++] = written.records[i];
        }
    }
    written.n = n_kept;
    if (n_kept == 0) {
        free(written.records);
        written.records = NULL;
        written.n_room = 0;
    }
}

static void forget(bool are_all) {
    pthread_mutex_lock(&written.lock);
    drop_records(are_all);
    pthread_mutex_unlock(&written.lock);
}

uint32_t gp_os_take_mappings(gp_mapping *mappings, uint32_t n_mappings) {
    uint32_t n_found = 0;
    pthread_mutex_lock(&written.lock);
    for (uint32_t i = 0; i < written.n; i++) {
        const record *r = &written.records[i];
        if (is_own(r) && r->mapping.bytes > 0) {
            if (n_found < n_mappings) {
                mappings[n_found] = r->mapping;
            }
            n_found++;
        }
    }
    if (n_found <= n_mappings) {
        drop_records(false);
    }
    pthread_mutex_unlock(&written.lock);
    return n_found;
}

/* ---- the calls -------------------------------------------------------------------------------------------------- */

static void *map_unpopulated(void *at, size_t bytes, int protection, int flags, int fd, off_t offset) {
    void *memory = mmap(at, bytes, protection, flags & ~MAP_POPULATE, fd, offset);
    const int error = errno;
    struct stat status;
    if (memory != MAP_FAILED && fd >= 0 && fstat(fd, &status) == 0) {
        const gp_mapping mapping = { .address = memory, .bytes = bytes, .device = status.st_dev, .inode = status.st_ino,
                                     .offset_bytes = (uint64_t) offset };
        pthread_mutex_lock(&written.lock);
        add_record(pthread_self(), &mapping);
        pthread_mutex_unlock(&written.lock);
    }
    errno = error;
    return memory;
}

/* Written down before it happens: afterwards another thread may have the addresses, and have written them down. */
static int unmap_known(void *at, size_t bytes) {
    pthread_mutex_lock(&written.lock);
    cut_records((uintptr_t) at, (uintptr_t) at + bytes);
    pthread_mutex_unlock(&written.lock);
    return munmap(at, bytes);
}

static int advise_no_reading(void *at, size_t bytes, int advice) {
    return advice == POSIX_MADV_WILLNEED ? 0 : posix_madvise(at, bytes, advice);
}

#if defined(__x86_64__)
enum { JUMP_SLOT = R_X86_64_JUMP_SLOT, GLOBAL_DATA = R_X86_64_GLOB_DAT };
#elif defined(__aarch64__)
enum { JUMP_SLOT = R_AARCH64_JUMP_SLOT, GLOBAL_DATA = R_AARCH64_GLOB_DAT };
#else
enum { JUMP_SLOT = 0, GLOBAL_DATA = 0 };
#endif

typedef struct {
    void **entry;
    void  *original;
    void  *replacement;
} jump_slot;

enum { N_CALLS = 3 };

static struct {
    pthread_mutex_t lock;
    unsigned        depth;              /* lock */
    jump_slot       slots[N_CALLS];     /* lock */
} shim = { .lock = PTHREAD_MUTEX_INITIALIZER };

typedef struct {
    const char      *library;
    bool             found;
    jump_slot        slots[N_CALLS];
    char            *relro_begin, *relro_end;
} search;

static void search_relocations(search *s, char *base, const ElfW(Rela) *relocations, size_t n_relocations,
                               const ElfW(Sym) *symbols, const char *strings) {
    for (size_t i = 0; i < n_relocations; i++) {
        const unsigned type = (unsigned) ELF64_R_TYPE(relocations[i].r_info);
        if (type != JUMP_SLOT && type != GLOBAL_DATA) {
            continue;
        }
        const char *name = strings + symbols[ELF64_R_SYM(relocations[i].r_info)].st_name;
        void **entry = (void **) (base + relocations[i].r_offset);
        if (strcmp(name, "mmap") == 0 || strcmp(name, "mmap64") == 0) {
            s->slots[0] = (jump_slot) { entry, *entry, (void *) (uintptr_t) map_unpopulated };
        } else if (strcmp(name, "posix_madvise") == 0) {
            s->slots[1] = (jump_slot) { entry, *entry, (void *) (uintptr_t) advise_no_reading };
        } else if (strcmp(name, "munmap") == 0) {
            s->slots[2] = (jump_slot) { entry, *entry, (void *) (uintptr_t) unmap_known };
        }
    }
}

static int search_object(struct dl_phdr_info *info, size_t info_bytes, void *data) {
    (void) info_bytes;
    search *s = data;
    struct stat wanted, seen;
    if (!info->dlpi_name[0] || stat(s->library, &wanted) != 0 || stat(info->dlpi_name, &seen) != 0
        || wanted.st_ino != seen.st_ino || wanted.st_dev != seen.st_dev) {
        return 0;
    }
    s->found = true;
    char *base = (char *) info->dlpi_addr;
    const ElfW(Dyn) *dynamic = NULL;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *header = &info->dlpi_phdr[i];
        if (header->p_type == PT_DYNAMIC) {
            dynamic = (const ElfW(Dyn) *) (base + header->p_vaddr);
        } else if (header->p_type == PT_GNU_RELRO) {
            s->relro_begin = base + header->p_vaddr;
            /* The loader protects whole pages; the last one may hold ordinary data behind the table. */
            const uintptr_t page = (uintptr_t) sysconf(_SC_PAGESIZE);
            s->relro_end = (char *) (((uintptr_t) s->relro_begin + header->p_memsz) / page * page);
        }
    }
    const ElfW(Sym) *symbols = NULL;
    const char *strings = NULL;
    const ElfW(Rela) *jumps = NULL, *others = NULL;
    size_t jumps_bytes = 0, others_bytes = 0;
    bool is_rela = true;
    for (; dynamic && dynamic->d_tag != DT_NULL; dynamic++) {
        switch (dynamic->d_tag) {
            case DT_SYMTAB:   symbols = (const void *) dynamic->d_un.d_ptr; break;
            case DT_STRTAB:   strings = (const void *) dynamic->d_un.d_ptr; break;
            case DT_JMPREL:   jumps = (const void *) dynamic->d_un.d_ptr; break;
            case DT_PLTRELSZ: jumps_bytes = dynamic->d_un.d_val; break;
            case DT_RELA:     others = (const void *) dynamic->d_un.d_ptr; break;
            case DT_RELASZ:   others_bytes = dynamic->d_un.d_val; break;
            case DT_PLTREL:   is_rela = dynamic->d_un.d_val == DT_RELA; break;
            default: break;
        }
    }
    /* musl and a few old loaders keep these addresses relative to the load address: then nothing is touched. */
    if (!symbols || !strings || !is_rela || (char *) symbols < base || (char *) strings < base) {
        return 1;
    }
    if (jumps) {
        search_relocations(s, base, jumps, jumps_bytes / sizeof *jumps, symbols, strings);
    }
    if (others) {
        search_relocations(s, base, others, others_bytes / sizeof *others, symbols, strings);
    }
    return 1;
}

static int write_entry(const search *s, void **entry, void *value) {
    const bool is_relro = s && (char *) entry >= s->relro_begin && (char *) entry < s->relro_end;
    const uintptr_t page = (uintptr_t) sysconf(_SC_PAGESIZE);
    void *start = (void *) ((uintptr_t) entry / page * page);
    if (is_relro && mprotect(start, page, PROT_READ | PROT_WRITE) != 0) {
        return -errno;
    }
    atomic_store((_Atomic(void *) *) entry, value);
    if (is_relro) {
        (void) mprotect(start, page, PROT_READ);
    }
    return 0;
}

static search found_library;    /* shim.lock; where the entries are, kept from begin to end */

int gp_os_lazy_load_begin(const char *library) {
    int result = 0;
    pthread_mutex_lock(&shim.lock);
    if (shim.depth == 0) {
        found_library = (search) { .library = library };
        dl_iterate_phdr(search_object, &found_library);
        for (int i = 0; i < N_CALLS; i++) {
            if (!found_library.found || !found_library.slots[i].entry) {
                result = -ENOTSUP;
            }
        }
        for (int i = 0; i < N_CALLS && result == 0; i++) {
            shim.slots[i] = found_library.slots[i];
            result = write_entry(&found_library, shim.slots[i].entry, shim.slots[i].replacement);
            for (int done = 0; result != 0 && done < i; done++) {
                (void) write_entry(&found_library, shim.slots[done].entry, shim.slots[done].original);
            }
        }
    }
    if (result == 0) {
        shim.depth++;
        forget(false);      /* of a load that nobody asked about */
    }
    pthread_mutex_unlock(&shim.lock);
    return result;
}

void gp_os_lazy_load_end(void) {
    pthread_mutex_lock(&shim.lock);
    if (shim.depth > 0 && --shim.depth == 0) {
        for (int i = 0; i < N_CALLS; i++) {
            (void) write_entry(&found_library, shim.slots[i].entry, shim.slots[i].original);
        }
        forget(true);
    }
    pthread_mutex_unlock(&shim.lock);
}
