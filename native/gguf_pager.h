/* gguf_pager: experts of a mixture-of-experts model, kept in a fixed amount of memory.
 *
 * The boundary.
 *   The caller owns the description of the model (gp_config and all it points to; copied at open), the llama.cpp
 *   contexts, and the choice of every size. It computes all addresses inside a slot: this side only checks them.
 *   The library owns the arena, the slots in it, the reader threads and the tensors it lends to graph nodes.
 *
 * How calls fail.
 *   Functions return 0 or -errno. Nothing prints, nothing exits. A constructor that fails leaves nothing behind and
 *   stores NULL; close(NULL) does nothing. What failed while a graph was being computed is kept in the tap as a
 *   gp_failure until gp_tap_take_failure is called; until then gp_tap_abort tells llama.cpp to stop.
 *
 * Who may call when.
 *   gp_pager_* may be called from any thread. A tap belongs to one llama.cpp context and is called by the thread that
 *   decodes with it. gp_pager_close comes after gp_tap_close of every tap, and that after the context is freed.
 *
 * The way from the router to the matrix multiply allocates nothing, so it cannot fail for want of memory.
 */
#ifndef GGUF_PAGER_H
#define GGUF_PAGER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "os/os.h"

enum {
    GP_MAX_SLICES = 4,  /* gate, up, down; or gate_up, down; one to spare */
    GP_MAX_TAPS = 64,   /* contexts per model: one bit each in a slot's mask of users */
    GP_MAX_COPIES = 8,  /* of a model, with itself: few machines have as many disks */
    GP_MAX_NAME = 64    /* GGML_MAX_NAME */
};

/* One expert tensor of one layer: the slices of all its experts, one after the other in one file. */
typedef struct {
    char     name[GP_MAX_NAME];
    int32_t  type;          /* ggml_type */
    int64_t  ne[3];         /* elements; ne[2] is the number of experts */
    uint32_t file;          /* index into gp_config.paths */
    uint64_t offset_bytes;  /* of expert 0, from the start of that file */
    uint64_t slice_bytes;   /* one expert's share */
    uint64_t data_at;       /* where the slice's first byte lies in a slot, from the slot's start */
    uint64_t region_at;     /* where the bytes that a read may touch begin in a slot */
    uint64_t region_bytes;  /* and how many they are */
} gp_slice_spec;

/* The experts of one block that are routed together. */
typedef struct {
    gp_slice_spec slices[GP_MAX_SLICES];
    uint32_t n_slices;
    uint32_t n_experts;
    uint32_t n_used;        /* experts chosen per token */
    uint32_t shape_class;   /* index into gp_config.classes */
} gp_layer_spec;

/* A table of which a token needs a row or a few. Its rows are read when a graph looks them up. */
typedef struct {
    char     name[GP_MAX_NAME];
    int32_t  type;          /* ggml_type */
    int64_t  ne[2];         /* elements of a row, rows */
    uint32_t file;          /* index into gp_config.paths */
    uint64_t offset_bytes;  /* of row 0, from the start of that file */
    uint64_t row_bytes;
} gp_table_spec;

/* A run of slots with one stride, for all layers whose slices have equal sizes. */
typedef struct {
    uint64_t stride_bytes;
    uint32_t n_slots;
} gp_class_spec;

/* Another copy of the model, byte for byte, on another disk: the caller has made sure of it. */
typedef struct {
    const char *const *paths;   /* n_paths of them, in the order of the model's */
    bool               direct;
} gp_mirror_spec;

/* GP_LOOK_AUTO: as long as it is faster, and of layers where enough comes true. */
typedef enum { GP_LOOK_NEVER, GP_LOOK_AUTO, GP_LOOK_ALWAYS } gp_look_ahead;

typedef struct {
    const char *const   *paths;
    uint32_t             n_paths;
    const gp_mirror_spec *mirrors;
    uint32_t             n_mirrors;
    const gp_layer_spec *layers;
    uint32_t             n_layers;
    const gp_class_spec *classes;
    uint32_t             n_classes;
    const gp_table_spec *tables;
    uint32_t             n_tables;
    const char          *policy;            /* a name that gp_policy_find knows */
    bool                 direct;            /* O_DIRECT or its like; the caller has asked gp_os.file_alignment first */
    bool                 read_ahead;        /* in batches, read what the next layer will probably want */
    gp_look_ahead        look_ahead;        /* of single tokens, read what the next layer's router will probably choose */
    uint32_t             offset_align;      /* of direct reads, in the file: what serves every copy that is read so */
    uint32_t             memory_align;      /* of direct reads, in memory */
    uint32_t             n_readers;         /* reads of piece_bytes in flight, of each copy; as many threads, unless the
                                             * system reads in the background */
    uint64_t             piece_bytes;       /* the largest single read */
} gp_config;

/* Whether a layer is foretold, and why not. */
typedef enum {
    GP_SIGHT_ON,
    GP_SIGHT_OFF,               /* nobody wants it */
    GP_SIGHT_FIRST,             /* there is no layer before it */
    GP_SIGHT_UNSEEN,            /* too few tokens have passed to say */
    GP_SIGHT_OTHER,             /* its router, or the norm in front of the layer before, is of a kind that is not known */
    GP_SIGHT_POOR,              /* too little came true */
    GP_SIGHT_SLOWER             /* tokens were no faster with it */
} gp_sight;

typedef struct {
    uint64_t hits, misses;      /* distinct experts wanted by one graph node's batch, found or not found */
    uint64_t bytes_read;
    uint64_t bytes_wasted;      /* of them, those that were read ahead and given up before anybody wanted them */
    uint64_t stall_ns;          /* time the decoding thread waited for reads */
    uint64_t stall_bytes;       /* what arrived meanwhile, for whomever: with stall_ns, the bandwidth while waiting */
    uint64_t evictions;
    uint64_t left_alone;        /* nodes that llama.cpp computed from its own mapping */
    uint64_t visits;            /* batches routed through this layer */
    uint64_t tokens;
    uint64_t foreseen;          /* of the misses, those that had begun to be read before the layer's router chose them */
    uint64_t in_vain;           /* experts that were read so, and not chosen */
    gp_sight sight;
    uint32_t resident;          /* experts in slots now */
} gp_counters;

/* Of tables. Each distinct row that a node looks up counts once. */
typedef struct {
    uint64_t rows_read, bytes_read;
    uint64_t left_alone;        /* nodes that llama.cpp computed from its own mapping */
} gp_row_counters;

typedef struct {
    int      error;             /* -errno; 0: none */
    uint32_t file;              /* index into gp_config.paths, followed by those of each mirror */
    uint64_t offset_bytes;
} gp_failure;

/* What could not be had when a pager was to be opened. */
typedef enum { GP_LACKS_NOTHING, GP_LACKS_SENSE, GP_LACKS_MEMORY, GP_LACKS_FILE, GP_LACKS_THREAD } gp_lack;

typedef struct {
    gp_lack  lack;              /* GP_LACKS_SENSE: the config contradicts itself */
    uint32_t file;              /* GP_LACKS_FILE: as in gp_failure */
} gp_open_failure;
/* When a file was changed last, as its file system says. */
typedef struct {
    int64_t modified_ns, changed_ns;
} gp_file_times;

typedef struct gp_pager gp_pager;
typedef struct gp_tap gp_tap;

typedef bool (*gp_eval_callback)(void *tensor, bool ask, void *data);
typedef bool (*gp_abort_callback)(void *data);

int  gp_pager_open(gp_pager **out, const gp_os *os, const gp_config *config, gp_open_failure *failure);
void gp_pager_close(gp_pager *pager);

/* The arena becomes present while the pager is used already; waits until it is. Not from two threads at once. */
void gp_pager_wait_present(gp_pager *pager);
/* Whether there is nothing to wait for. */
bool gp_pager_is_present(const gp_pager *pager);

/* counters: one per layer, n_layers of them. */
void gp_pager_counters(gp_pager *pager, gp_counters *counters);

void gp_pager_row_counters(const gp_pager *pager, gp_row_counters *counters);

/* bytes_read: one number for the model's own files and one per mirror, n_mirrors + 1 of them. */
void gp_pager_copies(const gp_pager *pager, uint64_t *bytes_read);

/* Whether the system reads the model's own files in the background, without threads of ours. */
bool gp_pager_reads_in_background(const gp_pager *pager);

/* resident: n_experts bytes for `layer`; 1 in a slot, 2 in a slot and pinned, 0 not. */
int  gp_pager_resident(gp_pager *pager, uint32_t layer, uint8_t *resident);

/* chosen: n_experts numbers for `layer`; how many tokens have chosen each expert since the pager was opened. */
int  gp_pager_chosen(gp_pager *pager, uint32_t layer, uint64_t *chosen);

/* Reads the experts and keeps them until unpinned; on failure none of them that was not pinned before. -ENOSPC when too few slots
 * would be left to compute with; -EBUSY when others compute with them for long. `shall_stop`, which may be NULL, is asked as
 * gp_tap_watch does: -EINTR. */
int  gp_pager_pin(gp_pager *pager, uint32_t layer, const int32_t *experts, uint32_t n_experts,
                  gp_abort_callback shall_stop, void *data, gp_failure *failure);
void gp_pager_unpin_all(gp_pager *pager);

/* Leaves a class so many of its slots, and gives the memory of the others back; after gp_pager_wait_present, and with slots
 * enough for every batch that is computed. -EBUSY: those that would go are in use now, or pinned. */
int  gp_pager_shrink(gp_pager *pager, uint32_t shape_class, uint32_t n_slots);

/* An expert of a layer, and the share of tokens that are likely to choose it. */
typedef struct {
    uint32_t layer;
    int32_t  expert;
    float    share;
} gp_expert;

/* Reads these experts in the background, in this order, as long as slots are free that no batch needs. Demand goes first,
 * and may give up again what has come. A read that fails fails nothing, but ends it. Once: -EALREADY. */
int  gp_pager_warm_up(gp_pager *pager, const gp_expert *experts, uint32_t n_experts);

/* Called when something was read of a file whose times have changed: `bytes` bytes at `memory` were read from that place of
 * one of the model's files. Returns GP_SAME if they are what the file holds, and the file holds what it did when it was opened;
 * gp_pager_accept has been called then. Anything else, 0 too, is a failure: -errno. Called with no lock held, in the thread
 * that decodes. */
enum { GP_SAME = 0x53616d65 };  /* no number that a callback which was interrupted leaves behind by chance */
typedef int (*gp_compare)(void *data, uint32_t file, uint64_t offset_bytes, const void *memory, uint64_t bytes);

/* Without it a file whose times have changed is a changed file. Before the first tap is attached. */
void gp_pager_compare_with(gp_pager *pager, gp_compare compare, void *data);

/* Files whose times have changed hold the same bytes: from now on these are their times. One entry per file, of the model and
 * then of each mirror. What was read since and is not in use is dropped. -ESTALE when they have changed again. */
int  gp_pager_accept(gp_pager *pager, const gp_file_times *times);

bool gp_policy_exists(const char *name);

struct ggml_tensor;

/* ggml's conversion of n floats, and its product of two vectors of n elements (*result; strides and nrc unused: 0, 1). */
typedef void (*gp_from_float)(const float *from, void *to, int64_t n);
typedef void (*gp_vec_dot)(int n, float *result, size_t bs, const void *x, size_t bx, const void *y, size_t by, int nrc);

/* As struct ggml_init_params. */
typedef struct {
    size_t bytes;
    void  *memory;
    bool   no_alloc;
} gp_graphs_memory;

/* ggml's functions that make small graphs and compute them; all are there, or `compute` is NULL. */
typedef struct {
    void  *(*init)(gp_graphs_memory memory);                        /* ggml_init */
    void   (*free)(void *context);                                  /* ggml_free */
    size_t (*overhead)(size_t n_nodes, bool grads);                 /* ggml_graph_overhead_custom */
    void  *(*new_graph)(void *context, size_t n_nodes, bool grads); /* ggml_new_graph_custom */
    void   (*clear)(void *graph);                                   /* ggml_graph_clear */
    void   (*expand)(void *graph, struct ggml_tensor *node);        /* ggml_build_forward_expand */
    void  *(*backend_init)(void);                                   /* ggml_backend_cpu_init */
    void   (*backend_set_n_threads)(void *backend, int n_threads);  /* ggml_backend_cpu_set_n_threads */
    void   (*backend_free)(void *backend);                          /* ggml_backend_free */
    int    (*compute)(void *backend, void *graph);                  /* ggml_backend_graph_compute */
} gp_graphs;

enum { GP_ROW_OPS = 6 };

/* What the tap needs of the ggml that computes; addresses of its functions and numbers of its enums. */
typedef struct {
    int32_t op_none, op_mul_mat_id, op_argsort, op_top_k, op_view, op_reshape, op_custom;
    int32_t op_add_id, op_get_rows;
    int32_t flag_compute;                   /* what a node is not computed without; 0: all are */
    int32_t row_ops[GP_ROW_OPS];            /* a row of their result depends on the same rows of their sources alone */
    int32_t op_mul, op_add, op_repeat, op_norm, op_rms_norm;    /* op_none: not known, and nothing is foretold */
    int32_t type_i32, type_f32;
    bool  (*buffer_is_host)(void *buffer);
    const void *(*cpu_traits)(int type);    /* NULL: all multiplying is left to ggml */
    int64_t (*block_size)(int type);
    size_t  (*type_size)(int type);         /* bytes of a block */
    gp_graphs graphs;
} gp_ggml;

enum { GP_ALL_THREADS = -1 };   /* GGML_N_TASKS_MAX */

/* What ggml finds in the op_params of a custom operation (struct ggml_custom_op_params); engine.py compares. */
typedef struct {
    void   (*compute)(struct ggml_tensor *node, int ith, int nth, void *data);
    int      n_tasks;
    void    *data;
} gp_custom;

/* max_ids: the most ids one router result can hold, n_ubatch * n_used of the widest layer. batch_bytes: memory for the rows of
 * experts that are being computed; what does not fit is left to ggml. row_bytes: memory for the rows of tables that one
 * piece of graph looks up, and eight bytes for each id; what does not fit is left to ggml.
 * The next_* callbacks are the caller's own, called as llama.cpp would have called them; may be NULL. */
int  gp_tap_open(gp_tap **out, const gp_ggml *ggml, uint32_t max_ids, size_t batch_bytes, size_t row_bytes,
                 gp_eval_callback next_eval, void *next_eval_data,
                 gp_abort_callback next_abort, void *next_abort_data);
/* Until then every node is left as it is: the context must exist before the arena can be sized. Once. */
int  gp_tap_attach(gp_tap *tap, gp_pager *pager);
void gp_tap_close(gp_tap *tap);

bool gp_tap_eval(void *tensor, bool ask, void *tap);    /* llama_context_params.cb_eval */
bool gp_tap_abort(void *tap);                           /* llama_context_params.abort_callback */

/* From now on the decoding thread asks, five times a second at most and holding no lock, whether its decode shall stop. If so it
 * is aborted, and the failure is -EINTR. Reads are not waited for then; those that are on their way fill their slots. */
void gp_tap_watch(gp_tap *tap, const gp_os *os, gp_abort_callback shall_stop, void *data);

/* Replaces the chained abort callback (llama_set_abort_callback called by the user). */
void gp_tap_chain_abort(gp_tap *tap, gp_abort_callback next_abort, void *next_abort_data);

/* The context is not computing now: its slots are free for others. */
void gp_tap_idle(gp_tap *tap);

/* Of the kinds of matrices tried so far: those that are ours to multiply, and those left to ggml for other bits. */
void gp_tap_count_kinds(const gp_tap *tap, uint32_t *n_same, uint32_t *n_other);

/* Of the feed-forwards, by what lies between their matrices: those computed an expert at a time, and those that gave other
 * bits so. */
void gp_tap_count_ffns(const gp_tap *tap, uint32_t *n_same, uint32_t *n_other);

/* Returns what went wrong since the last call and clears it. */
gp_failure gp_tap_take_failure(gp_tap *tap);

#endif
