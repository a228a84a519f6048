/* system_os FILE: the operating system's own table keeps the contract of os.h. FILE: 30,000 bytes, each i % 251. */
#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include "check.h"
#include "os/os.h"

enum { FILE_BYTES = 30000, LAST_PAGE = FILE_BYTES / 4096 * 4096, ALIGNED = 4096 };

static const gp_os *const os = &gp_os_system;
static _Alignas(ALIGNED) unsigned char buffer[4 * ALIGNED];

static bool is_right(uint64_t from, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        if (buffer[i] != (from + (uint64_t) i) % 251) {
            return false;
        }
    }
    return true;
}

static void buffered_files(const char *path) {
    int fd;
    CHECK(os->file_open(path, false, &fd) == 0 && fd >= 0, "a file opens");
    CHECK(fcntl(fd, F_GETFD) & FD_CLOEXEC, "a child process does not inherit it");
    CHECK(os->file_read(fd, buffer, 100, 77) == 100 && is_right(77, 100), "any range can be read");
    CHECK(os->file_read(fd, buffer, 100, FILE_BYTES - 40) == 40, "the end cuts it short");
    CHECK(is_right(FILE_BYTES - 40, 40), "what there is comes");
    CHECK(os->file_read(fd, buffer, 100, FILE_BYTES) == 0, "behind the end there is nothing");
    os->file_expect(fd, 100, 77);
    os->file_expect(fd, 100, FILE_BYTES - 40);
    os->file_expect(fd, 100, 2 * FILE_BYTES);
    CHECK(os->file_read(fd, buffer, 100, 77) == 100 && is_right(77, 100), "what is expected, also in vain, changes nothing");
    gp_file_id id;
    CHECK(os->file_identify(fd, &id) == 0, "a file has an identity");
    struct stat status;
    CHECK(fstat(fd, &status) == 0 && id.size_bytes == FILE_BYTES && id.inode == status.st_ino, "its own");
    CHECK(id.modified_ns / 1000000000 == status.st_mtime, "with a time in nanoseconds");
    CHECK(os->file_close(fd) == 0, "a file closes");
    CHECK(os->file_read(fd, buffer, 1, 0) == -EBADF && os->file_close(fd) == -EBADF, "errors are negative errnos");
    CHECK(os->file_identify(fd, &id) == -EBADF, "of each call");
    CHECK(os->file_open("/nonexistent/file", false, &fd) == -ENOENT, "also of open");
    uint32_t at, memory;
    CHECK(os->file_alignment("/nonexistent/file", &at, &memory) == -ENOENT, "and of the question for alignment");
}

static void direct_files(const char *path) {
    uint32_t at, memory;
    const int error = os->file_alignment(path, &at, &memory);
    if (error != 0) {
        CHECK(error == -ENOTSUP || error == -EINVAL, "a file system without direct reads says so");
        return;
    }
    CHECK(at > 0 && at <= ALIGNED && (at & (at - 1)) == 0, "alignments are powers of two and no larger than a page");
    CHECK(memory > 0 && memory <= ALIGNED && (memory & (memory - 1)) == 0, "that in memory as well");
    int fd;
    CHECK(os->file_open(path, true, &fd) == 0, "a file opens for direct reads");
    CHECK(os->file_read(fd, buffer, ALIGNED, ALIGNED) == ALIGNED && is_right(ALIGNED, ALIGNED), "aligned ranges come");
    CHECK(os->file_read(fd, buffer + memory, 2 * at, at) == 2 * at, "as little aligned as was said");
    const int64_t got = os->file_read(fd, buffer, 2 * ALIGNED, LAST_PAGE);
    CHECK(got >= FILE_BYTES - LAST_PAGE && is_right(LAST_PAGE, FILE_BYTES - LAST_PAGE), "the end cuts it short");
    CHECK(os->file_close(fd) == 0, "a file closes");
}

static void *wait_for_one(void *queue) {
    gp_event event;
    return os->queues->wait(queue, &event, 1) == 0 ? queue : NULL;
}

static void reads_in_the_background(const char *path) {
    uint32_t at, memory;
    int fd;
    if (!os->queues || os->file_alignment(path, &at, &memory) != 0) {
        return;
    }
    CHECK(os->file_open(path, true, &fd) == 0, "a file opens");
    gp_queue *queue = (gp_queue *) &fd;
    CHECK(os->queues->open(&queue, 4, -1) < 0 && !queue, "no queue for a file that is not open");
    const int error = os->queues->open(&queue, 4, fd);
    if (error != 0) {
        CHECK(error == -ENOTSUP || error == -ENOSYS || error == -EPERM || error == -EAGAIN, "a system may refuse");
        CHECK(!queue, "and leaves nothing");
        printf("skipped: no reads in the background (%d)\n", error);
    } else {
        os->queues->step_forward();
        memset(buffer, 0, sizeof buffer);
        gp_request requests[4];
        for (uint32_t i = 0; i < 4; i++) {
            requests[i] = (gp_request) { .fd = fd, .into = buffer + i * ALIGNED, .bytes = ALIGNED,
                                         .offset_bytes = (i + 4) * ALIGNED, .tag = 70 + i };
        }
        requests[3].into = buffer + 3 * ALIGNED + 1;        /* at no address for direct reads */
        uint32_t n_begun = 0;
        while (n_begun < 4) {
            const int begun = os->queues->submit(queue, requests + n_begun, 4 - n_begun);
            CHECK(begun > 0, "there is room for as many as was said");
            n_begun += (uint32_t) begun;
        }
        uint32_t seen = 0;
        for (uint32_t n_done = 0; n_done < 4;) {
            gp_event events[4];
            const int n = os->queues->wait(queue, events, 4);
            CHECK(n > 0, "they are done one day");
            for (int i = 0; i < n; i++) {
                seen |= 1u << (events[i].tag - 70);
                CHECK(events[i].got == ALIGNED || (events[i].tag == 73 && (events[i].got == -EINVAL || memory == 1)),
                      "each with its own result");
            }
            n_done += (uint32_t) n;
        }
        CHECK(seen == 15 && is_right(4 * ALIGNED, 3 * ALIGNED), "and what was read lies where it was wanted");
        requests[0].offset_bytes = LAST_PAGE;
        requests[1].fd = 9999;
        CHECK(os->queues->submit(queue, requests, 2) == 1, "what cannot begin ends the row");
        CHECK(os->queues->submit(queue, requests + 1, 1) == -EBADF, "and says why when it comes first");
        gp_event event;
        CHECK(os->queues->wait(queue, &event, 1) == 1 && event.tag == 70 && event.got == FILE_BYTES - LAST_PAGE
              && is_right(LAST_PAGE, event.got), "the end cuts it short");
        pthread_t thread;
        void *woken;
        CHECK(pthread_create(&thread, NULL, wait_for_one, queue) == 0, "the test has threads");
        nanosleep(&(struct timespec) { .tv_nsec = 20000000 }, NULL);
        os->queues->wake(queue);
        pthread_join(thread, &woken);
        CHECK(woken, "who waits can be woken");
        os->queues->wake(queue);
        CHECK(wait_for_one(queue), "also before he waits");
        os->queues->close(queue);
    }
    CHECK(os->file_close(fd) == 0, "the file closes");
}

static void memory(void) {
    static const size_t sizes[] = { 1, 4096, 100000, (2 << 20) - 4096, (5 << 20) + 3 };
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        void *at;
        CHECK(os->memory_open(&at, sizes[i]) == 0 && (uintptr_t) at % 4096 == 0, "memory begins at a page");
        char *bytes = at;
        CHECK(bytes[0] == 0 && bytes[sizes[i] - 1] == 0, "it is empty");
        bytes[sizes[i] / 2] = 7;
        CHECK(os->memory_populate(at, sizes[i]) == 0 && bytes[sizes[i] / 2] == 7, "it becomes present as it is");
        memset(bytes, 1, sizes[i]);
        const int locked = gp_os_memory_lock(at, sizes[i]);
        CHECK(locked == 0 || locked == -ENOMEM || locked == -EPERM || locked == -EAGAIN, "it is locked, or may not be");
        os->memory_close(at, sizes[i]);
    }
    void *at = buffer;
    CHECK(os->memory_open(&at, SIZE_MAX / 4 * 3 / ALIGNED * ALIGNED) == -ENOMEM && !at, "too much is refused");
    os->memory_close(NULL, 0);
}

static void *body(void *data) {
    *(int *) data = 42;
    char frame[64 << 10];       /* a reader's frames are far smaller */
    memset(frame, 1, sizeof frame);
    *(int *) data += frame[100];
    return data;
}

static void threads_and_time(void) {
    int seen = 0;
    pthread_t thread;
    os->thread_step_back();
    CHECK(os->thread_start(&thread, body, &seen) == 0, "a thread starts");
    void *result;
    pthread_join(thread, &result);
    CHECK(seen == 43 && result == &seen, "and runs its body");
    const uint64_t before = os->now_ns();
    nanosleep(&(struct timespec) { .tv_nsec = 2000000 }, NULL);
    const uint64_t passed = os->now_ns() - before;
    CHECK(passed >= 2000000 && passed < 5000000000, "the clock counts nanoseconds");
}

/* What cannot be switched is left alone; end without begin does nothing. */
static void lazy_load_of_something_else(void) {
    const int begun = gp_os_lazy_load_begin("/nonexistent/libllama.so");
    CHECK(begun == -ENOTSUP || begun == 0, "an unknown library is not touched");
    gp_os_lazy_load_end();
    gp_os_lazy_load_end();
}

int main(int argc, char **argv) {
    check_begin();
    CHECK(argc == 2, "a file is given");
    buffered_files(argv[1]);
    direct_files(argv[1]);
    reads_in_the_background(argv[1]);
    memory();
    threads_and_time();
    lazy_load_of_something_else();
    return 0;
}
