/* gguf_pager._native.Pager: opens and closes, pins and warms up. It is closed for good: methods raise ValueError then. */
#include "module.h"

#include <errno.h>
#include <stdlib.h>
#include <time.h>

gp_pager *gp_pager_object_opened(PagerObject *self) {
    if (!self->pager) {
        PyErr_SetString(PyExc_ValueError, "the pager is closed");
    }
    return self->pager;
}

static PyObject *pager_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    static char *names[] = { "paths", "mirrors", "layers", "classes", "tables", "policy", "direct", "read_ahead", "look_ahead",
                             "offset_align",
                             "memory_align", "n_readers", "piece_bytes", NULL };
    PyObject *paths, *mirrors, *layers, *classes, *tables;
    int direct, read_ahead, look_ahead;
    unsigned long long piece_bytes;
    gp_config config = { 0 };
    gp_config_arrays arrays = { 0 };
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOOOOsppiIIIK", names, &paths, &mirrors, &layers, &classes,
                                     &tables, &config.policy, &direct, &read_ahead, &look_ahead, &config.offset_align, &config.memory_align,
                                     &config.n_readers, &piece_bytes)) {
        return NULL;
    }
    PagerObject *self = NULL;
    uint32_t *n_experts = NULL;
    if (!gp_config_parse(&arrays, paths, mirrors, layers, classes, tables)) {
        goto fail;
    }
    config.direct = direct;
    config.read_ahead = read_ahead;
    config.look_ahead = (gp_look_ahead) look_ahead;
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
        gp_error_raise_open(type, error, &failure);
        Py_DECREF((PyObject *) self);
        self = NULL;
    }
fail:
    free(n_experts);
    gp_config_free(&arrays);
    return (PyObject *) self;
}

static PyObject *pager_wait_present(PyObject *object, PyObject *unused) {
    (void) unused;
    PagerObject *self = (PagerObject *) object;
    gp_pager *pager = gp_pager_object_opened(self);
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
    const gp_pager *pager = gp_pager_object_opened((PagerObject *) object);
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

static PyObject *pager_reads_in_background(PyObject *object, PyObject *unused) {
    (void) unused;
    gp_pager *pager = gp_pager_object_opened((PagerObject *) object);
    return pager ? PyBool_FromLong(gp_pager_reads_in_background(pager)) : NULL;
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
        PyObject *exception = gp_error_take(), *thread = PyLong_FromUnsignedLong(PyThread_get_thread_ident());
        if (!thread || PyDict_SetItem(self->caught, thread, exception) != 0) {
            PyErr_WriteUnraisable(self->compare);
        }
        Py_XDECREF(thread);
        Py_XDECREF(exception);
    }
    PyGILState_Release(state);
    return error == 0 ? GP_SAME : error > 0 && error < 4096 ? (int) -error : -EINTR;
}

PyObject *gp_pager_object_take_caught(PagerObject *self) {
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
    if (!gp_pager_object_opened(self) || !PyArg_ParseTuple(args, "IO", &layer, &sequence)) {
        return NULL;
    }
    const Py_ssize_t n = PySequence_Size(sequence);
    if (n < 0) {
        return NULL;
    }
    if (layer >= self->n_layers || n == 0 || (size_t) n > self->n_experts[layer]) {
        return gp_error_raise(-EINVAL);
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
                gp_error_raise(-EINVAL);
            }
            goto done;
        }
        experts[i] = (int32_t) expert;
    }
    gp_pager *pager = gp_pager_object_opened(self);     /* the sequence may be Python code, which may have closed it */
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
    } else if ((caught = gp_pager_object_take_caught(self))) {
        PyErr_SetObject((PyObject *) Py_TYPE(caught), caught);
        Py_DECREF(caught);
    } else if (failure.error != 0) {
        result = gp_error_tuple(&failure);
    } else {
        gp_error_raise(error);
    }
done:
    free(experts);
    return result;
}

static PyObject *pager_compare_with(PyObject *object, PyObject *compare) {
    PagerObject *self = (PagerObject *) object;
    gp_pager *pager = gp_pager_object_opened(self);
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
        return gp_error_raise(-EINVAL);
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
    gp_pager *pager = gp_pager_object_opened(self);     /* the sequence may be Python code, which may have closed it */
    if (pager) {
        const int error = gp_pager_accept(pager, times);
        result = error == 0 ? Py_BuildValue("") : gp_error_raise(error);
    }
done:
    free(times);
    return result;
}

static PyObject *pager_unpin_all(PyObject *object, PyObject *unused) {
    (void) unused;
    gp_pager *pager = gp_pager_object_opened((PagerObject *) object);
    if (!pager) {
        return NULL;
    }
    gp_pager_unpin_all(pager);
    Py_RETURN_NONE;
}

static PyObject *pager_shrink(PyObject *object, PyObject *args) {
    gp_pager *pager = gp_pager_object_opened((PagerObject *) object);
    unsigned int shape_class, n_slots;
    if (!pager || !PyArg_ParseTuple(args, "II", &shape_class, &n_slots)) {
        return NULL;
    }
    const int error = gp_pager_shrink(pager, shape_class, n_slots);
    return error == 0 ? Py_BuildValue("") : gp_error_raise(error);
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
    gp_pager *pager = gp_pager_object_opened(self);     /* the sequence may be Python code, which may have closed it */
    if (pager) {
        const int error = gp_pager_warm_up(pager, experts, (uint32_t) n);
        result = error == 0 ? Py_BuildValue("") : gp_error_raise(error);
    }
done:
    free(experts);
    return result;
}

static PyMethodDef pager_methods[] = {
    { "close", pager_close, METH_NOARGS, NULL },
    { "is_present", pager_is_present, METH_NOARGS, NULL },
    { "wait_present", pager_wait_present, METH_NOARGS, NULL },
    { "counters", gp_pager_object_counters, METH_NOARGS, NULL },
    { "copies", gp_pager_object_copies, METH_NOARGS, NULL },
    { "rows", gp_pager_object_rows, METH_NOARGS, NULL },
    { "reads_in_background", pager_reads_in_background, METH_NOARGS, NULL },
    { "resident", gp_pager_object_resident, METH_VARARGS, NULL },
    { "chosen", gp_pager_object_chosen, METH_VARARGS, NULL },
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

PyType_Spec gp_pager_spec = {
    .name = "gguf_pager._native.Pager", .basicsize = sizeof(PagerObject),
    .flags = Py_TPFLAGS_DEFAULT, .slots = pager_slots,
};
