/* gguf_pager._native.Mutex: one thread at a time, whatever interrupts it.
 *
 * A Python `with lock:` has places before and behind its body where an exception that a signal handler raises leaves the
 * lock held for good, and everybody else waiting. Here the lock is taken, the function called and the lock given back in
 * C, where no handler runs.
 *
 * Invariant: `owner` is 0 or the thread that holds `lock`; only that thread writes it, under the GIL, which all who read it
 * hold, too. In a child of a fork it is 0 or the thread that has forked: who else held the lock is not there to give it back. */
#include "module.h"

#include <pythread.h>
#include <unistd.h>

typedef struct {
    PyObject_HEAD
    PyThread_type_lock lock;
    unsigned long      owner;
    pid_t              pid;         /* of the process that used it last */
} MutexObject;

static PyObject *mutex_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    static char *names[] = { NULL };
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "", names)) {
        return NULL;
    }
    allocfunc allocate = (allocfunc) PyType_GetSlot(type, Py_tp_alloc);
    MutexObject *self = (MutexObject *) allocate(type, 0);
    if (!self) {
        return NULL;
    }
    self->lock = PyThread_allocate_lock();
    if (!self->lock) {
        Py_DECREF((PyObject *) self);
        return PyErr_NoMemory();
    }
    self->pid = getpid();
    return (PyObject *) self;
}

static void mutex_dealloc(PyObject *object) {
    MutexObject *self = (MutexObject *) object;
    PyTypeObject *type = Py_TYPE(object);
    if (self->lock) {
        PyThread_free_lock(self->lock);
    }
    freefunc release = (freefunc) PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

/* In a child of a fork, at first use: a new lock in the place of one that a thread of the parent's holds. The old one is left
 * as it is, as Python does with its own: nobody says what freeing a lock that is held does. */
static int leave_parent(MutexObject *self) {
    const pid_t pid = getpid();
    if (self->pid == pid) {
        return 0;
    }
    if (self->owner != PyThread_get_thread_ident()) {
        const PyThread_type_lock lock = PyThread_allocate_lock();
        if (!lock) {
            PyErr_NoMemory();
            return -1;
        }
        self->lock = lock;
        self->owner = 0;
    }
    self->pid = pid;
    return 0;
}

/* Waits for the lock; a signal's handler may end the waiting with an exception. */
static int acquire(MutexObject *self) {
    if (PyThread_acquire_lock_timed(self->lock, 0, 0) == PY_LOCK_ACQUIRED) {
        return 0;
    }
    for (;;) {
        PyLockStatus status;
        Py_BEGIN_ALLOW_THREADS
        status = PyThread_acquire_lock_timed(self->lock, -1, 1);
        Py_END_ALLOW_THREADS
        if (status == PY_LOCK_ACQUIRED) {
            return 0;
        }
        if (PyErr_CheckSignals() != 0) {
            return -1;
        }
    }
}

static PyObject *mutex_call(PyObject *object, PyObject *args, PyObject *keywords) {
    MutexObject *self = (MutexObject *) object;
    const Py_ssize_t n = PyTuple_Size(args);
    if (n < 1) {
        PyErr_SetString(PyExc_TypeError, "call takes a function and its arguments");
        return NULL;
    }
    if (leave_parent(self) != 0) {
        return NULL;
    }
    PyObject *function = PyTuple_GetItem(args, 0);
    PyObject *rest = PyTuple_GetSlice(args, 1, n);
    if (!rest) {
        return NULL;
    }
    PyObject *result = NULL;
    const unsigned long me = PyThread_get_thread_ident();
    if (self->owner == me) {
        result = PyObject_Call(function, rest, keywords);
    } else if (acquire(self) == 0) {
        self->owner = me;
        Py_INCREF(object);      /* the function may drop the last reference */
        result = PyObject_Call(function, rest, keywords);
        self->owner = 0;
        PyThread_release_lock(self->lock);
        Py_DECREF(object);
    }
    Py_DECREF(rest);
    return result;
}

static PyObject *mutex_is_mine(PyObject *object, PyObject *unused) {
    (void) unused;
    return PyBool_FromLong(((MutexObject *) object)->owner == PyThread_get_thread_ident());
}

static PyMethodDef mutex_methods[] = {
    { "call", (PyCFunction) (void (*)(void)) mutex_call, METH_VARARGS | METH_KEYWORDS, NULL },
    { "is_mine", mutex_is_mine, METH_NOARGS, NULL },
    { NULL, NULL, 0, NULL },
};

static PyType_Slot mutex_slots[] = {
    { Py_tp_new, (void *) (uintptr_t) mutex_new },
    { Py_tp_dealloc, (void *) (uintptr_t) mutex_dealloc },
    { Py_tp_methods, mutex_methods },
    { 0, NULL },
};

PyType_Spec gp_mutex_spec = {
    .name = "gguf_pager._native.Mutex", .basicsize = sizeof(MutexObject),
    .flags = Py_TPFLAGS_DEFAULT, .slots = mutex_slots,
};
