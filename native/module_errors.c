/* Errors between C and Python: what is raised, and what a handler of signals or a callback has raised meanwhile. */
#include "module.h"

#include <errno.h>
#include <string.h>

PyObject *gp_error_raise(int error) {
    errno = -error;
    return PyErr_SetFromErrno(PyExc_OSError);
}

PyObject *gp_error_take(void) {
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

void gp_error_raise_open(PyTypeObject *type, int error, const gp_open_failure *failure) {
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

PyObject *gp_error_tuple(const gp_failure *failure) {
    return Py_BuildValue("(iIK)", -failure->error, failure->file, (unsigned long long) failure->offset_bytes);
}
