/* Invariants
 *   1. Files are read through descriptors of their own, past no cache, whose file is the one that gp_copies watches.
 *   2. Bytes count only if the file was still the same after they were read.
 */
#include "reads/tables.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>

typedef struct {
    gp_table_spec spec;
    int           fd;
} table_file;

struct gp_tables {
    const gp_os     *os;
    gp_copies       *copies;
    gp_compare       compare;
    void            *compare_data;
    table_file      *tables;
    uint32_t         n_tables;
    _Atomic uint64_t rows_read, bytes_read, left_alone;
};

/* -ENODATA where the file ends. */
static int read_row(const gp_tables *tables, const table_file *t, uint64_t offset_bytes, char *into, gp_failure *failure) {
    for (uint64_t at = 0; at < t->spec.row_bytes;) {
        const int64_t got = tables->os->file_read(t->fd, into + at, t->spec.row_bytes - at, offset_bytes + at);
        if (got == -EINTR) {
            continue;
        }
        if (got <= 0) {
            *failure = (gp_failure) { got < 0 ? (int) got : -ENODATA, t->spec.file, offset_bytes + at };
            return failure->error;
        }
        at += (uint64_t) got;
    }
    return 0;
}

/* Whether a row is what a touched file holds: whoever opened the model is asked. */
static int compare(const gp_tables *tables, const table_file *t, uint64_t offset_bytes, const char *row) {
    if (!tables->compare) {
        return -ESTALE;
    }
    const int got = tables->compare(tables->compare_data, t->spec.file, offset_bytes, row, t->spec.row_bytes);
    return got == GP_SAME ? 0 : got < 0 && got > -4096 ? got : -EINTR;
}

static uint64_t offset_of(const table_file *t, int32_t row) {
    return t->spec.offset_bytes + (uint64_t) row * t->spec.row_bytes;
}

int gp_tables_read(gp_tables *tables, uint32_t table, const int32_t *rows, uint32_t n_rows, char *into, gp_watch *watch,
                   gp_failure *failure) {
    const table_file *t = &tables->tables[table];
    int error = 0;
    /* Told of all of them, the system reads them at once, and not one seek after the other: 512 rows scattered over a file
     * that was not in the cache took 5 ms instead of 79, and 800 through a mapping (virtual disk, Linux 6.18; a busy day). */
    for (uint32_t i = 0; n_rows > 1 && i < n_rows; i++) {
        tables->os->file_expect(t->fd, t->spec.row_bytes, offset_of(t, rows[i]));
    }
    for (uint32_t i = 0; error == 0 && i < n_rows; i++) {
        if (gp_watch_stops(watch)) {
            *failure = (gp_failure) { .error = -EINTR };
            return -EINTR;
        }
        error = read_row(tables, t, offset_of(t, rows[i]), into + i * t->spec.row_bytes, failure);
    }
    /* Looked at also after a failed read: a change explains missing bytes. */
    uint32_t changed_file;
    bool is_touched = false;
    int change = gp_copies_check(tables->copies, t->spec.file, &changed_file, &is_touched);
    for (uint32_t i = 0; error == 0 && change == 0 && is_touched && i < n_rows; i++) {
        change = compare(tables, t, offset_of(t, rows[i]), into + i * t->spec.row_bytes);
    }
    if (change != 0) {
        *failure = (gp_failure) { .error = change, .file = changed_file };
        error = change;
    }
    if (error == 0) {
        atomic_fetch_add_explicit(&tables->rows_read, n_rows, memory_order_relaxed);
        atomic_fetch_add_explicit(&tables->bytes_read, n_rows * t->spec.row_bytes, memory_order_relaxed);
    }
    return error;
}

void gp_tables_compare_with(gp_tables *tables, gp_compare compare, void *data) {
    tables->compare = compare;
    tables->compare_data = data;
}

const gp_table_spec *gp_tables_spec(const gp_tables *tables, uint32_t table) {
    return table < tables->n_tables ? &tables->tables[table].spec : NULL;
}

void gp_tables_count_left_alone(gp_tables *tables) {
    atomic_fetch_add_explicit(&tables->left_alone, 1, memory_order_relaxed);
}

void gp_tables_counters(const gp_tables *tables, gp_row_counters *counters) {
    *counters = (gp_row_counters) {
        .rows_read = atomic_load_explicit(&tables->rows_read, memory_order_relaxed),
        .bytes_read = atomic_load_explicit(&tables->bytes_read, memory_order_relaxed),
        .left_alone = atomic_load_explicit(&tables->left_alone, memory_order_relaxed),
    };
}

/* A file that was replaced since the copies were opened is another one. */
static int open_file(const gp_tables *tables, table_file *t, const char *path) {
    const gp_file_id *then = gp_copies_file(tables->copies, t->spec.file);
    gp_file_id now;
    int error = tables->os->file_open(path, false, &t->fd);
    if (error != 0) {
        return error;
    }
    error = tables->os->file_identify(t->fd, &now);
    if (error == 0 && (now.device != then->device || now.inode != then->inode)) {
        error = -ESTALE;
    }
    if (error != 0) {
        (void) tables->os->file_close(t->fd);
    }
    return error;
}

int gp_tables_open(gp_tables **out, const gp_os *os, const gp_config *config, gp_copies *copies,
                   gp_open_failure *failure) {
    *out = NULL;
    *failure = (gp_open_failure) { .lack = GP_LACKS_MEMORY };
    gp_tables *tables = calloc(1, sizeof *tables);
    if (!tables) {
        return -ENOMEM;
    }
    tables->os = os;
    tables->copies = copies;
    tables->tables = calloc(config->n_tables + 1, sizeof *tables->tables);
    int error = tables->tables ? 0 : -ENOMEM;
    while (error == 0 && tables->n_tables < config->n_tables) {
        table_file *t = &tables->tables[tables->n_tables];
        t->spec = config->tables[tables->n_tables];
        *failure = (gp_open_failure) { GP_LACKS_FILE, t->spec.file };
        error = open_file(tables, t, config->paths[t->spec.file]);
        tables->n_tables += error == 0;
    }
    if (error != 0) {
        gp_tables_close(tables);
        return error;
    }
    *out = tables;
    return 0;
}

void gp_tables_close(gp_tables *tables) {
    if (!tables) {
        return;
    }
    for (uint32_t i = 0; i < tables->n_tables; i++) {
        (void) tables->os->file_close(tables->tables[i].fd);
    }
    free(tables->tables);
    free(tables);
}
