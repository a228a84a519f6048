/* Rows of tables in a context's graphs: a node that looks up some is pointed at them in memory of ours, instead of at
 * llama.cpp's mapping of the file, whose disk may fail, and whose pages nobody has counted. ggml's own GET_ROWS converts the
 * same bytes, so the result is the same.
 *
 * Served are GET_ROWS of a whole table by ids that are known, and nodes that take one row as a view. Any other node is
 * left as llama.cpp made it. */
#ifndef GGUF_PAGER_ROWS_H
#define GGUF_PAGER_ROWS_H

#include "compute/ggml_tensor.h"
#include "reads/tables.h"

typedef struct gp_rows gp_rows;

/* row_bytes: as in gp_tap_open. All memory that is ever needed, present at once. */
int  gp_rows_open(gp_rows **out, const gp_ggml *ggml, size_t row_bytes);
void gp_rows_close(gp_rows *rows);
/* Before the first node; may fail, and be tried again. */
int  gp_rows_attach(gp_rows *rows, gp_tables *tables, gp_watch *watch);

/* Makes a node that was served what it was before: first of all, whenever llama.cpp asks about it or has computed it.
 * -ENOTRECOVERABLE, each time: what it was is forgotten, and it computes nothing any more. */
int  gp_rows_undo(const gp_rows *rows, ggml_tensor *node);
/* Whether the node, which is about to be computed, reads rows of a table. */
bool gp_rows_is_look_up(gp_rows *rows, const ggml_tensor *node);
/* Brings the rows in and points the node at them, until it is undone. `are_known`: its ids are computed. After a failure,
 * noted in *failure, it points at memory of ours all the same: what it computes is thrown away. */
void gp_rows_serve(gp_rows *rows, ggml_tensor *node, bool are_known, gp_failure *failure);
/* What was served is computed: its memory is free again. */
void gp_rows_release(gp_rows *rows);

#endif
