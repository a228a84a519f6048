/* A made-up model in the fake OS: a few layers of awkward sizes, laid out in files and slots as gguf_pager does it. */
#ifndef GGUF_PAGER_TEST_MODEL_H
#define GGUF_PAGER_TEST_MODEL_H

#include <stdbool.h>
#include <stdint.h>

#include "gguf_pager.h"
#include "slots/pager.h"
#include "slots/slots.h"

enum { MODEL_LAYERS = 8, MODEL_FILES = 2, MODEL_CLASSES = 2, MODEL_MIRRORS = 2, MODEL_TABLES = 2, MODEL_MOST_EXPERTS = 256 };

/* What is not said is taken from model_shape_default. */
typedef struct {
    uint32_t    n_layers, n_experts, n_used, n_slots;
    uint32_t    n_slices;
    uint64_t    slice_bytes[GP_MAX_SLICES];
    uint32_t    n_files;            /* a layer's slices go round the files */
    uint32_t    n_mirrors;
    uint32_t    n_classes;          /* layers go round the classes; n_slots each */
    uint32_t    n_tables;           /* they go round the files, too */
    uint32_t    n_readers;
    uint64_t    piece_bytes;
    uint32_t    offset_align, memory_align;     /* 0: buffered */
    bool        read_ahead;
    const char *policy;
} model_shape;

typedef struct {
    model_shape   shape;
    gp_config     config;
    gp_layer_spec layers[MODEL_LAYERS];
    gp_class_spec classes[MODEL_CLASSES];
    gp_table_spec tables[MODEL_TABLES];
    const char   *paths[MODEL_FILES];
    uint8_t      *files[MODEL_FILES];       /* what the fake OS reads from */
    uint8_t      *truth[MODEL_FILES];       /* what was in them at first */
    gp_mirror_spec mirrors[MODEL_MIRRORS];
    const char   *mirror_paths[MODEL_MIRRORS][MODEL_FILES];
    uint8_t      *mirror_files[MODEL_MIRRORS][MODEL_FILES];
} model;

/* Makes the files and the config. */
void model_make(model *m, model_shape shape);
/* Also forgets the fake OS's files, and checks that nothing was left behind. */
void model_end(model *m);

gp_pager *model_open(const model *m);

/* The bytes of one expert's slice, in the file as it was at first. */
const uint8_t *model_truth(const model *m, uint32_t layer, uint32_t slice, int32_t expert);
/* Where it lies in the file. */
uint64_t model_offset(const model *m, uint32_t layer, uint32_t slice, int32_t expert);

/* The bytes of a table's row, in the file as it was at first. */
const uint8_t *model_row(const model *m, uint32_t table, int32_t row);

/* Whether a slot, numbered within its class, holds an expert's bytes. */
bool model_slot_holds(const model *m, const gp_pager *pager, uint32_t slot, uint32_t layer, int32_t expert);

/* Begins a wave of distinct experts that were named once each, and waits until all are in slots: slots[i], numbered within its
 * class, holds experts[i] until gp_hold_release. There must be slots for all of them at once, as soon as others let theirs
 * go; -EBUSY: they did not. On failure nothing is held. Their files are not looked at: that is gp_wave_done's. */
int  model_acquire(gp_pager *pager, gp_hold *hold, uint32_t layer, const int32_t *experts, uint32_t n_experts,
                   uint32_t n_tokens, int32_t *slots, gp_failure *failure);
/* A whole wave in one thread, with any number of slots: looks at the bytes of each expert as it comes, and is done with it. counts
 * NULL: each was named once. On failure nothing is held. */
int  model_wave(const model *m, gp_pager *pager, gp_hold *hold, const gp_demand *demand, gp_failure *failure);
/* The same of experts that were named once each, which must come. */
void model_use(const model *m, gp_pager *pager, gp_hold *hold, uint32_t layer, const int32_t *experts,
               uint32_t n_experts, uint32_t n_tokens);
/* Draws distinct experts. */
void model_draw(const model *m, int32_t *experts, uint32_t n_experts);

bool model_is_resident(gp_pager *pager, const model *m, uint32_t layer, int32_t expert);
/* Waits until no slot is being read, for read-ahead has no caller that waits. */
void model_settle(gp_pager *pager);

/* The numbered invariants at the heads of slots.c and wave.c, and the counts that follow from them. */
void model_check_invariants(gp_pager *pager);

#endif
