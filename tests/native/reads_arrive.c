/* What lies in a slot is the expert's bytes, however the reads came: direct or buffered, in place or moved, in pieces,
 * short, interrupted, up to the very end of the file. */
#include "check.h"
#include "fake_os.h"
#include "model.h"

typedef enum { IN_PLACE, MOVED, EITHER } placement;

/* Whether the read that filled a slice put it where it belongs at once. */
static bool was_in_place(const gp_pager *pager, uint32_t slot, uint32_t slice) {
    const gp_read *read = &pager->reads[slot * GP_MAX_SLICES + slice];
    return read->cover_into + (read->offset_bytes - read->cover_offset) == read->into;
}

/* Brings in every expert of every layer through few slots, more than once. */
static void read_all(model_shape shape, fake_weather weather, placement wanted) {
    model m;
    model_make(&m, shape);
    fake_set_weather(weather);
    gp_pager *pager = model_open(&m);
    gp_hold hold;
    CHECK(gp_hold_open(&hold, pager) == 0, "a hold opens");
    for (int round = 0; round < 2; round++) {
        for (uint32_t l = 0; l < m.shape.n_layers; l++) {
            for (int32_t e = 0; e < (int32_t) m.shape.n_experts; e++) {
                int32_t slot;
                gp_failure failure;
                CHECK(model_acquire(pager, &hold, l, &e, 1, 1, &slot, &failure) == 0, "the expert comes");
                CHECK(model_slot_holds(&m, pager, (uint32_t) slot, l, e), "its bytes are those of the file");
                for (uint32_t s = 0; s < m.shape.n_slices; s++) {
                    CHECK(wanted == EITHER || was_in_place(pager, (uint32_t) slot, s) == (wanted == IN_PLACE),
                          "reads go in place exactly when they can");
                }
                gp_hold_release(pager, &hold);
            }
        }
    }
    gp_hold_close(&hold, pager);
    gp_pager_close(pager);
    model_end(&m);
}

#define SECTORS .n_slices = 3, .slice_bytes = { 1024, 1024, 2560 }     /* whole sectors: the slack is always the same */
#define RAGGED  .n_slices = 3, .slice_bytes = { 1120, 1120, 2208 }     /* as in MXFP4: it is not */

static const model_shape shapes[] = {
    { .piece_bytes = 64 << 10 },
    { .piece_bytes = 100 },
    { .n_files = 2, .n_classes = 2, .piece_bytes = 1024 },
    { SECTORS, .offset_align = 512, .memory_align = 512, .piece_bytes = 512 },
    { SECTORS, .offset_align = 512, .memory_align = 4, .piece_bytes = 64 << 10 },
    { SECTORS, .offset_align = 512, .memory_align = 512, .piece_bytes = 1536, .n_files = 2, .n_classes = 2 },
    { RAGGED, .offset_align = 512, .memory_align = 4, .piece_bytes = 512 },
    { RAGGED, .offset_align = 512, .memory_align = 512, .piece_bytes = 512 },
    { RAGGED, .offset_align = 4096, .memory_align = 4096, .piece_bytes = 4096, .n_files = 2, .n_classes = 2 },
    { RAGGED, .offset_align = 512, .memory_align = 1024, .piece_bytes = 4096 },
};

/* A slice of whole sectors is read in place; so is any slice where memory may lie at any fourth byte. Where both the
 * slack and the address count, most covers must be moved. */
static const placement placements[] = {
    IN_PLACE, IN_PLACE, IN_PLACE, IN_PLACE, IN_PLACE, EITHER, IN_PLACE, EITHER, EITHER, EITHER,
};

/* A file that ends at the last expert's last byte: the aligned cover of that slice ends behind it. */
static void last_slice_ends_the_file(void) {
    model m;
    model_make(&m, (model_shape) { RAGGED, .offset_align = 4096, .memory_align = 512, .piece_bytes = 4096 });
    const uint32_t l = m.shape.n_layers - 1;
    const int32_t e = (int32_t) m.shape.n_experts - 1;
    const uint64_t end = model_offset(&m, l, 2, e) + m.layers[l].slices[2].slice_bytes;
    CHECK(end % 4096 != 0, "the cover ends behind the file");
    fake_file_truncate(m.paths[0], end);
    gp_pager *pager = model_open(&m);
    gp_hold hold;
    CHECK(gp_hold_open(&hold, pager) == 0, "a hold opens");
    model_use(&m, pager, &hold, l, &e, 1, 1);
    gp_hold_close(&hold, pager);
    gp_pager_close(pager);
    model_end(&m);
}

/* The slack before ragged slices differs from expert to expert: some must be moved, and the test sees it. */
static void some_covers_are_moved(void) {
    model m;
    model_make(&m, (model_shape) { RAGGED, .offset_align = 512, .memory_align = 512, .piece_bytes = 512 });
    gp_pager *pager = model_open(&m);
    gp_hold hold;
    CHECK(gp_hold_open(&hold, pager) == 0, "a hold opens");
    int n_moved = 0;
    for (int32_t e = 0; e < (int32_t) m.shape.n_experts; e++) {
        int32_t slot;
        gp_failure failure;
        CHECK(model_acquire(pager, &hold, 0, &e, 1, 1, &slot, &failure) == 0, "the expert comes");
        n_moved += !was_in_place(pager, (uint32_t) slot, 0);
        gp_hold_release(pager, &hold);
    }
    CHECK(n_moved > 0, "a cover that does not fit in place is moved");
    gp_hold_close(&hold, pager);
    gp_pager_close(pager);
    model_end(&m);
}

typedef struct {
    const model *m;
    gp_pager    *pager;
    gp_hold      hold;
} reader_task;

static void *use_expert_1(void *data) {
    reader_task *task = data;
    model_use(task->m, task->pager, &task->hold, 0, (int32_t[]) { 1 }, 1, 1);
    return NULL;
}

/* Pieces are what keeps the device busy: one slice is read by several readers at once. */
static void pieces_are_read_at_once(void) {
    model m;
    model_make(&m, (model_shape) { .n_readers = 4, .n_slices = 1, .slice_bytes = { 4096 }, .piece_bytes = 1024 });
    reader_task task = { .m = &m, .pager = model_open(&m) };
    CHECK(gp_hold_open(&task.hold, task.pager) == 0, "a hold opens");
    fake_hold_reads();
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, use_expert_1, &task) == 0, "the test has threads");
    fake_wait_for_reads(4);
    fake_let_reads_go();
    pthread_join(thread, NULL);
    CHECK(fake_count(FAKE_FILE_READ) == 4 && fake_bytes_read() == 4096, "each piece is one read of its own bytes");
    gp_hold_close(&task.hold, task.pager);
    gp_pager_close(task.pager);
    model_end(&m);
}

int main(void) {
    static const fake_weather weathers[] = {
        { 0 },
        { .short_one_in = 2 },
        { .interrupted_one_in = 3 },
        { .short_one_in = 3, .interrupted_one_in = 3, .delay_us = 40, .is_ragged = true },
    };
    check_begin();
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++) {
        for (size_t w = 0; w < sizeof weathers / sizeof weathers[0]; w++) {
            read_all(shapes[s], weathers[w], placements[s]);
        }
    }
    last_slice_ends_the_file();
    some_covers_are_moved();
    pieces_are_read_at_once();
    return 0;
}
