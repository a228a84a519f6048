/* Tables of which a token needs a row, such as the embeddings of tokens: what is read of them, and how much. Rows come
 * through the page cache, so that one that is used again is mostly there, and costs this process no memory. */
#ifndef GGUF_PAGER_TABLES_H
#define GGUF_PAGER_TABLES_H

#include "gguf_pager.h"
#include "reads/copies.h"
#include "reads/watch.h"

typedef struct gp_tables gp_tables;

/* Opens the model's own files that hold tables. `copies` tells whether they change, and must outlive the tables. */
int  gp_tables_open(gp_tables **out, const gp_os *os, const gp_config *config, gp_copies *copies,
                    gp_open_failure *failure);
void gp_tables_close(gp_tables *tables);

/* As gp_pager_compare_with. */
void gp_tables_compare_with(gp_tables *tables, gp_compare compare, void *data);

const gp_table_spec *gp_tables_spec(const gp_tables *tables, uint32_t table);   /* NULL past the last */

/* Reads rows, distinct and in ascending order, one after the other into `into`. In the thread that decodes, whose watch may
 * end it between two rows: -EINTR. On failure *failure tells what and where, and `into` holds anything. */
int  gp_tables_read(gp_tables *tables, uint32_t table, const int32_t *rows, uint32_t n_rows, char *into, gp_watch *watch,
                    gp_failure *failure);

/* Any thread. */
void gp_tables_count_left_alone(gp_tables *tables);
void gp_tables_counters(const gp_tables *tables, gp_row_counters *counters);

#endif
