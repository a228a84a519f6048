/* gguf_pager._native, with module_mutex.c the only file that includes Python.h. It converts arguments and errors, nothing else.
 * What it offers is described in gguf_pager/_native.pyi. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "compute/ggml_tensor.h"
#include "gguf_pager.h"
#include "module.h"

typedef struct {
    PyObject_HEAD
    gp_pager *pager;
    uint32_t  n_layers;
    uint32_t *n_experts;    /* per layer */
    uint32_t  n_copies, n_files;    /* files of all copies */
    uint32_t  n_users;      /* taps, and calls that run without the GIL */
    PyObject *compare;      /* gp_compare's answer: 0 for GP_SAME, or an errno */
    PyObject *caught;       /* what it has raised and nobody has taken yet, by thread */
} PagerObject;

typedef struct {
    PyObject_HEAD
    gp_tap       *tap;
    PagerObject  *pager;
    unsigned long main_thread;      /* the only one in which signal handlers run */
    bool          is_watched;       /* what a handler raises will be taken, and raised */
    bool          is_handling;      /* one is running */
    bool          has_stopped;      /* one has raised, and the failure that it causes is not taken yet */
    PyObject     *exception;        /* what one has raised */
} TapObject;

typedef struct {
    PyObject *pager_type;
    PyObject *open_error;
} module_state;

static PyObject *raise_errno(int error) {
    errno = -error;
    return PyErr_SetFromErrno(PyExc_OSError);
}

static gp_pager *opened(PagerObject *self) {
    if (!self->pager) {
        PyErr_SetString(PyExc_ValueError, "the pager is closed");
    }
    return self->pager;
}

/* What was raised just now, which is not raised any more. */
static PyObject *take_raised(void) {
    PyObject *type, *exception, *traceback;
    PyErr_Fetch(&type, &exception, &traceback);
    PyErr_NormalizeException(&type, &exception, &traceback);
    if (traceback) {
        (void) PyException_SetTraceback(exception, traceback);
    }
    Py_XDECREF(type);
    Py_XDECREF(traceback);
    return exception;
}

/* ---- arguments -------------------------------------------------------------------------------------------------- */

static bool parse_slice(PyObject *item, gp_slice_spec *slice) {
    const char *name;
    int type;
    long long ne[3];
    unsigned int file;
    unsigned long long offset, bytes, data_at, region_at, region_bytes;
    if (!PyArg_ParseTuple(item, "si(LLL)IKKKKK", &name, &type, &ne[0], &ne[1], &ne[2], &file, &offset, &bytes,
                          &data_at, &region_at, &region_bytes)) {
        return false;
    }
    if (strlen(name) >= GP_MAX_NAME) {
        PyErr_Format(PyExc_ValueError, "tensor name too long: %s", name);
        return false;
    }
    *slice = (gp_slice_spec) {
        .type = type, .ne = { ne[0], ne[1], ne[2] }, .file = file, .offset_bytes = offset, .slice_bytes = bytes,
        .data_at = data_at, .region_at = region_at, .region_bytes = region_bytes,
    };
    strcpy(slice->name, name);
    return true;
}

static bool parse_layer(PyObject *item, gp_layer_spec *layer) {
    PyObject *slices;
    *layer = (gp_layer_spec) { 0 };
    if (!PyArg_ParseTuple(item, "IIIO", &layer->n_experts, &layer->n_used, &layer->shape_class, &slices)) {
        return false;
    }
    const Py_ssize_t n = PySequence_Size(slices);
    if (n < 0) {
        return false;
    }
    if (n > GP_MAX_SLICES) {
        PyErr_SetString(PyExc_ValueError, "too many slices in a layer");
        return false;
    }
    layer->n_slices = (uint32_t) n;
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *slice = PySequence_GetItem(slices, i);
        const bool is_parsed = slice && parse_slice(slice, &layer->slices[i]);
        Py_XDECREF(slice);
        if (!is_parsed) {
            return false;
        }
    }
    return true;
}

static bool parse_table(PyObject *item, gp_table_spec *table) {
    const char *name;
    int type;
    long long ne[2];
    unsigned int file;
    unsigned long long offset, bytes;
    if (!PyArg_ParseTuple(item, "si(LL)IKK", &name, &type, &ne[0], &ne[1], &file, &offset, &bytes)) {
        return false;
    }
    if (strlen(name) >= GP_MAX_NAME) {
        PyErr_Format(PyExc_ValueError, "tensor name too long: %s", name);
        return false;
    }
    *table = (gp_table_spec) { .type = type, .ne = { ne[0], ne[1] }, .file = file, .offset_bytes = offset, .row_bytes = bytes };
    strcpy(table->name, name);
    return true;
}

static bool parse_class(PyObject *item, gp_class_spec *class) {
    unsigned long long stride_bytes;
    if (!PyArg_ParseTuple(item, "KI", &stride_bytes, &class->n_slots)) {
        return false;
    }
    class->stride_bytes = stride_bytes;
    return true;
}

typedef struct {
    PyObject   **objects;
    const char **paths;
    Py_ssize_t   n;
} path_list;

static void free_paths(path_list *list) {
    for (Py_ssize_t i = 0; list->objects && i < list->n; i++) {
        Py_XDECREF(list->objects[i]);
    }
    free(list->objects);
    free(list->paths);
}

static bool parse_paths(path_list *list, PyObject *sequence) {
    list->n = PySequence_Size(sequence);
    if (list->n < 0) {
        return false;
    }
    list->objects = calloc((size_t) list->n + 1, sizeof *list->objects);
    list->paths = calloc((size_t) list->n + 1, sizeof *list->paths);
    if (!list->objects || !list->paths) {
        PyErr_NoMemory();
        return false;
    }
    for (Py_ssize_t i = 0; i < list->n; i++) {
        PyObject *item = PySequence_GetItem(sequence, i);
        const int converted = item ? PyUnicode_FSConverter(item, &list->objects[i]) : 0;
        Py_XDECREF(item);
        if (!converted) {
            return false;
        }
        list->paths[i] = PyBytes_AsString(list->objects[i]);
    }
    return true;
}

/* Owned copies of a config's arrays while it is handed over. */
typedef struct {
    path_list      files, mirror_files[GP_MAX_COPIES];
    gp_mirror_spec mirrors[GP_MAX_COPIES];
    gp_layer_spec *layers;
    gp_class_spec *classes;
    gp_table_spec *tables;
    Py_ssize_t     n_mirrors, n_layers, n_classes, n_tables;
} config_arrays;

static void free_arrays(config_arrays *arrays) {
    free_paths(&arrays->files);
    for (Py_ssize_t i = 0; i < GP_MAX_COPIES; i++) {
        free_paths(&arrays->mirror_files[i]);
    }
    free(arrays->layers);
    free(arrays->classes);
    free(arrays->tables);
}

static bool parse_mirrors(config_arrays *arrays, PyObject *sequence) {
    arrays->n_mirrors = PySequence_Size(sequence);
    if (arrays->n_mirrors >= GP_MAX_COPIES) {
        PyErr_SetString(PyExc_ValueError, "too many mirrors");
        return false;
    }
    for (Py_ssize_t i = 0; i < arrays->n_mirrors; i++) {
        PyObject *item = PySequence_GetItem(sequence, i), *paths = NULL;
        int direct = 0;
        const bool is_parsed = item && PyArg_ParseTuple(item, "Op", &paths, &direct)
            && parse_paths(&arrays->mirror_files[i], paths);
        Py_XDECREF(item);
        if (!is_parsed) {
            return false;
        }
        if (arrays->mirror_files[i].n != arrays->files.n) {
            PyErr_SetString(PyExc_ValueError, "a mirror has as many files as the model");
            return false;
        }
        arrays->mirrors[i] = (gp_mirror_spec) { arrays->mirror_files[i].paths, direct };
    }
    return arrays->n_mirrors >= 0;
}

static bool parse_arrays(config_arrays *arrays, PyObject *paths, PyObject *mirrors, PyObject *layers, PyObject *classes,
                         PyObject *tables) {
    if (!parse_paths(&arrays->files, paths) || !parse_mirrors(arrays, mirrors)) {
        return false;
    }
    arrays->n_layers = PySequence_Size(layers);
    arrays->n_classes = PySequence_Size(classes);
    arrays->n_tables = PySequence_Size(tables);
    if (arrays->n_layers < 0 || arrays->n_classes < 0 || arrays->n_tables < 0) {
        return false;
    }
    arrays->layers = calloc((size_t) arrays->n_layers + 1, sizeof *arrays->layers);
    arrays->classes = calloc((size_t) arrays->n_classes + 1, sizeof *arrays->classes);
    arrays->tables = calloc((size_t) arrays->n_tables + 1, sizeof *arrays->tables);
    if (!arrays->layers || !arrays->classes || !arrays->tables) {
        PyErr_NoMemory();
        return false;
    }
    for (Py_ssize_t i = 0; i < arrays->n_layers; i++) {
        PyObject *item = PySequence_GetItem(layers, i);
        const bool is_parsed = item && parse_layer(item, &arrays->layers[i]);
        Py_XDECREF(item);
        if (!is_parsed) {
            return false;
        }
    }
    for (Py_ssize_t i = 0; i < arrays->n_classes; i++) {
        PyObject *item = PySequence_GetItem(classes, i);
        const bool is_parsed = item && parse_class(item, &arrays->classes[i]);
        Py_XDECREF(item);
        if (!is_parsed) {
            return false;
        }
    }
    for (Py_ssize_t i = 0; i < arrays->n_tables; i++) {
        PyObject *item = PySequence_GetItem(tables, i);
        const bool is_parsed = item && parse_table(item, &arrays->tables[i]);
        Py_XDECREF(item);
        if (!is_parsed) {
            return false;
        }
    }
    return true;
}

/* ---- Pager ------------------------------------------------------------------------------------------------------ */

static void raise_open_error(PyTypeObject *type, int error, const gp_open_failure *failure) {
    static const char *const lacks[] = {
        [GP_LACKS_NOTHING] = "nothing", [GP_LACKS_SENSE] = "sense", [GP_LACKS_MEMORY] = "memory", [GP_LACKS_FILE] = "file",
        [GP_LACKS_THREAD] = "thread",
    };
    const module_state *state = PyType_GetModuleState(type);
    PyObject *exception = PyObject_CallFunction(state->open_error, "is", -error, strerror(-error));
    PyObject *lack = exception ? PyUnicode_FromString(lacks[failure->lack]) : NULL;
    PyObject *file = lack ? PyLong_FromUnsignedLong(failure->file) : NULL;
    if (file && PyObject_SetAttrString(exception, "lack", lack) == 0 && PyObject_SetAttrString(exception, "file", file) == 0) {
        PyErr_SetObject(state->open_error, exception);
    }
    Py_XDECREF(file);
    Py_XDECREF(lack);
    Py_XDECREF(exception);
}

static PyObject *pager_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    static char *names[] = { "paths", "mirrors", "layers", "classes", "tables", "policy", "direct", "read_ahead", "offset_align",
                             "memory_align", "n_readers", "piece_bytes", NULL };
    PyObject *paths, *mirrors, *layers, *classes, *tables;
    int direct, read_ahead;
    unsigned long long piece_bytes;
    gp_config config = { 0 };
    config_arrays arrays = { 0 };
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOOOOsppIIIK", names, &paths, &mirrors, &layers, &classes,
                                     &tables, &config.policy, &direct, &read_ahead, &config.offset_align, &config.memory_align,
                                     &config.n_readers, &piece_bytes)) {
        return NULL;
    }
    PagerObject *self = NULL;
    uint32_t *n_experts = NULL;
    if (!parse_arrays(&arrays, paths, mirrors, layers, classes, tables)) {
        goto fail;
    }
    config.direct = direct;
    config.read_ahead = read_ahead;
    config.piece_bytes = piece_bytes;
    config.paths = arrays.files.paths;
    config.n_paths = (uint32_t) arrays.files.n;
    config.mirrors = arrays.mirrors;
    config.n_mirrors = (uint32_t) arrays.n_mirrors;
    config.layers = arrays.layers;
    config.n_layers = (uint32_t) arrays.n_layers;
    config.classes = arrays.classes;
    config.n_classes = (uint32_t) arrays.n_classes;
    config.tables = arrays.tables;
    config.n_tables = (uint32_t) arrays.n_tables;
    n_experts = calloc((size_t) arrays.n_layers + 1, sizeof *n_experts);
    allocfunc allocate = (allocfunc) PyType_GetSlot(type, Py_tp_alloc);
    self = n_experts ? (PagerObject *) allocate(type, 0) : (PagerObject *) PyErr_NoMemory();
    if (!self) {
        goto fail;
    }
    for (Py_ssize_t i = 0; i < arrays.n_layers; i++) {
        n_experts[i] = arrays.layers[i].n_experts;
    }
    self->n_experts = n_experts;
    self->caught = PyDict_New();
    if (!self->caught) {
        n_experts = NULL;
        Py_CLEAR(self);
        goto fail;
    }
    self->n_layers = config.n_layers;
    self->n_copies = config.n_mirrors + 1;
    self->n_files = self->n_copies * config.n_paths;
    n_experts = NULL;
    gp_open_failure failure;
    int error;
    Py_BEGIN_ALLOW_THREADS
    error = gp_pager_open(&self->pager, &gp_os_system, &config, &failure);
    Py_END_ALLOW_THREADS
    if (error != 0) {
        raise_open_error(type, error, &failure);
        Py_DECREF((PyObject *) self);
        self = NULL;
    }
fail:
    free(n_experts);
    free_arrays(&arrays);
    return (PyObject *) self;
}

static PyObject *pager_wait_present(PyObject *object, PyObject *unused) {
    (void) unused;
    PagerObject *self = (PagerObject *) object;
    gp_pager *pager = opened(self);
    if (!pager) {
        return NULL;
    }
    self->n_users++;
    bool is_interrupted = false;
    for (long ms = 1; !gp_pager_is_present(pager) && !is_interrupted; ms = ms < 50 ? 2 * ms : ms) {
        Py_BEGIN_ALLOW_THREADS
        nanosleep(&(struct timespec) { .tv_nsec = ms * 1000000 }, NULL);
        Py_END_ALLOW_THREADS
        is_interrupted = PyErr_CheckSignals() != 0;
    }
    if (!is_interrupted) {
        gp_pager_wait_present(pager);
    }
    self->n_users--;
    if (is_interrupted) {
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *pager_is_present(PyObject *object, PyObject *unused) {
    (void) unused;
    const gp_pager *pager = opened((PagerObject *) object);
    return pager ? PyBool_FromLong(gp_pager_is_present(pager)) : NULL;
}

static PyObject *pager_close(PyObject *object, PyObject *unused) {
    (void) unused;
    PagerObject *self = (PagerObject *) object;
    if (self->n_users) {
        PyErr_SetString(PyExc_ValueError, "the pager is in use: close its taps first");
        return NULL;
    }
    gp_pager *pager = self->pager;
    self->pager = NULL;
    Py_BEGIN_ALLOW_THREADS
    gp_pager_close(pager);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static void pager_dealloc(PyObject *object) {
    PagerObject *self = (PagerObject *) object;
    PyTypeObject *type = Py_TYPE(object);
    gp_pager_close(self->pager);
    free(self->n_experts);
    Py_XDECREF(self->compare);
    Py_XDECREF(self->caught);
    freefunc release = (freefunc) PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

static PyObject *pager_counters(PyObject *object, PyObject *unused) {
    (void) unused;
    PagerObject *self = (PagerObject *) object;
    gp_pager *pager = opened(self);
    if (!pager) {
        return NULL;
    }
    gp_counters *counters = calloc(self->n_layers + 1, sizeof *counters);
    if (!counters) {
        return PyErr_NoMemory();
    }
    gp_pager_counters(pager, counters);
    PyObject *list = PyList_New(self->n_layers);
    for (uint32_t i = 0; list && i < self->n_layers; i++) {
        const gp_counters *c = &counters[i];
        PyObject *row = Py_BuildValue("(KKKKKKKKKI)", c->hits, c->misses, c->bytes_read, c->stall_ns, c->stall_bytes,
                                      c->evictions, c->left_alone, c->visits, c->tokens, c->resident);
        if (!row) {
            Py_CLEAR(list);
        } else {
            PyList_SetItem(list, i, row);
        }
    }
    free(counters);
    return list;
}

static PyObject *pager_copies(PyObject *object, PyObject *unused) {
    (void) unused;
    PagerObject *self = (PagerObject *) object;
    gp_pager *pager = opened(self);
    if (!pager) {
        return NULL;
    }
    uint64_t bytes_read[GP_MAX_COPIES];
    gp_pager_copies(pager, bytes_read);
    PyObject *list = PyList_New(self->n_copies);
    for (uint32_t i = 0; list && i < self->n_copies; i++) {
        PyObject *number = PyLong_FromUnsignedLongLong(bytes_read[i]);
        if (!number || PyList_SetItem(list, i, number) != 0) {  /* which takes the number, also when it fails */
            Py_CLEAR(list);
        }
    }
    return list;
}

static PyObject *pager_rows(PyObject *object, PyObject *unused) {
    (void) unused;
    const gp_pager *pager = opened((PagerObject *) object);
    if (!pager) {
        return NULL;
    }
    gp_row_counters counters;
    gp_pager_row_counters(pager, &counters);
    return Py_BuildValue("KKK", counters.rows_read, counters.bytes_read, counters.left_alone);
}

static PyObject *pager_reads_in_background(PyObject *object, PyObject *unused) {
    (void) unused;
    gp_pager *pager = opened((PagerObject *) object);
    return pager ? PyBool_FromLong(gp_pager_reads_in_background(pager)) : NULL;
}

/* NULL with the error set: closed, no number, or no such layer. */
static gp_pager *opened_for_layer(PagerObject *self, PyObject *args, unsigned int *layer) {
    gp_pager *pager = opened(self);
    if (!pager || !PyArg_ParseTuple(args, "I", layer)) {
        return NULL;
    }
    if (*layer >= self->n_layers) {
        raise_errno(-EINVAL);
        return NULL;
    }
    return pager;
}

static PyObject *pager_resident(PyObject *object, PyObject *args) {
    PagerObject *self = (PagerObject *) object;
    unsigned int layer;
    gp_pager *pager = opened_for_layer(self, args, &layer);
    if (!pager) {
        return NULL;
    }
    uint8_t *resident = malloc(self->n_experts[layer]);
    if (!resident) {
        return PyErr_NoMemory();
    }
    const int error = gp_pager_resident(pager, layer, resident);
    PyObject *result = error == 0
        ? PyBytes_FromStringAndSize((const char *) resident, self->n_experts[layer]) : raise_errno(error);
    free(resident);
    return result;
}

static PyObject *pager_chosen(PyObject *object, PyObject *args) {
    PagerObject *self = (PagerObject *) object;
    unsigned int layer;
    gp_pager *pager = opened_for_layer(self, args, &layer);
    if (!pager) {
        return NULL;
    }
    const uint32_t n_experts = self->n_experts[layer];
    uint64_t *chosen = malloc(n_experts * sizeof *chosen);
    if (!chosen) {
        return PyErr_NoMemory();
    }
    const int error = gp_pager_chosen(pager, layer, chosen);
    PyObject *list = error == 0 ? PyList_New(n_experts) : raise_errno(error);
    for (uint32_t e = 0; list && e < n_experts; e++) {
        PyObject *number = PyLong_FromUnsignedLongLong(chosen[e]);
        if (!number || PyList_SetItem(list, e, number) != 0) {  /* which takes the number, also when it fails */
            Py_DECREF(list);
            list = NULL;
        }
    }
    free(chosen);
    return list;
}

/* gp_compare, in a thread of Python's that has let go of the lock. An interrupt is kept for who can raise it. */
static int compare_read(void *data, uint32_t file, uint64_t offset_bytes, const void *memory, uint64_t bytes) {
    PagerObject *self = data;
    const PyGILState_STATE state = PyGILState_Ensure();
    PyObject *answer = PyObject_CallFunction(self->compare, "IKKK", (unsigned int) file, (unsigned long long) offset_bytes,
                                             (unsigned long long) (uintptr_t) memory, (unsigned long long) bytes);
    const long error = answer ? PyLong_AsLong(answer) : EINTR;
    Py_XDECREF(answer);
    if (PyErr_Occurred()) {
        PyObject *exception = take_raised(), *thread = PyLong_FromUnsignedLong(PyThread_get_thread_ident());
        if (!thread || PyDict_SetItem(self->caught, thread, exception) != 0) {
            PyErr_WriteUnraisable(self->compare);
        }
        Py_XDECREF(thread);
        Py_XDECREF(exception);
    }
    PyGILState_Release(state);
    return error == 0 ? GP_SAME : error > 0 && error < 4096 ? (int) -error : -EINTR;
}

/* What a comparison has raised in this thread since it was asked last; NULL if nothing. */
static PyObject *take_caught(PagerObject *self) {
    PyObject *exception = NULL, *thread = PyLong_FromUnsignedLong(PyThread_get_thread_ident());
    if (thread) {
        exception = PyDict_GetItemWithError(self->caught, thread);
        Py_XINCREF(exception);
        if (exception) {
            (void) PyDict_DelItem(self->caught, thread);
        }
        Py_DECREF(thread);
    }
    PyErr_Clear();  /* of memory that is lacking: nothing was taken */
    return exception;
}

static PyObject *failure_tuple(const gp_failure *failure) {
    return Py_BuildValue("(iIK)", -failure->error, failure->file, (unsigned long long) failure->offset_bytes);
}

/* In a thread of Python's that has let go of the lock; what is raised stays with it. */
static bool is_raising(void *unused) {
    (void) unused;
    const PyGILState_STATE state = PyGILState_Ensure();
    const bool is_raising = PyErr_CheckSignals() != 0;
    PyGILState_Release(state);
    return is_raising;
}

static PyObject *pager_pin(PyObject *object, PyObject *args) {
    PagerObject *self = (PagerObject *) object;
    unsigned int layer;
    PyObject *sequence, *caught;
    if (!opened(self) || !PyArg_ParseTuple(args, "IO", &layer, &sequence)) {
        return NULL;
    }
    const Py_ssize_t n = PySequence_Size(sequence);
    if (n < 0) {
        return NULL;
    }
    if (layer >= self->n_layers || n == 0 || (size_t) n > self->n_experts[layer]) {
        return raise_errno(-EINVAL);
    }
    int32_t *experts = malloc((size_t) n * sizeof *experts);
    if (!experts) {
        return PyErr_NoMemory();
    }
    PyObject *result = NULL;
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *item = PySequence_GetItem(sequence, i);
        const long expert = item ? PyLong_AsLong(item) : -1;
        Py_XDECREF(item);
        if (expert < 0 || expert >= (long) self->n_experts[layer]) {
            if (!PyErr_Occurred()) {
                raise_errno(-EINVAL);
            }
            goto done;
        }
        experts[i] = (int32_t) expert;
    }
    gp_pager *pager = opened(self);     /* the sequence may be Python code, which may have closed it */
    if (!pager) {
        goto done;
    }
    gp_failure failure;
    int error;
    self->n_users++;    /* nor may another thread meanwhile */
    Py_BEGIN_ALLOW_THREADS
    error = gp_pager_pin(pager, layer, experts, (uint32_t) n, is_raising, NULL, &failure);
    Py_END_ALLOW_THREADS
    self->n_users--;
    if (error == 0) {
        result = Py_BuildValue("");
    } else if (PyErr_Occurred()) {
        result = NULL;      /* what a signal handler has raised */
    } else if ((caught = take_caught(self))) {
        PyErr_SetObject((PyObject *) Py_TYPE(caught), caught);
        Py_DECREF(caught);
    } else if (failure.error != 0) {
        result = failure_tuple(&failure);
    } else {
        raise_errno(error);
    }
done:
    free(experts);
    return result;
}

static PyObject *pager_compare_with(PyObject *object, PyObject *compare) {
    PagerObject *self = (PagerObject *) object;
    gp_pager *pager = opened(self);
    if (!pager) {
        return NULL;
    }
    Py_INCREF(compare);
    Py_XDECREF(self->compare);
    self->compare = compare;
    gp_pager_compare_with(pager, compare_read, self);
    Py_RETURN_NONE;
}

static PyObject *pager_accept(PyObject *object, PyObject *sequence) {
    PagerObject *self = (PagerObject *) object;
    const Py_ssize_t n = PySequence_Size(sequence);
    if (n < 0) {
        return NULL;
    }
    if ((size_t) n != self->n_files) {
        return raise_errno(-EINVAL);
    }
    gp_file_times *times = malloc(((size_t) n + 1) * sizeof *times);
    if (!times) {
        return PyErr_NoMemory();
    }
    PyObject *result = NULL;
    for (Py_ssize_t i = 0; i < n; i++) {
        long long modified_ns, changed_ns;
        PyObject *item = PySequence_GetItem(sequence, i);
        const int is_parsed = item && PyArg_ParseTuple(item, "LL", &modified_ns, &changed_ns);
        Py_XDECREF(item);
        if (!is_parsed) {
            goto done;
        }
        times[i] = (gp_file_times) { modified_ns, changed_ns };
    }
    gp_pager *pager = opened(self);     /* the sequence may be Python code, which may have closed it */
    if (pager) {
        const int error = gp_pager_accept(pager, times);
        result = error == 0 ? Py_BuildValue("") : raise_errno(error);
    }
done:
    free(times);
    return result;
}

static PyObject *pager_unpin_all(PyObject *object, PyObject *unused) {
    (void) unused;
    gp_pager *pager = opened((PagerObject *) object);
    if (!pager) {
        return NULL;
    }
    gp_pager_unpin_all(pager);
    Py_RETURN_NONE;
}

static PyObject *pager_shrink(PyObject *object, PyObject *args) {
    gp_pager *pager = opened((PagerObject *) object);
    unsigned int shape_class, n_slots;
    if (!pager || !PyArg_ParseTuple(args, "II", &shape_class, &n_slots)) {
        return NULL;
    }
    const int error = gp_pager_shrink(pager, shape_class, n_slots);
    return error == 0 ? Py_BuildValue("") : raise_errno(error);
}

static PyObject *pager_warm_up(PyObject *object, PyObject *sequence) {
    PagerObject *self = (PagerObject *) object;
    const Py_ssize_t n = PySequence_Size(sequence);
    if (n < 0) {
        return NULL;
    }
    gp_expert *experts = malloc(((size_t) n + 1) * sizeof *experts);
    if (!experts) {
        return PyErr_NoMemory();
    }
    PyObject *result = NULL;
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *item = PySequence_GetItem(sequence, i);
        const int is_parsed = item && PyArg_ParseTuple(item, "Iif", &experts[i].layer, &experts[i].expert,
                                                       &experts[i].share);
        Py_XDECREF(item);
        if (!is_parsed) {
            goto done;
        }
    }
    gp_pager *pager = opened(self);     /* the sequence may be Python code, which may have closed it */
    if (pager) {
        const int error = gp_pager_warm_up(pager, experts, (uint32_t) n);
        result = error == 0 ? Py_BuildValue("") : raise_errno(error);
    }
done:
    free(experts);
    return result;
}

static PyMethodDef pager_methods[] = {
    { "close", pager_close, METH_NOARGS, NULL },
    { "is_present", pager_is_present, METH_NOARGS, NULL },
    { "wait_present", pager_wait_present, METH_NOARGS, NULL },
    { "counters", pager_counters, METH_NOARGS, NULL },
    { "copies", pager_copies, METH_NOARGS, NULL },
    { "rows", pager_rows, METH_NOARGS, NULL },
    { "reads_in_background", pager_reads_in_background, METH_NOARGS, NULL },
    { "resident", pager_resident, METH_VARARGS, NULL },
    { "chosen", pager_chosen, METH_VARARGS, NULL },
    { "pin", pager_pin, METH_VARARGS, NULL },
    { "unpin_all", pager_unpin_all, METH_NOARGS, NULL },
    { "shrink", pager_shrink, METH_VARARGS, NULL },
    { "warm_up", pager_warm_up, METH_O, NULL },
    { "accept", pager_accept, METH_O, NULL },
    { "compare_with", pager_compare_with, METH_O, NULL },
    { NULL, NULL, 0, NULL },
};

static PyType_Slot pager_slots[] = {
    { Py_tp_new, (void *) (uintptr_t) pager_new },
    { Py_tp_dealloc, (void *) (uintptr_t) pager_dealloc },
    { Py_tp_methods, pager_methods },
    { 0, NULL },
};

static PyType_Spec pager_spec = {
    .name = "gguf_pager._native.Pager", .basicsize = sizeof(PagerObject),
    .flags = Py_TPFLAGS_DEFAULT, .slots = pager_slots,
};

/* ---- Tap -------------------------------------------------------------------------------------------------------- */

/* In the thread that decodes, without Python's lock. Runs the handlers of signals that have come: the decode goes on, unless
 * one raises. Elsewhere than in the main thread it would run none, and only wait for the lock. */
static bool has_raised(void *data) {
    TapObject *self = data;
    if (!self->is_watched || PyThread_get_thread_ident() != self->main_thread) {
        return false;
    }
    const PyGILState_STATE state = PyGILState_Ensure();
    self->is_handling = true;
    const bool has_raised = PyErr_CheckSignals() != 0;
    self->is_handling = false;
    self->has_stopped |= has_raised;
    if (has_raised) {
        Py_CLEAR(self->exception);
        self->exception = take_raised();
    }
    PyGILState_Release(state);
    return has_raised;
}

/* threading.main_thread().ident; where Python is embedded it may not be the thread that runs handlers: then a decode is not
 * interrupted. */
static bool find_main_thread(unsigned long *ident) {
    PyObject *threading = PyImport_ImportModule("threading");
    PyObject *thread = threading ? PyObject_CallMethod(threading, "main_thread", NULL) : NULL;
    PyObject *number = thread ? PyObject_GetAttrString(thread, "ident") : NULL;
    *ident = number ? PyLong_AsUnsignedLong(number) : 0;
    Py_XDECREF(number);
    Py_XDECREF(thread);
    Py_XDECREF(threading);
    return !PyErr_Occurred();
}

static PyObject *tap_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    static char *names[] = { "ggml", "max_ids", "batch_bytes", "row_bytes", "next_eval", "next_eval_data", "next_abort",
                             "next_abort_data", NULL };
    gp_ggml ggml;
    unsigned int max_ids;
    unsigned long long is_host, traits, block_size, type_size, next_eval, next_eval_data, next_abort, next_abort_data;
    unsigned long long g[11], batch_bytes, row_bytes;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "(iiiiiiiiii(iiiiii)iiKKKK(KKKKKKKKKKK))IKKKKKK", names,
                                     &ggml.op_none, &ggml.op_mul_mat_id, &ggml.op_argsort, &ggml.op_top_k, &ggml.op_view,
                                     &ggml.op_reshape, &ggml.op_custom, &ggml.op_add_id, &ggml.op_get_rows,
                                     &ggml.flag_compute, &ggml.row_ops[0], &ggml.row_ops[1], &ggml.row_ops[2], &ggml.row_ops[3], &ggml.row_ops[4],
                                     &ggml.row_ops[5], &ggml.type_i32, &ggml.type_f32, &is_host, &traits, &block_size,
                                     &type_size, &g[0], &g[1], &g[2], &g[3], &g[4], &g[5], &g[6], &g[7], &g[8], &g[9],
                                     &g[10],
                                     &max_ids, &batch_bytes, &row_bytes, &next_eval, &next_eval_data, &next_abort, &next_abort_data)) {
        return NULL;
    }
    ggml.buffer_is_host = (bool (*)(void *)) (uintptr_t) is_host;
    ggml.cpu_traits = (const void *(*)(int)) (uintptr_t) traits;
    ggml.block_size = (int64_t (*)(int)) (uintptr_t) block_size;
    ggml.type_size = (size_t (*)(int)) (uintptr_t) type_size;
    ggml.graphs = (gp_graphs) {
        .init = (void *(*)(gp_graphs_memory)) (uintptr_t) g[0],
        .free = (void (*)(void *)) (uintptr_t) g[1],
        .overhead = (size_t (*)(size_t, bool)) (uintptr_t) g[2],
        .new_graph = (void *(*)(void *, size_t, bool)) (uintptr_t) g[3],
        .clear = (void (*)(void *)) (uintptr_t) g[4],
        .expand = (void (*)(void *, ggml_tensor *)) (uintptr_t) g[5],
        .backend_init = (void *(*)(void)) (uintptr_t) g[6],
        .backend_set_n_threads = (void (*)(void *, int)) (uintptr_t) g[7],
        .backend_free = (void (*)(void *)) (uintptr_t) g[8],
        .is_numa = (bool (*)(void)) (uintptr_t) g[9],
        .compute = (int (*)(void *, void *)) (uintptr_t) g[10],
    };
    allocfunc allocate = (allocfunc) PyType_GetSlot(type, Py_tp_alloc);
    TapObject *self = (TapObject *) allocate(type, 0);
    if (!self) {
        return NULL;
    }
    const int error = gp_tap_open(&self->tap, &ggml, max_ids, (size_t) batch_bytes, (size_t) row_bytes,
                                  (gp_eval_callback) (uintptr_t) next_eval, (void *) (uintptr_t) next_eval_data,
                                  (gp_abort_callback) (uintptr_t) next_abort, (void *) (uintptr_t) next_abort_data);
    if (error != 0) {
        Py_DECREF((PyObject *) self);
        return raise_errno(error);
    }
    if (!find_main_thread(&self->main_thread)) {
        Py_DECREF((PyObject *) self);
        return NULL;
    }
    gp_tap_watch(self->tap, &gp_os_system, has_raised, self);
    return (PyObject *) self;
}

static void close_tap(TapObject *self) {
    gp_tap_close(self->tap);
    self->tap = NULL;
    if (self->pager) {
        self->pager->n_users--;
        Py_DECREF((PyObject *) self->pager);
        self->pager = NULL;
    }
}

static PyObject *tap_close(PyObject *object, PyObject *unused) {
    (void) unused;
    close_tap((TapObject *) object);
    Py_RETURN_NONE;
}

static void tap_dealloc(PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    close_tap((TapObject *) object);
    Py_CLEAR(((TapObject *) object)->exception);
    freefunc release = (freefunc) PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

static gp_tap *opened_tap(PyObject *object) {
    TapObject *self = (TapObject *) object;
    if (!self->tap) {
        PyErr_SetString(PyExc_ValueError, "the tap is closed");
    }
    return self->tap;
}

static PyObject *tap_attach(PyObject *object, PyObject *args) {
    TapObject *self = (TapObject *) object;
    PyObject *argument;
    gp_tap *tap = opened_tap(object);
    if (!tap || !PyArg_ParseTuple(args, "O", &argument)) {
        return NULL;
    }
    const module_state *state = PyType_GetModuleState(Py_TYPE(object));
    if (!PyObject_TypeCheck(argument, (PyTypeObject *) state->pager_type) || self->pager) {
        PyErr_SetString(PyExc_TypeError, "attach takes a Pager, once");
        return NULL;
    }
    PagerObject *pager = (PagerObject *) argument;
    if (!opened(pager)) {
        return NULL;
    }
    const int error = gp_tap_attach(tap, pager->pager);
    if (error != 0) {
        return raise_errno(error);
    }
    Py_INCREF(argument);
    self->pager = pager;
    pager->n_users++;
    Py_RETURN_NONE;
}

static PyObject *tap_addresses(PyObject *object, PyObject *unused) {
    (void) unused;
    gp_tap *tap = opened_tap(object);
    if (!tap) {
        return NULL;
    }
    return Py_BuildValue("(KKK)", (unsigned long long) (uintptr_t) gp_tap_eval,
                         (unsigned long long) (uintptr_t) gp_tap_abort, (unsigned long long) (uintptr_t) tap);
}

static PyObject *tap_chain_abort(PyObject *object, PyObject *args) {
    gp_tap *tap = opened_tap(object);
    unsigned long long next_abort, next_abort_data;
    if (!tap || !PyArg_ParseTuple(args, "KK", &next_abort, &next_abort_data)) {
        return NULL;
    }
    gp_tap_chain_abort(tap, (gp_abort_callback) (uintptr_t) next_abort, (void *) (uintptr_t) next_abort_data);
    Py_RETURN_NONE;
}

static PyObject *tap_idle(PyObject *object, PyObject *unused) {
    (void) unused;
    gp_tap *tap = opened_tap(object);
    if (!tap) {
        return NULL;
    }
    gp_tap_idle(tap);
    Py_RETURN_NONE;
}

static PyObject *tap_take_failure(PyObject *object, PyObject *unused) {
    (void) unused;
    gp_tap *tap = opened_tap(object);
    if (!tap) {
        return NULL;
    }
    const gp_failure failure = gp_tap_take_failure(tap);
    TapObject *self = (TapObject *) object;
    const bool has_stopped = self->has_stopped;
    self->has_stopped = false;
    if (failure.error == 0 || (failure.error == -EINTR && has_stopped)) {       /* what stopped it is in `exception` */
        Py_RETURN_NONE;
    }
    return failure_tuple(&failure);
}

static PyObject *tap_watch(PyObject *object, PyObject *unused) {
    (void) unused;
    gp_tap *tap = opened_tap(object);
    if (!tap) {
        return NULL;
    }
    TapObject *self = (TapObject *) object;
    (void) gp_tap_take_failure(tap);    /* of a decode whose caller was interrupted before he could take it */
    Py_CLEAR(self->exception);
    if (self->pager) {
        Py_XDECREF(take_caught(self->pager));
    }
    self->has_stopped = false;
    self->is_watched = true;
    Py_RETURN_NONE;
}

static PyObject *tap_is_handling(PyObject *object, PyObject *unused) {
    (void) unused;
    return PyBool_FromLong(((TapObject *) object)->is_handling);
}

static PyObject *tap_take_exception(PyObject *object, PyObject *unused) {
    (void) unused;
    TapObject *self = (TapObject *) object;
    PyObject *exception = self->exception;
    self->exception = NULL;
    self->is_watched = false;
    if (!exception && self->pager) {
        exception = take_caught(self->pager);
    }
    if (!exception) {
        Py_RETURN_NONE;
    }
    return exception;
}

static PyObject *tap_count_kinds(PyObject *object, PyObject *unused) {
    (void) unused;
    const gp_tap *tap = opened_tap(object);
    uint32_t n_same, n_other;
    if (!tap) {
        return NULL;
    }
    gp_tap_count_kinds(tap, &n_same, &n_other);
    return Py_BuildValue("II", n_same, n_other);
}

static PyObject *tap_count_ffns(PyObject *object, PyObject *unused) {
    (void) unused;
    const gp_tap *tap = opened_tap(object);
    uint32_t n_same, n_other;
    if (!tap) {
        return NULL;
    }
    gp_tap_count_ffns(tap, &n_same, &n_other);
    return Py_BuildValue("II", n_same, n_other);
}

static PyMethodDef tap_methods[] = {
    { "count_kinds", tap_count_kinds, METH_NOARGS, NULL },
    { "count_ffns", tap_count_ffns, METH_NOARGS, NULL },
    { "close", tap_close, METH_NOARGS, NULL },
    { "attach", tap_attach, METH_VARARGS, NULL },
    { "addresses", tap_addresses, METH_NOARGS, NULL },
    { "chain_abort", tap_chain_abort, METH_VARARGS, NULL },
    { "idle", tap_idle, METH_NOARGS, NULL },
    { "take_failure", tap_take_failure, METH_NOARGS, NULL },
    { "watch", tap_watch, METH_NOARGS, NULL },
    { "is_handling", tap_is_handling, METH_NOARGS, NULL },
    { "take_exception", tap_take_exception, METH_NOARGS, NULL },
    { NULL, NULL, 0, NULL },
};

static PyType_Slot tap_slots[] = {
    { Py_tp_new, (void *) (uintptr_t) tap_new },
    { Py_tp_dealloc, (void *) (uintptr_t) tap_dealloc },
    { Py_tp_methods, tap_methods },
    { 0, NULL },
};

static PyType_Spec tap_spec = {
    .name = "gguf_pager._native.Tap", .basicsize = sizeof(TapObject),
    .flags = Py_TPFLAGS_DEFAULT, .slots = tap_slots,
};

/* ---- functions -------------------------------------------------------------------------------------------------- */

static PyObject *file_alignment(PyObject *module, PyObject *args) {
    (void) module;
    PyObject *path;
    if (!PyArg_ParseTuple(args, "O&", PyUnicode_FSConverter, &path)) {
        return NULL;
    }
    uint32_t offset_align = 0, memory_align = 0;
    const int error = gp_os_system.file_alignment(PyBytes_AsString(path), &offset_align, &memory_align);
    Py_DECREF(path);
    return error == 0 ? Py_BuildValue("(II)", offset_align, memory_align) : raise_errno(error);
}

static PyObject *memory_lock(PyObject *module, PyObject *args) {
    (void) module;
    unsigned long long address, bytes;
    if (!PyArg_ParseTuple(args, "KK", &address, &bytes)) {
        return NULL;
    }
    int error;
    Py_BEGIN_ALLOW_THREADS
    error = gp_os_memory_lock_coming((void *) (uintptr_t) address, bytes);
    Py_END_ALLOW_THREADS
    if (error != 0) {
        return raise_errno(error);
    }
    Py_RETURN_NONE;
}

static PyObject *lazy_load_begin(PyObject *module, PyObject *args) {
    (void) module;
    PyObject *path;
    if (!PyArg_ParseTuple(args, "O&", PyUnicode_FSConverter, &path)) {
        return NULL;
    }
    const int error = gp_os_lazy_load_begin(PyBytes_AsString(path));
    Py_DECREF(path);
    if (error != 0) {
        return raise_errno(error);
    }
    Py_RETURN_NONE;
}

static PyObject *lazy_load_end(PyObject *module, PyObject *unused) {
    (void) module;
    (void) unused;
    const uint32_t n = gp_os_take_mappings(NULL, 0);
    gp_mapping *mappings = calloc((size_t) n + 1, sizeof *mappings);
    const uint32_t n_taken = mappings ? gp_os_take_mappings(mappings, n) : 0;   /* by this thread: there are no more now */
    gp_os_lazy_load_end();
    if (!mappings) {
        return PyErr_NoMemory();
    }
    PyObject *list = PyList_New((Py_ssize_t) n_taken);
    for (uint32_t i = 0; list && i < n_taken; i++) {
        PyObject *item = Py_BuildValue("(KKKKK)", (unsigned long long) (uintptr_t) mappings[i].address,
                                       (unsigned long long) mappings[i].bytes,
                                       (unsigned long long) mappings[i].device, (unsigned long long) mappings[i].inode,
                                       (unsigned long long) mappings[i].offset_bytes);
        if (!item || PyList_SetItem(list, (Py_ssize_t) i, item) != 0) {     /* which takes the item, also when it fails */
            Py_CLEAR(list);
        }
    }
    free(mappings);
    return list;
}

static PyObject *policy_exists(PyObject *module, PyObject *args) {
    (void) module;
    const char *name;
    if (!PyArg_ParseTuple(args, "s", &name)) {
        return NULL;
    }
    return PyBool_FromLong(gp_policy_exists(name));
}

/* A tensor of ggml's as this side's declaration sees it, for comparison with what ggml says. */
static PyObject *read_tensor(PyObject *module, PyObject *args) {
    (void) module;
    unsigned long long address;
    if (!PyArg_ParseTuple(args, "K", &address)) {
        return NULL;
    }
    const ggml_tensor *t = (const ggml_tensor *) (uintptr_t) address;
    char name[GGML_NAME_BYTES + 1] = { 0 };
    memcpy(name, t->name, GGML_NAME_BYTES);
    gp_custom custom;
    memcpy(&custom, t->op_params, sizeof custom);
    return Py_BuildValue(
        "{s:n,s:i,s:K,s:(LLLL),s:(KKKK),s:i,s:i,s:(KiK),s:(KKK),s:K,s:K,s:K,s:s}", "struct_bytes", (Py_ssize_t) sizeof *t,
        "type", t->type, "buffer", (unsigned long long) (uintptr_t) t->buffer,
        "ne", t->ne[0], t->ne[1], t->ne[2], t->ne[3],
        "nb", (unsigned long long) t->nb[0], (unsigned long long) t->nb[1], (unsigned long long) t->nb[2],
        (unsigned long long) t->nb[3], "op", t->op, "flags", t->flags,
        "custom", (unsigned long long) (uintptr_t) custom.compute, custom.n_tasks,
        (unsigned long long) (uintptr_t) custom.data,
        "src", (unsigned long long) (uintptr_t) t->src[0], (unsigned long long) (uintptr_t) t->src[1],
        (unsigned long long) (uintptr_t) t->src[2],
        "view_src", (unsigned long long) (uintptr_t) t->view_src, "view_offs", (unsigned long long) t->view_offs,
        "data", (unsigned long long) (uintptr_t) t->data, "name", name);
}

static PyMethodDef functions[] = {
    { "file_alignment", file_alignment, METH_VARARGS, NULL },
    { "memory_lock", memory_lock, METH_VARARGS, NULL },
    { "lazy_load_begin", lazy_load_begin, METH_VARARGS, NULL },
    { "lazy_load_end", lazy_load_end, METH_NOARGS, NULL },
    { "policy_exists", policy_exists, METH_VARARGS, NULL },
    { "read_tensor", read_tensor, METH_VARARGS, NULL },
    { NULL, NULL, 0, NULL },
};

static int fill_module(PyObject *module) {
    module_state *state = PyModule_GetState(module);
    state->pager_type = PyType_FromModuleAndSpec(module, &pager_spec, NULL);
    if (!state->pager_type || PyModule_AddObjectRef(module, "Pager", state->pager_type) != 0) {
        return -1;
    }
    state->open_error = PyErr_NewException("gguf_pager._native.OpenError", PyExc_OSError, NULL);
    if (!state->open_error || PyModule_AddObjectRef(module, "OpenError", state->open_error) != 0) {
        return -1;
    }
    PyObject *tap_type = PyType_FromModuleAndSpec(module, &tap_spec, NULL);
    int error = tap_type ? PyModule_AddObjectRef(module, "Tap", tap_type) : -1;
    Py_XDECREF(tap_type);
    PyObject *mutex_type = error == 0 ? PyType_FromModuleAndSpec(module, &gp_mutex_spec, NULL) : NULL;
    error = mutex_type ? PyModule_AddObjectRef(module, "Mutex", mutex_type) : -1;
    Py_XDECREF(mutex_type);
    return error;
}

static void free_module(void *module) {
    module_state *state = PyModule_GetState((PyObject *) module);
    if (state) {
        Py_CLEAR(state->pager_type);
        Py_CLEAR(state->open_error);
    }
}

static PyModuleDef_Slot module_slots[] = {
    { Py_mod_exec, (void *) (uintptr_t) fill_module },
    { 0, NULL },
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_native",
    .m_doc = "The C core of gguf_pager; private.",
    .m_size = sizeof(module_state),
    .m_methods = functions,
    .m_slots = module_slots,
    .m_free = free_module,
};

PyMODINIT_FUNC PyInit__native(void) {
    return PyModuleDef_Init(&definition);
}
