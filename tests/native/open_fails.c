/* Whichever call of the system or of the allocator fails while a pager, a tap or a pin is opened: nothing is left
 * behind, and the next try works. */
#include <errno.h>

#include "check.h"
#include "fake_os.h"
#include "graph.h"
#include "model.h"

enum { MAX_TRIES = 200 };

static void pager_opens_or_refuses(uint32_t n_mirrors) {
    model m;
    model_make(&m, (model_shape) { .n_files = 2, .n_classes = 2, .n_readers = 4, .n_mirrors = n_mirrors,
                                   .n_tables = MODEL_TABLES });
    unsigned k = 1;
    for (;; k++) {
        CHECK(k < MAX_TRIES, "the calls come to an end");
        gp_pager *pager = (gp_pager *) &m;
        gp_open_failure failure;
        fake_fail_any(k, -EMFILE);
        const int error = gp_pager_open(&pager, &fake_os, &m.config, &failure);
        if (fake_is_armed()) {
            CHECK(error == 0 && failure.lack == GP_LACKS_NOTHING, "a pager opens when nothing fails");
            gp_pager_close(pager);
            break;
        }
        CHECK(error == -EMFILE || error == -ENOMEM, "the error is the system's own");
        CHECK(!pager, "a constructor that fails stores NULL");
        CHECK(failure.lack >= GP_LACKS_MEMORY, "and says what it lacked");
        CHECK(fake_open_files() == 0 && fake_open_memories() == 0 && fake_running_threads() == 0
              && fake_allocations() == 0, "a constructor that fails leaves nothing behind");
    }
    CHECK(k > 20, "arena, files, threads and tables were all refused once");
    fake_fail_any(0, 0);
    model_end(&m);
}

static void refuses(const model *m, fake_call call, unsigned nth, gp_lack lack, uint32_t file) {
    gp_pager *pager;
    gp_open_failure failure;
    fake_fail(call, nth, -EAGAIN);
    CHECK(gp_pager_open(&pager, &fake_os, &m->config, &failure) != 0 && !fake_is_armed(), "the call is made, and fails");
    CHECK(failure.lack == lack, "what is missing is named");
    CHECK(lack != GP_LACKS_FILE || failure.file == file, "and of which file");
}

static void failure_names_what_is_missing(void) {
    model m;
    model_make(&m, (model_shape) { .n_files = 2, .n_mirrors = 1, .n_readers = 3 });
    refuses(&m, FAKE_MEMORY_OPEN, 1, GP_LACKS_MEMORY, 0);
    refuses(&m, FAKE_ALLOCATE, 1, GP_LACKS_MEMORY, 0);
    for (uint32_t file = 0; file < 4; file++) {     /* the model's, then the mirror's */
        refuses(&m, FAKE_FILE_OPEN, file + 1, GP_LACKS_FILE, file);
        refuses(&m, FAKE_FILE_IDENTIFY, file + 1, GP_LACKS_FILE, file);
    }
    const unsigned n_readers = fake_has_queue() ? 1 : 3;
    for (unsigned thread = 1; thread <= 2 * n_readers + 1; thread++) {
        refuses(&m, FAKE_THREAD_START, thread, GP_LACKS_THREAD, 0);
    }
    model_end(&m);
}

static void each_kind_of_call_is_made(void) {
    model m;
    model_make(&m, (model_shape) { .n_files = 2, .n_readers = 4 });
    gp_pager *pager = model_open(&m);
    CHECK(fake_count(FAKE_FILE_OPEN) == 2 && fake_count(FAKE_FILE_IDENTIFY) == 2, "every file is opened once");
    CHECK(fake_count(FAKE_MEMORY_OPEN) == 1, "there is one arena");
    const unsigned n_readers = fake_has_queue() ? 1 : 4;
    CHECK(fake_count(FAKE_THREAD_START) == n_readers + 1, "every reader is started, and one thread for the arena");
    gp_pager_wait_present(pager);
    CHECK(fake_count(FAKE_MEMORY_POPULATE) == 1 && fake_count(FAKE_MEMORY_LOCK) == 1, "which makes it present, then locks it");
    CHECK(fake_running_threads() == n_readers, "and ends");
    gp_pager_wait_present(pager);       /* twice is fine */
    gp_pager_close(pager);
    gp_pager_close(NULL);
    model_end(&m);
}

/* Experts would be read from the one, rows from the other. */
static void file_replaced_while_it_is_opened(void) {
    model m;
    model_make(&m, (model_shape) { .n_tables = 1 });
    gp_pager *pager;
    fake_replace_after_open(m.paths[0]);
    gp_open_failure failure;
    CHECK(gp_pager_open(&pager, &fake_os, &m.config, &failure) == -ESTALE && !pager, "a file replaced meanwhile is refused");
    CHECK(failure.lack == GP_LACKS_FILE && failure.file == 0, "and named");
    gp_pager_close(model_open(&m));
    model_end(&m);
}

static void arena_that_may_not_be_locked(void) {
    model m;
    model_make(&m, (model_shape) { 0 });
    fake_fail(FAKE_MEMORY_LOCK, 1, -EPERM);
    gp_pager *pager = model_open(&m);
    gp_pager_wait_present(pager);
    gp_pager_close(pager);              /* anonymous memory serves as well, where nothing swaps it out */
    CHECK(!fake_is_armed(), "the pager tries to lock its arena");
    model_end(&m);
}

static void arena_that_cannot_be_made_present(void) {
    model m;
    model_make(&m, (model_shape) { 0 });
    fake_fail(FAKE_MEMORY_POPULATE, 1, -ENOMEM);
    gp_pager *pager = model_open(&m);
    gp_pager_wait_present(pager);
    CHECK(!fake_is_armed() && fake_count(FAKE_MEMORY_LOCK) == 0, "what is not present is not locked");
    gp_hold hold;
    CHECK(gp_hold_open(&hold, pager) == 0, "a hold opens");
    model_use(&m, pager, &hold, 0, (int32_t[]) { 0, 5 }, 2, 1);     /* reads make it present */
    gp_hold_close(&hold, pager);
    gp_pager_close(pager);
    model_end(&m);
}

/* More than two steps of 4 MiB, and a part of one. */
enum { ARENA_BYTES = 9 << 20 };

static void arena_is_made_present_once(void) {
    model m;
    model_make(&m, (model_shape) { 0 });
    m.classes[0].n_slots = (uint32_t) (ARENA_BYTES / m.classes[0].stride_bytes);
    gp_pager *pager = model_open(&m);
    gp_pager_wait_present(pager);
    CHECK(fake_bytes_present() == pager->arena_bytes, "all of it becomes present, once");
    gp_pager_close(pager);
    model_end(&m);
}

static void tap_attaches_or_refuses(void) {
    model m;
    graph_set_kernels(KERNELS);
    graph_set_small_graphs(true, true);
    model_make(&m, (model_shape) { 0 });
    gp_pager *pager = model_open(&m);
    const unsigned before = fake_allocations();
    for (unsigned k = 1;; k++) {
        CHECK(k < MAX_TRIES, "the calls come to an end");
        gp_tap *tap = (gp_tap *) &m;
        fake_fail_any(k, -EAGAIN);
        int error = gp_tap_open(&tap, &graph_ggml, 16, 4096, ROW_BYTES, NULL, NULL, NULL, NULL);
        CHECK(error == 0 || !tap, "a constructor that fails stores NULL");
        if (error == 0) {
            error = gp_tap_attach(tap, pager);
            if (error != 0) {
                CHECK(gp_tap_attach(tap, pager) == 0, "a tap that could not be attached can be attached later");
            }
        }
        const bool is_armed = fake_is_armed();
        gp_tap_close(tap);
        model_check_invariants(pager);      /* a closed tap holds nothing */
        CHECK(fake_allocations() == before, "a closed tap leaves nothing behind");
        if (is_armed) {
            CHECK(error == 0, "a tap opens when nothing fails");
            break;
        }
        CHECK(error == -ENOMEM, "the error is the allocator's");
    }
    fake_fail_any(0, 0);
    gp_tap_close(NULL);
    gp_pager_close(pager);
    model_end(&m);
}

static void pin_works_or_refuses(void) {
    model m;
    model_make(&m, (model_shape) { 0 });
    gp_pager *pager = model_open(&m);
    const int32_t experts[] = { 3, 5 };
    gp_hold hold;
    CHECK(gp_hold_open(&hold, pager) == 0, "a hold opens");
    const unsigned before = fake_allocations();
    for (unsigned k = 1;; k++) {
        CHECK(k < MAX_TRIES, "the calls come to an end");
        gp_failure failure;
        fake_fail_any(k, -EIO);
        const int error = gp_pager_pin(pager, 1, experts, 2, NULL, NULL, &failure);
        const bool is_armed = fake_is_armed();
        fake_fail_any(0, 0);
        CHECK(fake_allocations() == before, "a pin leaves nothing behind but the pin");
        model_check_invariants(pager);
        model_use(&m, pager, &hold, 1, experts, 2, 1);
        gp_pager_unpin_all(pager);
        if (is_armed) {
            CHECK(error == 0, "a pin works when nothing fails");
            break;
        }
        CHECK(error == -ENOMEM || error == -EIO, "the error is the system's own");
    }
    gp_hold_close(&hold, pager);
    gp_pager_close(pager);
    model_end(&m);
}

static void taps_are_few(void) {
    model m;
    model_make(&m, (model_shape) { 0 });
    gp_pager *pager = model_open(&m);
    gp_hold holds[GP_MAX_TAPS + 1];
    for (int i = 0; i < GP_MAX_TAPS; i++) {
        CHECK(gp_hold_open(&holds[i], pager) == 0, "there is a bit for each of the first 64");
    }
    const unsigned before = fake_allocations();
    CHECK(gp_hold_open(&holds[GP_MAX_TAPS], pager) == -EMFILE, "one more is refused");
    CHECK(fake_allocations() == before, "and leaves nothing behind");
    /* The last bit of the mask works as the others do. */
    model_use(&m, pager, &holds[GP_MAX_TAPS - 1], 0, (int32_t[]) { 0, 8 }, 2, 1);
    gp_hold_close(&holds[7], pager);
    CHECK(gp_hold_open(&holds[7], pager) == 0 && holds[7].bit == 7, "a bit that was given back is free");
    for (int i = 0; i < GP_MAX_TAPS; i++) {
        gp_hold_close(&holds[i], pager);
    }
    gp_pager_close(pager);
    model_end(&m);
}

int main(void) {
    check_begin();
    pager_opens_or_refuses(0);
    pager_opens_or_refuses(1);
    failure_names_what_is_missing();
    each_kind_of_call_is_made();
    file_replaced_while_it_is_opened();
    arena_that_may_not_be_locked();
    arena_that_cannot_be_made_present();
    arena_is_made_present_once();
    tap_attaches_or_refuses();
    pin_works_or_refuses();
    taps_are_few();
    return 0;
}
