/* A config that cannot work is refused with -EINVAL before anything is opened: no crash, no slot of one expert that
 * overlaps with another's. */
#include <errno.h>
#include <string.h>

#include "check.h"
#include "fake_os.h"
#include "model.h"

static model good;

static void refuses(const char *what, const gp_config *config) {
    gp_pager *pager = (gp_pager *) &good;
    const unsigned arenas = fake_count(FAKE_MEMORY_OPEN);
    gp_open_failure failure;
    const int error = gp_pager_open(&pager, &fake_os, config, &failure);
    CHECK(error == 0 || failure.lack == GP_LACKS_SENSE, "nothing of the system's was missing");
    if (error != -EINVAL) {
        fprintf(stderr, "not refused: %s (%d)\n", what, error);
    }
    CHECK(error == -EINVAL && !pager, "a config that cannot work is refused");
    CHECK(fake_count(FAKE_MEMORY_OPEN) == arenas || fake_open_memories() == 0, "and nothing stays open");
}

/* One change to a good config at a time. */
#define REFUSES(what, change)               \
    {                                       \
        gp_config c = good.config;          \
        gp_layer_spec l[MODEL_LAYERS];      \
        gp_class_spec k[MODEL_CLASSES];     \
        gp_table_spec t[MODEL_TABLES];      \
        copy(&c, l, k, t);                   \
        change;                             \
        refuses(what, &c);                  \
    }

static void copy(gp_config *config, gp_layer_spec *layers, gp_class_spec *classes, gp_table_spec *tables) {
    for (uint32_t i = 0; i < good.config.n_layers; i++) {
        layers[i] = good.layers[i];
    }
    for (uint32_t i = 0; i < good.config.n_classes; i++) {
        classes[i] = good.classes[i];
    }
    memcpy(tables, good.tables, sizeof good.tables);
    config->tables = tables;
    config->layers = layers;
    config->classes = classes;
}

static void counts_are_checked(void) {
    REFUSES("no layers", c.n_layers = 0);
    REFUSES("no classes", c.n_classes = 0);
    REFUSES("no files", c.n_paths = 0);
    REFUSES("more mirrors than there can be", c.n_mirrors = GP_MAX_COPIES);
    REFUSES("no readers", c.n_readers = 0);
    REFUSES("no such policy", c.policy = "fifo");
    REFUSES("no slots", k[0].n_slots = 0);
    REFUSES("slots of no size", k[0].stride_bytes = 0);
    REFUSES("no slices", l[1].n_slices = 0);
    REFUSES("too many slices", l[1].n_slices = GP_MAX_SLICES + 1);
    REFUSES("no such class", l[1].shape_class = 1);
    REFUSES("no such file", l[1].slices[0].file = 1);
    REFUSES("no experts", l[1].n_experts = 0);
    REFUSES("none used", l[1].n_used = 0);
    REFUSES("more used than there are", l[1].n_used = l[1].n_experts + 1);
    REFUSES("fewer slots than one token needs", k[0].n_slots = l[0].n_used - 1);
    REFUSES("another number of experts in the tensor", l[1].slices[1].ne[2]--);
    REFUSES("a slice of no size", l[1].slices[1].slice_bytes = 0);
}

static void tables_are_checked(void) {
    REFUSES("no such file for a table", t[1].file = 1);
    REFUSES("a table without rows", t[1].ne[1] = 0);
    REFUSES("more rows than there are numbers for", t[1].ne[1] = INT32_MAX + INT64_C(1));
    REFUSES("rows without elements", t[0].ne[0] = -1);
    REFUSES("rows of no size", t[0].row_bytes = 0);
    REFUSES("rows whose bytes cannot be counted", t[0].row_bytes = UINT64_MAX / 3);
    REFUSES("a table that ends nowhere", t[0].offset_bytes = INT64_MAX - 5);
}

static void addresses_are_checked(void) {
    REFUSES("a region behind the slot's end", l[0].slices[2].region_at += 64);
    REFUSES("a region that wraps round", l[0].slices[2].region_at = UINT64_MAX - 63);
    REFUSES("data before the region", l[0].slices[1].data_at = l[0].slices[1].region_at - 1);
    REFUSES("data that end behind the region",
            l[0].slices[1].data_at = l[0].slices[1].region_at + l[0].slices[1].region_bytes - 1);
    REFUSES("regions that overlap",
            l[0].slices[1].region_at = l[0].slices[0].region_at; l[0].slices[1].data_at = l[0].slices[0].data_at);
    REFUSES("more bytes than there are", k[0].stride_bytes = UINT64_MAX / 2 / 4096 * 4096; k[0].n_slots = 64);
}

static void alignments_are_checked(void) {
    REFUSES("no alignment in the file", c.offset_align = 0);
    REFUSES("no alignment in memory", c.memory_align = 0);
    REFUSES("no pieces", c.piece_bytes = 0);
    REFUSES("pieces that end within a sector", c.piece_bytes = 700);
    REFUSES("pieces that end at no address for direct reads", c.memory_align = 4096; c.piece_bytes = 512;
            k[0].stride_bytes = 32768);
    REFUSES("slots that begin at no such address", k[0].stride_bytes += 32);
    REFUSES("a region without room for whole sectors", l[0].slices[0].region_bytes = l[0].slices[0].slice_bytes);
}

static void good_config_opens(void) {
    gp_pager_close(model_open(&good));
}

int main(void) {
    check_begin();
    model_make(&good, (model_shape) { .n_tables = MODEL_TABLES });
    good_config_opens();
    counts_are_checked();
    tables_are_checked();
    addresses_are_checked();
    model_end(&good);

    model_make(&good, (model_shape) { .offset_align = 512, .memory_align = 512 });
    good_config_opens();
    alignments_are_checked();
    model_end(&good);
    return 0;
}
