/* gguf_pager._native.Tap: one context's hook, and the signals that end its decodes. */
#include "module.h"

#include <errno.h>

#include "compute/ggml_tensor.h"

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
        self->exception = gp_error_take();
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
    unsigned long long g[10], batch_bytes, row_bytes;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "(iiiiiiiiii(iiiiii)(iiiii)iiKKKK(KKKKKKKKKK))IKKKKKK", names,
                                     &ggml.op_none, &ggml.op_mul_mat_id, &ggml.op_argsort, &ggml.op_top_k, &ggml.op_view,
                                     &ggml.op_reshape, &ggml.op_custom, &ggml.op_add_id, &ggml.op_get_rows,
                                     &ggml.flag_compute, &ggml.row_ops[0], &ggml.row_ops[1], &ggml.row_ops[2], &ggml.row_ops[3], &ggml.row_ops[4],
                                     &ggml.row_ops[5], &ggml.op_mul, &ggml.op_add, &ggml.op_repeat,
                                     &ggml.op_norm, &ggml.op_rms_norm, &ggml.type_i32, &ggml.type_f32, &is_host, &traits, &block_size,
                                     &type_size, &g[0], &g[1], &g[2], &g[3], &g[4], &g[5], &g[6], &g[7], &g[8], &g[9],
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
        .compute = (int (*)(void *, void *)) (uintptr_t) g[9],
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
        return gp_error_raise(error);
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
    if (!gp_pager_object_opened(pager)) {
        return NULL;
    }
    const int error = gp_tap_attach(tap, pager->pager);
    if (error != 0) {
        return gp_error_raise(error);
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
    return gp_error_tuple(&failure);
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
        Py_XDECREF(gp_pager_object_take_caught(self->pager));
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
        exception = gp_pager_object_take_caught(self->pager);
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

PyType_Spec gp_tap_spec = {
    .name = "gguf_pager._native.Tap", .basicsize = sizeof(TapObject),
    .flags = Py_TPFLAGS_DEFAULT, .slots = tap_slots,
};
